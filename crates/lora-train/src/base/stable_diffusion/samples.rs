//! Samples: from noise along a sampler's way, with guidance, and through the autoencoder.

use std::collections::BTreeMap;

use lora_core::Component;
use lora_core::random::Stream;
use lora_models::diffusion::Sampler;
use lora_models::layers::Pass;
use lora_models::networks::Conditions;
use lora_torch::tch::{Tensor, no_grad_guard};
use lora_torch::tensor::from_f32;

use super::super::{Prompt, Sample, Tensors};
use super::{GUIDANCE, StableDiffusion, added, whole};
use crate::Result;
use crate::config::SampleConfig;

impl StableDiffusion {
    /// Samples of prompts, as [`Base::sample`](super::super::Base::sample).
    pub(super) fn samples(
        &self,
        prompts: &[Prompt],
        config: &SampleConfig,
        beside_recordings: bool,
    ) -> Result<Vec<Sample>> {
        let _guard = no_grad_guard();
        let vae = self.vae_config()?;
        let (width, height) = (config.resolution.0 / vae.factor(), config.resolution.1 / vae.factor());
        let sampler = Sampler::new(config.sampler, &self.schedule, config.steps)?;
        let guidance = config.guidance_scale.unwrap_or(GUIDANCE);
        let sizes = self.sizes(&[whole([config.resolution.0, config.resolution.1])])?;
        // The autoencoder comes when all latents are there, which are small, so that it is never beside the U-Net at work.
        let mut all = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let draw = Stream::new(config.seed).at("sample").with(index as u64);
            let shape = [1, vae.latent_channels, height, width];
            let normals = |draw: &Stream| from_f32(&draw.clone().normals(shape.iter().product()), &shape, self.device);
            let noise = normals(&draw)?;
            let fresh = |step: usize| Ok(normals(&draw.at("step").with(step as u64))?);
            let way = (&sampler, guidance, &Pass::default());
            all.push(self.denoised(way, &noise, fresh, [&prompt.without, &prompt.with], sizes.as_ref())?);
        }
        // In f32, where fp16 is too little, whole pictures of such sizes take several times the U-Net's own memory.
        let mut decoder = self.autoencoder()?.in_tiles(self.config.vae_tiling || vae.overflows_in_half);
        decoder.samples(&self.checkpoint, all, beside_recordings)
    }

    /// Latents along a sampler's way from noise `[1, channels, height, width]`, with what was kept of a negative prompt and of a
    /// prompt, and the embedded sizes of the picture where the U-Net reads such. A guidance of 1 asks for no second answer.
    pub(super) fn denoised(
        &self,
        (sampler, guidance, pass): (&Sampler, f64, &Pass),
        noise: &Tensor,
        fresh: impl FnMut(usize) -> lora_models::Result<Tensor>,
        [without, with]: [&BTreeMap<Component, Tensors>; 2],
        sizes: Option<&Tensor>,
    ) -> Result<Tensor> {
        let unet = self.unet()?;
        let mut texts = vec![self.kept(with)?];
        if guidance != 1.0 {
            texts.insert(0, self.kept(without)?);
        }
        let added = texts.iter().map(|text| added(text, sizes)).collect::<Result<Vec<_>>>()?;
        let added: Vec<Tensor> = added.into_iter().flatten().collect();
        let added = (!added.is_empty()).then(|| Tensor::f_cat(&added, 0)).transpose()?;
        let context = Tensor::f_cat(&texts.iter().map(|text| &text.states).collect::<Vec<_>>(), 0)?;
        let conditions = Conditions { context: &context, added: added.as_ref() };
        Ok(sampler.sample(noise, fresh, |latents, timestep| {
            if texts.len() == 1 {
                return unet.forward(latents, &[timestep], conditions, pass);
            }
            let both = unet.forward(&Tensor::f_cat(&[latents, latents], 0)?, &[timestep; 2], conditions, pass)?;
            let halves = both.f_chunk(2, 0)?;
            sampler.guided(&halves[0], &halves[1], guidance)
        })?)
    }
}
