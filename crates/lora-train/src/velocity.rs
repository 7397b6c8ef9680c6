//! The loss of flow matching (Lipman et al., 2022): mean squares between the velocity from data to noise and what a network
//! answers. Noise levels and the formulas are `lora_models::diffusion::flow`'s.

use lora_models::diffusion::flow;
use lora_torch::tch::Tensor;
use lora_torch::tensor::from_f32;

use crate::Result;
use crate::inputs::Inputs;
use crate::loss::mean_square;

/// What the loss of a batch is made of, beside the network and text: all that has to come from host memory is there.
#[derive(Debug)]
pub struct VelocityLoss {
    /// What the network is shown, `[batch, channels, height, width]`.
    noised: Tensor,
    /// What it is to answer.
    target: Tensor,
    /// Noise levels, `[batch]` f32.
    levels: Tensor,
    /// How much each place counts, `[batch, 1, height, width]`.
    mask: Option<Tensor>,
    /// How much each item counts, `[batch]`; none where all count in full.
    factors: Option<Tensor>,
}

impl VelocityLoss {
    /// Of `latents` and `noise`, `[batch, channels, height, width]`, at one noise level an item, from 0 to 1. `items` says how
    /// much each counts; empty where all count in full. A mask is `[batch, 1, height, width]`.
    ///
    /// # Errors
    /// Where shapes differ, and where memory runs out.
    pub fn new(latents: &Tensor, noise: &Tensor, levels: &[f64], items: &[f64], mask: Option<&Tensor>) -> Result<Self> {
        let device = latents.device();
        let numbers = |values: &[f64]| {
            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            from_f32(&values, &[values.len()], device)
        };
        let levels = numbers(levels)?;
        let weighted = items.iter().any(|&weight| weight != 1.0);
        Ok(Self {
            noised: flow::noised(latents, noise, &levels)?,
            target: flow::velocity(latents, noise)?,
            levels,
            mask: mask.map(Tensor::shallow_clone),
            factors: weighted.then(|| numbers(items)).transpose()?,
        })
    }

    /// Mean over the batch of each item's weighted mean squared error, a scalar in f32, with its graph where gradients are
    /// recorded. `answer` is the network's: noised latents and noise levels.
    ///
    /// # Errors
    /// What the network gives; where memory runs out.
    pub fn loss(&self, answer: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let answer = answer(&self.noised, &self.levels)?;
        mean_square(&answer, &self.target, self.mask.as_ref(), self.factors.as_ref())
    }

    /// Its tensors by name.
    pub fn into_inputs(self) -> Inputs {
        Inputs::default()
            .with("noised", Some(self.noised))
            .with("target", Some(self.target))
            .with("levels", Some(self.levels))
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
            levels: inputs.get("levels")?.shallow_clone(),
            mask: optional("mask"),
            factors: optional("factors"),
        })
    }
}
