//! Attention over tokens of several kinds at once: each kind has queries, keys and values of its own, normed by head, and
//! all attend to all (Esser et al., "Scaling Rectified Flow Transformers", 2024).

use lora_torch::norm::{RmsWeight, rms_norm};
use lora_torch::tch::{Kind, Tensor};

use super::super::axial_rotary::AxialTables;
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

    /// Queries and keys turned by the positions of their tokens.
    pub(in super::super) fn turned(self, positions: &AxialTables) -> Result<Self> {
        Ok(Self { query: positions.turn(&self.query)?, key: positions.turn(&self.key)?, value: self.value })
    }
}

/// How queries, keys and values are cut into heads, and queries and keys normed in each.
#[derive(Debug)]
pub(in super::super) struct QueryKeyNorms {
    /// Weights `[head]`, where there are such.
    weights: Option<[Tensor; 2]>,
    heads: i64,
}

/// The layers that make them of one kind of token.
#[derive(Debug)]
pub(in super::super) struct Projections {
    layers: [AdaptableLayer; 3],
    norms: QueryKeyNorms,
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

impl QueryKeyNorms {
    /// Of the tokens that diffusers calls the attention's own: `norm_q` …
    pub(in super::super) fn new(weights: &Weights<'_>, sizes: HeadSizes) -> Result<Self> {
        Self::named(weights, sizes, ProjectionNames::OWN.norms)
    }

    /// Of layers that are called otherwise.
    pub(super) fn named(weights: &Weights<'_>, sizes: HeadSizes, names: [&str; 2]) -> Result<Self> {
        let norm = |name: &str| weights.at(name).tensor("weight", &[sizes.width / sizes.heads]);
        let norms = sizes.norms.then(|| -> Result<_> { Ok([norm(names[0])?, norm(names[1])?]) });
        Ok(Self { weights: norms.transpose()?, heads: sizes.heads as i64 })
    }

    /// Of queries, keys and values `[batch, tokens, width]`.
    pub(in super::super) fn heads(&self, [query, key, value]: [&Tensor; 3]) -> Result<Heads> {
        let norm = |index: usize| self.weights.as_ref().map(|norms| &norms[index]);
        let cut = |projected: &Tensor, norm: Option<&Tensor>| heads(projected, self.heads, norm);
        Ok(Heads { query: cut(query, norm(0))?, key: cut(key, norm(1))?, value: cut(value, None)? })
    }
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
        let layer = |name: &str| AdaptableLayer::linear(&weights.at(name), sizes.width, sizes.width, sizes.bias);
        let [query, key, value] = names.layers;
        let layers = [layer(query)?, layer(key)?, layer(value)?];
        Ok(Self { layers, norms: QueryKeyNorms::named(weights, sizes, names.norms)? })
    }

    /// Of tokens `[batch, tokens, width]`.
    pub(in super::super) fn forward(&self, input: &Tensor, pass: &Pass) -> Result<Heads> {
        let [query, key, value] = &self.layers;
        let [query, key, value] = [query.forward(input, pass)?, key.forward(input, pass)?, value.forward(input, pass)?];
        self.norms.heads([&query, &key, &value])
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

/// What hides the text tokens from each item's number on, `lengths` `[batch]` int64, of a sequence that begins with `text` of
/// them and goes on with `image` of a picture: `[batch, 1, 1, text + image]` in `kind`, for [`attend`].
pub(in super::super) fn text_mask(lengths: &Tensor, text: i64, image: i64, kind: Kind) -> Result<Tensor> {
    let device = lengths.device();
    let places = Tensor::f_arange(text + image, (Kind::Int64, device))?.f_unsqueeze(0)?;
    let behind = places.f_ge_tensor(&lengths.f_unsqueeze(1)?)?;
    let hidden = behind.f_logical_and(&places.f_lt(text)?)?;
    let mask = Tensor::f_zeros(hidden.size().as_slice(), (Kind::Float, device))?;
    let mask = mask.f_masked_fill(&hidden, f64::NEG_INFINITY)?;
    Ok(mask.f_to_kind(kind)?.f_unsqueeze(1)?.f_unsqueeze(1)?)
}

/// `[batch, heads, tokens, head]` as `[batch, tokens, width]`.
fn merged(heads: &Tensor) -> Result<Tensor> {
    Ok(heads.f_transpose(1, 2)?.f_flatten(2, 3)?)
}
