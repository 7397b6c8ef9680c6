#![doc = include_str!("../README.md")]

pub mod activation;
mod backend;
pub mod checkpoint;
pub mod cross_entropy;
mod cuda;
pub mod device;
pub mod dry;
mod error;
pub mod fault;
pub mod foreach;
pub mod frozen;
pub mod gradients;
pub mod graph;
pub mod group;
pub mod memory;
pub mod nf4;
pub mod norm;
pub mod profile;
pub mod rotary;
mod scaler;
mod shim;
pub mod staging;
pub mod tensor;

pub use backend::{TchBackend, apply_layer};
pub use error::{Error, Result, caught};
pub use scaler::LossScaler;
/// The version of tch that the workspace is built on; use this one, not your own.
pub use tch;

/// The version of libtorch that the workspace is built on.
pub const LIBTORCH: &str = "2.11.0";

/// What tests draw from here on. libtorch decides for good whether there is CUDA when it is first asked, as seeding does.
#[cfg(test)]
pub(crate) fn seed(seed: i64) {
    device::cuda();
    tch::manual_seed(seed);
}
