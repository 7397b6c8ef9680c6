//! Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024), as torch.optim has it: the step of a matrix
//! is its averaged gradient with all singular values near 1, by Newton and Schulz's iteration. Kernels of convolutions count as
//! matrices of an output a row, as in the authors' own; what is no matrix takes AdamW's step, as they have it.
//!
//! The iteration runs in f32, not in bf16: an adapter's factors are small, and its products have the rank's sides.

use lora_torch::foreach;
use lora_torch::tch::{Kind, Tensor};

use super::{AdamW, Batch, Entry, Optimiser, Settings, StatePart, WORKING_SET, batches_by};
use crate::Result;

/// The polynomial of an iteration: `a x + (b x xᵀ + c (x xᵀ)²) x`.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];

/// The least that a gradient's norm counts as.
const LEAST_NORM: f64 = 1e-7;

/// Muon: one tensor kept for each matrix.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Muon {
    momentum: f64,
    nesterov: bool,
    iterations: usize,
    /// Steps are as large as AdamW's usually are, whatever a matrix' sides (Liu et al., 2025).
    like_adamw: bool,
    /// What is no matrix. Its weight decay is that of matrices.
    others: AdamW,
}

impl Muon {
    /// From the configuration's numbers.
    pub(crate) fn new(settings: &mut Settings) -> Self {
        let share = |value: f64| (0.0..1.0).contains(&value);
        let whole = |value: f64| (1.0..=20.0).contains(&value) && value.fract() == 0.0;
        Self {
            momentum: settings.number("momentum", 0.95, "a number from 0 to below 1", share),
            nesterov: settings.switch("nesterov", true),
            iterations: settings.number("ns_steps", 5.0, "a whole number from 1 to 20", whole) as usize,
            like_adamw: settings.switch("match_rms_adamw", true),
            others: AdamW::new(settings),
        }
    }

    fn matrix_step(&self, batch: &Batch<'_, '_>) -> Result<()> {
        let (parameters, gradients, means) = (batch.parameters(), batch.gradients(), batch.state(0));
        foreach::lerp(&means, &gradients, 1.0 - self.momentum)?;
        let average = Tensor::f_stack(&means, 0)?;
        let update = match self.nesterov {
            true => Tensor::f_stack(&gradients, 0)?.f_lerp(&average, self.momentum)?,
            false => average,
        };
        let (matrices, shape) = (update.f_flatten(2, -1)?, update.size());
        let (_, rows, columns) = matrices.size3()?;
        let steps = orthogonal(&matrices, self.iterations)?.f_view(shape.as_slice())?;
        let (rows, columns) = (rows as f64, columns as f64);
        let size = match self.like_adamw {
            true => 0.2 * rows.max(columns).sqrt(),
            false => (rows / columns).max(1.0).sqrt(),
        };
        let rate = batch.learning_rate();
        if self.others.weight_decay != 0.0 {
            foreach::scale(&parameters, 1.0 - rate * self.others.weight_decay)?;
        }
        Ok(foreach::add(&parameters, &steps.f_unbind(0)?, -rate * size)?)
    }
}

/// Matrices `[count, rows, columns]` with singular values near 1, from 0.7 to 1.2 after five iterations.
fn orthogonal(matrices: &Tensor, iterations: usize) -> Result<Tensor> {
    let [a, b, c] = COEFFICIENTS;
    let (_, rows, columns) = matrices.size3()?;
    // Products have the shorter side.
    let turned = |matrices: &Tensor| match rows > columns {
        true => matrices.f_transpose(1, 2),
        false => Ok(matrices.shallow_clone()),
    };
    let matrices = turned(matrices)?;
    let norms = matrices.f_square()?.f_sum_dim_intlist([1i64, 2].as_slice(), true, Kind::Float)?.f_sqrt()?;
    let mut x = matrices.f_div(&norms.f_clamp_min(LEAST_NORM)?)?;
    for _ in 0..iterations {
        let gram = x.f_matmul(&x.f_transpose(1, 2)?)?;
        let polynomial = gram.f_mul_scalar(b)?.f_add(&gram.f_matmul(&gram)?.f_mul_scalar(c)?)?;
        x = x.f_mul_scalar(a)?.f_add(&polynomial.f_matmul(&x)?)?;
    }
    Ok(turned(&x)?.f_contiguous()?)
}

fn is_matrix(shape: &[i64]) -> bool {
    shape.len() >= 2
}

impl Optimiser for Muon {
    fn parts(&self, shape: &[i64]) -> Vec<StatePart> {
        if is_matrix(shape) { vec![StatePart::zeros("mean", shape)] } else { AdamW::wide_parts(shape) }
    }

    fn step(&mut self, entries: &[Entry<'_>]) -> Result<()> {
        for batch in batches_by(entries, WORKING_SET, |entry| entry.parameter.size()) {
            match is_matrix(&batch.parameters()[0].size()) {
                true => self.matrix_step(&batch)?,
                false => self.others.wide_step(&batch)?,
            }
        }
        Ok(())
    }
}
