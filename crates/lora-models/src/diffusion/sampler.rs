//! Samplers that turn noise into latents, with the timesteps that diffusers' schedulers take, and guidance: DDIM (Song et
//! al., 2021, η = 0), Euler and its ancestral form (Karras et al., 2022, algorithm 2 without churn; k-diffusion), DPM-Solver++
//! of second order (Lu et al., 2022, multistep with midpoints). The same noise gives the same latents.

use lora_torch::tch::Tensor;

use super::schedule::{NoiseSchedule, Prediction};
use crate::{Error, Result};

/// Which sampler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SamplerKind {
    /// DDIM without noise; "leading" timesteps with an offset of 1, "trailing" ones with zero terminal SNR.
    Ddim,
    /// Euler; timesteps spaced evenly from 999 to 0, "trailing" ones with zero terminal SNR.
    #[default]
    Euler,
    /// Euler that goes further down than asked at each step and draws new noise for the difference; timesteps as of Euler.
    EulerAncestral,
    /// DPM-Solver++ (2M); timesteps spaced evenly from 999 on, 0 left out, "trailing" ones with zero terminal SNR.
    DpmSolver2M,
}

impl SamplerKind {
    /// All samplers.
    pub const ALL: [SamplerKind; 4] = [Self::Euler, Self::EulerAncestral, Self::Ddim, Self::DpmSolver2M];

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler_a",
            Self::DpmSolver2M => "dpmpp_2m",
        }
    }
}

/// A sampler set up for a number of steps.
#[derive(Debug, Clone)]
pub struct Sampler {
    kind: SamplerKind,
    prediction: Prediction,
    /// How much of the guided answer is brought to the spread of the answer to the prompt.
    rescale: f64,
    steps: Vec<Step>,
}

#[derive(Debug, Clone, Copy)]
struct Step {
    timestep: f64,
    /// DDIM: ᾱ here and after the step. Others: σ here and after the step.
    now: f64,
    next: f64,
}

impl Sampler {
    /// `steps` from 1 to 1000.
    ///
    /// # Errors
    /// [`Error::Input`] for another number.
    pub fn new(kind: SamplerKind, schedule: &NoiseSchedule, steps: usize) -> Result<Self> {
        let total = NoiseSchedule::TIMESTEPS;
        if steps == 0 || steps > total {
            return Err(Error::Input {
                what: "sampler",
                expected: format!("1 to {total} steps"),
                found: steps.to_string(),
            });
        }
        let timesteps = timesteps(kind, schedule, steps);
        let next = |index: usize| timesteps.get(index + 1).copied();
        let step = |(index, &timestep): (usize, &f64)| match kind {
            SamplerKind::Ddim => {
                let alpha = |t: f64| schedule.alpha_cumulative(t as usize);
                Step { timestep, now: alpha(timestep), next: alpha(next(index).unwrap_or(0.0)) }
            }
            _ => Step {
                timestep,
                now: sigma(schedule, timestep),
                next: next(index).map_or(0.0, |next| sigma(schedule, next)),
            },
        };
        Ok(Self {
            kind,
            prediction: schedule.prediction(),
            rescale: if schedule.has_zero_terminal_snr() { RESCALE } else { 0.0 },
            steps: timesteps.iter().enumerate().map(step).collect(),
        })
    }

    /// DDIM's way from noise to what is as noisy as a timestep, which its last step arrives at: of `steps` for the whole way
    /// those before it; none where it is noisier than the first. What it gives is then as the network expects it there.
    ///
    /// # Errors
    /// As [`Sampler::new`].
    pub fn until(schedule: &NoiseSchedule, steps: usize, timestep: usize) -> Result<Self> {
        let mut sampler = Self::new(SamplerKind::Ddim, schedule, steps)?;
        sampler.steps.retain(|step| step.timestep > timestep as f64);
        if let Some(last) = sampler.steps.last_mut() {
            last.next = schedule.alpha_cumulative(timestep);
        }
        Ok(sampler)
    }

