#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod bicubic;
mod captioner;
mod choose;
mod error;
mod folder;
mod input;
mod recorded;
mod runtime;
mod server;
mod settings;
mod tagger;
mod tags;

pub use captioner::{Captioner, Problem};
pub use choose::{RatingPlace, TagChoice};
pub use error::{Error, Result};
pub use folder::{Captioned, Existing, Failure, FolderOptions, Output, Progress, Report, caption_folder, has_caption};
pub use input::{Channels, Preprocessing};
pub use runtime::onnx_runtime;
pub use settings::{PROMPT, PROMPT_WITH_TAGS, Settings};
pub use tagger::{Device, Tagger};
pub use tags::{Category, Probabilities, Tag, TagList};
