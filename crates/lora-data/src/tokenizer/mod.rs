//! Tokenizers: texts into the numbers that models take. [`ClipTokenizer`] is that of the text encoders of diffusion models;
//! [`Tokenizer`] is a language model's, read from its folder or its GGUF file.

mod clean;
mod clip;
mod folder;
mod gguf;
mod language;
mod save;

pub use clean::TextCleaning;
pub use clip::{CHUNK, ClipTokenizer, END, Padding, ROW};
pub use language::{Encoding, SpecialToken, SpecialTokens, Tokenizer};
