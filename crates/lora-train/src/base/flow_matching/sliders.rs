//! The tensors of a micro-batch of concept sliders: latents on their way from noise. What a slider learns there is
//! [`Slider`]'s to say.

use lora_torch::dry;
use lora_torch::tch::{Tensor, no_grad_guard};

use super::super::slider::Slider;
use super::super::{Inputs, Item};
use super::FlowMatching;
use crate::Result;
use crate::difference::numbers;

impl FlowMatching {
    /// The tensors of a micro-batch of sliders: of each item latents that go from noise to its noise level.
    pub(super) fn slider_inputs(&self, slider: &Slider, items: &[Item]) -> Result<Inputs> {
        let _guard = no_grad_guard();
        let (factor, (width, height)) = (self.vae.factor(), slider.size(items)?);
        let shape = [items.len(), self.vae.latent_channels, height / factor, width / factor].map(|side| side as i64);
        let noise = self.noise.draw(items, &shape, self.device)?.added;
        let tokens = self.tokens((shape[2], shape[3]));
        let all = (self.kind.sample_levels)(&self.checkpoint, slider.steps(self.device), tokens)?;
        let (mut noised, mut levels) = (Vec::new(), Vec::new());
        for (index, item) in items.iter().enumerate() {
            // A dry run goes all the way.
            let drawn = || self.levels.draw(&item.draw.at("timestep"), tokens);
            let level = if dry::is_dry(self.device) { 0.0 } else { drawn() };
            let through: Vec<f64> = all.iter().copied().filter(|&own| own > level).chain([level]).collect();
            let (empty, noise) = (item.asked(""), noise.f_narrow(0, index as i64, 1)?);
            let way = (slider.guidance, &slider.way(item));
            noised.push(self.denoised(&noise, [&item.encoded, &empty.encoded], &through, way)?);
            levels.push(level);
        }
        let inputs = Inputs::default()
            .with("noised", Some(Tensor::f_cat(&noised, 0)?))
            .with("levels", Some(numbers(&levels, self.device)?));
        let inputs = self.with_captions(inputs, items)?;
        slider.beside(inputs, items, |asked| self.with_captions(Inputs::default(), asked))
    }
}
