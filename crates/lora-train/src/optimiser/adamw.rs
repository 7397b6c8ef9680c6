//! AdamW (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019), by libtorch's fused kernel.

use lora_torch::gradients::AdamW as Fused;

use super::{Batch, Entry, Optimiser, Settings, StatePart, batches};
use crate::Result;

/// AdamW with 32-bit state.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AdamW {
    pub(super) betas: (f64, f64),
    pub(super) epsilon: f64,
    pub(super) weight_decay: f64,
}

impl AdamW {
    /// From the configuration's numbers.
    pub(crate) fn new(settings: &mut Settings) -> Self {
        Self {
            betas: settings.betas((0.9, 0.999)),
            epsilon: settings.number("eps", 1e-8, "a number above 0", |value| value > 0.0),
            weight_decay: settings.weight_decay(0.01),
        }
    }

    /// The two parts in 32 bits.
    pub(super) fn wide_parts(shape: &[i64]) -> Vec<StatePart> {
        vec![StatePart::zeros("mean", shape), StatePart::zeros("square", shape)]
    }

    /// A step of tensors whose first two parts are in 32 bits.
    pub(super) fn wide_step(&self, batch: &Batch<'_, '_>) -> Result<()> {
        let numbers = Fused {
            learning_rate: batch.learning_rate(),
            betas: self.betas,
            weight_decay: self.weight_decay,
            epsilon: self.epsilon,
        };
        let (parameters, gradients) = (batch.parameters(), batch.gradients());
        Ok(numbers.step(&parameters, &gradients, &batch.state(0), &batch.state(1), batch.steps())?)
    }
}

impl Optimiser for AdamW {
    fn parts(&self, shape: &[i64]) -> Vec<StatePart> {
        Self::wide_parts(shape)
    }

    fn step(&mut self, entries: &[Entry<'_>]) -> Result<()> {
        batches(entries, usize::MAX).iter().try_for_each(|batch| self.wide_step(batch))
    }
}
