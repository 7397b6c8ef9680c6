//! The text encoders of a Stable Diffusion base: captions as they take them, and what the U-Net reads of their answers,
//! with words weighed. The tokenizer is `lora_data`'s, the networks are `lora_models`'.

use lora_core::Component;
use lora_data::tokenizer::{ClipTokenizer, END, Padding};
use lora_io::checkpoint::Checkpoint;
use lora_models::layers::Pass;
use lora_models::networks::{ClipConfig, ClipTextEncoder, Penultimate};
use lora_models::weights::{Held, Weights};
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::{from_f32, kind_of, upload};

use super::super::{Inputs, Tensors};
use super::tensor;
use crate::config::TrainConfig;
use crate::{Error, Result};

/// One text encoder of a kind of base: what its files do not say.
#[derive(Debug)]
pub(super) struct EncoderKind {
    /// The part of the base that it is.
    pub(super) component: Component,
    /// What people call it.
    pub(super) title: &'static str,
    /// What rows of tokens are filled up with.
    pub(super) padding: Padding,
    /// Whether it has the exact GELU.
    pub(super) exact_gelu: bool,
    /// Whether the U-Net reads its pooled vector.
    pub(super) pools: bool,
    /// The keys that say whether it trains and how fast, beside those of all text encoders.
    pub(super) keys: Option<[&'static str; 2]>,
    /// Names of its tensors in a micro-batch.
    pub(super) inputs: InputNames,
}

/// Names of a text encoder's tensors in a micro-batch.
#[derive(Debug)]
pub(super) struct InputNames {
    tokens: &'static str,
    weights: &'static str,
    ends: &'static str,
    states: &'static str,
    pooled: &'static str,
}

impl InputNames {
    /// Of a base's first text encoder.
    pub(super) const FIRST: Self =
        Self { tokens: "tokens", weights: "token_weights", ends: "ends", states: "states", pooled: "pooled" };
    /// Of its second.
    pub(super) const SECOND: Self =
        Self { tokens: "tokens_2", weights: "token_weights_2", ends: "ends_2", states: "states_2", pooled: "pooled_2" };
}

/// Which states the U-Net reads.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reads {
    /// The last layer's, or with `clip_skip` an earlier one's, after the final norm.
    Normed,
    /// Those before the last layer, without the norm.
    Penultimate,
}

/// A text encoder of an open base.
#[derive(Debug)]
pub(super) struct TextEncoder {
    pub(super) kind: &'static EncoderKind,
    pub(super) trains: bool,
    pub(super) learning_rate: f64,
    tokenizer: ClipTokenizer,
    reads: Reads,
    /// Rows of 75 tokens a caption.
    chunks: usize,
    /// 2 leaves out the last layer.
    clip_skip: usize,
    /// Whether `(word:1.2)` weighs words.
    weighted: bool,
    pub(super) network: Option<ClipTextEncoder>,
}

/// What text encoders tell the U-Net of captions.
#[derive(Debug)]
pub(super) struct Text {
    /// `[captions, states, width]`.
    pub(super) states: Tensor,
    /// `[captions, width]`, where the U-Net reads one.
    pub(super) pooled: Option<Tensor>,
}

/// Captions as a text encoder takes them.
#[derive(Debug)]
struct Tokens {
    /// `[captions · chunks, 77]`.
    rows: Tensor,
    /// `[captions, states, 1]` f32, where any word is weighted.
    weights: Option<Tensor>,
    /// `[captions]`: places of the end tokens that pooled vectors are read at, over all rows.
    ends: Tensor,
}

impl TextEncoder {
    pub(super) fn new(kind: &'static EncoderKind, reads: Reads, config: &TrainConfig) -> Self {
        let (trains, learning_rate) = match kind.keys {
            None => (config.train_text_encoder, config.text_encoder_lr),
            Some([train, rate]) => (
                config.extra.switch(train).unwrap_or(config.train_text_encoder),
                config.extra.number(rate).unwrap_or(config.text_encoder_lr),
            ),
        };
        Self {
            kind,
            trains,
            learning_rate,
            tokenizer: ClipTokenizer::new(config.text_cleaning).padded_with(kind.padding),
            reads,
            chunks: config.caption_chunks(),
            clip_skip: config.clip_skip,
            weighted: config.weighted_captions,
            network: None,
        }
    }

