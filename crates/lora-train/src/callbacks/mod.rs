//! The callbacks that come with every run: metrics and loss curve, health, validation, samples, intermediate saves
//! of the LoRA and of the run's state.

mod earlier;
mod health;
mod metrics;
mod samples;
mod save;
mod validation;

pub use health::{Finding, HealthCheck, LossHealth};
pub use metrics::Metrics;
pub use samples::Samples;
pub use save::{SaveCheckpoints, SaveStates};
pub use validation::ValidationLoss;
pub(crate) use validation::best_name;
