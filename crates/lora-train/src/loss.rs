//! The denoising loss of Stable Diffusion (Ho et al., 2020), with the min-SNR-γ weighting (Hang et al., 2023).

use lora_models::diffusion::NoiseSchedule;
use lora_models::layers::Pass;
use lora_models::networks::Unet;
use lora_torch::tch::{Kind, Tensor};
use lora_torch::tensor::from_f32;

use crate::Result;
use crate::inputs::Inputs;

/// How much parts of a batch count.
#[derive(Debug, Default)]
pub struct LossWeights<'w> {
    /// γ of the min-SNR weighting.
    pub min_snr_gamma: Option<f64>,
    /// One number an item; none where all count in full.
    pub items: &'w [f64],
    /// `[batch, 1, height, width]`, from 0 to 1; the mean is taken over all elements, those that count for nothing included,
    /// as sd-scripts does.
    pub mask: Option<&'w Tensor>,
}

/// What the loss of a batch is made of, beside networks and text: all that has to come from host memory is there.
#[derive(Debug)]
pub struct Denoising {
    /// What the U-Net is shown, `[batch, 4, height, width]`.
    noised: Tensor,
    /// What it is to answer.
    target: Tensor,
    /// Its timesteps, embedded.
    times: Tensor,
    /// How much each place counts, `[batch, 1, height, width]`.
    mask: Option<Tensor>,
    /// How much each item counts, `[batch]`; none where all count in full.
    factors: Option<Tensor>,
}

impl Denoising {
    /// Of `latents` and `noise`, `[batch, 4, height, width]`, at one timestep an item.
    ///
    /// # Errors
    /// Where a timestep is none of the schedule's or shapes differ, and where memory runs out.
    pub fn new(
        unet: &Unet,
        schedule: &NoiseSchedule,
        latents: &Tensor,
        noise: &Tensor,
        timesteps: &[usize],
        weights: &LossWeights<'_>,
    ) -> Result<Self> {
        let device = latents.device();
        let own = |index: usize, timestep: usize| {
            let snr = weights.min_snr_gamma.map_or(1.0, |gamma| schedule.min_snr_weight(timestep, gamma));
            (snr * weights.items.get(index).copied().unwrap_or(1.0)) as f32
        };
        let factors: Vec<f32> = timesteps.iter().enumerate().map(|(index, &timestep)| own(index, timestep)).collect();
        let all_in_full = weights.min_snr_gamma.is_none() && weights.items.iter().all(|&weight| weight == 1.0);
        let times: Vec<f64> = timesteps.iter().map(|&timestep| timestep as f64).collect();
        Ok(Self {
            noised: schedule.add_noise(latents, noise, timesteps)?,
            target: schedule.target(latents, noise, timesteps)?,
            times: unet.time_embedding(&times, device)?,
            mask: weights.mask.map(Tensor::shallow_clone),
            factors: (!all_in_full).then(|| from_f32(&factors, &[factors.len()], device)).transpose()?,
        })
    }

    /// Mean over the batch of each item's weighted mean squared error between the U-Net's answer and its target, a scalar in f32,
    /// with its graph where gradients are recorded. `context` is the text, `[batch, tokens, width]`.
    ///
    /// # Errors
    /// Where the text does not fit the U-Net or the mask the latents, and where memory runs out.
    pub fn loss(&self, unet: &Unet, context: &Tensor, pass: &Pass) -> Result<Tensor> {
        let answer = unet.forward_embedded(&self.noised, &self.times, context, pass)?;
        let squares = answer.f_sub(&self.target)?.f_square()?;
        let squares = match &self.mask {
            Some(mask) => squares.f_to_kind(Kind::Float)?.f_mul(mask)?,
            None => squares,
        };
        let each = squares.f_flatten(1, -1)?.f_mean_dim(-1, false, Kind::Float)?;
        let each = match &self.factors {
            Some(factors) => each.f_mul(factors)?,
            None => each,
        };
        Ok(each.f_mean(Kind::Float)?)
    }

    /// Its tensors by name.
    pub fn into_inputs(self) -> Inputs {
        Inputs::default()
            .with("noised", Some(self.noised))
            .with("target", Some(self.target))
            .with("times", Some(self.times))
            .with("mask", self.mask)
            .with("factors", self.factors)
    }

    /// From tensors by name.
    ///
    /// # Errors
    /// Where one is missing.
    pub fn of(inputs: &Inputs) -> Result<Self> {
        let optional = |name: &str| inputs.find(name).map(Tensor::shallow_clone);
        Ok(Self {
            noised: inputs.get("noised")?.shallow_clone(),
            target: inputs.get("target")?.shallow_clone(),
            times: inputs.get("times")?.shallow_clone(),
            mask: optional("mask"),
            factors: optional("factors"),
        })
    }
}
