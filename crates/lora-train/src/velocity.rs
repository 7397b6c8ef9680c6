//! The loss of flow matching (Lipman et al., 2022): how far a network's answer is from the velocity from data to noise. Noise levels
//! and the formulas are `lora_models::diffusion::flow`'s, what a difference counts is [`crate::difference`]'s.

use lora_models::diffusion::flow;
use lora_torch::tch::Tensor;

use crate::Result;
use crate::difference::{Difference, LossType, Target, numbers};
use crate::inputs::Inputs;

/// What the loss of a batch is made of, beside the network and text: all that has to come from host memory is there.
#[derive(Debug)]
pub struct VelocityLoss {
    /// What the network is shown, `[batch, channels, height, width]`.
    noised: Tensor,
    /// Noise levels, `[batch]` f32.
    levels: Tensor,
    /// What it is to answer.
    target: Target,
}

impl VelocityLoss {
    /// Of `latents` and noise, that of the target and that which is added, `[batch, channels, height, width]` each, at one noise
    /// level an item, from 0 to 1. `items` says how much each counts; empty where all count in full. A mask is `[batch, 1,
    /// height, width]`.
    ///
    /// # Errors
    /// Where shapes differ, and where memory runs out.
    pub fn new(
        latents: &Tensor,
        [noise, added]: [&Tensor; 2],
        levels: &[f64],
        items: &[f64],
        mask: Option<&Tensor>,
        difference: &Difference,
    ) -> Result<Self> {
        let thresholds = levels.iter().map(|&level| difference.threshold(level, 1.0 - level)).collect();
        let weighted = items.iter().any(|&weight| weight != 1.0);
        let levels = numbers(levels, latents.device())?;
        let target = flow::velocity(latents, noise)?;
        Ok(Self {
            noised: flow::noised(latents, added, &levels)?,
            levels,
            target: Target::new(difference.loss, target, thresholds, mask, weighted.then_some(items))?,
        })
    }

    /// Mean over the batch of each item's weighted mean loss, a scalar in f32, with its graph where gradients are recorded.
    /// `answer` is the network's: noised latents and noise levels.
    ///
    /// # Errors
    /// What the network gives; where memory runs out.
    pub fn loss(&self, answer: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
        self.target.mean_loss(&answer(&self.noised, &self.levels)?)
    }

    /// Its tensors by name.
    pub fn into_inputs(self) -> Inputs {
        let own = Inputs::default().with("noised", Some(self.noised)).with("levels", Some(self.levels));
        own.and(self.target.into_inputs())
    }

    /// From tensors by name, with the loss that they were made for.
    ///
    /// # Errors
    /// Where one is missing.
    pub fn of(inputs: &Inputs, loss: LossType) -> Result<Self> {
        Ok(Self {
            noised: inputs.get("noised")?.shallow_clone(),
            levels: inputs.get("levels")?.shallow_clone(),
            target: Target::of(inputs, loss)?,
        })
    }
}
