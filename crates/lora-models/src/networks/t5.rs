//! The encoder of T5 v1.1 (Raffel et al., JMLR 2020; gated feed-forward by Shazeer, 2020) that transformers of pictures read
//! captions with: transformers' `T5EncoderModel`. Tokens come from `lora_data`; which states a base reads is its own
//! business.

use lora_core::Component;
use lora_io::checkpoint::ComponentWeights;
use lora_torch::activation::{Gate, gated};
use lora_torch::checkpoint::Shared;
use lora_torch::norm::{RmsWeight, rms_norm};
use lora_torch::tch::{Kind, Tensor};

use super::config;
use crate::layers::{Adaptable, AdaptableLayer, Pass, exclusive};
use crate::weights::{Weights, dimension};
use crate::{Error, Result};

/// Sizes of a T5 encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct T5Config {
    /// Rows of the table of tokens.
    pub vocabulary: usize,
    /// Width of a token's state.
    pub width: usize,
    /// Width of all heads of an attention together.
    pub inner: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width inside of the feed-forward.
    pub intermediate: usize,
    /// Number of layers.
    pub layers: usize,
    /// Distances between tokens that attention tells apart.
    pub buckets: usize,
    /// The distance from which on all are one.
    pub max_distance: usize,
}

/// The bias by distance, which the first layer holds and all use.
const BIAS: &str = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";

/// Numbers of published files that a norm adds under its root.
const EPSILON: f64 = 1e-6;

/// In fp16 the feed-forward's inner numbers are smaller by this much, a power of two, so that they stay in range: states of
/// published models grow past 65,504.
const HALF_SCALE: f64 = 1.0 / 64.0;

impl T5Config {
    /// Read off a component's names and shapes; the largest distance from its `config.json`, 128 without one.
    ///
    /// # Errors
    /// Where a weight that sizes are read off is missing or lacks axes, or sizes do not fit each other.
    pub fn detect(component: &ComponentWeights) -> Result<Self> {
        let layer = |index: usize| format!("encoder.block.{index}.layer.0.SelfAttention.q.weight");
        let config = Self {
            vocabulary: dimension(component, "shared.weight", 0)?,
            width: dimension(component, "shared.weight", 1)?,
            inner: dimension(component, &layer(0), 0)?,
            heads: dimension(component, BIAS, 1)?,
            intermediate: dimension(component, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0)?,
            layers: (0..).take_while(|&index| component.contains(&layer(index))).count(),
            buckets: dimension(component, BIAS, 0)?,
            max_distance: config::number(component, "relative_attention_max_distance")?.unwrap_or(128),
        };
        if config.heads == 0 || !config.inner.is_multiple_of(config.heads) {
            let reason = format!("T5 encoder whose width {} does not divide into {} heads", config.inner, config.heads);
            return Err(config::wrong(component, reason));
        }
        if config.buckets < 4 || config.buckets / 4 >= config.max_distance {
            let reason = format!("T5 encoder with {} distances up to {}", config.buckets, config.max_distance);
            return Err(config::wrong(component, reason));
        }
        Ok(config)
    }
}

/// A T5 encoder.
#[derive(Debug)]
pub struct T5Encoder {
    component: Component,
    config: T5Config,
    kind: Kind,
    shared: AdaptableLayer,
    /// `[buckets, heads]`.
    bias: Tensor,
    layers: Vec<Shared<Layer>>,
    final_norm: Norm,
}

#[derive(Debug)]
struct Layer {
    heads: i64,
    norm_attention: Norm,
    q: AdaptableLayer,
    k: AdaptableLayer,
    v: AdaptableLayer,
    o: AdaptableLayer,
    norm_feed_forward: Norm,
    wi_0: AdaptableLayer,
    wi_1: AdaptableLayer,
    wo: AdaptableLayer,
    kind: Kind,
}

/// RMS normalisation, whose answer is in the compute dtype whatever that of the stream.
#[derive(Debug)]
struct Norm {
    weight: Tensor,
    kind: Kind,
}

