//! Adafactor (Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018), with the switches
//! of transformers' implementation: squared gradients are kept as means over rows and over columns only.
//!
//! Means over rows have no operation over lists; tensors of one shape are stacked instead.

use lora_torch::foreach;
use lora_torch::tch::{Kind, Tensor};

use super::{Batch, Entry, Optimiser, Settings, StatePart, WORKING_SET, batches_by};
use crate::Result;

/// Adafactor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Adafactor {
    /// Added to squared gradients, and the least that a tensor counts as large.
    epsilons: (f64, f64),
    clip_threshold: f64,
    decay_rate: f64,
    beta1: Option<f64>,
    weight_decay: f64,
    scale_parameter: bool,
    relative_step: bool,
    warmup_init: bool,
    /// The run's own; with `relative_step`, learning rates count relative to it.
    learning_rate: f64,
}

impl Adafactor {
    /// From the configuration's numbers.
    pub(crate) fn new(settings: &mut Settings) -> Self {
        let relative_step = settings.switch("relative_step", true);
        let warmup_init = settings.switch("warmup_init", false);
        if warmup_init && !relative_step {
            settings.problem("warmup_init", "needs relative_step = true");
        }
        Self {
            epsilons: settings.pair("eps", (1e-30, 1e-3), "two numbers above 0", |value| value > 0.0),
            clip_threshold: settings.number("clip_threshold", 1.0, "a number above 0", |value| value > 0.0),
            decay_rate: settings.number("decay_rate", -0.8, "a number below 0", |value| value < 0.0),
            beta1: settings.optional("beta1", "a number from 0 to below 1", |beta| (0.0..1.0).contains(&beta)),
            weight_decay: settings.weight_decay(0.0),
            scale_parameter: settings.switch("scale_parameter", true),
            relative_step,
            warmup_init,
            learning_rate: settings.learning_rate(),
        }
    }

    /// The learning rate of a step before a tensor's own size is counted.
    fn rate(&self, batch: &Batch<'_, '_>) -> f64 {
        if !self.relative_step {
            return batch.learning_rate();
        }
        let steps = batch.steps() as f64;
        let most = if self.warmup_init { 1e-6 * steps } else { 1e-2 };
        f64::min(most, 1.0 / steps.sqrt()) * batch.learning_rate() / self.learning_rate
    }

    fn batch_step(&self, batch: &Batch<'_, '_>) -> Result<()> {
        let shape = batch.parameters()[0].size();
        let (count, elements) = (batch.entries.len() as i64, shape.iter().product::<i64>() as f64);
        // One number for each tensor, against the stack.
        let mut single = vec![1; shape.len() + 1];
        single[0] = count;
        let average = 1.0 - (batch.steps() as f64).powf(self.decay_rate);
        let gradients = Tensor::f_stack(&batch.gradients(), 0)?;
        let squares = gradients.f_mul(&gradients)?.f_add_scalar(self.epsilons.0)?;
        let kept = |part: usize, new: Tensor| follow(&batch.state(part), average, new);
        let mean = |squares: &Tensor, axis: i64| squares.f_mean_dim([axis].as_slice(), false, Kind::Float);
        let mut update = if is_factored(&shape) {
            let rows = kept(ROWS, mean(&squares, -1)?)?;
            let columns = kept(COLUMNS, mean(&squares, -2)?)?;
            drop(squares);
            inverse_root(&rows, &columns)?
        } else {
            kept(SQUARE, squares)?.f_rsqrt()?
        };
        let _ = update.f_mul_(&gradients)?;
        drop(gradients);
        let excess = roots_of_means(&update)?.f_div_scalar(self.clip_threshold)?.f_clamp_min(1.0)?;
        let mut rates = excess.f_full_like(self.rate(batch))?;
        if self.scale_parameter {
            let size = foreach::norms(&batch.parameters())?.f_div_scalar(elements.sqrt())?;
            rates = rates.f_mul(&size.f_clamp_min(self.epsilons.1)?)?;
        }
        let mut update = update.f_mul_(&rates.f_div(&excess)?.f_view(single.as_slice())?)?;
        if let Some(beta1) = self.beta1 {
            let means = batch.state(if is_factored(&shape) { COLUMNS + 1 } else { SQUARE + 1 });
            foreach::scale(&means, beta1)?;
            foreach::add(&means, &update.f_unbind(0)?, 1.0 - beta1)?;
            update = Tensor::f_stack(&means, 0)?;
        }
        if self.weight_decay != 0.0 {
            let decay = rates.f_mul_scalar(self.weight_decay)?.f_view(single.as_slice())?;
            let _ = update.f_addcmul_(&Tensor::f_stack(&batch.parameters(), 0)?, &decay)?;
        }
        Ok(foreach::add(&batch.parameters(), &update.f_unbind(0)?, -1.0)?)
    }
}

