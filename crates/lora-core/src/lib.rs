#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod adapter;
pub mod backend;
pub mod blocks;
pub mod compose;
pub mod conformance;
mod error;
pub mod health;
mod layer;
pub mod linalg;
pub mod merge;
pub mod openmp;
pub mod random;
pub mod rank;
pub mod strength;
pub mod target;
mod tensor;
pub mod variant;

pub use adapter::{Adapter, AdapterModule, Component, ModulePath};
pub use error::{Error, Result};
pub use layer::LayerGeometry;
pub use strength::Strength;
pub use tensor::{DType, HostData, HostTensor};
