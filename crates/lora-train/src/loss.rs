//! The denoising loss of Stable Diffusion (Ho et al., 2020), with the min-SNR-γ weighting (Hang et al., 2023).

use lora_models::layers::Pass;
use lora_models::stable_diffusion::{NoiseSchedule, Unet};
use lora_torch::tch::{Kind, Tensor};
use lora_torch::tensor::from_f32;

use crate::Result;

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

/// Mean over the batch of each item's weighted mean squared error between the U-Net's answer and its target, in f32.
#[allow(clippy::too_many_arguments, reason = "the formula's own")]
pub fn denoising_loss(
    unet: &Unet,
    schedule: &NoiseSchedule,
    latents: &Tensor,
    noise: &Tensor,
    timesteps: &[usize],
    context: &Tensor,
    weights: &LossWeights<'_>,
    pass: &Pass,
) -> Result<Tensor> {
    let noised = schedule.add_noise(latents, noise, timesteps)?;
    let target = schedule.target(latents, noise, timesteps)?;
    let times: Vec<f64> = timesteps.iter().map(|&timestep| timestep as f64).collect();
    let answer = unet.forward(&noised, &times, context, pass)?;
    let squares = answer.f_sub(&target)?.f_square()?;
    let squares = match weights.mask {
        Some(mask) => squares.f_to_kind(Kind::Float)?.f_mul(mask)?,
        None => squares,
    };
    let each = squares.f_flatten(1, -1)?.f_mean_dim(-1, false, Kind::Float)?;
    let own = |index: usize, timestep: usize| {
        let snr = weights.min_snr_gamma.map_or(1.0, |gamma| schedule.min_snr_weight(timestep, gamma));
        (snr * weights.items.get(index).copied().unwrap_or(1.0)) as f32
    };
    let factors: Vec<f32> = timesteps.iter().enumerate().map(|(index, &timestep)| own(index, timestep)).collect();
    let each = match factors.iter().all(|&factor| factor == 1.0) {
        true => each,
        false => each.f_mul(&from_f32(&factors, &[factors.len()], latents.device())?)?,
    };
    Ok(each.f_mean(Kind::Float)?)
}
