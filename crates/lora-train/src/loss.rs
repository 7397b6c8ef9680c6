//! The denoising loss of Stable Diffusion (Ho et al., 2020), with the weightings by timestep that people use: min-SNR-γ
//! (Hang et al., 2023), debiased estimation (Yu et al., 2023), and those by which sd-scripts makes losses of the
//! velocity and of the noise alike. The weights of one timestep are [`NoiseSchedule`]'s, what a difference counts is
//! [`crate::difference`]'s.

use lora_models::diffusion::{NoiseSchedule, Prediction};
use lora_models::layers::Pass;
use lora_models::networks::{Conditions, Unet};
use lora_torch::tch::Tensor;

use crate::Result;
use crate::config::TrainConfig;
use crate::difference::{Difference, LossType, Target};
use crate::inputs::Inputs;

/// How much parts of a batch count.
#[derive(Debug, Default)]
pub struct LossWeights<'w> {
    /// γ of the min-SNR weighting.
    pub min_snr_gamma: Option<f64>,
    /// A loss of the velocity is scaled as one of the noise is; one of the noise is left as it is.
    pub scale_like_noise: bool,
    /// How much of a loss scaled as one of the velocity is added to one of the noise; one of the velocity is left as it
    /// is.
    pub velocity_like: f64,
    /// The weighting of debiased estimation.
    pub debiased: bool,
    /// One number an item; none where all count in full.
    pub items: &'w [f64],
    /// `[batch, 1, height, width]`, from 0 to 1; the mean is taken over all elements, those that count for nothing
    /// included, as sd-scripts does.
    pub mask: Option<&'w Tensor>,
    /// What a difference between answer and target counts.
    pub difference: Difference,
}

impl LossWeights<'_> {
    /// Those by timestep that a configuration asks for.
    pub(crate) fn of(config: &TrainConfig) -> Self {
        let switch = |key| config.extra.switch(key).unwrap_or(false);
        Self {
            min_snr_gamma: config.min_snr_gamma,
            scale_like_noise: switch("scale_v_pred_loss_like_noise_pred"),
            velocity_like: config.extra.number("v_pred_like_loss").unwrap_or(0.0),
            debiased: switch("debiased_estimation_loss"),
            items: &[],
            mask: None,
            difference: Difference::of_diffusion(config),
        }
    }

    /// What an adapter's file says of them beside γ: sd-scripts' word, where it has one (`train_network.py` writes
    /// `ss_debiased_estimation`), or our own.
    pub(crate) fn record(&self) -> Vec<(&'static str, String)> {
        let said = [
            self.debiased.then(|| ("ss_debiased_estimation", "True".to_owned())),
            self.scale_like_noise.then(|| ("lora_scale_v_pred_loss_like_noise_pred", "True".to_owned())),
            (self.velocity_like != 0.0).then(|| ("lora_v_pred_like_loss", self.velocity_like.to_string())),
        ];
        said.into_iter().flatten().collect()
    }

    /// Whether they differ from timestep to timestep.
    fn by_timestep(&self) -> bool {
        self.min_snr_gamma.is_some() || self.scale_like_noise || self.velocity_like != 0.0 || self.debiased
    }

    /// The product of those that are asked for at a timestep.
    fn at(&self, schedule: &NoiseSchedule, timestep: usize) -> f64 {
        let min_snr = self.min_snr_gamma.map_or(1.0, |gamma| schedule.min_snr_weight(timestep, gamma));
        let scaled = match schedule.prediction() {
            Prediction::Velocity if self.scale_like_noise => schedule.noise_like_weight(timestep),
            Prediction::Epsilon if self.velocity_like != 0.0 => {
                1.0 + self.velocity_like / schedule.noise_like_weight(timestep)
            }
            _ => 1.0,
        };
        let debiased = if self.debiased { schedule.debiased_weight(timestep) } else { 1.0 };
        min_snr * scaled * debiased
    }
}

/// What the loss of a batch is made of, beside networks and text: all that has to come from host memory is there.
#[derive(Debug)]
pub struct Denoising {
    /// What the U-Net is shown, `[batch, 4, height, width]`.
    noised: Tensor,
    /// Its timesteps, embedded.
    times: Tensor,
    /// What it is to answer.
    target: Target,
}

