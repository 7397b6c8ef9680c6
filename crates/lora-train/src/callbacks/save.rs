//! The LoRA every so many steps or epochs, and the state of the run.

use crate::callback::{Callback, Control};
use crate::config::TrainConfig;
use crate::session::{Session, StepReport};
use crate::{Error, Result};

/// Saves `name-step000100.safetensors` along the way; the last one is the run's own.
#[derive(Debug)]
pub(crate) struct SaveCheckpoints {
    steps: Option<usize>,
    epochs: Option<usize>,
}

impl SaveCheckpoints {
    /// For a run.
    pub(crate) fn new(config: &TrainConfig) -> Self {
        Self { steps: config.save_every_n_steps, epochs: config.save_every_n_epochs }
    }
}

impl Callback for SaveCheckpoints {
    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        let every = |interval: Option<usize>| interval.is_some_and(|interval| report.step.is_multiple_of(interval));
        let epochs = self.epochs.map(|epochs| epochs * session.plan().steps_per_epoch);
        if (every(self.steps) || every(epochs)) && report.step < report.steps {
            let name = format!("{}-step{:06}", session.config().output_name, report.step);
            match session.save(&name) {
                Ok(path) => tracing::info!("saved {}", path.display()),
                // A full disk must not end a run whose result may still fit.
                Err(Error::File(error)) => tracing::warn!("{error}; training goes on without this save"),
                Err(error) => return Err(error),
            }
        }
        Ok(Control::Continue)
    }
}

/// Saves the run's state every so many steps, each in the place of the one before.
#[derive(Debug)]
pub(crate) struct SaveStates {
    every: Option<usize>,
}

impl SaveStates {
    /// For a run.
    pub(crate) fn new(config: &TrainConfig) -> Self {
        Self { every: config.save_state_every_n_steps }
    }
}

impl Callback for SaveStates {
    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        if self.every.is_some_and(|every| report.step.is_multiple_of(every)) {
            match session.save_state() {
                Ok(path) => tracing::debug!("saved the state of step {} in {}", report.step, path.display()),
                // The next may fit again.
                Err(error @ Error::StateNotWritten { .. }) => tracing::warn!("{error}. Training goes on"),
                Err(error) => return Err(error),
            }
        }
        Ok(Control::Continue)
    }
}
