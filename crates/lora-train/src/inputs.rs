//! The tensors of a micro-batch by name: all that its loss reads beside the networks. What differs between two micro-batches of
//! one shape is in these values alone, so that a CUDA graph which was recorded for one computes the other.

use lora_torch::tch::{Tensor, no_grad_guard};

use crate::{Error, Result};

/// Named tensors on the device; some names may have none. Further ones of the same names stand beside them in named groups.
#[derive(Debug, Default)]
pub struct Inputs(Vec<(&'static str, &'static str, Option<Tensor>)>);

/// The group of what is in none.
const OWN: &str = "";

/// What decides which micro-batches share a graph: the shape of each tensor, or that there is none.
pub(crate) type InputShapes = Vec<Option<Vec<i64>>>;

impl Inputs {
    /// Adds a tensor, or that there is none of this name.
    #[must_use]
    pub fn with(mut self, name: &'static str, tensor: Option<Tensor>) -> Self {
        self.0.push((OWN, name, tensor));
        self
    }

    /// Adds others.
    #[must_use]
    pub(crate) fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }

    /// Adds others as a group of their own ([`Inputs::part`]).
    #[must_use]
    pub(crate) fn beside(mut self, group: &'static str, others: Self) -> Self {
        self.0.extend(others.0.into_iter().map(|(_, name, tensor)| (group, name, tensor)));
        self
    }

    /// A group in the place of the tensors of the same names, with all others as they are; tensors are shared. `None` where
    /// there is no such group.
    pub(crate) fn part(&self, group: &str) -> Option<Self> {
        let of = |wanted: &str| {
            let own = self.0.iter().filter(move |(own, ..)| *own == wanted);
            own.map(|(_, name, tensor)| (OWN, *name, tensor.as_ref().map(Tensor::shallow_clone))).collect::<Vec<_>>()
        };
        let mut part = of(group);
        if part.is_empty() {
            return None;
        }
        part.extend(of(OWN));
        Some(Self(part))
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
        self.0.iter().find(|(group, own, _)| *group == OWN && *own == name)?.2.as_ref()
    }

    pub(crate) fn shapes(&self) -> InputShapes {
        self.0.iter().map(|(.., tensor)| tensor.as_ref().map(Tensor::size)).collect()
    }

    /// Takes over the values of others of the same names and shapes.
    ///
    /// # Errors
    /// Where a shape differs.
    pub fn assign(&self, other: &Self) -> Result<()> {
        let _guard = no_grad_guard();
        for ((.., own), (.., other)) in self.0.iter().zip(&other.0) {
            if let (Some(own), Some(other)) = (own, other) {
                own.shallow_clone().f_copy_(other)?;
            }
        }
        Ok(())
    }
}