    /// The network's answer with guidance (Ho & Salimans, 2022), `without + scale · (with − without)`, of its answers
    /// without and with the prompt, `[batch, 4, height, width]`. With zero terminal SNR, seven tenths of it have the
    /// standard deviation of `with`.
    ///
    /// # Errors
    /// [`Error::Torch`] where the answers differ in shape; out of memory.
    pub fn guided(&self, without: &Tensor, with: &Tensor, scale: f64) -> Result<Tensor> {
        let guided = without.f_add(&with.f_sub(without)?.f_mul_scalar(scale)?)?;
        if self.rescale == 0.0 {
            return Ok(guided);
        }
        let spread = |answer: &Tensor| answer.f_std_dim([1i64, 2, 3].as_slice(), true, true);
        let factor = spread(with)?.f_div(&spread(&guided)?)?;
        Ok(guided.f_mul(&factor.f_mul_scalar(self.rescale)?.f_add_scalar(1.0 - self.rescale)?)?)
    }

    /// Denoises from standard normal noise `[batch, 4, height, width]`. `predict` is the (guided) U-Net: noised latents
    /// as it expects them, and the timestep. `fresh` is standard normal noise of the same shape for a step, which only
    /// [`SamplerKind::EulerAncestral`] asks for.
    ///
    /// # Errors
    /// What `predict` and `fresh` give; out of memory.
    pub fn sample(
        &self,
        noise: &Tensor,
        mut fresh: impl FnMut(usize) -> Result<Tensor>,
        mut predict: impl FnMut(&Tensor, f64) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut latents = match self.kind {
            SamplerKind::Ddim | SamplerKind::DpmSolver2M => noise.shallow_clone(),
            SamplerKind::Euler | SamplerKind::EulerAncestral => noise.f_mul_scalar(self.steps[0].now)?,
        };
        let mut earlier = None;
        for (index, step) in self.steps.iter().enumerate() {
            latents = match self.kind {
                SamplerKind::Ddim => self.ddim(step, &latents, predict(&latents, step.timestep)?)?,
                SamplerKind::Euler | SamplerKind::EulerAncestral => {
                    let power = step.now * step.now + 1.0;
                    let answer = predict(&latents.f_div_scalar(power.sqrt())?, step.timestep)?;
                    let slope = self.slope(step.now, &latents, answer)?;
                    let (down, up) = if self.kind == SamplerKind::Euler { (step.next, 0.0) } else { step.ancestral() };
                    let moved = latents.f_add(&slope.f_mul_scalar(down - step.now)?)?;
                    if up > 0.0 { moved.f_add(&fresh(index)?.f_mul_scalar(up)?)? } else { moved }
                }
                SamplerKind::DpmSolver2M => {
                    let answer = predict(&latents, step.timestep)?;
                    let clean = self.clean(&latents, &answer, Mix::of_sigma(step.now))?;
                    let moved = step.dpm_solver(&latents, &clean, earlier.as_ref())?;
                    earlier = Some((clean, step.now));
                    moved
                }
            };
        }
        Ok(latents)
    }

    /// The picture that an answer of the network means, of latents that are `mix` of picture and noise.
    fn clean(&self, latents: &Tensor, answer: &Tensor, mix: Mix) -> Result<Tensor> {
        let Mix { signal, noise } = mix;
        Ok(match self.prediction {
            Prediction::Epsilon => latents.f_sub(&answer.f_mul_scalar(noise)?)?.f_div_scalar(signal)?,
            Prediction::Velocity => latents.f_mul_scalar(signal)?.f_sub(&answer.f_mul_scalar(noise)?)?,
        })
    }

