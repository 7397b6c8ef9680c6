//! Rectified flow (Liu et al., 2022; Lipman et al., 2022): data and noise mixed by a noise level, the velocity between
//! them, how trainers draw noise levels, and Euler's way from noise to data. Networks that answer with velocities are in
//! [`crate::networks`]; the loss is the trainer's.
//!
//! A noise level σ goes from 0, data, to 1, noise alone: `x = (1 - σ) data + σ noise`, and the velocity is `noise - data`.

use lora_core::random::Stream;
use lora_torch::tch::{Kind, Tensor};

use crate::{Error, Result};

/// Data and noise, `[batch, …]`, mixed by noise levels `[batch]`: f32, of the data's shape.
///
/// # Errors
/// [`Error::Torch`] where shapes differ; out of memory.
pub fn noised(data: &Tensor, noise: &Tensor, levels: &Tensor) -> Result<Tensor> {
    let shape: Vec<i64> =
        data.size().iter().enumerate().map(|(axis, &side)| if axis == 0 { side } else { 1 }).collect();
    let levels = levels.f_to_kind(Kind::Float)?.f_view(shape.as_slice())?;
    let kept = levels.f_neg()?.f_add_scalar(1.0)?;
    Ok(data.f_to_kind(Kind::Float)?.f_mul(&kept)?.f_add(&noise.f_mul(&levels)?)?)
}

/// The velocity from data to noise.
///
/// # Errors
/// As [`noised`].
pub fn velocity(data: &Tensor, noise: &Tensor) -> Result<Tensor> {
    Ok(noise.f_sub(data)?)
}

/// How noise levels are spread before they are shifted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Density {
    /// Evenly.
    Uniform,
    /// The sigmoid of `mean + deviation · z`, z standard normal: logit-normal (Esser et al., 2024).
    LogitNormal {
        /// Mean of the normal numbers.
        mean: f64,
        /// Their standard deviation.
        deviation: f64,
    },
    /// With a mode in the middle, more or less of it (Esser et al., 2024, section 3.1).
    Mode {
        /// How much; 1.29 there.
        scale: f64,
    },
}

impl Density {
    /// The noise level of a draw: an even one from 0 to 1, or a standard normal one where the density asks for that.
    pub fn level(self, draw: f64) -> f64 {
        match self {
            Self::Uniform => draw,
            Self::LogitNormal { mean, deviation } => 1.0 / (1.0 + (-(mean + deviation * draw)).exp()),
            Self::Mode { scale } => {
                let bent = (std::f64::consts::FRAC_PI_2 * draw).cos().powi(2);
                1.0 - draw - scale * (bent - 1.0 + draw)
            }
        }
    }

    /// Whether [`Density::level`] takes standard normal draws.
    pub fn is_normal(self) -> bool {
        matches!(self, Self::LogitNormal { .. })
    }
}

/// How noise levels are moved towards noise: larger pictures lose less of themselves to the same noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shift {
    /// By the same factor everywhere; 1 moves nothing.
    Factor(f64),
    /// By the exponential of a number that grows evenly with the tokens of a picture.
    Tokens {
        /// The numbers at two counts of tokens.
        between: [(usize, f64); 2],
    },
}

impl Shift {
    /// FLUX.1's: from 0.5 at 256 tokens to 1.15 at 4096.
    pub const FLUX: Self = Self::Tokens { between: [(256, 0.5), (4096, 1.15)] };

    /// Qwen-Image's: from 0.5 at 256 tokens to 0.9 at 8192.
    pub const QWEN_IMAGE: Self = Self::Tokens { between: [(256, 0.5), (8192, 0.9)] };

    /// The factor for a picture of so many tokens.
    pub fn factor(self, tokens: usize) -> f64 {
        match self {
            Self::Factor(factor) => factor,
            Self::Tokens { between: [(fewer, low), (more, high)] } => {
                let share = (tokens as f64 - fewer as f64) / (more as f64 - fewer as f64);
                (low + share * (high - low)).exp()
            }
        }
    }

    /// A noise level as it is moved for a picture of so many tokens.
    pub fn moved(self, level: f64, tokens: usize) -> f64 {
        let factor = self.factor(tokens);
        factor * level / (1.0 + (factor - 1.0) * level)
    }
}

/// How the noise levels of training are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseLevels {
    /// How they are spread.
    pub density: Density,
    /// How they are moved.
    pub shift: Shift,
    /// The lowest and the highest that are trained; all are brought into what is between.
    pub range: (f64, f64),
}

impl NoiseLevels {
    /// The noise level that belongs to a draw, for a picture of so many tokens.
    pub fn level(&self, draw: f64, tokens: usize) -> f64 {
        let (low, high) = self.range;
        low + (high - low) * self.shift.moved(self.density.level(draw), tokens)
    }

