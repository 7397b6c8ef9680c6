//! Results as pictures: the loss curve, the grid of samples, the norms of an adapter's updates. They know nothing of training.

pub(crate) mod chart;
mod font;
pub mod grid;
mod heat_map;
pub(crate) mod loss_curve;
pub mod norms;
pub(crate) mod run_page;
pub(crate) mod tensorboard;
