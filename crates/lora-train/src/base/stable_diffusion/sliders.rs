//! The tensors of a micro-batch of concept sliders: latents on their way from noise. What a slider learns there is
//! [`Slider`]'s to say.

use lora_models::diffusion::Sampler;
use lora_torch::dry;
use lora_torch::tch::{Tensor, no_grad_guard};

use super::super::slider::Slider;
use super::super::{Inputs, Item};
use super::{SIZES, StableDiffusion, whole};
use crate::Result;

impl StableDiffusion {
    /// The tensors of a micro-batch of sliders: of each item latents that are denoised from noise to its timestep.
    pub(super) fn slider_inputs(&self, slider: &Slider, items: &[Item]) -> Result<Inputs> {
        let _guard = no_grad_guard();
        let (vae, (width, height)) = (self.vae_config()?, slider.size(items)?);
        let shape = [items.len(), vae.latent_channels, height / vae.factor(), width / vae.factor()];
        let noise = self.noise.draw(items, &shape.map(|side| side as i64), self.device)?.added;
        let sizes = whole([width, height]);
        let embedded = self.sizes(&[sizes])?;
        let (mut noised, mut times) = (Vec::new(), Vec::new());
        for (index, item) in items.iter().enumerate() {
            // A dry run goes all the way.
            let timestep = if dry::is_dry(self.device) { 0 } else { self.timestep(&item.draw) };
            let sampler = Sampler::until(&self.schedule, slider.steps(self.device), timestep)?;
            let (empty, noise) = (item.asked(""), noise.f_narrow(0, index as i64, 1)?);
            let way = (&sampler, slider.guidance, &slider.way(item));
            let fresh = |_: usize| Ok(noise.f_zeros_like()?);
            noised.push(self.denoised(way, &noise, fresh, [&empty.encoded, &item.encoded], embedded.as_ref())?);
            times.push(timestep as f64);
        }
        self.with_prompts(slider, items, &noised, &times, self.sizes(&vec![sizes; items.len()])?)
    }

    /// What a U-Net is told of a micro-batch of sliders, with its latents at their timesteps.
    pub(super) fn with_prompts(
        &self,
        slider: &Slider,
        items: &[Item],
        noised: &[Tensor],
        times: &[f64],
        sizes: Option<Tensor>,
    ) -> Result<Inputs> {
        let inputs = Inputs::default()
            .with("noised", Some(Tensor::f_cat(noised, 0)?))
            .with("times", Some(self.unet()?.time_embedding(times, self.device)?))
            .with(SIZES, sizes);
        let inputs = self.with_captions(inputs, items)?;
        slider.beside(inputs, items, |asked| self.with_captions(Inputs::default(), asked))
    }
}
