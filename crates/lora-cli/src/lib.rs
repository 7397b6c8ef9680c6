#![doc = include_str!("../README.md")]
//!
//! What the programs `lora` and `lora-trainer` share: how they speak, fail, log, show progress, take signals, read
//! arguments that several commands have, what they know of a machine, and the look at a dataset, which either takes.
//! The other commands are in the programs.
#![forbid(unsafe_code)]

#[macro_use]
#[doc(hidden)]
pub mod output;

pub mod arguments;
pub mod dataset;
mod failure;
pub mod interrupt;
pub mod nvidia;
mod program;
pub mod progress;
pub mod training;

pub use failure::Failure;
pub use program::run;
