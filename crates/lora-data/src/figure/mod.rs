//! Results drawn as pictures: the loss curve, the grid of samples, the norms of an adapter's updates. Nothing here knows where
//! its numbers come from; pages with pictures of a dataset are in [`crate::report`].

pub mod chart;
pub mod grid;
mod heat_map;
mod label;
pub mod loss_curve;
pub mod norms;
