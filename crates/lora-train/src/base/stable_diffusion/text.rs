//! Captions as CLIP's text encoders take them, and the states that those make of them, with words weighed. The tokenizer is
//! `lora_data`'s, the network `lora_models`'.

use lora_data::tokenizer::ClipTokenizer;
use lora_models::layers::Pass;
use lora_models::networks::ClipTextEncoder;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::{from_f32, upload};

use crate::Result;

/// How captions become text states.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TextEncoding {
    /// Splits them into tokens.
    pub(crate) tokenizer: ClipTokenizer,
    /// Rows of 75 tokens a caption.
    pub(crate) chunks: usize,
    /// 2 leaves out the last layer.
    pub(crate) clip_skip: usize,
    /// Whether `(word:1.2)` weighs words.
    pub(crate) weighted: bool,
}

impl TextEncoding {
    /// States of captions, `[captions, chunks · 75 + 2, width]`, with gradients unless there is a guard.
    pub(crate) fn states(
        &self,
        encoder: &ClipTextEncoder,
        captions: &[&str],
        device: Device,
        pass: &Pass,
    ) -> Result<Tensor> {
        self.encode(encoder, &self.tokens(captions, device)?, pass)
    }

    /// Captions as the encoder takes them, on the device.
    pub(crate) fn tokens(&self, captions: &[&str], device: Device) -> Result<Tokens> {
        let coded: Vec<_> = captions
            .iter()
            .map(|caption| match self.weighted {
                true => self.tokenizer.weighted_rows(caption, self.chunks),
                false => (self.tokenizer.rows(caption, self.chunks), Vec::new()),
            })
            .collect();
        let rows: Vec<i64> = coded.iter().flat_map(|(rows, _)| rows).flatten().map(|&token| i64::from(token)).collect();
        let weights: Vec<f32> = coded.into_iter().flat_map(|(_, weights)| weights).collect();
        let places = weights.len() / captions.len();
        let any = weights.iter().any(|&weight| weight != 1.0);
        Ok(Tokens {
            rows: upload(&Tensor::from_slice(&rows).f_view([-1, 77])?, device)?,
            weights: any.then(|| from_f32(&weights, &[captions.len(), places, 1], device)).transpose()?,
        })
    }

    /// [`TextEncoding::states`] of tokens. Weighted states are multiplied place by place and then brought back to their mean, as
    /// sd-scripts and diffusers' long-prompt-weighting pipeline do.
    pub(crate) fn encode(&self, encoder: &ClipTextEncoder, tokens: &Tokens, pass: &Pass) -> Result<Tensor> {
        let states = encoder.encode(&tokens.rows, self.chunks, self.clip_skip, pass)?;
        let Some(weights) = &tokens.weights else { return Ok(states) };
        let weights = weights.f_to_kind(states.kind())?;
        let mean = |states: &Tensor| states.f_mean_dim(&[-2i64, -1][..], true, Kind::Float);
        let before = mean(&states)?;
        let weighed = states.f_mul(&weights)?;
        let factor = before.f_div(&mean(&weighed)?)?.f_to_kind(states.kind())?;
        Ok(weighed.f_mul(&factor)?)
    }
}

/// Captions as a text encoder takes them.
#[derive(Debug)]
pub(crate) struct Tokens {
    /// `[captions · chunks, 77]`.
    pub(crate) rows: Tensor,
    /// `[captions, states, 1]` f32, where any word is weighted.
    pub(crate) weights: Option<Tensor>,
}
