//! What watches and steers a run: progress, metrics, samples, saving and health checks are callbacks, and a user's crate
//! can add its own.
//!
//! A program that wants no callback of its own takes a channel: an [`mpsc::Sender`] of events is a callback that passes
//! on what happens, an [`mpsc::Receiver`] of commands one that steers the run.
//!
//! ```no_run
//! use std::sync::{Arc, atomic::AtomicBool, mpsc};
//! use lora_train::{Command, Event, Plugins, config::TrainConfig, train};
//!
//! let config = TrainConfig::from_file("config.toml", &[] as &[&str])?;
//! let (events, watched) = mpsc::channel::<Event>();
//! let (steer, commands) = mpsc::channel::<Command>();
//! std::thread::spawn(move || {
//!     for event in watched {
//!         if matches!(&event, Event::Step(step) if step.report.step == 500) {
//!             let _ = steer.send(Command::Save);
//!         }
//!     }
//! });
//! let stop = Arc::new(AtomicBool::new(false));
//! train(config, &Plugins::default(), vec![Box::new(events), Box::new(commands)], &stop, &mut |_| {})?;
//! # Ok::<(), lora_train::Error>(())
//! ```

use std::sync::mpsc;

use crate::Result;
use crate::command::Command;
use crate::event::Event;
use crate::session::{Session, StepReport};

/// Whether to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Stop after this step, as if the run were over, for this reason.
    Stop(String),
}

/// What came of a command: what was done, or why nothing was.
pub type Answer = std::result::Result<String, String>;

/// Sees a run at its edges and after each step, is told what happens, and may steer it.
pub trait Callback {
    /// Something happened. What a callback tells ([`Session::tell`]) reaches all callbacks, itself too, once it returns.
    fn on_event(&mut self, event: &Event) {
        let _ = event;
    }

    /// What the run is to do before its next step. Asked before each step, and many times a second while the run is held.
    fn commands(&mut self) -> Vec<Command> {
        Vec::new()
    }

    /// A command that is a callback's to do: [`Command::Sample`], [`Command::Save`]. `None` where it is not this one's;
    /// otherwise what came of it.
    ///
    /// # Errors
    /// As [`Callback::on_step`].
    fn on_command(&mut self, session: &mut Session, command: &Command) -> Result<Option<Answer>> {
        let _ = (session, command);
        Ok(None)
    }

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

/// Passes events on; where nobody receives them any more, they are lost.
impl Callback for mpsc::Sender<Event> {
    fn on_event(&mut self, event: &Event) {
        let _ = self.send(event.clone());
    }
}

/// Takes commands as they come.
impl Callback for mpsc::Receiver<Command> {
    fn commands(&mut self) -> Vec<Command> {
        self.try_iter().collect()
    }
}
