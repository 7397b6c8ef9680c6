//! Samples: from noise through noise levels, with what makes them follow their prompts more closely, and through the
//! autoencoder.

use std::collections::BTreeMap;
use std::sync::Once;

use lora_core::Component;
use lora_core::random::Stream;
use lora_models::diffusion::SamplerKind;
use lora_models::diffusion::flow;
use lora_models::layers::Pass;
use lora_torch::tch::{Kind as Number, Tensor, no_grad_guard};
use lora_torch::tensor::from_f32;

use super::super::{Prompt, Sample, Tensors};
use super::FlowMatching;
use super::kind::Guidance;
use crate::config::SampleConfig;
use crate::{Error, Result};

impl FlowMatching {
    /// Samples of prompts, as [`Base::sample`](super::super::Base::sample).
    pub(super) fn samples(
        &self,
        prompts: &[Prompt],
        config: &SampleConfig,
        beside_recordings: bool,
    ) -> Result<Vec<Sample>> {
        let _guard = no_grad_guard();
        let vae = &self.vae;
        let multiple = vae.factor() * self.kind.patch;
        if !config.resolution.0.is_multiple_of(multiple) || !config.resolution.1.is_multiple_of(multiple) {
            return Err(Error::SampleSize { size: config.resolution, multiple });
        }
        let (width, height) = (config.resolution.0 / vae.factor(), config.resolution.1 / vae.factor());
        let tokens = self.tokens((height as i64, width as i64));
        let levels = (self.kind.sample_levels)(&self.checkpoint, config.steps, tokens)?;
        let guidance = config.guidance_scale.unwrap_or_else(|| self.guidance.strength());
        if config.sampler != SamplerKind::Euler {
            let known = SamplerKind::Euler.name().to_owned();
            return Err(Error::NoSampler { name: config.sampler.name().into(), known });
        }
        if !config.negative_prompt.is_empty() && !self.asks_negative(guidance) {
            static ONCE: Once = Once::new();
            ONCE.call_once(|| tracing::warn!("a negative prompt changes nothing here: {}", self.why_not_negative()));
        }
        // The autoencoder comes when all latents are there, which are small, so that it is never beside the transformer
        // at work.
        let mut all = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let mut draw = Stream::new(config.seed).at("sample").with(index as u64);
            let noise = draw.normals(vae.latent_channels * height * width);
            let noise = from_f32(&noise, &[1, vae.latent_channels, height, width], self.device)?;
            let way = (guidance, &Pass::default());
            all.push(self.denoised(&noise, [&prompt.with, &prompt.without], &levels, way)?);
        }
        let mut decoder = self.autoencoder()?;
        decoder.samples(&self.checkpoint, all, beside_recordings)
    }

    /// Whether the transformer is asked for a negative prompt too.
    fn asks_negative(&self, guidance: f64) -> bool {
        !matches!(self.guidance, Guidance::Told(_)) && guidance != 1.0
    }

    fn why_not_negative(&self) -> &'static str {
        match self.guidance {
            Guidance::Told(_) => "the base is told how strong its guidance is, and not asked twice",
            _ => "guidance of 1 is none",
        }
    }

    /// Latents from noise `[1, channels, height, width]` through noise levels, with encodings of a prompt and of a
    /// negative one.
    pub(super) fn denoised(
        &self,
        noise: &Tensor,
        [with, without]: [&BTreeMap<Component, Tensors>; 2],
        levels: &[f64],
        (guidance, pass): (f64, &Pass),
    ) -> Result<Tensor> {
        let transformer = self.transformer()?;
        let of = |kept| self.with_guidance(self.kept(kept, 1)?, 1, guidance);
        let (with, without) = (of(with)?, of(without)?);
        let asks_negative = self.asks_negative(guidance);
        flow::euler(noise, levels, |mixture, level| {
            let level = from_f32(&[level as f32], &[1], self.device)?;
            let with = transformer.velocity(mixture, &level, &with, pass)?;
            if !asks_negative {
                return Ok(with);
            }
            // One after the other: captions differ in length, and half as much is in memory.
            let without = transformer.velocity(mixture, &level, &without, pass)?;
            let guided = without.f_add(&with.f_sub(&without)?.f_mul_scalar(guidance)?)?;
            match self.guidance {
                Guidance::Rescaled(_) => rescaled(&guided, &with, self.kind.patch),
                _ => Ok(guided),
            }
        })
    }
}

/// Velocities `[batch, channels, height, width]` of which each token, a square of `patch` a side, is as long as
/// another's.
fn rescaled(velocity: &Tensor, like: &Tensor, patch: usize) -> Result<Tensor> {
    let patch = patch as i64;
    let length = |velocity: &Tensor| -> Result<Tensor> {
        let squares = velocity.f_square()?.f_sum_dim_intlist([1i64].as_slice(), true, Number::Float)?;
        // The mean instead of the sum: only the ratio counts.
        Ok(squares.f_avg_pool2d([patch, patch], [patch, patch], [0, 0], false, true, None::<i64>)?.f_sqrt()?)
    };
    let ratio = length(like)?.f_div(&length(velocity)?.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)?;
    let (_, _, height, width) = velocity.size4()?;
    Ok(velocity.f_mul(&ratio.f_upsample_nearest2d([height, width], None, None)?)?)
}
