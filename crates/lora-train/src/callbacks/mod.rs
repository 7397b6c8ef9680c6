//! The callbacks that come with every run: metrics and loss curve, health, crowded cores, validation, samples, intermediate saves
//! of the LoRA and of the run's state; and those of `log_with`.

mod clock;
mod crowded;
mod csv;
mod health;
mod history;
mod metrics;
mod report;
mod samples;
mod save;
mod tensorboard;
mod validation;

pub(crate) use crowded::Crowded;
pub(crate) use csv::MetricsCsv;
pub(crate) use health::HealthCheck;
pub(crate) use metrics::Metrics;
pub(crate) use report::Report;
pub(crate) use samples::Samples;
pub(crate) use save::{SaveCheckpoints, SaveStates};
pub(crate) use tensorboard::TensorBoard;
pub(crate) use validation::ValidationLoss;
pub(crate) use validation::best_name;
