//! The loss on items that are not trained on: before, every so many steps, and after, in `validation.jsonl`; what of the run
//! had the lowest is kept, and a run whose loss no longer falls is stopped, where that is asked for.

use std::fs::File;
use std::io::Write;

use crate::callback::{Callback, Control};
use crate::callbacks::history::{self, Look, VALIDATION};
use crate::config::TrainConfig;
use crate::event::Event;
use crate::session::{Session, StepReport, Validation};
use crate::{Error, Result};

/// Looks at `validation_data_dir`, or at what `validation_split` holds out; without either it does nothing.
#[derive(Debug)]
pub(crate) struct ValidationLoss {
    every: Option<usize>,
    patience: Option<usize>,
    saves_best: bool,
    loaded: Option<(Validation, File)>,
    first: Option<f64>,
}

impl ValidationLoss {
    /// For a run.
    pub(crate) fn new(config: &TrainConfig) -> Self {
        let (every, patience) = (config.validate_every_n_steps, config.early_stopping_patience);
        Self { every, patience, saves_best: config.save_best, loaded: None, first: None }
    }

    /// Whether a run that is not interrupted looks after so many steps.
    fn is_due(&self, step: usize) -> bool {
        self.every.is_some_and(|every| step > 0 && step.is_multiple_of(every))
    }

    /// The loss now; `None` where there is nothing to look at, or no memory for it.
    fn look(&mut self, session: &mut Session) -> Result<Option<f64>> {
        let Some((validation, file)) = &mut self.loaded else { return Ok(None) };
        let step = session.steps_done();
        let loss = match session.validation_loss(validation) {
            // A look is worth less than the run.
            Err(error) if error.is_out_of_memory() => {
                session.empty_cache()?;
                tracing::warn!("no validation loss at step {step}: {error}");
                return Ok(None);
            }
            loss => loss?,
        };
        let first = *self.first.get_or_insert(loss);
        session.tell(Event::Validation { step, loss, first });
        tracing::info!("validation loss at step {step}: {loss:.4} ({:+.1} %)", 100.0 * (loss / first - 1.0));
        if let Err(error) = writeln!(file, "{}", serde_json::json!({ "step": step, "loss": loss })) {
            tracing::warn!("validation.jsonl cannot be written ({error})");
        }
        Ok(Some(loss))
    }

    /// A look that counts: what is best is saved, and where it was in vain too often the run is to stop. A step counts once,
    /// also where a run is taken up again after it.
    fn judge(&self, session: &mut Session, loss: f64) -> Result<Control> {
        if session.looks().last >= session.steps_done() {
            return Ok(Control::Continue);
        }
        if session.take_look(loss) && self.saves_best {
            let name = best_name(session.config());
            match session.save(&name) {
                Ok(path) => tracing::info!("the lowest validation loss so far: saved {}", path.display()),
                Err(Error::File(error)) => tracing::warn!("{error}; training goes on without this save"),
                Err(error) => return Err(error),
            }
        }
        let looks = session.looks();
        match (self.patience, looks.best) {
            (Some(patience), Some((step, lowest))) if looks.in_vain >= patience => Ok(Control::Stop(format!(
                "the validation loss has not fallen for {} looks; the lowest was {lowest:.4} at step {step}",
                looks.in_vain
            ))),
            _ => Ok(Control::Continue),
        }
    }
}

/// What the best of a run is called.
pub(crate) fn best_name(config: &TrainConfig) -> String {
    format!("{}-best", config.output_name)
}

impl Callback for ValidationLoss {
    fn on_start(&mut self, session: &mut Session) -> Result<Control> {
        let Some(validation) = session.load_held_out()? else { return Ok(Control::Continue) };
        let own = &session.config().output_dir;
        let file = match session.resumed() {
            Some(resumed) => {
                // The state's own step is looked at again, now.
                let belongs = |look: &Look| look.step < resumed.step;
                let (file, lines) = history::go_on(own, VALIDATION, resumed, history::json(belongs))?;
                self.first = lines.first().map(|line| line.loss);
                file
            }
            None => history::begin(own, VALIDATION)?,
        };
        self.loaded = Some((validation, file));
        match self.look(session)? {
            // The last step of a run that is made longer.
            Some(loss) if self.is_due(session.steps_done()) => self.judge(session, loss),
            _ => Ok(Control::Continue),
        }
    }

    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        if self.is_due(report.step)
            && report.step < report.steps
            && let Some(loss) = self.look(session)?
        {
            return self.judge(session, loss);
        }
        Ok(Control::Continue)
    }

    fn on_end(&mut self, session: &mut Session) -> Result<()> {
        if let Some(loss) = self.look(session)?
            && session.steps_done() >= session.plan().steps
        {
            self.judge(session, loss)?;
        }
        Ok(())
    }
}