    fn ddim(&self, step: &Step, latents: &Tensor, answer: Tensor) -> Result<Tensor> {
        let mix = Mix { signal: step.now.sqrt(), noise: (1.0 - step.now).sqrt() };
        let clean = self.clean(latents, &answer, mix)?;
        let epsilon = match self.prediction {
            Prediction::Epsilon => answer,
            Prediction::Velocity => answer.f_mul_scalar(mix.signal)?.f_add(&latents.f_mul_scalar(mix.noise)?)?,
        };
        Ok(clean.f_mul_scalar(step.next.sqrt())?.f_add(&epsilon.f_mul_scalar((1.0 - step.next).sqrt())?)?)
    }

    /// The change of latents (picture + σ · noise) with σ.
    fn slope(&self, sigma: f64, latents: &Tensor, answer: Tensor) -> Result<Tensor> {
        let power = sigma * sigma + 1.0;
        Ok(match self.prediction {
            Prediction::Epsilon => answer,
            Prediction::Velocity => {
                let clean = latents.f_div_scalar(power)?.f_sub(&answer.f_mul_scalar(sigma / power.sqrt())?)?;
                latents.f_sub(&clean)?.f_div_scalar(sigma)?
            }
        })
    }
}

/// How much of the picture and of the noise is in latents whose variance stays 1.
#[derive(Debug, Clone, Copy)]
struct Mix {
    signal: f64,
    noise: f64,
}

impl Mix {
    /// At a ratio σ of noise to picture.
    fn of_sigma(sigma: f64) -> Self {
        let signal = 1.0 / (sigma * sigma + 1.0).sqrt();
        Self { signal, noise: sigma * signal }
    }
}

impl Step {
    /// The σ that the ancestral form goes down to, and the noise that it adds then.
    fn ancestral(&self) -> (f64, f64) {
        let (from, to) = (self.now * self.now, self.next * self.next);
        let up = to * (from - to) / from;
        ((to - up).sqrt(), up.sqrt())
    }

    /// The step of DPM-Solver++ from the picture that the network means now and that of the step before, which was at another
    /// σ. The last step, to σ = 0, is of first order, as all it needs is the picture.
    fn dpm_solver(&self, latents: &Tensor, clean: &Tensor, earlier: Option<&(Tensor, f64)>) -> Result<Tensor> {
        let (now, next) = (Mix::of_sigma(self.now), Mix::of_sigma(self.next));
        // λ = −ln σ, whose difference over the step is infinite at the last one.
        let ahead = (self.now / self.next).ln();
        let towards = next.signal * (1.0 - (-ahead).exp());
        let target = match earlier {
            Some((before, sigma)) if self.next > 0.0 => {
                let ratio = (sigma / self.now).ln() / ahead;
                clean.f_add(&clean.f_sub(before)?.f_mul_scalar(0.5 / ratio)?)?
            }
            _ => clean.shallow_clone(),
        };
        Ok(latents.f_mul_scalar(next.noise / now.noise)?.f_add(&target.f_mul_scalar(towards)?)?)
    }
}

/// How much of the guidance is rescaled with zero terminal SNR, where it would be overexposed (Lin et al., 2023,
/// section 3.4).
const RESCALE: f64 = 0.7;

/// The timesteps of a sampler, from the noisiest. Only "trailing" ones begin at the last timestep whatever their
/// number, as a schedule that ends in noise alone needs.
fn timesteps(kind: SamplerKind, schedule: &NoiseSchedule, steps: usize) -> Vec<f64> {
    let total = NoiseSchedule::TIMESTEPS;
    let last = (total - 1) as f64;
    let timestep = |left: usize| match kind {
        _ if schedule.has_zero_terminal_snr() => (total as f64 * left as f64 / steps as f64).round_ties_even() - 1.0,
        SamplerKind::Ddim => (((left - 1) * (total / steps) + 1) as f64).min(last),
        // A single step starts where the noise is.
        SamplerKind::DpmSolver2M => (last * left as f64 / steps as f64).round_ties_even(),
        _ if steps == 1 => last,
        _ => last * (left - 1) as f64 / (steps - 1) as f64,
    };
    (1..=steps).rev().map(timestep).collect()
}

