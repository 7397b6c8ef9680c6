//! The tensors of a micro-batch by name: all that its loss reads beside the networks. What differs between two micro-batches of
//! one shape is in these values alone, so that a CUDA graph which was recorded for one computes the other.

use lora_torch::tch::{Tensor, no_grad_guard};

use crate::{Error, Result};

/// Named tensors on the device; some names may have none.
#[derive(Debug, Default)]
pub struct Inputs(Vec<(&'static str, Option<Tensor>)>);

/// What decides which micro-batches share a graph: the shape of each tensor, or that there is none.
pub(crate) type InputShapes = Vec<Option<Vec<i64>>>;

impl Inputs {
    /// Adds a tensor, or that there is none of this name.
    #[must_use]
    pub fn with(mut self, name: &'static str, tensor: Option<Tensor>) -> Self {
        self.0.push((name, tensor));
        self
    }

    /// Adds others.
    #[must_use]
    pub(crate) fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }

    /// The tensor of a name.
    ///
    /// # Errors
    /// [`Error::MissingInput`] where there is none.
    pub fn get(&self, name: &'static str) -> Result<&Tensor> {
        self.find(name).ok_or(Error::MissingInput { name })
    }

    /// The tensor of a name, where there is one.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.0.iter().find(|(own, _)| *own == name)?.1.as_ref()
    }

    pub(crate) fn shapes(&self) -> InputShapes {
        self.0.iter().map(|(_, tensor)| tensor.as_ref().map(Tensor::size)).collect()
    }

    /// Takes over the values of others of the same names and shapes.
    ///
    /// # Errors
    /// Where a shape differs.
    pub fn assign(&self, other: &Self) -> Result<()> {
        let _guard = no_grad_guard();
        for ((_, own), (_, other)) in self.0.iter().zip(&other.0) {
            if let (Some(own), Some(other)) = (own, other) {
                own.shallow_clone().f_copy_(other)?;
            }
        }
        Ok(())
    }
}
