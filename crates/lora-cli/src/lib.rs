//! What the programs `lora` and `lora-trainer` share: how they fail, log, show progress, take signals, read arguments that
//! several commands have, and what they know of a machine. The commands themselves are in the programs.

#![forbid(unsafe_code)]

pub mod arguments;
mod failure;
pub mod interrupt;
pub mod nvidia;
mod program;
pub mod progress;
pub mod training;

pub use failure::Failure;
pub use program::run;
