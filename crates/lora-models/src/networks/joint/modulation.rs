//! Layer norms whose shift and scale are made of a vector, and gates on what a block adds (Peebles and Xie, "Scalable
//! Diffusion Models with Transformers", 2023: adaLN-Zero).

use lora_torch::tch::Tensor;

use crate::Result;
use crate::layers::{AdaptableLayer, Pass};
use crate::weights::Weights;

/// What the layer norms add under their root.
const EPSILON: f64 = 1e-6;

/// Where the shifts, scales and gates of a block come from.
#[derive(Debug)]
pub(in super::super) enum Modulator {
    /// A linear layer of the block's own makes them of a vector.
    Layer(Box<AdaptableLayer>),
    /// They are rows of a table that was made for all blocks at once.
    Rows {
        /// The first of them.
        first: usize,
        /// How many there are.
        count: usize,
    },
}

/// Shifts, scales and gates, `[batch, 1, width]` each, in the order of the layer's or the table's rows.
#[derive(Debug)]
pub(in super::super) struct Modulation(Vec<Tensor>);

impl Modulator {
    /// Of so many parts; `weights` are the layer's own.
    pub(in super::super) fn new(weights: &Weights<'_>, width: usize, parts: usize, bias: bool) -> Result<Self> {
        Ok(Self::Layer(Box::new(AdaptableLayer::linear(weights, width, parts * width, bias)?)))
    }

    /// Of a vector `[batch, width]` that has been through SiLU, or of the table `[batch, rows, width]`.
    pub(in super::super) fn forward(&self, vector: &Tensor, pass: &Pass) -> Result<Modulation> {
        match self {
            Self::Layer(layer) => {
                let all = layer.forward(vector, pass)?.f_unsqueeze(1)?;
                let width = vector.size2()?.1;
                Ok(Modulation(all.f_split(width, -1)?))
            }
            Self::Rows { first, count } => {
                Ok(Modulation(vector.f_narrow(1, *first as i64, *count as i64)?.f_split(1, 1)?))
            }
        }
    }

    pub(in super::super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        match self {
            Self::Layer(layer) => visit(layer),
            Self::Rows { .. } => {}
        }
    }
}

impl Modulation {
    /// All parts.
    pub(in super::super) fn all(&self) -> impl Iterator<Item = &Tensor> {
        self.0.iter()
    }

    /// The part of a number.
    pub(in super::super) fn part(&self, index: usize) -> Tensor {
        self.0[index].shallow_clone()
    }
}

/// Layer norm over the last axis without weights.
pub(in super::super) fn layer_norm(input: &Tensor) -> Result<Tensor> {
    let width = input.size3()?.2;
    Ok(input.f_layer_norm([width], None::<&Tensor>, None::<&Tensor>, EPSILON, true)?)
}

/// `input · (1 + scale) + shift`.
pub(in super::super) fn modulated(input: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    Ok(shift.f_addcmul(input, &scale.f_add_scalar(1.0)?)?)
}

/// `stream + gate · added`.
pub(in super::super) fn gated_sum(stream: &Tensor, gate: &Tensor, added: &Tensor) -> Result<Tensor> {
    Ok(stream.f_addcmul(gate, added)?)
}
