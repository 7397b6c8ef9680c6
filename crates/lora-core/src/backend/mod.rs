//! The tensor operations that adapter formulas are written over, so that one formula serves several tensor libraries.
//! [`CpuBackend`] needs nothing but this crate, [`ShapeBackend`] not even numbers; training uses the backend of
//! `lora-torch`.

mod cpu;
mod shapes;

pub use cpu::CpuBackend;
pub use shapes::ShapeBackend;

use std::fmt::Debug;

use crate::linalg;
use crate::{HostTensor, LayerGeometry, Result};

/// A tensor library as adapter formulas see it.
///
/// Operations differentiate where the library does. Shapes broadcast as in NumPy: axes are aligned at the end, and an
/// axis of length 1 is repeated.
///
/// # Errors
/// Every operation gives [`crate::Error::Shape`] where shapes do not go together, and [`crate::Error::Backend`] where
/// the library fails (out of memory, say), with the library's error as its source.
///
/// The defaults of some operations copy tensors from host memory, for which a device waits. A backend that trains has
/// operations of its own, so that a step can be recorded.
#[expect(clippy::missing_errors_doc, reason = "said above for all operations")]
pub trait Backend: Debug + Clone + Send + Sync + 'static {
    /// The library's tensor.
    type Tensor: Debug;

    /// The shape, outermost first.
    fn shape(&self, tensor: &Self::Tensor) -> Vec<usize>;
    /// Another handle on the same elements and the same place in the autograd graph.
    fn share(&self, tensor: &Self::Tensor) -> Self::Tensor;
    /// Another handle on the same elements, outside the autograd graph.
    fn detach(&self, tensor: &Self::Tensor) -> Self::Tensor;
    /// A copy of host elements with the dtype and device of `like`.
    fn upload(&self, host: &HostTensor, like: &Self::Tensor) -> Result<Self::Tensor>;
    /// A copy in host memory.
    fn to_host(&self, tensor: &Self::Tensor) -> Result<HostTensor>;
    /// The same values in the dtype of `like`.
    fn cast_like(&self, tensor: &Self::Tensor, like: &Self::Tensor) -> Result<Self::Tensor>;
    /// `a + b` with `b` broadcast to the shape of `a`; may reuse the storage of `a`, which must be no leaf of the
    /// autograd graph.
    fn add(&self, a: Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// Element by element `a · b`, broadcast.
    fn mul(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// Element by element `a / b`, broadcast.
    fn div(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// `tensor · factor`.
    fn scale(&self, tensor: &Self::Tensor, factor: f64) -> Result<Self::Tensor>;
    /// The square root of each element.
    fn sqrt(&self, tensor: &Self::Tensor) -> Result<Self::Tensor>;
    /// Each element, or `least` where it is less; such elements have no gradient.
    fn at_least(&self, tensor: &Self::Tensor, least: f64) -> Result<Self::Tensor>;
    /// The sum over some axes, which stay with length 1.
    fn sum(&self, tensor: &Self::Tensor, axes: &[usize]) -> Result<Self::Tensor>;
    /// `[..., m, k] × [..., k, n]`, leading axes equal.
    fn matmul(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// The same elements under another shape.
    fn reshape(&self, tensor: &Self::Tensor, shape: &[usize]) -> Result<Self::Tensor>;
    /// The axes in another order: axis `i` of the result is axis `order[i]` of the tensor.
    fn permute(&self, tensor: &Self::Tensor, order: &[usize]) -> Result<Self::Tensor>;
    /// The slices of an axis at `indices`, in their order.
    fn select(&self, tensor: &Self::Tensor, axis: usize, indices: &[usize]) -> Result<Self::Tensor>;
    /// The layer of this geometry with this weight and bias: input `[..., in_features]` for a linear layer,
    /// `[batch, in_channels, height, width]` for a convolution, row numbers of any shape for an embedding.
    fn apply(
        &self,
        geometry: &LayerGeometry,
        input: &Self::Tensor,
        weight: &Self::Tensor,
        bias: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor>;

    /// `tensor + amount`.
    fn shift(&self, tensor: &Self::Tensor, amount: f64) -> Result<Self::Tensor> {
        let shape = self.shape(tensor);
        let amounts = vec![amount as f32; shape.iter().product()];
        self.add(self.upload(&HostTensor::from_f32(shape, amounts)?, tensor)?, tensor)
    }

    /// The identity `[side, side]` with the dtype and device of `like`.
    fn identity(&self, side: usize, like: &Self::Tensor) -> Result<Self::Tensor> {
        let mut ones = vec![0.0; side * side];
        ones.iter_mut().step_by(side + 1).for_each(|one| *one = 1.0);
        self.upload(&HostTensor::from_f32([side, side], ones)?, like)
    }

    /// Matrices `[n, side, side]` of the numbers above their diagonals, `[n, side · (side - 1) / 2]`, row by row; zero
    /// elsewhere.
    fn above_diagonal(&self, numbers: &Self::Tensor, side: usize) -> Result<Self::Tensor> {
        let (mut places, mut mask, mut next) = (Vec::new(), Vec::new(), 0);
        for row in 0..side {
            for column in 0..side {
                let above = column > row;
                places.push(if above { next } else { 0 });
                mask.push(if above { 1.0 } else { 0.0 });
                next += usize::from(above);
            }
        }
        let spread = self.select(numbers, 1, &places)?;
        let mask = self.upload(&HostTensor::from_f32([1, side * side], mask)?, numbers)?;
        let matrices = self.shape(numbers).first().copied().unwrap_or(0);
        self.reshape(&self.mul(&spread, &mask)?, &[matrices, side, side])
    }

    /// The inverses of square matrices `[..., n, n]`. The default computes them in host memory in f64, outside the
    /// autograd graph; a backend that trains overrides it.
    fn inverse(&self, tensor: &Self::Tensor) -> Result<Self::Tensor> {
        self.upload(&linalg::inverse(&self.to_host(tensor)?)?, tensor)
    }
}
