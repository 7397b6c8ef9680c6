//! The dozen tensor operations that adapter formulas are written over, so that one formula serves several tensor
//! libraries. [`CpuBackend`] needs nothing but this crate; training uses the backend of `lora-torch`.

mod cpu;

pub use cpu::CpuBackend;

use std::fmt::Debug;

use crate::{HostTensor, LayerGeometry, Result};

/// A tensor library as adapter formulas see it.
///
/// Operations differentiate where the library does. Implementations return [`crate::Error::Backend`] for failures of
/// the library (out of memory, say) with its own error as source.
pub trait Backend: Debug + Clone + Send + Sync + 'static {
    /// The library's tensor.
    type Tensor: Debug;

    /// The shape, outermost first.
    fn shape(&self, tensor: &Self::Tensor) -> Vec<usize>;
    /// Another handle on the same elements and the same place in the autograd graph.
    fn share(&self, tensor: &Self::Tensor) -> Self::Tensor;
    /// A copy of host elements with the dtype and device of `like`.
    fn upload(&self, host: &HostTensor, like: &Self::Tensor) -> Result<Self::Tensor>;
    /// A copy in host memory.
    fn to_host(&self, tensor: &Self::Tensor) -> Result<HostTensor>;
    /// The same values in the dtype of `like`.
    fn cast_like(&self, tensor: &Self::Tensor, like: &Self::Tensor) -> Result<Self::Tensor>;
    /// `a + b`, shapes equal; may reuse the storage of `a`.
    fn add(&self, a: Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// Element by element `a · b`, shapes equal.
    fn mul(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// `tensor · factor`.
    fn scale(&self, tensor: &Self::Tensor, factor: f64) -> Result<Self::Tensor>;
    /// `[m, k] × [k, n]`.
    fn matmul(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// The same elements under another shape.
    fn reshape(&self, tensor: &Self::Tensor, shape: &[usize]) -> Result<Self::Tensor>;
    /// The layer of this geometry with this weight and bias: input `[..., in_features]` for a linear layer,
    /// `[batch, in_channels, height, width]` for a convolution.
    fn apply(
        &self,
        geometry: &LayerGeometry,
        input: &Self::Tensor,
        weight: &Self::Tensor,
        bias: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor>;
}
