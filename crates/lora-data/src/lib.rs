#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod bucket;
pub mod cache;
pub mod caption;
pub mod crop;
pub mod dataset;
mod error;
pub mod figure;
pub mod finding;
mod focus;
pub mod guard;
mod joined;
mod picture;
mod pictures;
pub mod prefetch;
pub mod processor;
mod prompt_line;
pub mod report;
mod sample;
pub mod sampler;
pub mod sliders;
pub mod source;
pub mod template;
pub mod texts;
pub mod tokenizer;

pub use error::{Error, Result};
pub use joined::Joined;
pub use picture::RgbPicture;
pub use pictures::{DatasetOptions, MaskOptions, Pictures};
pub use prompt_line::PromptLine;
pub use sample::{Frame, Mask, Sample};
