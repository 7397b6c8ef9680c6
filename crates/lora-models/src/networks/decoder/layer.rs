//! One layer of a decoder: norms, attention with its projections and positions, feed-forward, residuals. Names are
//! transformers'.

use lora_torch::activation::{Gate, gated};
use lora_torch::norm::{RmsWeight, rms_norm};
use lora_torch::tch::Tensor;

use super::Context;
use super::attention::{Scores, attend};
use super::config::{DecoderConfig, LayerConfig, QueryKeyNorm};
use super::feed_forward::{FeedForward, linear};
use super::generate::KeyValues;
use crate::Result;
use crate::layers::{AdaptableLayer, Pass};
use crate::weights::Weights;

/// A layer.
#[derive(Debug)]
pub(super) struct Layer {
    before_attention: Option<RmsNorm>,
    attention: Attention,
    after_attention: Option<RmsNorm>,
    before_feed_forward: Option<RmsNorm>,
    feed_forward: FeedForward,
    after_feed_forward: Option<RmsNorm>,
    residual_scale: f64,
    layer_input: Option<LayerInput>,
    /// What the layer's output is multiplied by, `[1]`.
    scalar: Option<Tensor>,
}

/// What a layer reads besides the hidden states.
#[derive(Debug, Default)]
pub(super) struct Beside<'b> {
    /// Its own input, `[batch, tokens, own width]`.
    pub(super) layer_input: Option<&'b Tensor>,
    /// Keys and values of an earlier layer, `[batch, kv heads, tokens, head]`.
    pub(super) borrowed: Option<[&'b Tensor; 2]>,
    /// Where keys and values of the tokens before are kept, and go.
    pub(super) cache: Option<&'b mut KeyValues>,
}

/// Hidden states, and the keys and values that attention saw; none where they are another layer's.
pub(super) type Output = (Tensor, Option<[Tensor; 2]>);

impl Layer {
    pub(super) fn new(weights: &Weights<'_>, config: &DecoderConfig, layer: &LayerConfig) -> Result<Self> {
        let norm =
            |name: Option<&str>| name.map(|name| RmsNorm::new(&weights.at(name), config, config.width)).transpose();
        let norms = config.norms;
        let own_input = config.layer_inputs.map(|(_, width)| LayerInput::new(weights, config, width)).transpose()?;
        Ok(Self {
            before_attention: norm(norms.before_attention)?,
            attention: Attention::new(&weights.at("self_attn"), config, layer)?,
            after_attention: norm(norms.after_attention)?,
            before_feed_forward: norm(norms.before_feed_forward)?,
            feed_forward: FeedForward::new(&weights.at("mlp"), config, layer)?,
            after_feed_forward: norm(norms.after_feed_forward)?,
            residual_scale: config.residual_scale,
            scalar: own_input.is_some().then(|| weights.tensor("layer_scalar", &[1])).transpose()?,
            layer_input: own_input,
        })
    }

    /// `[batch, tokens, width]` of the same.
    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        beside: Beside<'_>,
        context: &Context,
        pass: &Pass,
    ) -> Result<Output> {
        let Beside { layer_input, borrowed, cache } = beside;
        // What nothing reads again goes before the feed-forward, where most is held.
        let (hidden, keys_values) = {
            let read = normed(self.before_attention.as_ref(), hidden, pass)?;
            let (added, keys_values) = self.attention.forward(&read, borrowed, cache, context, pass)?;
            (self.residual(hidden, &normed(self.after_attention.as_ref(), &added, pass)?)?, keys_values)
        };
        let read = normed(self.before_feed_forward.as_ref(), &hidden, pass)?;
        let added = self.feed_forward.forward(&read, pass)?;
        let mut hidden = self.residual(&hidden, &normed(self.after_feed_forward.as_ref(), &added, pass)?)?;
        if let (Some(own), Some(input)) = (&self.layer_input, layer_input) {
            hidden = hidden.f_add(&own.forward(&hidden, input, pass)?)?;
        }
        if let Some(scalar) = &self.scalar {
            hidden = hidden.f_mul(&scalar.f_to_kind(hidden.kind())?)?;
        }
        Ok((hidden, keys_values))
    }

    fn residual(&self, hidden: &Tensor, added: &Tensor) -> Result<Tensor> {
        if self.residual_scale == 1.0 {
            return Ok(hidden.f_add(added)?);
        }
        Ok(hidden.f_add(&added.f_mul_scalar(self.residual_scale)?)?)
    }

    pub(super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        let norm = |norm: &mut Option<RmsNorm>, visit: &mut dyn FnMut(&mut AdaptableLayer)| {
            norm.iter_mut().for_each(|norm| norm.visit(visit));
        };
        norm(&mut self.before_attention, visit);
        self.attention.visit(visit);
        norm(&mut self.after_attention, visit);
        norm(&mut self.before_feed_forward, visit);
        self.feed_forward.visit(visit)?;
        norm(&mut self.after_feed_forward, visit);
        if let Some(LayerInput { gate, projection, norm, .. }) = &mut self.layer_input {
            [gate, projection].into_iter().for_each(&mut *visit);
            norm.visit(visit);
        }
        Ok(())
    }
}

