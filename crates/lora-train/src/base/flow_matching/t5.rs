//! Captions through T5's encoder: rows of one length, filled up with token 0, whose states count as those of the caption do, or
//! rows as long as captions are. The tokenizer is `lora_data`'s, the network is `lora_models`'.

use lora_core::Component;
use lora_data::tokenizer::Tokenizer;
use lora_io::checkpoint::Checkpoint;
use lora_models::layers::Pass;
use lora_models::networks::{T5Encoder, load_t5};
use lora_models::weights::Held;
use lora_torch::dry;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::upload;

use super::super::Tensors;
use super::text::{CaptionReader, EncoderKind, STATES, T5, open_tokenizer};
use crate::config::TrainConfig;
use crate::{Error, Result};

/// The token that ends a caption.
const END: u32 = 1;

/// The text encoder.
#[derive(Debug)]
pub(super) struct T5Reader {
    kind: &'static EncoderKind,
    tokenizer: Tokenizer,
    length: usize,
    fills_up: bool,
    network: Option<T5Encoder>,
}

impl T5Reader {
    pub(super) fn open(
        kind: &'static EncoderKind,
        reads: T5,
        checkpoint: &Checkpoint,
        config: &TrainConfig,
    ) -> Result<Self> {
        let names = (["tokenizer", kind.tokenizer.unwrap_or("tokenizer")], "shared.weight");
        let tokenizer = open_tokenizer(checkpoint, kind.component, names, config)?;
        let given = config.extra.whole("max_sequence_length").filter(|_| config.gives("max_sequence_length"));
        let length = given.unwrap_or_else(|| (reads.length)(checkpoint));
        Ok(Self { kind, tokenizer, length, fills_up: reads.fills_up, network: None })
    }

    fn component(&self) -> Component {
        self.kind.component
    }

    /// A caption's row, and how many of its tokens are seen.
    fn row(&self, caption: &str, device: Device) -> Result<(Vec<i64>, usize)> {
        let mut row = row(&self.tokenizer, caption, self.length)?;
        let own = row.len();
        // What a run may need is planned with captions as long as they can be: nobody has looked at the real ones.
        let whole = self.fills_up || dry::is_dry(device);
        row.resize(if whole { self.length } else { self.length.min(own + 1) }, 0);
        Ok((row, if self.fills_up { self.length } else { own }))
    }
}

/// A caption's tokens and the one that ends it, so many at most.
pub(super) fn row(tokenizer: &Tokenizer, caption: &str, length: usize) -> Result<Vec<i64>> {
    let mut ids = tokenizer.encode_document(caption)?;
    if ids.len() > length {
        ids.truncate(length - 1);
        ids.push(END);
    }
    Ok(ids.into_iter().map(i64::from).collect())
}

impl CaptionReader for T5Reader {
    fn load(&mut self, checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<()> {
        self.network = Some(load_t5(checkpoint, self.component(), kind, device, held)?);
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
        Ok(self.tokenizer.encode_document(caption)?.len())
    }

    fn settings(&self) -> String {
        let rows = if self.fills_up { "" } else { "as long as captions " };
        format!("{rows}{} {}", self.length, self.tokenizer.digest())
    }

    fn encode(&self, caption: &str, device: Device) -> Result<Tensors> {
        let network = self.network.as_ref().ok_or(Error::NotLoaded { network: self.kind.title })?;
        let (row, seen) = self.row(caption, device)?;
        let row = upload(&Tensor::from_slice(&row).f_unsqueeze(0)?, device)?;
        let states = network.forward_seeing(seen as i64, &row, &Pass::default())?.f_squeeze_dim(0)?;
        Ok(Tensors::from([(STATES.to_owned(), states)]))
    }
}