impl Norm {
    fn new(weights: &Weights<'_>, width: usize) -> Result<Self> {
        Ok(Self { weight: weights.tensor("weight", &[width])?, kind: weights.kind() })
    }

    fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let weight = self.weight.f_to_kind(input.kind())?;
        Ok(rms_norm(input, Some(&weight), EPSILON, RmsWeight::Rounded)?.f_to_kind(self.kind)?)
    }
}

impl T5Encoder {
    /// Built from its weights.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source has other weights than `config`; out of
    /// memory.
    pub fn new(weights: &Weights<'_>, config: T5Config) -> Result<Self> {
        let blocks = weights.at("encoder.block");
        let layers = (0..config.layers).map(|index| Layer::new(&blocks.at(index), &config).map(Shared::new));
        Ok(Self {
            component: Component::TEXT_ENCODER_2,
            config,
            kind: weights.kind(),
            shared: AdaptableLayer::embedding(&weights.at("shared"), config.vocabulary, config.width, true)?,
            bias: weights.tensor(BIAS, &[config.buckets, config.heads])?,
            layers: layers.collect::<Result<_>>()?,
            final_norm: Norm::new(&weights.at("encoder.final_layer_norm"), config.width)?,
        })
    }

    /// The same as another text encoder of a base than the second.
    #[must_use]
    pub fn of(self, component: Component) -> Self {
        Self { component, ..self }
    }

    /// Its sizes.
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Hidden states `[rows, tokens, width]` of token rows `[rows, tokens]` (int64), final norm applied, in the compute
    /// dtype. Nothing is masked: most bases that read these states were trained with those of filled-up rows.
    ///
    /// # Errors
    /// Where tokens are no rows, and where memory runs out.
    pub fn forward(&self, tokens: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.forward_seeing(i64::MAX, tokens, pass)
    }

    /// The same where tokens see the first `seen` alone: those behind them fill the rows up.
    ///
    /// # Errors
    /// As of [`forward`](Self::forward).
    pub fn forward_seeing(&self, seen: i64, tokens: &Tensor, pass: &Pass) -> Result<Tensor> {
        let &[_, length] = tokens.size().as_slice() else {
            let found = format!("tokens {:?}", tokens.size());
            return Err(Error::Input { what: "T5 encoder", expected: "rows of tokens".into(), found });
        };
        let bias = self.distance_bias(length)?;
        if seen < length {
            let _ = bias.f_narrow(3, seen, length - seen)?.f_fill_(f64::NEG_INFINITY)?;
        }
        let mut hidden = self.shared.forward(tokens, pass)?.f_to_kind(self.stream())?;
        for layer in &self.layers {
            hidden = pass
                .block(layer, &[&hidden, &bias], |layer, inputs, pass| layer.forward(&inputs[0], &inputs[1], pass))?;
        }
        self.final_norm.forward(&hidden)
    }

    /// What layers hand on: f32 where the compute dtype is fp16, whose range published states leave.
    fn stream(&self) -> Kind {
        if self.kind == Kind::Half { Kind::Float } else { self.kind }
    }

    /// `[1, heads, tokens, tokens]`: what is added to scores by how far a key is from its query.
    fn distance_bias(&self, length: i64) -> Result<Tensor> {
        let device = self.bias.device();
        let offsets: Vec<i64> = (1 - length..length).map(|offset| bucket(&self.config, offset)).collect();
        let offsets = Tensor::f_from_slice(&offsets)?.f_to_device(device)?;
        // One number for each offset, looked up; then each query's row is a run of them.
        let by_offset = Tensor::f_embedding(&self.bias, &offsets, -1, false, false)?;
        let places = Tensor::f_arange(length, (Kind::Int64, device))?;
        let places = places.f_unsqueeze(0)?.f_sub(&places.f_unsqueeze(1)?)?.f_add_scalar(length - 1)?;
        let bias = Tensor::f_embedding(&by_offset, &places, -1, false, false)?;
        Ok(bias.f_permute([2, 0, 1])?.f_unsqueeze(0)?.f_to_kind(self.kind)?.f_contiguous()?)
    }
}

