//! Results as pictures: the loss curve, the grid of samples, tables of magnitudes. They know nothing of training.

mod font;
pub mod grid;
pub mod heat_map;
pub(crate) mod loss_curve;