fn normed(norm: Option<&RmsNorm>, input: &Tensor, pass: &Pass) -> Result<Tensor> {
    norm.map_or_else(|| Ok(input.shallow_clone()), |norm| norm.forward(input, pass))
}

/// Normalisation by the root of the mean square over the last axis.
#[derive(Debug)]
pub(super) struct RmsNorm {
    /// None multiplies by nothing.
    weight: Option<AdaptableLayer>,
    epsilon: f64,
    way: RmsWeight,
}

impl RmsNorm {
    pub(super) fn new(weights: &Weights<'_>, config: &DecoderConfig, width: usize) -> Result<Self> {
        Ok(Self { weight: Some(AdaptableLayer::norm(weights, width)?), ..Self::without_weight(config) })
    }

    fn without_weight(config: &DecoderConfig) -> Self {
        Self { weight: None, epsilon: config.epsilon, way: config.norm }
    }

    /// In the dtype of the input; sums are in f32.
    pub(super) fn forward(&self, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        let factors = self.weight.as_ref().map(|weight| weight.factors(pass)).transpose()?;
        Ok(rms_norm(input, factors.as_ref(), self.epsilon, self.way)?)
    }

    pub(super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        self.weight.iter_mut().for_each(visit);
    }
}

/// A layer's own input: gated by the hidden states, brought to their width and normed.
#[derive(Debug)]
struct LayerInput {
    gate: AdaptableLayer,
    projection: AdaptableLayer,
    norm: RmsNorm,
    activation: Gate,
}

impl LayerInput {
    fn new(weights: &Weights<'_>, config: &DecoderConfig, width: usize) -> Result<Self> {
        Ok(Self {
            gate: linear(&weights.at("per_layer_input_gate"), config.width, width)?,
            projection: linear(&weights.at("per_layer_projection"), width, config.width)?,
            norm: RmsNorm::new(&weights.at("post_per_layer_input_norm"), config, config.width)?,
            activation: config.activation,
        })
    }

    fn forward(&self, hidden: &Tensor, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        let inner = gated(&self.gate.forward(hidden, pass)?, input, self.activation)?;
        self.norm.forward(&self.projection.forward(&inner, pass)?, pass)
    }
}

/// Attention with what is around it.
#[derive(Debug)]
struct Attention {
    projections: Projections,
    o_proj: AdaptableLayer,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    v_norm: Option<RmsNorm>,
    norms_heads: bool,
    layer: LayerConfig,
    cap: Option<f64>,
    /// `[heads]`.
    sinks: Option<Tensor>,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a layer has one")]
enum Projections {
    /// Keys and values may be another layer's, and values may be the keys.
    Separate {
        q_proj: AdaptableLayer,
        k_proj: Option<AdaptableLayer>,
        v_proj: Option<AdaptableLayer>,
    },
    Fused(AdaptableLayer),
}

impl Attention {
    fn new(weights: &Weights<'_>, config: &DecoderConfig, layer: &LayerConfig) -> Result<Self> {
        let (queries, keys) = (layer.heads * layer.head, layer.kv_heads * layer.head);
        let project = |name: &str, outputs| linear(&weights.at(name), config.width, outputs);
        let has_keys = layer.borrows.is_none();
        let projections = if config.fused_attention {
            Projections::Fused(project("qkv_proj", queries + 2 * keys)?)
        } else {
            Projections::Separate {
                q_proj: project("q_proj", queries)?,
                k_proj: has_keys.then(|| project("k_proj", keys)).transpose()?,
                v_proj: (has_keys && !layer.keys_are_values).then(|| project("v_proj", keys)).transpose()?,
            }
        };
        let norm = |name: &str, all: usize, wanted: bool| match config.query_key_norm {
            QueryKeyNorm::Heads if wanted => RmsNorm::new(&weights.at(name), config, layer.head).map(Some),
            QueryKeyNorm::All if wanted => RmsNorm::new(&weights.at(name), config, all).map(Some),
            _ => Ok(None),
        };
        Ok(Self {
            projections,
            o_proj: linear(&weights.at("o_proj"), queries, config.width)?,
            q_norm: norm("q_norm", queries, true)?,
            k_norm: norm("k_norm", keys, has_keys)?,
            v_norm: (config.value_norm && has_keys).then(|| RmsNorm::without_weight(config)),
            norms_heads: config.query_key_norm == QueryKeyNorm::Heads,
            layer: layer.clone(),
            cap: config.attention_cap,
            sinks: config.sinks.then(|| weights.tensor("sinks", &[layer.heads])).transpose()?,
        })
    }