/// σ = √((1−ᾱ)/ᾱ), between two timesteps in proportion. Noise alone, whose σ is infinite, counts as an ᾱ of 2⁻²⁴, as in
/// diffusers.
fn sigma(schedule: &NoiseSchedule, timestep: f64) -> f64 {
    let at = |t: usize| match schedule.snr(t) {
        0.0 => f64::from(1 << 24).sqrt(),
        snr => snr.recip().sqrt(),
    };
    let low = timestep.floor() as usize;
    let (a, b) = (at(low), at((low + 1).min(NoiseSchedule::TIMESTEPS - 1)));
    a + (b - a) * timestep.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With the exact answer for one known picture, every sampler must arrive at that picture.
    #[test]
    fn the_true_prediction_leads_to_the_picture() {
        let zero = NoiseSchedule::new(Prediction::Velocity).with_zero_terminal_snr().unwrap();
        for schedule in [NoiseSchedule::new(Prediction::Epsilon), NoiseSchedule::new(Prediction::Velocity), zero] {
            let prediction = schedule.prediction();
            let picture = Tensor::from_slice(&[0.5f32, -1.0, 0.25, 2.0]).view([1, 1, 2, 2]);
            let noise = Tensor::from_slice(&[1.0f32, 0.3, -0.7, 0.1]).view([1, 1, 2, 2]);
            for kind in SamplerKind::ALL {
                let sampler = Sampler::new(kind, &schedule, 20).unwrap();
                let fresh = |_: usize| Ok(Tensor::from_slice(&[-0.4f32, 0.9, 0.2, -1.3]).view([1, 1, 2, 2]));
                let result = sampler.sample(&noise, fresh, |latents, t| {
                    // Interpolated ᾱ agrees with the samplers' own only at whole timesteps; Euler's are fractional.
                    let step = sampler.steps.iter().find(|step| step.timestep == t).unwrap();
                    let alpha = if kind == SamplerKind::Ddim { step.now } else { 1.0 / (1.0 + step.now * step.now) };
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

    /// With the same answer at each step DDIM keeps to mixtures of one picture and one noise.
    #[test]
    fn a_way_that_ends_early_arrives_at_its_timestep() {
        let schedule = NoiseSchedule::new(Prediction::Epsilon);
        let noise = Tensor::from_slice(&[1.0f32, 0.3, -0.7, 0.1]).view([1, 1, 2, 2]);
        // Of timesteps 901, 801, … 1.
        for (timestep, expected) in [(990, 0), (901, 0), (900, 1), (455, 5), (0, 10)] {
            let sampler = Sampler::until(&schedule, 10, timestep).unwrap();
            let mut asked = 0;
            let fresh = |_: usize| unreachable!("DDIM draws no noise");
            let latents = sampler.sample(&noise, fresh, |_, t| {
                asked += 1;
                assert!(t > timestep as f64);
                Ok(noise.shallow_clone())
            });
            assert_eq!(asked, expected, "{timestep}");
            if expected > 0 {
                // What noise alone means at the first timestep is taken for a mixture; from there on it is one.
                let at = |t: usize| schedule.alpha_cumulative(t);
                let clean = (&noise - &noise * (1.0 - at(901)).sqrt()) / at(901).sqrt();
                let mixture = &clean * at(timestep).sqrt() + &noise * (1.0 - at(timestep)).sqrt();
                assert!(latents.unwrap().allclose(&mixture, 1e-5, 1e-5, false), "{timestep}");
            } else {
                assert_eq!(latents.unwrap(), noise);
            }
        }
        assert!(Sampler::until(&schedule, 0, 500).is_err());
    }

    #[test]
    fn impossible_step_counts_are_refused() {
        let schedule = NoiseSchedule::new(Prediction::Epsilon);
        assert!(Sampler::new(SamplerKind::Ddim, &schedule, 0).is_err());
        assert!(Sampler::new(SamplerKind::Euler, &schedule, 1001).is_err());
        assert!(Sampler::new(SamplerKind::Ddim, &schedule, 1000).is_ok());
    }
}
