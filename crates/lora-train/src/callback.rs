//! What watches a run: progress, metrics, samples, saving and health checks are callbacks, and a user's crate can add its
//! own.

use crate::Result;
use crate::session::{Session, StepReport};

/// Whether to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Stop after this step, as if the run were over, for this reason.
    Stop(String),
}

/// Sees a run at its edges and after each step.
pub trait Callback {
    /// Everything is prepared; the first step comes next.
    ///
    /// # Errors
    /// Any; it ends the run before its first step.
    fn on_start(&mut self, session: &mut Session) -> Result<Control> {
        let _ = session;
        Ok(Control::Continue)
    }

    /// A step is done.
    ///
    /// # Errors
    /// Any; it ends the run, and what was learnt is saved beside the LoRA's name with `-rescued`. [`Control::Stop`]
    /// ends it in order.
    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        let _ = (session, report);
        Ok(Control::Continue)
    }

    /// The run is over, whether complete or stopped, and the LoRA is saved. Not called after an error.
    ///
    /// # Errors
    /// Any; the LoRA is saved all the same.
    fn on_end(&mut self, session: &mut Session) -> Result<()> {
        let _ = session;
        Ok(())
    }
}
