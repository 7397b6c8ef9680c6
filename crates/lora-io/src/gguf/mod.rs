//! GGUF, the format of llama.cpp (versions 2 and 3, little-endian): reading model files, writing small ones and
//! copies of models with some tensors replaced. What the
//! blocks of a quantised tensor mean is told in [`blocks`], how a language model's tensors are named in [`names`]; adapters
//! in this format are [`crate::adapter::gguf`]'s.
//!
//! Format: github.com/ggml-org/ggml, `docs/gguf.md`.

pub mod blocks;
mod config;
pub(crate) mod copy;
pub(crate) mod dequantise;
pub mod names;
mod quantise;
mod reader;
pub mod rope;
mod writer;

pub use blocks::{TensorType, values};
pub use dequantise::{LanguageModel, Packed, dequantise, dequantise_to_folder};
pub use quantise::quantise;
pub use reader::{GgufFile, Value};
pub use writer::write;

/// What a file begins with.
pub const MAGIC: &[u8; 4] = b"GGUF";

/// Tensors begin at multiples of this where a file does not say otherwise.
const ALIGNMENT: usize = 32;
