#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
pub mod layers;
pub mod stable_diffusion;
pub mod synthetic;
pub mod weights;

pub use error::{Error, Result};
