#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod diffusion;
mod error;
pub mod layers;
pub mod networks;
pub mod synthetic;
mod token_rows;
pub mod weights;

pub use error::{Error, Result};
