//! Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023): the sign of an averaged gradient.

use lora_torch::foreach;

use super::{Entry, Optimiser, Settings, StatePart, WORKING_SET, batches};
use crate::Result;

/// Lion: one tensor kept for each trained one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Lion {
    betas: (f64, f64),
    weight_decay: f64,
}

impl Lion {
    /// From the configuration's numbers.
    pub(crate) fn new(settings: &mut Settings) -> Self {
        Self { betas: settings.betas((0.9, 0.99)), weight_decay: settings.weight_decay(0.0) }
    }
}

impl Optimiser for Lion {
    fn parts(&self, shape: &[i64]) -> Vec<StatePart> {
        vec![StatePart::zeros("mean", shape)]
    }

    fn step(&mut self, entries: &[Entry<'_>]) -> Result<()> {
        for batch in batches(entries, WORKING_SET) {
            let (parameters, gradients, means) = (batch.parameters(), batch.gradients(), batch.state(0));
            if self.weight_decay != 0.0 {
                foreach::scale(&parameters, 1.0 - batch.learning_rate() * self.weight_decay)?;
            }
            let update = foreach::scaled(&means, self.betas.0)?;
            foreach::add(&update, &gradients, 1.0 - self.betas.0)?;
            foreach::sign(&update)?;
            foreach::add(&parameters, &update, -batch.learning_rate())?;
            foreach::scale(&means, self.betas.1)?;
            foreach::add(&means, &gradients, 1.0 - self.betas.1)?;
        }
        Ok(())
    }

    fn notes(&self, learning_rate: f64) -> Vec<String> {
        // Every number moves by the whole learning rate at each step.
        match learning_rate > 5e-5 {
            true => vec![format!(
                "lion wants a learning rate 3 to 10 times lower than adamw's (for a LoRA about 1e-5 to 3e-5), and as much \
                 more weight decay; it is {learning_rate:e}"
            )],
            false => Vec::new(),
        }
    }
}
