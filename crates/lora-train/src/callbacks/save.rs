//! The LoRA every so many steps or epochs.

use crate::Result;
use crate::callback::{Callback, Control};
use crate::config::TrainConfig;
use crate::session::{Session, StepReport};

/// Saves `name-step000100.safetensors` along the way; the last one is the run's own.
#[derive(Debug)]
pub struct SaveCheckpoints {
    steps: Option<usize>,
    epochs: Option<usize>,
}

impl SaveCheckpoints {
    /// For a run.
    pub fn new(config: &TrainConfig) -> Self {
        Self { steps: config.save_every_n_steps, epochs: config.save_every_n_epochs }
    }
}

impl Callback for SaveCheckpoints {
    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        let every = |interval: Option<usize>| interval.is_some_and(|interval| report.step.is_multiple_of(interval));
        let epochs = self.epochs.map(|epochs| epochs * session.plan().steps_per_epoch);
        if (every(self.steps) || every(epochs)) && report.step < report.steps {
            let name = format!("{}-step{:06}", session.config().output_name, report.step);
            let path = session.save(&name)?;
            tracing::info!("saved {}", path.display());
        }
        Ok(Control::Continue)
    }
}