    /// Builds the network.
    pub(super) fn load(
        &mut self,
        checkpoint: &Checkpoint,
        precision: lora_core::DType,
        device: Device,
        held: Held,
    ) -> Result<()> {
        let component = checkpoint.component(self.kind.component)?;
        let mut config = ClipConfig::detect(component)?;
        if component.config().is_none() {
            config.exact_gelu = self.kind.exact_gelu;
        }
        if self.kind.pools {
            config = config.with_projection(component)?;
        }
        let most = match self.reads {
            Reads::Normed => config.layers,
            // 2 is what it means for these bases, whose states are always those before the last layer.
            Reads::Penultimate => 2,
        };
        if self.clip_skip > most {
            return Err(lora_models::Error::Input {
                what: "clip_skip",
                expected: format!("1 to {most}"),
                found: self.clip_skip.to_string(),
            }
            .into());
        }
        let weights = Weights::new(component, kind_of(precision), device).held(held);
        self.network = Some(ClipTextEncoder::new(&weights, config)?.of(self.kind.component));
        Ok(())
    }

    fn network(&self) -> Result<&ClipTextEncoder> {
        self.network.as_ref().ok_or(Error::NotLoaded { network: self.kind.title })
    }

    /// How the names of its layers begin that come after the states which the U-Net reads.
    pub(super) fn unread(&self) -> Vec<String> {
        let layers = self.network.as_ref().map_or(0, |network| network.config().layers);
        let read = match self.reads {
            Reads::Normed => (layers + 1).saturating_sub(self.clip_skip),
            Reads::Penultimate if self.kind.pools => layers,
            Reads::Penultimate => layers.saturating_sub(1),
        };
        (read..layers).map(|layer| format!("{}.text_model.encoder.layers.{layer}.", self.kind.component)).collect()
    }

    /// Number of tokens in a caption.
    pub(super) fn length(&self, caption: &str) -> usize {
        self.tokenizer.encode(caption).len()
    }

    /// What answers depend on beside the caption and the weights.
    pub(super) fn settings(&self) -> String {
        let Self { tokenizer, reads, chunks, clip_skip, weighted, .. } = self;
        match reads {
            Reads::Normed => format!("{chunks} {clip_skip} {weighted} {tokenizer:?}"),
            Reads::Penultimate => format!("{chunks} penultimate {weighted} {tokenizer:?}"),
        }
    }

    /// What the network makes of captions, with gradients unless there is a guard.
    pub(super) fn text(&self, captions: &[&str], device: Device, pass: &Pass) -> Result<Text> {
        self.encode(&self.tokens(captions, device)?, pass)
    }

    fn tokens(&self, captions: &[&str], device: Device) -> Result<Tokens> {
        let coded: Vec<_> = captions
            .iter()
            .map(|caption| match self.weighted {
                true => self.tokenizer.weighted_rows(caption, self.chunks),
                false => (self.tokenizer.rows(caption, self.chunks), Vec::new()),
            })
            .collect();
        let rows: Vec<i64> = coded.iter().flat_map(|(rows, _)| rows).flatten().map(|&token| i64::from(token)).collect();
        let end = |row: &[i64]| row.iter().position(|&token| token == i64::from(END)).unwrap_or(row.len() - 1);
        let length = rows.len() / captions.len();
        let ends: Vec<i64> =
            rows.chunks(length).enumerate().map(|(index, row)| (index * length + end(row)) as i64).collect();
        let weights: Vec<f32> = coded.into_iter().flat_map(|(_, weights)| weights).collect();
        let places = weights.len() / captions.len();
        let any = weights.iter().any(|&weight| weight != 1.0);
        Ok(Tokens {
            rows: upload(&Tensor::from_slice(&rows).f_view([-1, 77])?, device)?,
            weights: any.then(|| from_f32(&weights, &[captions.len(), places, 1], device)).transpose()?,
            ends: upload(&Tensor::from_slice(&ends), device)?,
        })
    }

