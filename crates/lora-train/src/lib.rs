#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod base;
pub mod callback;
pub mod callbacks;
pub mod config;
mod error;
pub mod inference;
pub mod loss;
pub mod optimiser;
pub mod parameters;
pub mod plan;
mod plugins;
pub mod report;
mod run;
mod schedule;
pub mod session;
pub mod state;
pub mod trainable;
pub mod whole;

pub use error::{Error, Result};
/// To be called first in `main` of a program that trains.
pub use lora_torch::openmp::let_threads_yield;
pub use plugins::Plugins;
pub use run::{Best, RunResult, train};
pub use schedule::Schedule;
pub use session::Session;
