//! What an optimiser does to whole lists of tensors, by one kernel each instead of a dozen small ones per tensor.
//! Optimisers themselves (state, schedules, groups) live above.

use std::borrow::Borrow;

use tch::Tensor;

use crate::{Result, shim};

/// What a step's loss and gradients come to.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Settled {
    /// The sum of the losses.
    pub loss: f64,
    /// L2 norm over all gradients, unscaled, before it was limited.
    pub norm: f64,
    /// Whether all gradients are finite; where not, they are of no use any more.
    pub finite: bool,
}

/// Divides gradients by the loss scale and, where their common L2 norm is above `limit` (0: no limit), scales them down to it,
/// in place, as PyTorch's `GradScaler.unscale_` and `clip_grad_norm_` do. Everything that the host has to know of a step is
/// read in one piece: it waits for the device once. Gradients are f32 of any shapes, `losses` any number of losses of any shape,
/// all on one device. Fails only as libtorch does (a device that is lost, memory).
///
/// # Errors
/// [`Error::DeviceLost`](crate::Error::DeviceLost) and out of memory; norms that are not finite are no error.
pub fn settle(gradients: &mut [Tensor], losses: &Tensor, scale: f64, limit: f64) -> Result<Settled> {
    let [loss, norm, infinite] = shim::settle(gradients, losses, 1.0 / scale, limit)?;
    Ok(Settled { loss, norm, finite: infinite == 0.0 })
}

/// Forgets the gradients of parameters: afterwards `grad()` is undefined until a backward pass reaches one. (tch's
/// `zero_grad` leaves zeros, which an optimiser cannot tell from a gradient.)
///
/// # Errors
/// [`Error::DeviceLost`](crate::Error::DeviceLost).
pub fn clear(parameters: &mut [Tensor]) -> Result<()> {
    shim::clear_gradients(parameters)
}

/// Gives parameters gradients, in the place of those that they have: of the parameters' shapes, f32, in lists of one length. The
/// tensors are shared, not copied.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) for a gradient of another shape than its parameter.
pub fn put<T: Borrow<Tensor>>(parameters: &[T], gradients: &[T]) -> Result<()> {
    if parameters.is_empty() { Ok(()) } else { shim::put_gradients(parameters, gradients) }
}

/// Adds the gradients of copies in half precision to those of the f32 numbers that they stand for, in lists of one length, and
/// forgets them: by a few kernels for all, where a cast in the graph would be one for each tensor in either pass.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) where a gradient has another shape than its original; out of memory.
pub fn collect<T: Borrow<Tensor>>(copies: &[T], originals: &[T]) -> Result<()> {
    if copies.is_empty() { Ok(()) } else { shim::collect_gradients(copies, originals) }
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
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) where lists, shapes or number types differ; out of memory, and a device
    /// that is lost. Some parameters may have taken the step then.
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
    fn gradients_are_unscaled_limited_and_checked() {
        let losses = Tensor::from_slice(&[0.25f32, 0.5]);
        let mut gradients = [Tensor::from_slice(&[12.0f32]), Tensor::from_slice(&[16.0f32, 0.0])];
        let mut settled = |scale, limit| settle(&mut gradients, &losses, scale, limit).unwrap();
        let expected = |norm: f64, own: Settled| {
            assert!((own.norm - norm).abs() < 1e-5 && own.finite && own.loss == 0.75, "{own:?}");
        };
        expected(5.0, settled(4.0, 10.0));
        // The scale is 1, the norm below the limit: nothing changes, to the bit.
        expected(5.0, settled(1.0, 10.0));
        expected(5.0, settled(1.0, 1.0));
        expected(1.0, settled(1.0, 0.0));
        assert!((gradients[1].double_value(&[0]) - 0.8).abs() < 1e-5);
        for bad in [f32::INFINITY, f32::NAN] {
            let mut gradients = [Tensor::from_slice(&[1.0f32]), Tensor::from_slice(&[bad])];
            assert!(!settle(&mut gradients, &losses, 2.0, 1.0).unwrap().finite);
        }
        let none = settle(&mut [], &losses, 1.0, 1.0).unwrap();
        assert_eq!(none, Settled { loss: 0.75, norm: 0.0, finite: true });
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
    fn gradients_of_copies_are_summed_in_full_precision() {
        let originals =
            [Tensor::from_slice(&[1.0f32, 2.0]), Tensor::from_slice(&[3.0f32]), Tensor::from_slice(&[4.0f32])];
        let copy = |own: &Tensor| own.to_kind(Kind::BFloat16).set_requires_grad(true);
        let copies: Vec<Tensor> = originals.iter().map(copy).collect();
        let pass = |first: f64, second: f64| {
            (&copies[0] * first + &copies[1] * second).sum(Kind::Float).backward();
            collect(&copies, &originals.each_ref().map(Tensor::shallow_clone)).unwrap();
            assert!(copies.iter().all(|copy| !copy.grad().defined()));
        };
        pass(256.0, 2.0);
        // In 8 bits of mantissa 256 and 1 are 256.
        pass(1.0, 0.5);
        let found = |index: usize| Vec::<f32>::try_from(originals[index].grad()).unwrap();
        assert_eq!((originals[0].grad().kind(), found(0), found(1)), (Kind::Float, vec![257.0, 257.0], vec![5.0]));
        assert!(!originals[2].grad().defined(), "it got none");
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
