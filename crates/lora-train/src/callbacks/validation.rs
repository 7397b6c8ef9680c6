//! The loss on pictures that are not trained on: before, every so many steps, and after, in `validation.jsonl`.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use crate::Result;
use crate::callback::{Callback, Control};
use crate::callbacks::history;
use crate::config::TrainConfig;
use crate::session::{Session, StepReport, Validation};

const FILE: &str = "validation.jsonl";

/// A line of the file.
#[derive(Debug, serde::Deserialize)]
struct Line {
    step: usize,
    loss: f64,
}

/// Looks at `validation_data_dir`; without one it does nothing.
#[derive(Debug)]
pub(crate) struct ValidationLoss {
    folder: Option<PathBuf>,
    every: Option<usize>,
    loaded: Option<(Validation, File)>,
    first: Option<f64>,
}

impl ValidationLoss {
    /// For a run.
    pub(crate) fn new(config: &TrainConfig) -> Self {
        let (folder, every) = (config.validation_data_dir.clone(), config.validate_every_n_steps);
        Self { folder, every, loaded: None, first: None }
    }

    fn look(&mut self, session: &mut Session) -> Result<()> {
        let Some((validation, file)) = &mut self.loaded else { return Ok(()) };
        let step = session.steps_done();
        let loss = match session.validation_loss(validation) {
            // A look is worth less than the run.
            Err(error) if error.is_out_of_memory() => {
                session.empty_cache()?;
                tracing::warn!("no validation loss at step {step}: {error}");
                return Ok(());
            }
            loss => loss?,
        };
        let first = *self.first.get_or_insert(loss);
        tracing::info!("validation loss at step {step}: {loss:.4} ({:+.1} %)", 100.0 * (loss / first - 1.0));
        if let Err(error) = writeln!(file, "{}", serde_json::json!({ "step": step, "loss": loss })) {
            tracing::warn!("validation.jsonl cannot be written ({error})");
        }
        Ok(())
    }
}

impl Callback for ValidationLoss {
    fn on_start(&mut self, session: &mut Session) -> Result<Control> {
        if let Some(folder) = &self.folder {
            let own = &session.config().output_dir;
            let file = match session.resumed() {
                Some(resumed) => {
                    // The state's own step is looked at again, now.
                    let belongs = |line: &Line| line.step < resumed.step;
                    let (file, lines) = history::go_on(own, FILE, resumed, belongs)?;
                    self.first = lines.first().map(|line| line.loss);
                    file
                }
                None => history::begin(own, FILE)?,
            };
            self.loaded = Some((session.load_validation(folder)?, file));
            self.look(session)?;
        }
        Ok(Control::Continue)
    }

    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        if self.every.is_some_and(|every| report.step.is_multiple_of(every)) && report.step < report.steps {
            self.look(session)?;
        }
        Ok(Control::Continue)
    }

    fn on_end(&mut self, session: &mut Session) -> Result<()> {
        self.look(session)
    }
}