    fn forward(
        &self,
        input: &Tensor,
        borrowed: Option<[&Tensor; 2]>,
        cache: Option<&mut KeyValues>,
        context: &Context,
        pass: &Pass,
    ) -> Result<Output> {
        let [query, key, value] = self.project(input, pass)?;
        let query = query.ok_or_else(lost)?;
        let query = self.placed(&self.heads(&query, self.layer.heads, self.q_norm.as_ref(), pass)?, context)?;
        let query = context.grown(query)?;
        let own = match (key, value) {
            (Some(key), value) => {
                let value = value.as_ref().unwrap_or(&key);
                let value = self.heads(value, self.layer.kv_heads, self.v_norm.as_ref(), pass)?;
                let key = self.placed(&self.heads(&key, self.layer.kv_heads, self.k_norm.as_ref(), pass)?, context)?;
                Some(match cache {
                    Some(cache) => cache.append(&key, &value)?,
                    None => [key, value],
                })
            }
            _ => None,
        };
        let [key, value] = match (&own, borrowed) {
            (Some([key, value]), _) => [key, value],
            (None, Some(borrowed)) => borrowed,
            (None, None) => return Err(lost()),
        };
        let (key, value) = context.in_window(key, value, self.layer.sight())?;
        let mask = context.mask(self.layer.sight())?;
        let scores = Scores { scale: self.layer.scale, cap: self.cap, sinks: self.sinks.as_ref() };
        let mixed = attend(&query, &key, &value, mask, scores)?;
        let output = self.o_proj.forward(&mixed.f_transpose(1, 2)?.f_flatten(2, 3)?, pass)?;
        Ok((output, own))
    }

    /// Query, key and value, `[batch, tokens, heads · head]`, as far as the layer has them.
    fn project(&self, input: &Tensor, pass: &Pass) -> Result<[Option<Tensor>; 3]> {
        let project =
            |layer: &Option<AdaptableLayer>| layer.as_ref().map(|layer| layer.forward(input, pass)).transpose();
        match &self.projections {
            Projections::Separate { q_proj, k_proj, v_proj } => {
                Ok([Some(q_proj.forward(input, pass)?), project(k_proj)?, project(v_proj)?])
            }
            Projections::Fused(qkv_proj) => {
                let all = qkv_proj.forward(input, pass)?;
                let LayerConfig { heads, kv_heads, head, .. } = self.layer;
                let (queries, keys) = ((heads * head) as i64, (kv_heads * head) as i64);
                let part = |from, width| all.f_narrow(-1, from, width).map(Some);
                Ok([part(0, queries)?, part(queries, keys)?, part(queries + keys, keys)?])
            }
        }
    }

    /// `[batch, heads, tokens, head]`, normed.
    fn heads(&self, input: &Tensor, heads: usize, norm: Option<&RmsNorm>, pass: &Pass) -> Result<Tensor> {
        let split = |input: &Tensor| input.f_unflatten(-1, [heads as i64, self.layer.head as i64]);
        let by_head = match norm {
            Some(norm) if self.norms_heads => norm.forward(&split(input)?, pass)?,
            Some(norm) => split(&norm.forward(input, pass)?)?,
            None => split(input)?,
        };
        Ok(by_head.f_transpose(1, 2)?)
    }

    fn placed(&self, heads: &Tensor, context: &Context) -> Result<Tensor> {
        match self.layer.rope {
            Some(rope) => context.tables[rope].turn(heads),
            None => Ok(heads.shallow_clone()),
        }
    }

    fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        match &mut self.projections {
            Projections::Separate { q_proj, k_proj, v_proj } => {
                visit(q_proj);
                k_proj.iter_mut().chain(v_proj).for_each(&mut *visit);
            }
            Projections::Fused(qkv_proj) => visit(qkv_proj),
        }
        visit(&mut self.o_proj);
        [&mut self.q_norm, &mut self.k_norm].into_iter().flatten().for_each(|norm| norm.visit(visit));
    }
}

/// A layer that was built without keys was run without those of another, or the other way round.
fn lost() -> crate::Error {
    crate::Error::Input {
        what: "keys and values of a layer",
        expected: "the layer's own, or those of the layer that it shares them with".into(),
        found: "neither".into(),
    }
}
