//! What an optimiser does to whole lists of tensors, by one kernel each instead of a dozen small ones per tensor.
//! Optimisers themselves (state, schedules, groups) live above.

use std::borrow::Borrow;

use tch::Tensor;

use crate::{Result, shim};

/// The L2 norm over all gradients; where it is above `limit` (0: no limit) they are scaled down to it, in place, as
/// PyTorch's `clip_grad_norm_` does. Waits for the device once.
pub fn clip(gradients: &mut [Tensor], limit: f64) -> Result<f64> {
    if gradients.is_empty() { Ok(0.0) } else { shim::clip_gradients(gradients, limit) }
}

/// Forgets the gradients of parameters: afterwards `grad()` is undefined until a backward pass reaches one. (tch's
/// `zero_grad` leaves zeros, which an optimiser cannot tell from a gradient.)
pub fn clear(parameters: &mut [Tensor]) -> Result<()> {
    shim::clear_gradients(parameters)
}

/// Numbers of an AdamW step (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub learning_rate: f64,
    /// Averaging of gradients and of their squares.
    pub betas: (f64, f64),
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// ε.
    pub epsilon: f64,
}

impl AdamW {
    /// Takes a step with each parameter, in place, by its gradient, the running mean of its gradients and of their squares:
    /// all f32, on one device, in lists of one length. `taken` counts the steps of all of them, this one included.
    pub fn step<T: Borrow<Tensor>>(
        &self,
        parameters: &[T],
        gradients: &[T],
        means: &[T],
        squares: &[T],
        taken: u64,
    ) -> Result<()> {
        if parameters.is_empty() {
            return Ok(());
        }
        let Self { learning_rate, betas, weight_decay, epsilon } = *self;
        shim::adamw(parameters, gradients, means, squares, taken, learning_rate, betas, weight_decay, epsilon)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn clipping_limits_the_common_norm() {
        let mut gradients = [Tensor::from_slice(&[3.0f32]), Tensor::from_slice(&[4.0f32, 0.0])];
        assert!((clip(&mut gradients, 10.0).unwrap() - 5.0).abs() < 1e-6);
        assert_eq!(gradients[0].double_value(&[0]), 3.0);
        assert!((clip(&mut gradients, 1.0).unwrap() - 5.0).abs() < 1e-6);
        assert!((gradients[1].double_value(&[0]) - 0.8).abs() < 1e-5);
        assert!((clip(&mut gradients, 0.0).unwrap() - 1.0).abs() < 1e-5);
        assert_eq!(clip(&mut [], 1.0).unwrap(), 0.0);
    }

    #[test]
    fn cleared_gradients_are_undefined() {
        let parameter = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        (&parameter * 2.0).sum(Kind::Float).backward();
        assert!(parameter.grad().defined());
        clear(&mut [parameter.shallow_clone()]).unwrap();
        assert!(!parameter.grad().defined());
        (&parameter * 3.0).sum(Kind::Float).backward();
        assert_eq!(parameter.grad().double_value(&[0]), 3.0);
    }

    #[test]
    fn adamw_follows_its_formula() {
        let numbers = AdamW { learning_rate: 0.1, betas: (0.9, 0.999), weight_decay: 0.01, epsilon: 1e-8 };
        let zeros = || Tensor::zeros([1], (Kind::Float, Device::Cpu));
        let (parameter, mean, square) = (Tensor::from_slice(&[1.0f32]), zeros(), zeros());
        let (mut p, mut m, mut v) = (1.0f64, 0.0f64, 0.0f64);
        for t in 1..=3 {
            let g = 0.5 / f64::from(t);
            let gradient = Tensor::from_slice(&[g as f32]);
            numbers.step(&[&parameter], &[&gradient], &[&mean], &[&square], t as u64).unwrap();
            p -= 0.1 * 0.01 * p;
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            p -= 0.1 * (m / (1.0 - 0.9f64.powi(t))) / ((v / (1.0 - 0.999f64.powi(t))).sqrt() + 1e-8);
        }
        assert!((parameter.double_value(&[0]) - p).abs() < 1e-6, "{} {p}", parameter.double_value(&[0]));
    }
}
