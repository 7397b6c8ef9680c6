//! The callbacks that come with every run: metrics and loss curve, health, samples, intermediate saves.

mod health;
mod metrics;
mod samples;
mod save;

pub use health::HealthCheck;
pub use metrics::Metrics;
pub use samples::SampleGrid;
pub use save::SaveCheckpoints;
