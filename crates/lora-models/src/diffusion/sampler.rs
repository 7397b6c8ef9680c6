//! Samplers that turn noise into latents: DDIM (Song et al., 2021, η = 0) and Euler (Karras et al., 2022, algorithm 2
//! without churn), with the timesteps that diffusers' schedulers take for Stable Diffusion 1.x. Deterministic given the
//! starting noise.

use lora_torch::tch::Tensor;

use super::schedule::{NoiseSchedule, Prediction};
use crate::{Error, Result};

/// Which sampler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SamplerKind {
    /// DDIM without noise; "leading" timesteps with an offset of 1.
    Ddim,
    /// Euler; timesteps spaced evenly from 999 to 0.
    #[default]
    Euler,
}

/// A sampler set up for a number of steps.
#[derive(Debug, Clone)]
pub struct Sampler {
    kind: SamplerKind,
    prediction: Prediction,
    steps: Vec<Step>,
}

#[derive(Debug, Clone, Copy)]
struct Step {
    timestep: f64,
    /// DDIM: ᾱ here and after the step. Euler: σ here and after the step.
    now: f64,
    next: f64,
}

impl Sampler {
    /// `steps` from 1 to 1000.
    pub fn new(kind: SamplerKind, schedule: &NoiseSchedule, steps: usize) -> Result<Self> {
        let total = NoiseSchedule::TIMESTEPS;
        if steps == 0 || steps > total {
            return Err(Error::Input {
                what: "sampler",
                expected: format!("1 to {total} steps"),
                found: steps.to_string(),
            });
        }
        let built = match kind {
            SamplerKind::Ddim => {
                let stride = total / steps;
                let alpha = |t: isize| schedule.alpha_cumulative(t.clamp(0, total as isize - 1) as usize);
                (0..steps)
                    .rev()
                    .map(|index| {
                        let t = ((index * stride + 1).min(total - 1)) as isize;
                        Step { timestep: t as f64, now: alpha(t), next: alpha(t - stride as isize) }
                    })
                    .collect()
            }
            SamplerKind::Euler => {
                let last = (total - 1) as f64;
                let timestep = |index: usize| {
                    if steps == 1 { last } else { last * (steps - 1 - index) as f64 / (steps - 1) as f64 }
                };
                // A single step starts where the noise is.
                let sigma = |t: f64| {
                    let at = |t: usize| schedule.snr(t).recip().sqrt();
                    let low = t.floor() as usize;
                    let (a, b) = (at(low), at((low + 1).min(total - 1)));
                    a + (b - a) * t.fract()
                };
                (0..steps)
                    .map(|index| Step {
                        timestep: timestep(index),
                        now: sigma(timestep(index)),
                        next: if index + 1 < steps { sigma(timestep(index + 1)) } else { 0.0 },
                    })
                    .collect()
            }
        };
        Ok(Self { kind, prediction: schedule.prediction(), steps: built })
    }

    /// Denoises from standard normal noise `[batch, 4, height, width]`. `predict` is the (guided) U-Net: noised latents
    /// as it expects them, and the timestep.
    pub fn sample(&self, noise: &Tensor, mut predict: impl FnMut(&Tensor, f64) -> Result<Tensor>) -> Result<Tensor> {
        let mut latents = match self.kind {
            SamplerKind::Ddim => noise.shallow_clone(),
            SamplerKind::Euler => noise.f_mul_scalar(self.steps[0].now)?,
        };
        for &Step { timestep, now, next } in &self.steps {
            latents = match self.kind {
                SamplerKind::Ddim => {
                    let (signal, sigma) = (now.sqrt(), (1.0 - now).sqrt());
                    let answer = predict(&latents, timestep)?;
                    let (clean, epsilon) = match self.prediction {
                        Prediction::Epsilon => {
                            let clean = latents.f_sub(&answer.f_mul_scalar(sigma)?)?.f_div_scalar(signal)?;
                            (clean, answer)
                        }
                        Prediction::Velocity => (
                            latents.f_mul_scalar(signal)?.f_sub(&answer.f_mul_scalar(sigma)?)?,
                            answer.f_mul_scalar(signal)?.f_add(&latents.f_mul_scalar(sigma)?)?,
                        ),
                    };
                    clean.f_mul_scalar(next.sqrt())?.f_add(&epsilon.f_mul_scalar((1.0 - next).sqrt())?)?
                }
                SamplerKind::Euler => {
                    let power = now * now + 1.0;
                    let answer = predict(&latents.f_div_scalar(power.sqrt())?, timestep)?;
                    let slope = match self.prediction {
                        Prediction::Epsilon => answer,
                        Prediction::Velocity => {
                            let clean =
                                latents.f_div_scalar(power)?.f_sub(&answer.f_mul_scalar(now / power.sqrt())?)?;
                            latents.f_sub(&clean)?.f_div_scalar(now)?
                        }
                    };
                    latents.f_add(&slope.f_mul_scalar(next - now)?)?
                }
            };
        }
        Ok(latents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With the exact answer for one known picture, every sampler must arrive at that picture.
    #[test]
    fn the_true_prediction_leads_to_the_picture() {
        for prediction in [Prediction::Epsilon, Prediction::Velocity] {
            let schedule = NoiseSchedule::new(prediction);
            let picture = Tensor::from_slice(&[0.5f32, -1.0, 0.25, 2.0]).view([1, 1, 2, 2]);
            let noise = Tensor::from_slice(&[1.0f32, 0.3, -0.7, 0.1]).view([1, 1, 2, 2]);
            for kind in [SamplerKind::Ddim, SamplerKind::Euler] {
                let sampler = Sampler::new(kind, &schedule, 20).unwrap();
                let result = sampler.sample(&noise, |latents, t| {
                    // Interpolated ᾱ agrees with the samplers' own only at whole timesteps; Euler's are fractional.
                    let step = sampler.steps.iter().find(|step| step.timestep == t).unwrap();
                    let alpha = if kind == SamplerKind::Euler { 1.0 / (1.0 + step.now * step.now) } else { step.now };
                    let (signal, sigma) = (alpha.sqrt(), (1.0 - alpha).sqrt());
                    let epsilon = (latents - &picture * signal) / sigma;
                    Ok(match prediction {
                        Prediction::Epsilon => epsilon,
                        Prediction::Velocity => epsilon * signal - &picture * sigma,
                    })
                });
                let error = f64::try_from((result.unwrap() - &picture).abs().max()).unwrap();
                // DDIM ends at ᾱ_0 = 0.99915, a trace of noise away.
                assert!(error < 0.1, "{kind:?} {prediction:?}: {error}");
            }
        }
    }

    #[test]
    fn impossible_step_counts_are_refused() {
        let schedule = NoiseSchedule::new(Prediction::Epsilon);
        assert!(Sampler::new(SamplerKind::Ddim, &schedule, 0).is_err());
        assert!(Sampler::new(SamplerKind::Euler, &schedule, 1001).is_err());
        assert!(Sampler::new(SamplerKind::Ddim, &schedule, 1000).is_ok());
    }
}
