#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod bicubic;
mod captioner;
pub mod choose;
mod error;
mod folder;
mod input;
mod recorded;
mod runtime;
mod server;
pub mod settings;
pub mod tagger;
pub mod tags;

pub use captioner::{Captioner, Problem};
pub use error::{Error, Result};
pub use folder::{Captioned, Existing, Failure, FolderOptions, Output, Progress, Report, caption_folder, has_caption};
pub use input::{Channels, Preprocessing};
pub use settings::Settings;
pub use tagger::Tagger;
pub use tags::Probabilities;
