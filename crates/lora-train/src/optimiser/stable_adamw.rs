//! StableAdamW (Wortsman et al., "Stable and low-precision training for large-scale vision-language models", NeurIPS 2023): AdamW
//! whose step of a tensor is made smaller where gradients are larger than their average says, as Adafactor clips its updates.
//! Averages are corrected as they are made, as in optimi and pytorch-optimizer, instead of when they are read.

use lora_torch::foreach;
use lora_torch::tch::Tensor;

use super::adafactor::roots_of_means;
use super::{AdamW, Batch, Entry, Optimiser, Settings, StatePart, WORKING_SET, batches_by, bias_correction};
use crate::Result;

/// StableAdamW, with AdamW's two tensors for each trained one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StableAdamW {
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
}

impl StableAdamW {
    /// From the configuration's numbers.
    pub(crate) fn new(settings: &mut Settings) -> Self {
        Self {
            betas: settings.betas((0.9, 0.99)),
            epsilon: settings.number("eps", 1e-8, "a number above 0", |value| value > 0.0),
            weight_decay: settings.weight_decay(0.01),
        }
    }

    fn batch_step(&self, batch: &Batch<'_, '_>) -> Result<()> {
        let (parameters, gradients) = (batch.parameters(), batch.gradients());
        let (means, squares) = (batch.state(0), batch.state(1));
        // How much of an average stays, so that it is free of its first zeros at each step.
        let kept = |beta: f64| beta * bias_correction(beta, batch.steps() - 1) / bias_correction(beta, batch.steps());
        let (first, second) = (kept(self.betas.0), kept(self.betas.1));
        foreach::lerp(&means, &gradients, 1.0 - first)?;
        foreach::scale(&squares, second)?;
        foreach::add_product(&squares, &gradients, &gradients, 1.0 - second)?;
        // One number for each tensor, against the stack.
        let mut single = vec![1; parameters[0].dim() + 1];
        single[0] = parameters.len() as i64;
        let roots = Tensor::f_stack(&squares, 0)?.f_sqrt()?;
        let of_average = Tensor::f_stack(&gradients, 0)?.f_div(&roots.f_clamp_min(self.epsilon)?)?;
        let excess = roots_of_means(&of_average)?.f_clamp_min(1.0)?;
        let rates = excess.f_reciprocal()?.f_mul_scalar(batch.learning_rate())?.f_view(single.as_slice())?;
        let steps = Tensor::f_stack(&means, 0)?.f_div(&roots.f_add_scalar(self.epsilon)?)?;
        let decay = Tensor::f_stack(&parameters, 0)?.f_mul_scalar(self.weight_decay)?;
        Ok(foreach::add(&parameters, &steps.f_add(&decay)?.f_mul(&rates)?.f_unbind(0)?, -1.0)?)
    }
}

impl Optimiser for StableAdamW {
    fn parts(&self, shape: &[i64]) -> Vec<StatePart> {
        AdamW::wide_parts(shape)
    }

    fn step(&mut self, entries: &[Entry<'_>]) -> Result<()> {
        batches_by(entries, WORKING_SET, |entry| entry.parameter.size())
            .iter()
            .try_for_each(|batch| self.batch_step(batch))
    }
}
