//! Schedule-free AdamW (Defazio et al., "The Road Less Scheduled", NeurIPS 2024). Three points: gradients are taken at
//! y = β₁·x + (1 − β₁)·z, which is what the network holds while it trains; z steps; x, the average of all z, is what to save
//! and to sample with. x is not kept: it follows from y and z.

use lora_torch::foreach;
use lora_torch::tch::{Kind, Tensor};

use super::{Entry, First, Optimiser, Settings, StatePart, WORKING_SET, batches, bias_correction};
use crate::Result;

/// Schedule-free AdamW.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ScheduleFreeAdamW {
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
    warmup_steps: f64,
    power: f64,
    rate_power: f64,
    /// Steps taken.
    taken: u64,
    /// Sum of the weights of all z in the average.
    weights: f64,
    /// The largest learning rate so far.
    largest: f64,
}

impl ScheduleFreeAdamW {
    /// From the configuration's numbers.
    pub(crate) fn new(settings: &mut Settings) -> Self {
        let betas = settings.betas((0.9, 0.999));
        if betas.0 == 0.0 {
            settings.problem("betas", "the first must be above 0: it says where between x and z gradients are taken");
        }
        let whole = |value: f64| value >= 0.0 && value.fract() == 0.0;
        Self {
            betas,
            epsilon: settings.number("eps", 1e-8, "a number above 0", |value| value > 0.0),
            weight_decay: settings.weight_decay(0.0),
            warmup_steps: settings.number("warmup_steps", 0.0, "a whole number from 0 on", whole),
            power: settings.number("r", 0.0, "a number from 0 on", |value| value >= 0.0),
            rate_power: settings.number("weight_lr_power", 2.0, "a number from 0 on", |value| value >= 0.0),
            taken: 0,
            weights: 0.0,
            largest: 0.0,
        }
    }
}

impl Optimiser for ScheduleFreeAdamW {
    fn parts(&self, shape: &[i64]) -> Vec<StatePart> {
        let z = StatePart { name: "z", shape: shape.to_vec(), kind: Kind::Float, first: First::Copy };
        vec![z, StatePart::zeros("square", shape)]
    }

    fn step(&mut self, entries: &[Entry<'_>]) -> Result<()> {
        let next = (self.taken + 1) as f64;
        let warmup = if next <= self.warmup_steps { next / self.warmup_steps } else { 1.0 };
        // One weight for all tensors: learning rates keep their ratios over a run, and a common factor cancels in the share.
        let rate = entries.iter().map(|entry| entry.learning_rate).fold(0.0, f64::max) * warmup;
        self.largest = self.largest.max(rate);
        let weight = next.powf(self.power) * self.largest.powf(self.rate_power);
        self.weights += weight;
        let share = if self.weights > 0.0 { weight / self.weights } else { 0.0 };
        let correction = bias_correction(self.betas.1, self.taken + 1);
        for batch in batches(entries, WORKING_SET) {
            let (parameters, gradients) = (batch.parameters(), batch.gradients());
            let (points, squares) = (batch.state(0), batch.state(1));
            let rate = batch.learning_rate() * warmup;
            foreach::scale(&squares, self.betas.1)?;
            foreach::add_product(&squares, &gradients, &gradients, 1.0 - self.betas.1)?;
            let divisor = foreach::scaled(&squares, 1.0 / correction)?;
            foreach::sqrt(&divisor)?;
            foreach::shift(&divisor, self.epsilon)?;
            foreach::div(&gradients, &divisor)?;
            if self.weight_decay != 0.0 {
                foreach::add(&gradients, &parameters, self.weight_decay)?;
            }
            foreach::lerp(&parameters, &points, share)?;
            foreach::add(&parameters, &gradients, rate * (self.betas.0 * (1.0 - share) - 1.0))?;
            foreach::add(&points, &gradients, -rate)?;
        }
        self.taken += 1;
        Ok(())
    }

    fn numbers(&self) -> Vec<(&'static str, f64)> {
        vec![("taken", self.taken as f64), ("weights", self.weights), ("largest_rate", self.largest)]
    }

    fn set_numbers(&mut self, values: &[f64]) {
        if let [taken, weights, largest] = *values {
            (self.taken, self.weights, self.largest) = (taken as u64, weights, largest);
        }
    }

    fn evaluates_elsewhere(&self) -> bool {
        true
    }

    fn evaluation(&self, parameter: &Tensor, state: &[Tensor]) -> Result<Option<Tensor>> {
        Ok(Some(parameter.detach().f_lerp(&state[0], 1.0 - 1.0 / self.betas.0)?))
    }
}
