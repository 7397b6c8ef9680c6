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
use super::text::{CaptionReader, EncoderKind, Language, STATES, open_tokenizer};
use crate::config::TrainConfig;
use crate::{Error, Result};

/// Tokens of templates that are one in the vocabulary of the model that reads them.
const SPECIAL: [&str; 4] = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"];

/// What fills up rows of the language models that are known here.
const PAD: &str = "<|endoftext|>";

/// The text encoder.
#[derive(Debug)]
pub(super) struct LanguageReader {
    kind: &'static EncoderKind,
    reads: &'static Language,
    tokenizer: Tokenizer,
    /// Tokens of a caption and what stands around it, at most, without those that are dropped.
    length: usize,
    /// How many layers are before each of the states that are read.
    depths: Vec<usize>,
    network: Option<Decoder>,
}

impl LanguageReader {
    pub(super) fn open(
        kind: &'static EncoderKind,
        reads: &'static Language,
        checkpoint: &Checkpoint,
        config: &TrainConfig,
    ) -> Result<Self> {
        let names = (["tokenizer", kind.tokenizer.unwrap_or("tokenizer")], "model.embed_tokens.weight");
        let tokenizer = open_tokenizer(checkpoint, kind.component, names, config)?;
        let special =
            SPECIAL.iter().find(|token| reads.around.concat().contains(**token) && tokenizer.id_of(token).is_none());
        if let Some(token) = special {
            return Err(Error::PartOfAnother {
                path: tokenizer.path().to_owned(),
                found: format!("a vocabulary without `{token}`"),
                expected: format!("that of its text encoder, {}", kind.published),
                key: "tokenizer",
            });
        }
        let given = config.extra.whole("max_sequence_length").filter(|_| config.gives("max_sequence_length"));
        let length = given.unwrap_or(reads.length);
        Ok(Self { kind, reads, tokenizer, length, depths: Vec::new(), network: None })
    }

    /// The tokens of a caption with what stands around it, uncut.
    fn ids(&self, caption: &str) -> Result<Vec<u32>> {
        let [before, behind] = self.reads.around;
        Ok(self.tokenizer.encode(&format!("{before}{caption}{behind}"))?.ids)
    }

    /// A caption's row on the device.
    fn rows(&self, caption: &str, device: Device) -> Result<Rows> {
        let mut tokens: Vec<i64> = self.ids(caption)?.into_iter().map(i64::from).collect();
        let most = self.length + self.reads.dropped;
        tokens.truncate(most);
        let own = tokens.len();
        // What a run may need is planned with captions as long as they can be: nobody has looked at the real ones.
        if self.reads.fills_up || dry::is_dry(device) {
            tokens.resize(most, i64::from(self.tokenizer.id_of(PAD).unwrap_or_default()));
        }
        let rows = Rows::of(&upload(&Tensor::from_slice(&tokens).f_unsqueeze(0)?, device)?, 0)?;
        Ok(Rows { unpadded: self.reads.fills_up.then_some(own), ..rows })
    }
}

impl CaptionReader for LanguageReader {
    fn load(&mut self, checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<()> {
        let mut depths = Vec::new();
        let read = |layers: usize| {
            depths = self.reads.states.depths(layers);
            depths.clone()
        };
        let network = load_caption_decoder(checkpoint, self.kind.component, read, kind, device, held)?;
        (self.network, self.depths) = (Some(network), depths);
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
        Ok(self.ids(caption)?.len().saturating_sub(self.reads.dropped))
    }

    fn settings(&self) -> String {
        format!("{} {:?} {}", self.length, self.reads, self.tokenizer.digest())
    }

    /// The states of a caption, `[tokens, width]` on the device, in the compute dtype.
    fn encode(&self, caption: &str, device: Device) -> Result<Tensors> {
        let network = self.network.as_ref().ok_or(Error::NotLoaded { network: self.kind.title })?;
        let states = network.states(&self.rows(caption, device)?, &self.depths, &Pass::default())?;
        let states = Tensor::f_cat(&states, -1)?.f_squeeze_dim(0)?;
        // Of a vocabulary whose template is shorter something is left to read.
        let first = (self.reads.dropped as i64).min(states.size2()?.0 - 1);
        let states = states.f_slice(0, first, None, 1)?.f_contiguous()?;
        Ok(Tensors::from([(STATES.to_owned(), states)]))
    }
}