    /// [`Self::text`] of tokens. Weighted states are multiplied place by place and then brought back to their mean, as
    /// sd-scripts and diffusers' long-prompt-weighting pipeline do; the pooled vector is that of the caption without weights.
    fn encode(&self, tokens: &Tokens, pass: &Pass) -> Result<Text> {
        let encoder = self.network()?;
        let (states, pooled) = match self.reads {
            Reads::Normed => (encoder.encode(&tokens.rows, self.chunks, self.clip_skip, pass)?, None),
            Reads::Penultimate => {
                let Penultimate { states, pooled } =
                    encoder.penultimate(&tokens.rows, &tokens.ends, self.chunks, pass)?;
                (states, pooled)
            }
        };
        let Some(weights) = &tokens.weights else { return Ok(Text { states, pooled }) };
        let weights = weights.f_to_kind(states.kind())?;
        let mean = |states: &Tensor| states.f_mean_dim(&[-2i64, -1][..], true, Kind::Float);
        let before = mean(&states)?;
        let weighed = states.f_mul(&weights)?;
        let factor = before.f_div(&mean(&weighed)?)?.f_to_kind(states.kind())?;
        Ok(Text { states: weighed.f_mul(&factor)?, pooled })
    }

    /// Adds the captions of a batch: as tokens where the encoder trains, else as what was kept of them, or what it makes of
    /// them now where captions change. `kept` has an entry for each caption, or `None`.
    pub(super) fn with_captions(
        &self,
        inputs: Inputs,
        captions: &[&str],
        kept: Option<Vec<&Tensors>>,
        device: Device,
    ) -> Result<Inputs> {
        let names = &self.kind.inputs;
        if self.trains {
            let Tokens { rows, weights, ends } = self.tokens(captions, device)?;
            let inputs = inputs.with(names.tokens, Some(rows)).with(names.weights, weights);
            return Ok(if self.kind.pools { inputs.with(names.ends, Some(ends)) } else { inputs });
        }
        let text = match kept {
            Some(kept) => self.kept(&kept, device)?,
            None => {
                let _guard = lora_torch::tch::no_grad_guard();
                self.text(captions, device, &Pass::default())?
            }
        };
        Ok(inputs.with(names.states, Some(text.states)).with(names.pooled, text.pooled))
    }

    /// What was kept of captions, on the device.
    pub(super) fn kept(&self, kept: &[&Tensors], device: Device) -> Result<Text> {
        let of = |name: &'static str| -> Result<Tensor> {
            let each = kept.iter().map(|kept| tensor(kept, self.kind.component, name)).collect::<Result<Vec<_>>>()?;
            Ok(upload(&Tensor::f_cat(&each, 0)?, device)?)
        };
        Ok(Text { states: of(STATES)?, pooled: self.kind.pools.then(|| of(POOLED)).transpose()? })
    }

    /// What is in a micro-batch of this encoder, or what it makes of its tokens.
    pub(super) fn of_inputs(&self, inputs: &Inputs, pass: &Pass) -> Result<Text> {
        let names = &self.kind.inputs;
        let optional = |name: &str| inputs.find(name).map(Tensor::shallow_clone);
        if let Some(states) = optional(names.states) {
            return Ok(Text { states, pooled: optional(names.pooled) });
        }
        let rows = inputs.get(names.tokens)?.shallow_clone();
        // Encoders whose pooled vector nobody reads have no use for their ends.
        let ends = optional(names.ends).unwrap_or_else(|| rows.shallow_clone());
        self.encode(&Tokens { rows, weights: optional(names.weights), ends }, pass)
    }
}

/// Names of what is kept of a caption.
const STATES: &str = "states";
const POOLED: &str = "pooled";

impl Text {
    /// By name, as it is kept.
    pub(super) fn into_tensors(self) -> Tensors {
        let states = [(STATES.to_owned(), self.states)];
        states.into_iter().chain(self.pooled.map(|pooled| (POOLED.to_owned(), pooled))).collect()
    }

    /// Its tensors.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.states).chain(&self.pooled)
    }

    /// What several encoders tell, side by side.
    pub(super) fn joined(texts: Vec<Text>) -> Result<Self> {
        let pooled: Vec<Tensor> =
            texts.iter().filter_map(|text| text.pooled.as_ref().map(Tensor::shallow_clone)).collect();
        let states = match texts.as_slice() {
            [one] => one.states.shallow_clone(),
            several => Tensor::f_cat(&several.iter().map(|text| &text.states).collect::<Vec<_>>(), -1)?,
        };
        Ok(Self { states, pooled: pooled.into_iter().next() })
    }

    /// The same for each of `count` items.
    pub(super) fn repeated(&self, count: i64) -> Result<Self> {
        let pooled = self.pooled.as_ref().map(|pooled| pooled.f_repeat([count, 1])).transpose()?;
        Ok(Self { states: self.states.f_repeat([count, 1, 1])?, pooled })
    }
}
