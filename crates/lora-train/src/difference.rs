//! How far the answer of a network is from its target: the loss of an element, masks, what items count for, and means. Losses
//! other than the squared difference are those of sd-scripts; what the thresholds of some follow is drawn with the timestep, so
//! that they are tensors of a micro-batch like any other. Targets themselves are [`crate::loss`]'s and [`crate::velocity`]'s.

use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::from_f32;

use crate::Result;
use crate::config::TrainConfig;
use crate::inputs::Inputs;

/// The loss of one element, of the difference d between answer and target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LossType {
    /// d².
    #[default]
    L2,
    /// |d|.
    L1,
    /// 2c (√(d² + c²) − c): as d² where d is far below the threshold c, as 2c |d| far above.
    Huber,
    /// 2 (√(d² + c²) − c): the same over c.
    SmoothL1,
}

/// What the threshold c of [`LossType::Huber`] and [`LossType::SmoothL1`] follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum HuberSchedule {
    /// Nothing: `huber_c · huber_scale`.
    Constant,
    /// The noise against the signal, σ = √((1 − ᾱ)/ᾱ): `(1 − huber_c) / (1 + σ)² + huber_c`.
    #[default]
    Snr,
    /// The timestep t from 0 to 1: `huber_c^t · huber_scale`.
    Exponential,
}

/// How the differences of a run are measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// The loss of one element.
    pub loss: LossType,
    /// What the threshold follows.
    pub schedule: HuberSchedule,
    /// `huber_c`, above 0.
    pub threshold: f64,
    /// `huber_scale`.
    pub scale: f64,
}

impl Default for Difference {
    fn default() -> Self {
        Self { loss: LossType::default(), schedule: HuberSchedule::default(), threshold: 0.1, scale: 1.0 }
    }
}

impl Difference {
    /// That of a configuration, for a base whose noise schedule has signal levels.
    pub(crate) fn of_diffusion(config: &TrainConfig) -> Self {
        Self::of(config, HuberSchedule::Snr)
    }

    /// That of a configuration, for a base that is trained by flow matching.
    ///
    /// # Errors
    /// [`crate::Error::Config`] where thresholds are to follow signal levels, which such bases have not.
    pub(crate) fn of_flow(config: &TrainConfig) -> Result<Self> {
        let own = Self::of(config, HuberSchedule::Constant);
        if own.schedule == HuberSchedule::Snr {
            let message = "\"snr\" is for bases that predict the noise; take \"constant\" or \"exponential\"";
            return Err(config.refused([("huber_schedule", message.to_owned())]).into());
        }
        Ok(own)
    }

    /// `usual` is the schedule where no key says it.
    fn of(config: &TrainConfig, usual: HuberSchedule) -> Self {
        let loss = match config.extra.text("loss_type") {
            Some("l1") => LossType::L1,
            Some("huber") => LossType::Huber,
            Some("smooth_l1") => LossType::SmoothL1,
            _ => LossType::L2,
        };
        let schedule = match config.extra.text("huber_schedule") {
            Some("constant") => HuberSchedule::Constant,
            Some("snr") => HuberSchedule::Snr,
            Some("exponential") => HuberSchedule::Exponential,
            _ => usual,
        };
        let Self { threshold, scale, .. } = Self::default();
        let number = |key, usual| config.extra.number(key).unwrap_or(usual);
        Self { loss, schedule, threshold: number("huber_c", threshold), scale: number("huber_scale", scale) }
    }

    /// What a file says of it, in sd-scripts' words; nothing of squared differences.
    pub(crate) fn record(&self) -> Vec<(&'static str, String)> {
        let name = match self.loss {
            LossType::L2 => return Vec::new(),
            LossType::L1 => return vec![("ss_loss_type", "l1".to_owned())],
            LossType::Huber => "huber",
            LossType::SmoothL1 => "smooth_l1",
        };
        let schedule = match self.schedule {
            HuberSchedule::Constant => "constant",
            HuberSchedule::Snr => "snr",
            HuberSchedule::Exponential => "exponential",
        };
        vec![
            ("ss_loss_type", name.to_owned()),
            ("ss_huber_schedule", schedule.to_owned()),
            ("ss_huber_c", self.threshold.to_string()),
            ("ss_huber_scale", self.scale.to_string()),
        ]
    }

