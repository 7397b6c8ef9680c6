//! The denoising loss of Stable Diffusion (Ho et al., 2020), with the min-SNR-γ weighting (Hang et al., 2023).

use lora_models::layers::Pass;
use lora_models::stable_diffusion::{NoiseSchedule, Unet};
use lora_torch::tch::{Kind, Tensor};
use lora_torch::tensor::from_f32;

use crate::Result;

/// Mean over the batch of each item's weighted mean squared error between the U-Net's answer and its target, in f32.
#[allow(clippy::too_many_arguments, reason = "the formula's own")]
pub fn denoising_loss(
    unet: &Unet,
    schedule: &NoiseSchedule,
    latents: &Tensor,
    noise: &Tensor,
    timesteps: &[usize],
    context: &Tensor,
    min_snr_gamma: Option<f64>,
    pass: &Pass,
) -> Result<Tensor> {
    let noised = schedule.add_noise(latents, noise, timesteps)?;
    let target = schedule.target(latents, noise, timesteps)?;
    let times: Vec<f64> = timesteps.iter().map(|&timestep| timestep as f64).collect();
    let answer = unet.forward(&noised, &times, context, pass)?;
    let each = answer.f_sub(&target)?.f_square()?.f_flatten(1, -1)?.f_mean_dim(-1, false, Kind::Float)?;
    let each = match min_snr_gamma {
        Some(gamma) => {
            let weights: Vec<f32> = timesteps.iter().map(|&t| schedule.min_snr_weight(t, gamma) as f32).collect();
            each.f_mul(&from_f32(&weights, &[weights.len()], latents.device())?)?
        }
        None => each,
    };
    Ok(each.f_mean(Kind::Float)?)
}
