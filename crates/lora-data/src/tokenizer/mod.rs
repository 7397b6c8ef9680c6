//! Tokenisers: captions into the numbers that text encoders take.

mod clean;
mod clip;

pub use clean::TextCleaning;
pub use clip::{BEGIN, CHUNK, ClipTokenizer, END, Padding, ROW};
