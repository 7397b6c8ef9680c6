//! Captions through a language model and a text conditioner, which makes of its states and of T5's tokens of the same caption
//! what the transformer reads. Both are there together, and are gone together.

use lora_data::tokenizer::Tokenizer;
use lora_io::checkpoint::Checkpoint;
use lora_io::family::anima::TEXT_CONDITIONER;
use lora_models::layers::Pass;
use lora_models::networks::{TextConditioner, load_text_conditioner};
use lora_models::weights::Held;
use lora_torch::dry;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::upload;

use super::super::Tensors;
use super::language::LanguageReader;
use super::t5;
use super::text::{CaptionReader, EncoderKind, Language, STATES, T5_TOKENIZER, open_tokenizer};
use crate::config::TrainConfig;
use crate::{Error, Result};

/// The language model and the conditioner behind it.
#[derive(Debug)]
pub(super) struct ConditionedReader {
    language: LanguageReader,
    /// T5's.
    tokenizer: Tokenizer,
    conditioner: Option<TextConditioner>,
}

impl ConditionedReader {
    pub(super) fn open(
        kind: &'static EncoderKind,
        reads: &'static Language,
        checkpoint: &Checkpoint,
        config: &TrainConfig,
    ) -> Result<Self> {
        let tokenizer = open_tokenizer(checkpoint, TEXT_CONDITIONER, (T5_TOKENIZER, "embed.weight"), config)?;
        Ok(Self { language: LanguageReader::open(kind, reads, checkpoint, config)?, tokenizer, conditioner: None })
    }
}

impl CaptionReader for ConditionedReader {
    fn load(&mut self, checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<()> {
        self.conditioner = Some(load_text_conditioner(checkpoint, kind, device, held.clone())?);
        self.language.load(checkpoint, kind, device, held)
    }

    fn unload(&mut self) {
        self.conditioner = None;
        self.language.unload();
    }

    fn is_loaded(&self) -> bool {
        self.conditioner.is_some() && self.language.is_loaded()
    }

    fn length(&self) -> usize {
        self.language.length()
    }

    fn tokens(&self, caption: &str) -> Result<usize> {
        Ok(self.language.tokens(caption)?.max(self.tokenizer.encode_document(caption)?.len()))
    }

    fn settings(&self) -> String {
        format!("{} {}", self.language.settings(), self.tokenizer.digest())
    }

    /// The states of T5's tokens, `[tokens, width]` on the device, in the compute dtype.
    fn encode(&self, caption: &str, device: Device) -> Result<Tensors> {
        let conditioner = self.conditioner.as_ref().ok_or(Error::NotLoaded { network: "text conditioner" })?;
        let mut row = t5::row(&self.tokenizer, caption, self.length())?;
        if dry::is_dry(device) {
            row.resize(self.length(), 0);
        }
        let row = upload(&Tensor::from_slice(&row).f_unsqueeze(0)?, device)?;
        // An empty caption has no tokens for the language model, and the conditioner reads nothing then.
        let is_told = dry::is_dry(device) || self.language.tokens(caption)? > 0;
        let told = is_told.then(|| self.language.encode(caption, device)).transpose()?;
        let source = told.as_ref().and_then(|kept| kept.get(STATES)).map(|states| states.f_unsqueeze(0)).transpose()?;
        let states = conditioner.forward(&row, source.as_ref(), &Pass::default())?.f_squeeze_dim(0)?;
        Ok(Tensors::from([(STATES.to_owned(), states)]))
    }
}
