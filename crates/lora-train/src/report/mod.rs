//! Results as pictures: the loss curve and the grid of samples. They know nothing of training.

mod font;
pub mod grid;
pub mod loss_curve;
