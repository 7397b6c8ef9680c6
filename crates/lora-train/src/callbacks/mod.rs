//! The callbacks that come with every run: metrics and loss curve, health, validation, samples, intermediate saves.

mod health;
mod metrics;
mod samples;
mod save;
mod validation;

pub use health::HealthCheck;
pub use metrics::Metrics;
pub use samples::SampleGrid;
pub use save::SaveCheckpoints;
pub use validation::ValidationLoss;
