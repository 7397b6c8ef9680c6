//! Captions through a language model: what stands around them, which of its states are read. The tokenizer is `lora_data`'s,
//! the network is `lora_models`'.

use std::path::PathBuf;

use lora_core::Component;
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
use crate::config::TrainConfig;
use crate::{Error, Result};

/// The text encoder of a kind of base: what its files do not say.
#[derive(Debug)]
pub(super) struct EncoderKind {
    /// The part of the base that it is.
    pub(super) component: Component,
    /// What people call it.
    pub(super) title: &'static str,
    /// What the key `text_encoder` may name, for people.
    pub(super) published: &'static str,
    /// What stands before a caption and behind it, special tokens among them.
    pub(super) around: [&'static str; 2],
    /// Layers behind the states that are read; states behind the last layer are normed, others are not.
    pub(super) unread_layers: usize,
}

/// The name of what is kept of a caption.
pub(super) const STATES: &str = "states";

/// The text encoder of an open base.
#[derive(Debug)]
pub(super) struct CaptionEncoder {
    kind: &'static EncoderKind,
    tokenizer: Tokenizer,
    /// Tokens of a caption and what stands around it, at most.
    length: usize,
    network: Option<Decoder>,
}

/// Where the tokenizer of a base's text encoder is: where a key says it, in the encoder's own folder, or beside it.
pub(super) fn tokenizer(checkpoint: &Checkpoint, component: Component, config: &TrainConfig) -> Option<PathBuf> {
    let given = config.extra.text("tokenizer").map(PathBuf::from);
    let encoder = checkpoint.component(component).ok()?.path().to_owned();
    let beside = [Some(encoder.as_path()), encoder.parent()].into_iter().flatten();
    let places = beside.flat_map(|folder| [folder.to_owned(), folder.join("tokenizer")]);
    // The text encoder may come from elsewhere without one: a base's own is of the same kind.
    let of_base = checkpoint.path().join("tokenizer");
    given.into_iter().chain(places).chain([of_base]).find(|folder| Tokenizer::is_at(folder))
}

impl CaptionEncoder {
    pub(super) fn open(kind: &'static EncoderKind, checkpoint: &Checkpoint, config: &TrainConfig) -> Result<Self> {
        let found = tokenizer(checkpoint, kind.component, config);
        let path = found.unwrap_or_else(|| checkpoint.path().join("tokenizer"));
        let tokenizer = Tokenizer::open(&path)?;
        let rows = checkpoint.component(kind.component)?.shape("model.embed_tokens.weight").and_then(<[_]>::first);
        if let Some(&rows) = rows.filter(|rows| **rows < tokenizer.vocabulary_size()) {
            return Err(Error::Vocabulary { path, tokens: tokenizer.vocabulary_size(), rows });
        }
        let length = config.extra.whole("max_sequence_length").unwrap_or(512);
        Ok(Self { kind, tokenizer, length, network: None })
    }

    pub(super) fn load(&mut self, checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<()> {
        self.network = Some(load_caption_decoder(checkpoint, self.kind.component, kind, device, held)?);
        Ok(())
    }

    pub(super) fn unload(&mut self) {
        self.network = None;
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.network.is_some()
    }

    /// Tokens of a caption at most.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// The tokens of a caption with what stands around it, uncut.
    pub(super) fn tokens(&self, caption: &str) -> Result<Vec<u32>> {
        let [before, behind] = self.kind.around;
        Ok(self.tokenizer.encode(&format!("{before}{caption}{behind}"))?.ids)
    }

    /// What answers depend on beside the caption and the weights.
    pub(super) fn settings(&self) -> String {
        format!("{} {:?} {} {}", self.length, self.kind.around, self.kind.unread_layers, self.tokenizer.digest())
    }

    /// The states of a caption, `[tokens, width]` on the device, in the compute dtype.
    pub(super) fn encode(&self, caption: &str, device: Device) -> Result<Tensors> {
        let network = self.network.as_ref().ok_or(Error::NotLoaded { network: self.kind.title })?;
        let mut tokens: Vec<i64> = self.tokens(caption)?.into_iter().map(i64::from).collect();
        // What a run may need is planned with captions as long as they can be: nobody has looked at the real ones.
        tokens.resize(if dry::is_dry(device) { self.length } else { tokens.len().min(self.length) }, 0);
        let rows = Rows::of(&upload(&Tensor::from_slice(&tokens).f_unsqueeze(0)?, device)?, 0)?;
        let depth = network.config().layers.len().saturating_sub(self.kind.unread_layers);
        let states = network.states(&rows, &[depth], &Pass::default())?;
        let states = states.first().map(|states| states.f_squeeze_dim(0)).transpose()?;
        Ok(states.map(|states| (STATES.to_owned(), states)).into_iter().collect())
    }
}
