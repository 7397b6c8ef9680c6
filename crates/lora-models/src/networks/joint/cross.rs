//! Attention with layers of its own: tokens to others, as those of a picture to a caption's, or to themselves alone. What all
//! kinds of tokens do together is in `attention`.

use lora_torch::tch::Tensor;

use super::super::axial_rotary::AxialTables;
use super::attention::{HeadSizes, Heads, QueryKeyNorms, attend};
use crate::Result;
use crate::layers::{AdaptableLayer, Pass};
use crate::weights::Weights;

/// Names of its layers and norms in a scope: of queries, keys, values and the way out; of queries and keys.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct AttentionNames {
    pub(in super::super) layers: [&'static str; 4],
    pub(in super::super) norms: [&'static str; 2],
}

/// The attention.
#[derive(Debug)]
pub(in super::super) struct Attention {
    to_q: AdaptableLayer,
    to_k: AdaptableLayer,
    to_v: AdaptableLayer,
    to_out: AdaptableLayer,
    norms: QueryKeyNorms,
}

impl Attention {
    /// Of tokens of `sizes` to others of `context` numbers each.
    pub(in super::super) fn new(
        weights: &Weights<'_>,
        names: AttentionNames,
        sizes: HeadSizes,
        context: usize,
    ) -> Result<Self> {
        let width = sizes.width;
        let layer = |name: &str, inputs| AdaptableLayer::linear(&weights.at(name), inputs, width, sizes.bias);
        let [query, key, value, out] = names.layers;
        Ok(Self {
            to_q: layer(query, width)?,
            to_k: layer(key, context)?,
            to_v: layer(value, context)?,
            to_out: layer(out, width)?,
            norms: QueryKeyNorms::named(weights, sizes, names.norms)?,
        })
    }

    /// What tokens `[batch, tokens, width]` make of `context` `[batch, others, context]`: `[batch, tokens, width]`. Queries and
    /// keys are turned by the positions of their own tokens, where there are such.
    pub(in super::super) fn forward(
        &self,
        tokens: &Tensor,
        context: &Tensor,
        positions: Option<[&AxialTables; 2]>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let query = self.to_q.forward(tokens, pass)?;
        let (key, value) = (self.to_k.forward(context, pass)?, self.to_v.forward(context, pass)?);
        let mut heads = self.norms.heads([&query, &key, &value])?;
        if let Some([own, others]) = positions {
            heads = Heads { query: own.turn(&heads.query)?, key: others.turn(&heads.key)?, value: heads.value };
        }
        self.to_out.forward(&attend(&heads, None)?, pass)
    }

    pub(in super::super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        let Self { to_q, to_k, to_v, to_out, .. } = self;
        [to_q, to_k, to_v, to_out].into_iter().for_each(visit);
    }
}