    /// The threshold at a timestep from 0 to 1 whose signal level is ᾱ; none where the loss has none. A base that has no signal
    /// levels gives 1 − σ.
    pub fn threshold(&self, time: f64, alpha: f64) -> Option<f64> {
        let Self { loss, schedule, threshold, scale } = *self;
        matches!(loss, LossType::Huber | LossType::SmoothL1).then(|| match schedule {
            HuberSchedule::Constant => threshold * scale,
            HuberSchedule::Snr => (1.0 - threshold) / (1.0 + ((1.0 - alpha) / alpha).sqrt()).powi(2) + threshold,
            HuberSchedule::Exponential => threshold.powf(time) * scale,
        })
    }
}

/// What the answers of a micro-batch are held against.
#[derive(Debug)]
pub struct Target {
    loss: LossType,
    /// What the network is to answer, `[batch, channels, height, width]`.
    target: Tensor,
    /// Thresholds of the loss, `[batch]` f32, where it has such.
    thresholds: Option<Tensor>,
    /// How much each place counts, `[batch, 1, height, width]`, from 0 to 1.
    mask: Option<Tensor>,
    /// How much each item counts, `[batch]`; none where all count in full.
    factors: Option<Tensor>,
}

impl Target {
    /// A target `[batch, channels, height, width]`. `thresholds` has one an item where the loss has such
    /// ([`Difference::threshold`]), `factors` one an item, none where all count in full: whether there are some should not change
    /// from micro-batch to micro-batch, as CUDA graphs are recorded with or without them.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn new(
        loss: LossType,
        target: Tensor,
        thresholds: Option<Vec<f64>>,
        mask: Option<&Tensor>,
        factors: Option<&[f64]>,
    ) -> Result<Self> {
        let device = target.device();
        Ok(Self {
            loss,
            target,
            thresholds: thresholds.map(|each| numbers(&each, device)).transpose()?,
            mask: mask.map(Tensor::shallow_clone),
            factors: factors.map(|each| numbers(each, device)).transpose()?,
        })
    }

    /// Mean over the batch of each item's weighted mean over its elements, those that a mask counts for nothing included; a scalar
    /// in f32, with its graph where gradients are recorded.
    ///
    /// # Errors
    /// Where shapes differ, and where memory runs out.
    pub fn mean_loss(&self, answer: &Tensor) -> Result<Tensor> {
        let losses = self.losses(answer)?;
        let losses = match &self.mask {
            Some(mask) => losses.f_to_kind(Kind::Float)?.f_mul(mask)?,
            None => losses,
        };
        let each = losses.f_flatten(1, -1)?.f_mean_dim(-1, false, Kind::Float)?;
        let each = match &self.factors {
            Some(factors) => each.f_mul(factors)?,
            None => each,
        };
        Ok(each.f_mean(Kind::Float)?)
    }

    /// The loss of each element.
    fn losses(&self, answer: &Tensor) -> Result<Tensor> {
        let difference = answer.f_sub(&self.target)?;
        let Some(thresholds) = &self.thresholds else {
            return Ok(match self.loss {
                LossType::L1 => difference.f_abs()?,
                _ => difference.f_square()?,
            });
        };
        let mut column = vec![1; difference.dim()];
        column[0] = -1;
        let threshold = thresholds.f_view(column.as_slice())?;
        let above = difference.f_square()?.f_add(&threshold.f_square()?)?.f_sqrt()?.f_sub(&threshold)?;
        Ok(match self.loss {
            LossType::Huber => above.f_mul(&threshold.f_mul_scalar(2.0)?)?,
            _ => above.f_mul_scalar(2.0)?,
        })
    }

    /// Its tensors by name.
    pub fn into_inputs(self) -> Inputs {
        Inputs::default()
            .with("target", Some(self.target))
            .with("thresholds", self.thresholds)
            .with("mask", self.mask)
            .with("factors", self.factors)
    }

    /// From tensors by name.
    ///
    /// # Errors
    /// Where the target is missing.
    pub fn of(inputs: &Inputs, loss: LossType) -> Result<Self> {
        let optional = |name: &str| inputs.find(name).map(Tensor::shallow_clone);
        Ok(Self {
            loss,
            target: inputs.get("target")?.shallow_clone(),
            thresholds: optional("thresholds"),
            mask: optional("mask"),
            factors: optional("factors"),
        })
    }
}

/// Numbers in f32 on a device.
pub(crate) fn numbers(values: &[f64], device: Device) -> Result<Tensor> {
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    Ok(from_f32(&values, &[values.len()], device)?)
}

#[cfg(test)]
mod tests {
    use lora_models::diffusion::{NoiseSchedule, Prediction};

    use super::*;

    fn difference(loss: LossType, schedule: HuberSchedule) -> Difference {
        Difference { loss, schedule, ..Difference::default() }
    }