const ROWS: usize = 0;
const COLUMNS: usize = 1;
const SQUARE: usize = 0;

/// Brings kept tensors of one shape towards a stack of new ones, of which they keep `kept`. Returns their stack.
pub(super) fn follow(state: &[&Tensor], kept: f64, mut new: Tensor) -> Result<Tensor> {
    let mut all = Tensor::f_stack(state, 0)?;
    let all = all.f_mul_scalar_(kept)?.f_add_(&new.f_mul_scalar_(1.0 - kept)?)?;
    foreach::copy(state, &all.f_unbind(0)?)?;
    Ok(all)
}

/// One over the root of what means over rows and over columns are means of, as far as their product tells.
pub(super) fn inverse_root(rows: &Tensor, columns: &Tensor) -> Result<Tensor> {
    let share = rows.f_div(&rows.f_mean_dim([-1i64].as_slice(), true, Kind::Float)?)?;
    Ok(share.f_rsqrt()?.f_unsqueeze(-1)?.f_mul(&columns.f_rsqrt()?.f_unsqueeze(-2)?)?)
}

/// The root of the mean square of each tensor of a stack, `[count]`.
pub(super) fn roots_of_means(stack: &Tensor) -> Result<Tensor> {
    let count = stack.size()[0];
    let elements = stack.numel() as f64 / count as f64;
    let norms = stack.f_reshape([count, -1])?.f_norm_scalaropt_dim(2.0, [1i64].as_slice(), false)?;
    Ok(norms.f_div_scalar(elements.sqrt())?)
}

pub(super) fn is_factored(shape: &[i64]) -> bool {
    shape.len() >= 2
}

impl Optimiser for Adafactor {
    fn parts(&self, shape: &[i64]) -> Vec<StatePart> {
        let mut parts = match shape {
            [outer @ .., rows, columns] => {
                let without = |side: &i64| [outer, &[*side]].concat();
                vec![StatePart::zeros("rows", &without(rows)), StatePart::zeros("columns", &without(columns))]
            }
            _ => vec![StatePart::zeros("square", shape)],
        };
        parts.extend(self.beta1.map(|_| StatePart::zeros("mean", shape)));
        parts
    }

    fn step(&mut self, entries: &[Entry<'_>]) -> Result<()> {
        batches_by(entries, WORKING_SET, |entry| entry.parameter.size())
            .iter()
            .try_for_each(|batch| self.batch_step(batch))
    }

    fn notes(&self, _: f64) -> Vec<String> {
        let mut notes = Vec::new();
        if self.relative_step {
            notes.push(
                "adafactor finds its step size itself (relative_step), so that learning_rate has no effect; \
                 optimizer_args = { relative_step = false, scale_parameter = false } goes by learning_rate"
                    .into(),
            );
        } else if self.scale_parameter {
            notes.push(
                "adafactor's scale_parameter makes steps as small as the tensors, a thousandth where they are zero, as an \
                 adapter's are at first; optimizer_args = { scale_parameter = false } goes by learning_rate alone"
                    .into(),
            );
        }
        notes
    }
}
