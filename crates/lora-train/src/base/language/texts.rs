//! Texts as the data of a run: what the configuration says of them, and the base's tokenizer.

use std::path::Path;
use std::sync::Arc;

use lora_core::Component;
use lora_core::random::Stream;
use lora_data::Joined;
use lora_data::source::{Example, Source};
use lora_data::texts::{LongDocuments, TextOptions, Texts, TokenRow};
use lora_data::tokenizer::Tokenizer;
use lora_models::networks::decoder::DecoderConfig;

use crate::base::{Data, DataOpening};
use crate::config::TrainConfig;
use crate::config::keys::language::TEXTS as KEYS;
use crate::{Error, Result};

/// Texts.
pub const TEXTS: Data = Data { noun: "row", unit: "tok", keys: &[&KEYS], open, stand_ins };

fn open(opening: &DataOpening<'_>) -> Result<Box<dyn Source>> {
    let tokenizer = Arc::new(Tokenizer::open(opening.checkpoint.path())?);
    let decoder = DecoderConfig::detect(opening.checkpoint.component(Component::LANGUAGE_MODEL)?)?;
    let each = |options: TextOptions| -> Result<Box<dyn Source>> {
        let texts = Texts::open(options, Arc::clone(&tokenizer), opening.disk.map(|disk| &**disk))?;
        // Tokenizers of published models have tokens that their models never see, as Gemma 3 1B's for pictures. What
        // counts is what the texts have.
        if tokenizer.vocabulary_size() > decoder.vocabulary {
            let draw = Stream::new(0);
            for item in 0..texts.count() {
                if let Example::Tokens(row) = texts.example(item, &draw)? {
                    known(&row, decoder.vocabulary, texts.path(item), &tokenizer)?;
                }
            }
        }
        Ok(Box::new(texts))
    };
    Ok(Joined::of(options(opening.config).into_iter().map(each).collect::<Result<_>>()?))
}

/// Refuses a row with a token that the model's embedding, of so many rows, does not have.
///
/// # Errors
/// [`Error::UnknownToken`] with the file at `path`.
pub(crate) fn known(row: &TokenRow, rows: usize, path: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let unknown = row.ids.iter().find(|id| **id as usize >= rows);
    let text = |id: &u32| tokenizer.text_of(*id).unwrap_or_else(|| id.to_string());
    unknown.map_or(Ok(()), |id| Err(Error::UnknownToken { path: path.to_owned(), token: text(id), rows }))
}

fn stand_ins(config: &TrainConfig, batches: usize) -> Result<Box<dyn Source>> {
    let each = |options: TextOptions| -> Box<dyn Source> {
        let rows = options.batch_size * batches;
        Box::new(Texts::stand_in(options, rows))
    };
    Ok(Joined::of(options(config).into_iter().map(each).collect()))
}

/// The texts that a configuration names.
pub(crate) fn options(config: &TrainConfig) -> Vec<TextOptions> {
    let extra = &config.extra;
    let long = extra.text("long_documents").and_then(LongDocuments::of_name).unwrap_or_default();
    let each = |dataset: &lora_data::DatasetOptions| TextOptions {
        path: dataset.path.clone(),
        strictness: dataset.scan.strictness,
        repeats: dataset.scan.repeats,
        batch_size: dataset.batch_size,
        max_seq_length: extra.whole("max_seq_length").unwrap_or(2048),
        packing: extra.switch("packing") == Some(true),
        train_on_inputs: extra.switch("train_on_inputs") == Some(true),
        chat_template: extra.text("chat_template").map(str::to_owned),
        system_prompt: extra.text("system_prompt").map(str::to_owned),
        long_documents: long,
        overlap: extra.whole("overlap").unwrap_or(0),
        pairs: Some(extra.text("objective").is_some_and(|objective| objective != "sft")),
        ..TextOptions::default()
    };
    config.datasets.iter().map(each).collect()
}
