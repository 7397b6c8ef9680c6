#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod bucket;
pub mod caption;
pub mod crop;
pub mod dataset;
mod error;
pub mod focus;
pub mod picture;
pub mod processor;
pub mod sampler;
pub mod tokenizer;

pub use error::{Error, Result};
pub use picture::RgbPicture;