    /// Values of sd-scripts' formulas, computed independently from the published betas.
    #[test]
    fn thresholds_are_those_of_their_schedules() {
        let schedule = NoiseSchedule::new(Prediction::Epsilon);
        for (timestep, snr, exponential) in
            [(0, 0.949_710, 1.0), (100, 0.598_297, 0.794_328), (500, 0.231_284, 0.316_228), (999, 0.103_691, 0.100_231)]
        {
            let at = |kind: Difference| kind.threshold(timestep as f64 / 1000.0, schedule.alpha_cumulative(timestep));
            let near = |found: Option<f64>, expected: f64| assert!((found.unwrap() / expected - 1.0).abs() < 1e-5);
            near(at(difference(LossType::Huber, HuberSchedule::Snr)), snr);
            near(at(difference(LossType::SmoothL1, HuberSchedule::Exponential)), exponential);
            let scaled = Difference { scale: 3.0, ..difference(LossType::Huber, HuberSchedule::Exponential) };
            near(at(scaled), 3.0 * exponential);
            near(at(Difference { scale: 3.0, ..difference(LossType::Huber, HuberSchedule::Constant) }), 0.3);
            assert_eq!(at(difference(LossType::L1, HuberSchedule::Snr)), None);
        }
        // Of noise alone the signal is nothing, and nothing is divided by it.
        assert_eq!(difference(LossType::Huber, HuberSchedule::Snr).threshold(0.999, 0.0), Some(0.1));
    }

    /// Two items of two numbers: differences 0 and 3, and 4 and 0, with thresholds 4 and 3, so that the roots are whole.
    #[test]
    fn losses_and_their_gradients_are_those_of_their_definitions() {
        let answer = || Tensor::from_slice(&[1.0f32, 5.0, 6.0, 7.0]).view([2, 1, 1, 2]).set_requires_grad(true);
        let target = Tensor::from_slice(&[1.0f32, 2.0, 2.0, 7.0]).view([2, 1, 1, 2]);
        for (loss, thresholds, mean, gradients) in [
            (LossType::L2, None, (9.0 + 16.0) / 4.0, [0.0, 1.5, 2.0, 0.0]),
            (LossType::L1, None, (3.0 + 4.0) / 4.0, [0.0, 0.25, 0.25, 0.0]),
            // 2 · 4 (5 − 4) and 2 · 3 (5 − 3); gradients 2c d / 5.
            (LossType::Huber, Some(vec![4.0, 3.0]), (8.0 + 12.0) / 4.0, [0.0, 1.2, 1.2, 0.0]),
            (LossType::SmoothL1, Some(vec![4.0, 3.0]), (2.0 + 4.0) / 4.0, [0.0, 0.3, 0.4, 0.0]),
        ] {
            let answer = answer();
            let made = Target::new(loss, target.shallow_clone(), thresholds, None, None).unwrap();
            // As a recorded step does, by way of named tensors.
            let found = Target::of(&made.into_inputs(), loss).unwrap().mean_loss(&answer).unwrap();
            found.backward();
            assert!((f64::try_from(&found).unwrap() - mean).abs() < 1e-6, "{loss:?}");
            let slopes = Vec::<f64>::try_from(answer.grad().view([-1]).to_kind(Kind::Double)).unwrap();
            assert!(slopes.iter().zip(gradients).all(|(a, b)| (a - b).abs() < 1e-6), "{loss:?} {slopes:?}");
        }
    }

    #[test]
    fn masks_and_factors_weigh_every_loss_alike() {
        let answer = Tensor::from_slice(&[1.0f32, 5.0, 6.0, 7.0]).view([2, 1, 1, 2]);
        let target = Tensor::from_slice(&[1.0f32, 2.0, 2.0, 7.0]).view([2, 1, 1, 2]);
        let mask = Tensor::from_slice(&[1.0f32, 0.5, 0.25, 1.0]).view([2, 1, 1, 2]);
        let found = |loss, thresholds: Option<Vec<f64>>| {
            let made = Target::new(loss, target.shallow_clone(), thresholds, Some(&mask), Some(&[2.0, 3.0])).unwrap();
            f64::try_from(made.mean_loss(&answer).unwrap()).unwrap()
        };
        assert!((found(LossType::L1, None) - (2.0 * 1.5 + 3.0) / 4.0).abs() < 1e-6);
        assert!((found(LossType::Huber, Some(vec![4.0, 3.0])) - (2.0 * 4.0 + 3.0 * 3.0) / 4.0).abs() < 1e-6);
    }
}
