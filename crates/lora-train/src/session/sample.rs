//! Drawing pictures with what is trained as it is.

use lora_core::Component;
use lora_core::random::Stream;
use lora_data::RgbPicture;
use lora_models::diffusion::Sampler;
use lora_models::layers::Pass;
use lora_models::networks::{VaeConfig, load_text_encoder};
use lora_models::weights::{Frozen, Held};
use lora_torch::tch::{Tensor, no_grad_guard};
use lora_torch::tensor::{from_f32, kind_of};

use super::Session;
use crate::Result;
use crate::encode::Encoder;

impl Session {
    /// Draws pictures with what is trained as it is now; with its running average, where there is one.
    pub fn sample(&mut self, prompts: &[String]) -> Result<Vec<RgbPicture>> {
        let _scope = self.scope()?;
        self.with_averages(|session| session.beside_recordings(|session| session.draw(prompts)))
    }

    fn draw(&mut self, prompts: &[String]) -> Result<Vec<RgbPicture>> {
        let _guard = no_grad_guard();
        let samples = self.config.samples.clone();
        let vae = VaeConfig::detect(self.checkpoint.component(Component::VAE)?)?;
        let (width, height) = (samples.resolution.0 / vae.factor(), samples.resolution.1 / vae.factor());
        let sampler = Sampler::new(samples.sampler, &self.schedule, samples.steps)?;
        let pass = Pass::default();
        // The autoencoder comes when all latents are there, which are small, so that it is never beside the U-Net at work.
        let mut all = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let noise =
                Stream::new(samples.seed).at("sample").with(index as u64).normals(vae.latent_channels * height * width);
            let noise = from_f32(&noise, &[1, vae.latent_channels, height, width], self.device)?;
            let context = Tensor::f_cat(&[self.states_of(&samples.negative_prompt)?, self.states_of(prompt)?], 0)?;
            all.push(sampler.sample(&noise, |latents, timestep| {
                let both =
                    self.unet.forward(&Tensor::f_cat(&[latents, latents], 0)?, &[timestep; 2], &context, &pass)?;
                let halves = both.f_chunk(2, 0)?;
                sampler.guided(&halves[0], &halves[1], samples.guidance_scale)
            })?);
        }
        let decoder = Encoder::load(&self.checkpoint, self.precision, self.device)?;
        let mut decoder = decoder.in_tiles(self.config.vae_tiling);
        let mut pictures = Vec::new();
        for latents in all {
            pictures.extend(match self.recorded_shapes() {
                0 => decoder.decode(&self.checkpoint, &latents)?,
                // Recordings make room before the autoencoder leaves the device.
                _ => decoder.decode_here(&self.checkpoint, &latents)?,
            });
        }
        Ok(pictures)
    }

    pub(super) fn states_of(&self, caption: &str) -> Result<Tensor> {
        if let Some(states) = self.text_states.get(caption) {
            return Ok(states.f_to_device(self.device)?);
        }
        let pass = Pass::default();
        match &self.text_encoder {
            Some(encoder) => self.text.states(encoder, &[caption], self.device, &pass),
            // A frozen text encoder has left the device: it comes back for a caption that was not foreseen.
            None => {
                let encoder = load_text_encoder(
                    &self.checkpoint,
                    kind_of(self.precision),
                    self.device,
                    Held::Frozen(Frozen::stored(self.config.base_storage)),
                )?;
                self.text.states(&encoder, &[caption], self.device, &pass)
            }
        }
    }
}
