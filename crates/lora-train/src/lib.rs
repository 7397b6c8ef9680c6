#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

// What a program that trains, or brings a base, variant, optimiser, callback or source of its own, needs is public, each
// item under one path. Everything else is private to the crate.
mod auto_label;
pub mod base;
mod bytes;
pub mod callback;
mod callbacks;
mod command;
pub mod config;
pub mod difference;
mod error;
pub mod event;
mod full;
mod fuse;
pub mod inference;
mod initial;
mod inputs;
pub mod loss;
mod meter;
pub mod optimiser;
pub mod parameters;
pub mod plan;
mod plugins;
pub mod ranks;
mod run;
mod schedule;
mod session;
mod state;
pub mod trainable;
pub mod velocity;

pub use auto_label::auto_label;
pub use command::Command;
pub use error::{Error, Result};
pub use event::Event;
/// To be called first in `main` of a program that trains.
pub use lora_core::openmp::yield_to_busy_programs;
pub use plugins::Plugins;
pub use run::{Best, RunResult, train};
pub use session::{Preparing, ResumedFrom, Session, StepReport, Summary, Validation};
