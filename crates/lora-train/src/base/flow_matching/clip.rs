//! Captions through CLIP's text encoders, of which one row of 77 tokens is read. Tokens are `lora_data`'s, the network is
//! `lora_models`'.

use lora_data::tokenizer::{ClipTokenizer, END, Padding, ROW};
use lora_io::checkpoint::Checkpoint;
use lora_models::layers::Pass;
use lora_models::networks::{ClipConfig, ClipTextEncoder};
use lora_models::weights::{Held, Weights};
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::upload;

use super::super::Tensors;
use super::text::{CaptionReader, Clip, EncoderKind};
use crate::config::TrainConfig;
use crate::{Error, Result};

/// The text encoder.
#[derive(Debug)]
pub(super) struct ClipReader {
    kind: &'static EncoderKind,
    kept: Clip,
    tokenizer: ClipTokenizer,
    network: Option<ClipTextEncoder>,
}

impl ClipReader {
    pub(super) fn new(kind: &'static EncoderKind, kept: Clip, config: &TrainConfig) -> Self {
        let padding = if is_open(kept) { Padding::Zero } else { Padding::End };
        let tokenizer = ClipTokenizer::new(config.text_cleaning).padded_with(padding);
        Self { kind, kept, tokenizer, network: None }
    }
}

fn is_open(kept: Clip) -> bool {
    matches!(kept, Clip::StatesAndPooled { open: true, .. })
}

impl CaptionReader for ClipReader {
    fn load(&mut self, checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<()> {
        let component = checkpoint.component(self.kind.component)?;
        let mut config = ClipConfig::detect(component)?;
        if component.config().is_none() {
            config.exact_gelu = is_open(self.kept);
        }
        // Files of CLIP-L have none where it would be the identity.
        if matches!(self.kept, Clip::StatesAndPooled { .. }) && component.contains("text_projection.weight") {
            config = config.with_projection(component)?;
        }
        let weights = Weights::new(component, kind, device).held(held);
        self.network = Some(ClipTextEncoder::new(&weights, config)?.of(self.kind.component));
        Ok(())
    }

    fn unload(&mut self) {
        self.network = None;
    }

    fn is_loaded(&self) -> bool {
        self.network.is_some()
    }

    fn length(&self) -> usize {
        ROW
    }

    fn tokens(&self, caption: &str) -> Result<usize> {
        Ok(self.tokenizer.encode(caption).len() + 2)
    }

    fn settings(&self) -> String {
        format!("{:?} {:?}", self.kept, self.tokenizer)
    }

    fn encode(&self, caption: &str, device: Device) -> Result<Tensors> {
        let network = self.network.as_ref().ok_or(Error::NotLoaded { network: self.kind.title })?;
        let row: Vec<i64> = self.tokenizer.rows(caption, 1).iter().flatten().map(|&token| i64::from(token)).collect();
        let end = row.iter().position(|&token| token == i64::from(END)).unwrap_or(row.len() - 1) as i64;
        let row = upload(&Tensor::from_slice(&row).f_unsqueeze(0)?, device)?;
        let end = upload(&Tensor::from_slice(&[end]), device)?;
        let named = |name: &str, tensor: Tensor| -> Result<(String, Tensor)> {
            Ok((name.to_owned(), tensor.f_squeeze_dim(0)?))
        };
        match self.kept {
            Clip::End(name) => Ok(Tensors::from([named(name, network.end(&row, &end, &Pass::default())?)?])),
            Clip::StatesAndPooled { names: [states, pooled], .. } => {
                let (own_states, own_pooled) = network.states_and_end(&row, &end, &Pass::default())?;
                Ok(Tensors::from([named(states, own_states)?, named(pooled, own_pooled)?]))
            }
        }
    }
}