impl Denoising {
    /// Of `latents` and noise, that of the target and that which is added, `[batch, 4, height, width]` each, at one
    /// timestep an item.
    ///
    /// # Errors
    /// Where a timestep is none of the schedule's or shapes differ, and where memory runs out.
    pub fn new(
        unet: &Unet,
        schedule: &NoiseSchedule,
        latents: &Tensor,
        [noise, added]: [&Tensor; 2],
        timesteps: &[usize],
        weights: &LossWeights<'_>,
    ) -> Result<Self> {
        let times: Vec<f64> = timesteps.iter().map(|&timestep| timestep as f64).collect();
        let noised = schedule.add_noise(latents, added, timesteps)?;
        let target = schedule.target(latents, noise, timesteps)?;
        let own = |(index, &timestep): (usize, &usize)| {
            weights.at(schedule, timestep) * weights.items.get(index).copied().unwrap_or(1.0)
        };
        let factors: Vec<f64> = timesteps.iter().enumerate().map(own).collect();
        let all_in_full = !weights.by_timestep() && weights.items.iter().all(|&weight| weight == 1.0);
        let threshold = |&timestep: &usize| {
            let time = timestep as f64 / NoiseSchedule::TIMESTEPS as f64;
            weights.difference.threshold(time, schedule.alpha_cumulative(timestep))
        };
        let thresholds = timesteps.iter().map(threshold).collect();
        Ok(Self {
            noised,
            times: unet.time_embedding(&times, latents.device())?,
            target: Target::new(
                weights.difference.loss,
                target,
                thresholds,
                weights.mask,
                (!all_in_full).then_some(&*factors),
            )?,
        })
    }

    /// Mean over the batch of each item's weighted mean loss of the U-Net's answer, a scalar in f32, with its graph
    /// where gradients are recorded.
    ///
    /// # Errors
    /// Where the text does not fit the U-Net or the mask the latents, and where memory runs out.
    pub fn loss<'t>(&self, unet: &Unet, conditions: impl Into<Conditions<'t>>, pass: &Pass) -> Result<Tensor> {
        self.of_answer(&self.answer(unet, conditions, pass)?)
    }

    /// The U-Net's answer, `[batch, 4, height, width]`.
    pub(crate) fn answer<'t>(&self, unet: &Unet, conditions: impl Into<Conditions<'t>>, pass: &Pass) -> Result<Tensor> {
        Ok(unet.forward_embedded(&self.noised, &self.times, conditions, pass)?)
    }

    /// The loss of an answer.
    pub(crate) fn of_answer(&self, answer: &Tensor) -> Result<Tensor> {
        self.target.mean_loss(answer)
    }

    /// Its tensors by name.
    pub fn into_inputs(self) -> Inputs {
        let own = Inputs::default().with("noised", Some(self.noised)).with("times", Some(self.times));
        own.and(self.target.into_inputs())
    }

    /// From tensors by name, with the loss that they were made for.
    ///
    /// # Errors
    /// Where one is missing.
    pub fn of(inputs: &Inputs, loss: LossType) -> Result<Self> {
        Ok(Self {
            noised: inputs.get("noised")?.shallow_clone(),
            times: inputs.get("times")?.shallow_clone(),
            target: Target::of(inputs, loss)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of sd-scripts' formulas, computed independently from the published betas.
    #[test]
    fn an_adapters_file_says_how_its_loss_was_weighted() {
        let weights =
            LossWeights { debiased: true, scale_like_noise: true, velocity_like: 0.5, ..LossWeights::default() };
        let expected = [
            ("ss_debiased_estimation", "True"),
            ("lora_scale_v_pred_loss_like_noise_pred", "True"),
            ("lora_v_pred_like_loss", "0.5"),
        ];
        assert_eq!(weights.record(), expected.map(|(key, value)| (key, value.to_owned())));
        assert!(LossWeights::default().record().is_empty());
    }

    #[test]
    fn weights_by_timestep_are_those_of_their_definitions() {
        let noise = NoiseSchedule::new(Prediction::Epsilon);
        let velocity = NoiseSchedule::new(Prediction::Velocity);
        let near = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
        let debiased = LossWeights { debiased: true, ..LossWeights::default() };
        near(debiased.at(&noise, 0), 0.031_622_8);
        near(debiased.at(&noise, 900), 8.346_60);
        near(debiased.at(&velocity, 0), 1.0 / 1001.0);
        let scaled = LossWeights { scale_like_noise: true, velocity_like: 0.5, ..LossWeights::default() };
        near(scaled.at(&velocity, 100), 0.894_223);
        near(scaled.at(&noise, 100), 1.0 + 0.5 / 0.894_223);
        let all = LossWeights { min_snr_gamma: Some(5.0), debiased: true, ..scaled };
        near(all.at(&noise, 100), 0.591_443 * 0.343_931 * (1.0 + 0.5 / 0.894_223));
        // Of noise alone nothing is learned, and nothing is divided by it.
        let zero = velocity.with_zero_terminal_snr().unwrap();
        assert_eq!(scaled.at(&zero, 999), 0.0);
    }
}
