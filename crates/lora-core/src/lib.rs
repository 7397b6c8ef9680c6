#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod adapter;
mod error;
pub mod random;
mod tensor;

pub use adapter::{Adapter, AdapterModule, Component, ModulePath};
pub use error::{Error, Result};
pub use tensor::{DType, HostData, HostTensor};
