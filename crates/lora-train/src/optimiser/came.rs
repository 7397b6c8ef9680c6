//! CAME (Luo et al., "CAME: Confidence-guided Adaptive Memory Efficient Optimization", ACL 2023): Adafactor's means over rows and
//! columns, of squared gradients and of how far each update is from their average, which is the step where it is trusted.

use lora_torch::foreach;
use lora_torch::tch::{Kind, Tensor};

use super::adafactor::{follow, inverse_root, is_factored, roots_of_means};
use super::{Batch, Entry, Optimiser, Settings, StatePart, WORKING_SET, batches_by};
use crate::Result;

/// CAME: one tensor kept for each trained one, and four small ones for a matrix.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Came {
    /// Of updates, of squared gradients, of what updates are off by.
    betas: [f64; 3],
    /// Added to squared gradients, and to squares of what updates are off by.
    epsilons: (f64, f64),
    clip_threshold: f64,
    weight_decay: f64,
}

const MEAN: usize = 0;
const ROWS: usize = 1;
const COLUMNS: usize = 2;
const OFF_ROWS: usize = 3;
const OFF_COLUMNS: usize = 4;
/// Of a tensor that is no matrix.
const SQUARE: usize = 1;

impl Came {
    /// From the configuration's numbers.
    pub(crate) fn new(settings: &mut Settings) -> Self {
        let share = |beta: f64| (0.0..1.0).contains(&beta);
        Self {
            betas: settings.several("betas", [0.9, 0.999, 0.9999], "three numbers from 0 to below 1", share),
            epsilons: settings.pair("eps", (1e-30, 1e-16), "two numbers above 0", |value| value > 0.0),
            clip_threshold: settings.number("clip_threshold", 1.0, "a number above 0", |value| value > 0.0),
            weight_decay: settings.weight_decay(0.0),
        }
    }

    fn batch_step(&self, batch: &Batch<'_, '_>) -> Result<()> {
        let [beta, beta_square, beta_off] = self.betas;
        let shape = batch.parameters()[0].size();
        // One number for each tensor, against the stack.
        let mut single = vec![1; shape.len() + 1];
        single[0] = batch.entries.len() as i64;
        let mean = |squares: &Tensor, axis: i64| squares.f_mean_dim([axis].as_slice(), false, Kind::Float);
        let gradients = Tensor::f_stack(&batch.gradients(), 0)?;
        let squares = gradients.f_square()?.f_add_scalar(self.epsilons.0)?;
        let root = match is_factored(&shape) {
            true => inverse_root(
                &follow(&batch.state(ROWS), beta_square, mean(&squares, -1)?)?,
                &follow(&batch.state(COLUMNS), beta_square, mean(&squares, -2)?)?,
            )?,
            false => follow(&batch.state(SQUARE), beta_square, squares)?.f_rsqrt()?,
        };
        let update = root.f_mul(&gradients)?;
        drop(gradients);
        let excess = roots_of_means(&update)?.f_div_scalar(self.clip_threshold)?.f_clamp_min(1.0)?;
        let update = update.f_div(&excess.f_view(single.as_slice())?)?;
        let average = follow(&batch.state(MEAN), beta, update.f_detach_copy()?)?;
        let step = match is_factored(&shape) {
            true => {
                let off = update.f_sub(&average)?.f_square()?.f_add_scalar(self.epsilons.1)?;
                let rows = follow(&batch.state(OFF_ROWS), beta_off, mean(&off, -1)?)?;
                let columns = follow(&batch.state(OFF_COLUMNS), beta_off, mean(&off, -2)?)?;
                inverse_root(&rows, &columns)?.f_mul(&average)?
            }
            false => average,
        };
        let (parameters, rate) = (batch.parameters(), batch.learning_rate());
        if self.weight_decay != 0.0 {
            foreach::scale(&parameters, 1.0 - rate * self.weight_decay)?;
        }
        Ok(foreach::add(&parameters, &step.f_unbind(0)?, -rate)?)
    }
}

impl Optimiser for Came {
    fn parts(&self, shape: &[i64]) -> Vec<StatePart> {
        let mut parts = vec![StatePart::zeros("mean", shape)];
        match shape {
            [outer @ .., rows, columns] => {
                let without = |side: &i64| [outer, &[*side]].concat();
                let sides = [("rows", rows), ("columns", columns), ("off_rows", rows), ("off_columns", columns)];
                parts.extend(sides.map(|(name, side)| StatePart::zeros(name, &without(side))));
            }
            _ => parts.push(StatePart::zeros("square", shape)),
        }
        parts
    }

    fn step(&mut self, entries: &[Entry<'_>]) -> Result<()> {
        batches_by(entries, WORKING_SET, |entry| entry.parameter.size())
            .iter()
            .try_for_each(|batch| self.batch_step(batch))
    }
}
