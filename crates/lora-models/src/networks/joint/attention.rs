//! Attention over tokens of several kinds at once: each kind has queries, keys and values of its own, normed by head, and
//! all attend to all (Esser et al., "Scaling Rectified Flow Transformers", 2024).

use lora_torch::norm::{RmsWeight, rms_norm};
use lora_torch::tch::Tensor;

use crate::Result;
use crate::layers::{AdaptableLayer, Pass};
use crate::weights::Weights;

/// What the norms of queries and keys add under their root.
const EPSILON: f64 = 1e-6;

/// Queries, keys and values, `[batch, heads, tokens, head]` each.
#[derive(Debug)]
pub(in super::super) struct Heads {
    pub(in super::super) query: Tensor,
    pub(in super::super) key: Tensor,
    pub(in super::super) value: Tensor,
}

impl Heads {
    /// Those of the first tokens and those of others behind them.
    pub(in super::super) fn joined(first: &Self, second: &Self) -> Result<Self> {
        let joined = |first: &Tensor, second: &Tensor| Tensor::f_cat(&[first, second], 2);
        Ok(Self {
            query: joined(&first.query, &second.query)?,
            key: joined(&first.key, &second.key)?,
            value: joined(&first.value, &second.value)?,
        })
    }
}

/// The layers that make them of one kind of token.
#[derive(Debug)]
pub(in super::super) struct Projections {
    layers: [AdaptableLayer; 3],
    /// Weights `[head]` of the norms of queries and keys, where there are such.
    norms: Option<[Tensor; 2]>,
    heads: i64,
}

/// Names of those layers in a scope.
#[derive(Debug, Clone, Copy)]
struct ProjectionNames {
    layers: [&'static str; 3],
    norms: [&'static str; 2],
}

impl ProjectionNames {
    const OWN: Self = Self { layers: ["to_q", "to_k", "to_v"], norms: ["norm_q", "norm_k"] };
    const ADDED: Self =
        Self { layers: ["add_q_proj", "add_k_proj", "add_v_proj"], norms: ["norm_added_q", "norm_added_k"] };
}

/// How heads are cut, and what layers have.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct HeadSizes {
    pub(in super::super) width: usize,
    pub(in super::super) heads: usize,
    pub(in super::super) bias: bool,
    pub(in super::super) norms: bool,
}

impl Projections {
    /// Of the tokens that diffusers calls the attention's own: `to_q` …
    pub(in super::super) fn own(weights: &Weights<'_>, sizes: HeadSizes) -> Result<Self> {
        Self::new(weights, sizes, ProjectionNames::OWN)
    }

    /// Of those that are added to it: `add_q_proj` …
    pub(in super::super) fn added(weights: &Weights<'_>, sizes: HeadSizes) -> Result<Self> {
        Self::new(weights, sizes, ProjectionNames::ADDED)
    }

    fn new(weights: &Weights<'_>, sizes: HeadSizes, names: ProjectionNames) -> Result<Self> {
        let HeadSizes { width, heads, bias, norms } = sizes;
        let layer = |name: &str| AdaptableLayer::linear(&weights.at(name), width, width, bias);
        let norm = |name: &str| weights.at(name).tensor("weight", &[width / heads]);
        let [query, key, value] = names.layers;
        let norms = norms.then(|| -> Result<_> { Ok([norm(names.norms[0])?, norm(names.norms[1])?]) });
        Ok(Self { layers: [layer(query)?, layer(key)?, layer(value)?], norms: norms.transpose()?, heads: heads as i64 })
    }

    /// Of tokens `[batch, tokens, width]`.
    pub(in super::super) fn forward(&self, input: &Tensor, pass: &Pass) -> Result<Heads> {
        let [query, key, value] = &self.layers;
        let norm = |index: usize| self.norms.as_ref().map(|norms| &norms[index]);
        let split =
            |layer: &AdaptableLayer, norm: Option<&Tensor>| heads(&layer.forward(input, pass)?, self.heads, norm);
        Ok(Heads { query: split(query, norm(0))?, key: split(key, norm(1))?, value: split(value, None)? })
    }

    pub(in super::super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        self.layers.iter_mut().for_each(visit);
    }
}

/// `[batch, tokens, width]` by head, `[batch, heads, tokens, head]`, normed where there is a weight for that.
fn heads(projected: &Tensor, heads: i64, norm: Option<&Tensor>) -> Result<Tensor> {
    let (batch, tokens, width) = projected.size3()?;
    let split = projected.f_reshape([batch, tokens, heads, width / heads])?;
    let split = match norm {
        Some(weight) => rms_norm(&split, Some(&weight.f_to_kind(split.kind())?), EPSILON, RmsWeight::Single)?,
        None => split,
    };
    Ok(split.f_transpose(1, 2)?)
}

/// Every token's mixture of values, `[batch, tokens, width]`. `mask`, `[batch, 1, 1, tokens]`, is added to the scores.
pub(in super::super) fn attend(heads: &Heads, mask: Option<&Tensor>) -> Result<Tensor> {
    let Heads { query, key, value } = heads;
    let mixed = Tensor::f_scaled_dot_product_attention(query, key, value, mask, 0.0, false, None, false)?;
    merged(&mixed)
}

/// `[batch, heads, tokens, head]` as `[batch, tokens, width]`.
fn merged(heads: &Tensor) -> Result<Tensor> {
    Ok(heads.f_transpose(1, 2)?.f_flatten(2, 3)?)
}
