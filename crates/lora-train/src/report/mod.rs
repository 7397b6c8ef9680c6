//! Results as pictures: the loss curve, the grid of samples, tables of magnitudes. They know nothing of training.

mod font;
pub mod grid;
pub mod heat_map;
pub mod loss_curve;
