//! Watches for runs that go wrong quietly: skipped steps, losses that explode, adapters that learn nothing.

use crate::Result;
use crate::callback::{Callback, Control};
use crate::session::{Session, StepReport};

/// Steps over which the loss at the start is averaged.
const WINDOW: usize = 50;

/// Warns, once for each finding, with numbers and what helps.
#[derive(Debug, Default)]
pub struct HealthCheck {
    first: Vec<f64>,
    recent: f64,
    warned: bool,
}

impl Callback for HealthCheck {
    fn on_step(&mut self, _session: &mut Session, report: &StepReport) -> Result<Control> {
        if report.skipped {
            tracing::warn!(
                "step {} was skipped: a gradient was not finite ({} skipped so far, loss scale now {})",
                report.step,
                report.skipped_steps,
                report.loss_scale
            );
            return Ok(Control::Continue);
        }
        if self.first.len() < WINDOW {
            self.first.push(report.loss);
            self.recent = self.first.iter().sum::<f64>() / self.first.len() as f64;
            return Ok(Control::Continue);
        }
        let start = self.first.iter().sum::<f64>() / WINDOW as f64;
        self.recent += (report.loss - self.recent) / WINDOW as f64;
        if self.recent > 3.0 * start && !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(
                "the loss has risen from {start:.4} to {:.4}: the run diverges; use a lower learning_rate or a larger effective batch",
                self.recent
            );
        }
        Ok(Control::Continue)
    }

    fn on_end(&mut self, session: &mut Session) -> Result<()> {
        // An up-projection that is still zero never got a gradient that mattered.
        let (mut all, mut dead) = (0, 0);
        for up in session.parameters().iter().filter(|parameter| parameter.is_up) {
            all += 1;
            dead += usize::from(up.norm()? == 0.0);
        }
        if dead > 0 && session.steps_done() > 0 {
            tracing::warn!("{dead} of {all} modules have learnt nothing (their update is still zero)");
        }
        Ok(())
    }
}