/// The bucket of a key so many tokens behind its query: half of them for each direction, of which the first half are
/// distances by themselves and the others wider and wider, as logarithms have it.
fn bucket(config: &T5Config, offset: i64) -> i64 {
    let half = config.buckets as i64 / 2;
    let exact = half / 2;
    let distance = offset.abs();
    let place = if distance < exact {
        distance
    } else {
        // In f32, as the reference rounds.
        let share = (distance as f32 / exact as f32).ln() / (config.max_distance as f64 / exact as f64).ln() as f32;
        (exact + (share * (half - exact) as f32) as i64).min(half - 1)
    };
    if offset > 0 { half + place } else { place }
}

impl Layer {
    fn new(weights: &Weights<'_>, config: &T5Config) -> Result<Self> {
        let (attention, feed_forward) = (weights.at("layer.0.SelfAttention"), weights.at("layer.1.DenseReluDense"));
        let &T5Config { width, inner, intermediate, .. } = config;
        let linear = |weights: Weights<'_>, inputs, outputs| AdaptableLayer::linear(&weights, inputs, outputs, false);
        Ok(Self {
            heads: config.heads as i64,
            norm_attention: Norm::new(&weights.at("layer.0.layer_norm"), width)?,
            q: linear(attention.at("q"), width, inner)?,
            k: linear(attention.at("k"), width, inner)?,
            v: linear(attention.at("v"), width, inner)?,
            o: linear(attention.at("o"), inner, width)?,
            norm_feed_forward: Norm::new(&weights.at("layer.1.layer_norm"), width)?,
            wi_0: linear(feed_forward.at("wi_0"), width, intermediate)?,
            wi_1: linear(feed_forward.at("wi_1"), width, intermediate)?,
            wo: linear(feed_forward.at("wo"), intermediate, width)?,
            kind: weights.kind(),
        })
    }

    fn forward(&self, hidden: &Tensor, bias: &Tensor, pass: &Pass) -> Result<Tensor> {
        let normed = self.norm_attention.forward(hidden)?;
        let heads = |layer: &AdaptableLayer| -> Result<Tensor> {
            let projected = layer.forward(&normed, pass)?;
            let (rows, tokens, inner) = projected.size3()?;
            Ok(projected.f_view([rows, tokens, self.heads, inner / self.heads])?.f_transpose(1, 2)?)
        };
        let (query, key, value) = (heads(&self.q)?, heads(&self.k)?, heads(&self.v)?);
        // Scores are not divided by the root of the heads' width.
        let mixed =
            Tensor::f_scaled_dot_product_attention(&query, &key, &value, Some(bias), 0.0, false, Some(1.0), false)?;
        let mixed = mixed.f_transpose(1, 2)?.f_flatten(2, 3)?;
        let hidden = hidden.f_add(&self.o.forward(&mixed, pass)?)?;

        let normed = self.norm_feed_forward.forward(&hidden)?;
        let (gate, up) = (self.wi_0.forward(&normed, pass)?, self.wi_1.forward(&normed, pass)?);
        if self.kind != Kind::Half {
            let inner = gated(&gate, &up, Gate::GeluTanh)?;
            return Ok(hidden.f_add(&self.wo.forward(&inner, pass)?)?);
        }
        let inner = gated(&gate, &up.f_mul_scalar(HALF_SCALE)?, Gate::GeluTanh)?;
        let out = self.wo.forward(&inner, pass)?.f_to_kind(Kind::Float)?;
        Ok(hidden.f_add(&out.f_mul_scalar(1.0 / HALF_SCALE)?)?)
    }
}

impl Adaptable for T5Encoder {
    fn component(&self) -> Component {
        self.component
    }

    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        for layer in &mut self.layers {
            let Layer { q, k, v, o, wi_0, wi_1, wo, .. } = exclusive(layer)?;
            [q, k, v, o, wi_0, wi_1, wo].into_iter().for_each(&mut *visit);
        }
        Ok(())
    }
}
