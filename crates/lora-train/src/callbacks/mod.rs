//! The callbacks that come with every run: metrics and loss curve, health, validation, samples, intermediate saves
//! of the LoRA and of the run's state.

mod health;
mod history;
mod metrics;
mod samples;
mod save;
mod validation;

pub(crate) use health::HealthCheck;
pub(crate) use metrics::Metrics;
pub(crate) use samples::Samples;
pub(crate) use save::{SaveCheckpoints, SaveStates};
pub(crate) use validation::ValidationLoss;
