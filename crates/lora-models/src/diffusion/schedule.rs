//! The noise schedule that Stable Diffusion's networks share: DDPM (Ho et al., 2020) with scaled-linear betas over 1000
//! timesteps, as published or with zero terminal SNR (Lin et al., 2023). With it, what a network is to predict and the
//! loss weights that depend on the noise. How a schedule is walked down is the samplers' business.

use lora_io::checkpoint::Checkpoint;
use lora_torch::tch::{Kind, Tensor};

use crate::{Error, Result};

/// What a network is trained to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Prediction {
    /// The noise ε.
    #[default]
    Epsilon,
    /// The velocity √ᾱ·ε − √(1−ᾱ)·x₀ (Salimans & Ho, 2022).
    Velocity,
}

/// The largest SNR that weights count with: that of the first timesteps grows without bound as betas shrink.
const MOST_SNR: f64 = 1000.0;

/// Cumulative signal levels ᾱ_t.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseSchedule {
    alphas_cumulative: Vec<f64>,
    prediction: Prediction,
}

impl NoiseSchedule {
    /// Timesteps of the schedule.
    pub const TIMESTEPS: usize = 1000;

    /// Betas `(√0.00085 … √0.012)²`, spaced linearly before squaring.
    pub fn new(prediction: Prediction) -> Self {
        let (first, last) = (0.00085f64.sqrt(), 0.012f64.sqrt());
        let beta = |t: usize| (first + (last - first) * t as f64 / (Self::TIMESTEPS - 1) as f64).powi(2);
        let alphas_cumulative = (0..Self::TIMESTEPS)
            .scan(1.0, |product, t| {
                *product *= 1.0 - beta(t);
                Some(*product)
            })
            .collect();
        Self { alphas_cumulative, prediction }
    }

    /// The same with noise alone at the last timestep: √ᾱ is shifted to end at zero and stretched to begin where it
    /// began (Lin et al., 2023, algorithm 1).
    ///
    /// # Errors
    /// Where the noise is predicted: of noise alone such a prediction says nothing about the picture.
    pub fn with_zero_terminal_snr(self) -> Result<Self> {
        if self.prediction == Prediction::Epsilon {
            return Err(Error::Input {
                what: "noise schedule with zero terminal SNR",
                expected: "a network that predicts velocity".into(),
                found: "one that predicts the noise".into(),
            });
        }
        let (first, last) = (self.alphas_cumulative[0].sqrt(), self.alphas_cumulative[Self::TIMESTEPS - 1].sqrt());
        let rescaled = |alpha: f64| ((alpha.sqrt() - last) * first / (first - last)).powi(2);
        Ok(Self { alphas_cumulative: self.alphas_cumulative.into_iter().map(rescaled).collect(), ..self })
    }

    /// Whether the last timestep is noise alone.
    pub fn has_zero_terminal_snr(&self) -> bool {
        self.alphas_cumulative[Self::TIMESTEPS - 1] == 0.0
    }

    /// ᾱ_t.
    ///
    /// # Panics
    /// Where `t` is not below [`Self::TIMESTEPS`].
    pub fn alpha_cumulative(&self, t: usize) -> f64 {
        self.alphas_cumulative[t]
    }

    /// What the network predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// Signal-to-noise ratio ᾱ/(1−ᾱ).
    ///
    /// # Panics
    /// As of [`NoiseSchedule::alpha_cumulative`].
    pub fn snr(&self, t: usize) -> f64 {
        let alpha = self.alphas_cumulative[t];
        alpha / (1.0 - alpha)
    }

    /// The min-SNR-γ loss weight (Hang et al., 2023): min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR+1) for velocity.
    ///
    /// # Panics
    /// As of [`NoiseSchedule::alpha_cumulative`].
    pub fn min_snr_weight(&self, t: usize, gamma: f64) -> f64 {
        let snr = self.snr(t);
        match self.prediction {
            Prediction::Epsilon => snr.min(gamma) / snr,
            Prediction::Velocity => snr.min(gamma) / (snr + 1.0),
        }
    }

    /// What brings a loss of the velocity to the scale of one of the noise: SNR/(SNR+1), the SNR at most 1000 (sd-scripts'
    /// `scale_v_pred_loss_like_noise_pred`).
    pub fn noise_like_weight(&self, t: usize) -> f64 {
        let snr = self.snr(t).min(MOST_SNR);
        snr / (snr + 1.0)
    }

    /// The loss weight of debiased estimation (Yu et al., 2023): 1/√SNR for ε; for velocity 1/(SNR+1), as sd-scripts has it. The
    /// SNR counts as 1000 at most.
    pub fn debiased_weight(&self, t: usize) -> f64 {
        let snr = self.snr(t).min(MOST_SNR);
        match self.prediction {
            Prediction::Epsilon => snr.sqrt().recip(),
            Prediction::Velocity => (snr + 1.0).recip(),
        }
    }

    /// Noised latents √ᾱ·x₀ + √(1−ᾱ)·ε, one timestep per item; f32 `[batch, 4, height, width]`.
    ///
    /// # Errors
    /// [`Error::Input`] for a timestep that is not below [`Self::TIMESTEPS`]; [`Error::Torch`] where
    /// shapes differ; out of memory.
    pub fn add_noise(&self, latents: &Tensor, noise: &Tensor, timesteps: &[usize]) -> Result<Tensor> {
        let (signal, sigma) = self.factors(timesteps, latents)?;
        Ok(latents.f_mul(&signal)?.f_add(&noise.f_mul(&sigma)?)?)
    }

