//! Captions through a language model: what stands around them, which of its states are read. The tokenizer is `lora_data`'s,
//! the network is `lora_models`'.

use lora_data::tokenizer::Tokenizer;
use lora_io::checkpoint::Checkpoint;
use lora_models::layers::Pass;
use lora_models::networks::decoder::Rows;
use lora_models::networks::{Decoder, load_caption_decoder};
use lora_models::weights::Held;
use lora_torch::dry;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::upload;

use super::super::Tensors;
use super::text::{CaptionReader, EncoderKind, STATES, open_tokenizer};
use crate::config::TrainConfig;
use crate::{Error, Result};

/// The text encoder.
#[derive(Debug)]
pub(super) struct LanguageReader {
    kind: &'static EncoderKind,
    around: [&'static str; 2],
    unread_layers: usize,
    tokenizer: Tokenizer,
    /// Tokens of a caption and what stands around it, at most.
    length: usize,
    network: Option<Decoder>,
}

impl LanguageReader {
    pub(super) fn open(
        kind: &'static EncoderKind,
        (around, unread_layers): ([&'static str; 2], usize),
        checkpoint: &Checkpoint,
        config: &TrainConfig,
    ) -> Result<Self> {
        let names = (kind.tokenizer.unwrap_or("tokenizer"), "model.embed_tokens.weight");
        let tokenizer = open_tokenizer(checkpoint, kind.component, names, config)?;
        let length = config.extra.whole("max_sequence_length").unwrap_or(512);
        Ok(Self { kind, around, unread_layers, tokenizer, length, network: None })
    }

    /// The tokens of a caption with what stands around it, uncut.
    fn ids(&self, caption: &str) -> Result<Vec<u32>> {
        let [before, behind] = self.around;
        Ok(self.tokenizer.encode(&format!("{before}{caption}{behind}"))?.ids)
    }
}

impl CaptionReader for LanguageReader {
    fn load(&mut self, checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<()> {
        self.network = Some(load_caption_decoder(checkpoint, self.kind.component, kind, device, held)?);
        Ok(())
    }

    fn unload(&mut self) {
        self.network = None;
    }

    fn is_loaded(&self) -> bool {
        self.network.is_some()
    }

    fn length(&self) -> usize {
        self.length
    }

    fn tokens(&self, caption: &str) -> Result<usize> {
        Ok(self.ids(caption)?.len())
    }

    fn settings(&self) -> String {
        format!("{} {:?} {} {}", self.length, self.around, self.unread_layers, self.tokenizer.digest())
    }

    /// The states of a caption, `[tokens, width]` on the device, in the compute dtype.
    fn encode(&self, caption: &str, device: Device) -> Result<Tensors> {
        let network = self.network.as_ref().ok_or(Error::NotLoaded { network: self.kind.title })?;
        let mut tokens: Vec<i64> = self.ids(caption)?.into_iter().map(i64::from).collect();
        // What a run may need is planned with captions as long as they can be: nobody has looked at the real ones.
        tokens.resize(if dry::is_dry(device) { self.length } else { tokens.len().min(self.length) }, 0);
        let rows = Rows::of(&upload(&Tensor::from_slice(&tokens).f_unsqueeze(0)?, device)?, 0)?;
        let depth = network.config().layers.len().saturating_sub(self.unread_layers);
        let states = network.states(&rows, &[depth], &Pass::default())?;
        let states = states.first().map(|states| states.f_squeeze_dim(0)).transpose()?;
        Ok(states.map(|states| (STATES.to_owned(), states)).into_iter().collect())
    }
}