    /// One that a stream draws.
    pub fn draw(&self, stream: &Stream, tokens: usize) -> f64 {
        let draw = match self.density.is_normal() {
            true => f64::from(stream.clone().normals(1)[0]),
            false => f64::from(stream.clone().uniform()),
        };
        self.level(draw, tokens)
    }
}

/// The noise levels that Euler's method goes through in so many steps, from 1 to 0, one more than there are steps: evenly
/// from 1 to 1/steps, moved by a factor, and 0.
///
/// # Errors
/// [`Error::Input`] for less than 1 step or more than 1000.
pub fn levels(steps: usize, factor: f64) -> Result<Vec<f64>> {
    if steps == 0 || steps > 1000 {
        return Err(Error::Input { what: "sampler", expected: "1 to 1000 steps".into(), found: steps.to_string() });
    }
    let even = (1..=steps).rev().map(|left| left as f64 / steps as f64);
    Ok(even.map(|level| Shift::Factor(factor).moved(level, 0)).chain([0.0]).collect())
}

/// [`levels`] drawn apart so that the last before 0 is `last`, and the first stays 1.
///
/// # Errors
/// As [`levels`].
pub fn levels_to(last: f64, steps: usize, factor: f64) -> Result<Vec<f64>> {
    let mut all = levels(steps, factor)?;
    let count = all.len();
    // One step goes from 1 to 0.
    if count > 2 {
        let stretch = (1.0 - last) / (1.0 - all[count - 2]);
        all[..count - 1].iter_mut().for_each(|level| *level = 1.0 - (1.0 - *level) * stretch);
    }
    Ok(all)
}

/// The factor that FLUX.2's noise levels are moved by for a picture of so many tokens in so many steps, as its authors measured
/// it: fewer steps stay longer near noise.
pub fn flux2_factor(tokens: usize, steps: usize) -> f64 {
    let tokens = tokens as f64;
    let at_200 = 0.000_169_27 * tokens + 0.456_666_66;
    if tokens > 4300.0 {
        return at_200.exp();
    }
    let at_10 = 8.738_095_24e-5 * tokens + 1.898_333_33;
    (at_200 + (steps as f64 - 200.0) * (at_200 - at_10) / 190.0).exp()
}

/// Data from noise by Euler's method through [`levels`]. `velocity` is asked for the velocity of a mixture at a level.
///
/// # Errors
/// What `velocity` gives; out of memory.
pub fn euler<E: From<Error>>(
    noise: &Tensor,
    levels: &[f64],
    mut velocity: impl FnMut(&Tensor, f64) -> std::result::Result<Tensor, E>,
) -> std::result::Result<Tensor, E> {
    let mut mixture = noise.f_to_kind(Kind::Float).map_err(Error::from)?;
    for pair in levels.windows(2) {
        let step = velocity(&mixture, pair[0])?.f_mul_scalar(pair[1] - pair[0]).map_err(Error::from)?;
        mixture = mixture.f_add(&step).map_err(Error::from)?;
    }
    Ok(mixture)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_true_velocity_leads_to_the_data() {
        let data = Tensor::from_slice(&[0.5f32, -1.0, 0.25, 2.0]).view([1, 1, 2, 2]);
        let noise = Tensor::from_slice(&[1.0f32, 0.3, -0.7, 0.1]).view([1, 1, 2, 2]);
        let true_velocity = velocity(&data, &noise).unwrap();
        for steps in [1, 4, 30] {
            let through = levels(steps, 3.0).unwrap();
            assert_eq!((through.len(), through[0], through[steps]), (steps + 1, 1.0, 0.0));
            let found = euler(&noise, &through, |mixture, level| {
                let expected = noised(&data, &noise, &Tensor::from_slice(&[level as f32])).unwrap();
                assert!(mixture.allclose(&expected, 1e-5, 1e-5, false), "at {level}");
                Ok::<_, Error>(true_velocity.shallow_clone())
            });
            assert!(found.unwrap().allclose(&data, 1e-5, 1e-5, false));
        }
        assert!(levels(0, 1.0).is_err() && levels(1001, 1.0).is_err());
    }

    #[test]
    fn levels_stay_in_their_range() {
        let drawn = NoiseLevels {
            density: Density::LogitNormal { mean: 0.0, deviation: 1.0 },
            shift: Shift::FLUX,
            range: (0.2, 0.7),
        };
        let of = |index: u64| drawn.draw(&Stream::new(5).with(index), 1024);
        let all: Vec<f64> = (0..200).map(of).collect();
        assert!(all.iter().all(|level| (0.2..=0.7).contains(level)));
        // The middle of the draws is moved by e^0.63 at 1024 tokens.
        assert!((drawn.level(0.0, 1024) - (0.2 + 0.5 * 0.652_488)).abs() < 1e-4, "{}", drawn.level(0.0, 1024));
        assert_eq!(of(3), of(3));
    }
}
