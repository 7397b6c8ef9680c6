#![doc = include_str!("../README.md")]

pub mod adapter;
pub mod atomic;
pub mod checkpoint;
pub mod consumers;
mod error;
pub mod family;
mod foreign;
pub mod gguf;
pub mod hash;
pub mod hub;
mod info;
pub mod json;
mod map;
pub mod merge;
pub mod metadata;
pub mod overwrite;
pub mod safetensors;

pub use error::{Error, Result};
pub use info::AdapterInfo;