    /// What the network should answer, f32 `[batch, 4, height, width]`.
    ///
    /// # Errors
    /// As of [`NoiseSchedule::add_noise`].
    pub fn target(&self, latents: &Tensor, noise: &Tensor, timesteps: &[usize]) -> Result<Tensor> {
        match self.prediction {
            Prediction::Epsilon => Ok(noise.shallow_clone()),
            Prediction::Velocity => {
                let (signal, sigma) = self.factors(timesteps, latents)?;
                Ok(noise.f_mul(&signal)?.f_sub(&latents.f_mul(&sigma)?)?)
            }
        }
    }

    /// √ᾱ and √(1−ᾱ) as `[batch, 1, 1, 1]`.
    fn factors(&self, timesteps: &[usize], like: &Tensor) -> Result<(Tensor, Tensor)> {
        let column = |factor: fn(f64) -> f64| -> Result<Tensor> {
            let alpha = |&t: &usize| self.alphas_cumulative.get(t).map(|&alpha| factor(alpha) as f32).ok_or(t);
            let values = timesteps.iter().map(alpha).collect::<std::result::Result<Vec<f32>, usize>>();
            let values = values.map_err(|timestep| Error::Input {
                what: "noise schedule",
                expected: format!("timesteps below {}", Self::TIMESTEPS),
                found: timestep.to_string(),
            })?;
            let values = lora_torch::tensor::from_f32(&values, &[timesteps.len(), 1, 1, 1], like.device())?;
            Ok(values.f_to_kind(Kind::Float)?)
        };
        Ok((column(f64::sqrt)?, column(|alpha| (1.0 - alpha).sqrt())?))
    }
}

/// The noise schedule that the scheduler of a diffusers folder names; without one, as published, for ε.
///
/// # Errors
/// Where the scheduler asks for other betas, for another prediction than ε or velocity, or for ε with zero terminal
/// SNR.
pub fn noise_schedule(checkpoint: &Checkpoint) -> Result<NoiseSchedule> {
    let wrong = |reason: String| Error::Architecture { source_name: checkpoint.path().display().to_string(), reason };
    let Some(config) = checkpoint.scheduler() else { return Ok(NoiseSchedule::new(Prediction::Epsilon)) };
    for (key, expected) in [("num_train_timesteps", 1000.0), ("beta_start", 0.00085), ("beta_end", 0.012)] {
        if let Some(found) = config[key].as_f64()
            && (found - expected).abs() > 1e-9
        {
            return Err(wrong(format!("scheduler: {key} is {found}; expected {expected}")));
        }
    }
    if let Some(other) = config["beta_schedule"].as_str().filter(|&name| name != "scaled_linear") {
        return Err(wrong(format!("scheduler: beta_schedule is `{other}`; expected scaled_linear")));
    }
    let schedule = NoiseSchedule::new(match config["prediction_type"].as_str() {
        None | Some("epsilon") => Prediction::Epsilon,
        Some("v_prediction") => Prediction::Velocity,
        Some(other) => {
            return Err(wrong(format!("scheduler: prediction_type `{other}`; expected epsilon or v_prediction")));
        }
    });
    match config["rescale_betas_zero_snr"].as_bool() {
        Some(true) => schedule.with_zero_terminal_snr(),
        _ => Ok(schedule),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reference_values() {
        // Computed independently from the published betas.
        let schedule = NoiseSchedule::new(Prediction::Epsilon);
        for (t, alpha, snr, weight) in [
            (0, 0.999_150_00, 1175.47, 0.004_253_62),
            (100, 0.894_223_48, 8.453_89, 0.591_443),
            (500, 0.276_332_68, 0.381_850, 1.0),
            (999, 0.004_660_10, 0.004_681_92, 1.0),
        ] {
            assert!((schedule.alpha_cumulative(t) / alpha - 1.0).abs() < 1e-5, "{t}");
            assert!((schedule.snr(t) / snr - 1.0).abs() < 1e-5, "{t}");
            assert!((schedule.min_snr_weight(t, 5.0) / weight - 1.0).abs() < 1e-5, "{t}");
        }
        let velocity = NoiseSchedule::new(Prediction::Velocity);
        assert!((velocity.min_snr_weight(100, 5.0) / 0.528_883 - 1.0).abs() < 1e-5);
    }

    #[test]
    fn zero_terminal_snr_is_for_velocity_alone_and_weighs_the_last_timestep_with_nothing() {
        assert!(NoiseSchedule::new(Prediction::Epsilon).with_zero_terminal_snr().is_err());
        let published = NoiseSchedule::new(Prediction::Velocity);
        let zero = published.clone().with_zero_terminal_snr().unwrap();
        assert!(zero.has_zero_terminal_snr() && !published.has_zero_terminal_snr());
        assert_eq!((zero.snr(999), zero.min_snr_weight(999, 5.0)), (0.0, 0.0));
        assert!((zero.alpha_cumulative(0) - published.alpha_cumulative(0)).abs() < 1e-12);
    }
}
