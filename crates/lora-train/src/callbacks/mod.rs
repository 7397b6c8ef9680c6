//! The callbacks that come with every run: metrics and loss curve, health, crowded cores, validation, samples, intermediate saves
//! of the LoRA and of the run's state.

mod clock;
mod crowded;
mod health;
mod history;
mod metrics;
mod samples;
mod save;
mod validation;

pub(crate) use crowded::Crowded;
pub(crate) use health::HealthCheck;
pub(crate) use metrics::Metrics;
pub(crate) use samples::Samples;
pub(crate) use save::{SaveCheckpoints, SaveStates};
pub(crate) use validation::ValidationLoss;
pub(crate) use validation::best_name;
