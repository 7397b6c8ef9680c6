//! What a base does with finished adapters: a language model writes and is judged on texts, a picture base draws. Training is
//! not here.

mod adapters;
mod picture;
mod text;

pub use picture::{AppliedAdapter, PictureModel, PictureModelOptions, PictureRequest};
pub use text::{Evaluation, EvaluationOptions, Sampling, TextModel, TextModelOptions, Writer};
