//! CLIP's text encoder (Radford et al., 2021; OpenCLIP's: Cherti et al., 2023), as transformers' `CLIPTextModel`.
//! Tokens come from outside.

use lora_core::Component;
use lora_io::checkpoint::ComponentWeights;
use lora_torch::checkpoint::Shared;
use lora_torch::tch::{Kind, Tensor};
use serde_json::Value;

use super::config;
use crate::layers::{Adaptable, AdaptableLayer, LayerNorm, Pass, attention, exclusive, head_width};
use crate::weights::{Weights, dimension};
use crate::{Error, Result};

/// Tokens of one row: begin, 75 of text, end.
const ROW: i64 = 77;

/// Tokens of CLIP's vocabulary: a smaller table would be read past its end.
const CLIP_VOCABULARY: usize = 49408;

/// Sizes of a text encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClipConfig {
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// Width of the hidden states.
    pub width: usize,
    /// Width inside the feed-forward layers.
    pub intermediate: usize,
    /// Number of layers that are used; a file may hold more.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// The exact GELU, as OpenCLIP has it, instead of `x · sigmoid(1.702 x)`.
    pub exact_gelu: bool,
    /// Width of the pooled vector, where the model's last states are projected to one (`CLIPTextModelWithProjection`).
    pub projection: Option<usize>,
}

impl ClipConfig {
    /// Read off a component: widths from shapes; layers, heads and activation from its `config.json`. Without one, as
    /// in a single file, all layers are used, heads are 64 wide and the activation is that of OpenAI's CLIP. OpenCLIP's
    /// text encoders have the exact GELU, which nothing in a single file tells: whoever knows the family sets it. A
    /// projection is left out, which most families do not read: [`ClipConfig::with_projection`] has it.
    ///
    /// # Errors
    /// Where a weight that sizes are read off is missing or lacks axes, or the config asks for what is not built here.
    pub fn detect(component: &ComponentWeights) -> Result<Self> {
        let wrong = |reason: String| config::wrong(component, reason);
        let name = "text_model.embeddings.token_embedding.weight";
        let (vocabulary, width) = (dimension(component, name, 0)?, dimension(component, name, 1)?);
        if vocabulary < CLIP_VOCABULARY {
            return Err(wrong(format!("a text encoder of {vocabulary} tokens; expected CLIP's {CLIP_VOCABULARY}")));
        }
        let layer = |index: usize| format!("text_model.encoder.layers.{index}.mlp.fc1.weight");
        let present = (0..).take_while(|&index| component.contains(&layer(index))).count();
        let heads = config::number(component, "num_attention_heads")?.unwrap_or(width / head_width(&[width]));
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(wrong(format!("a text encoder of width {width} does not divide into {heads} heads")));
        }
        let exact_gelu = match config::value(component, "hidden_act").and_then(Value::as_str).unwrap_or("quick_gelu") {
            "quick_gelu" => false,
            "gelu" => true,
            other => return Err(wrong(format!("text encoder: activation `{other}`; expected quick_gelu or gelu"))),
        };
        Ok(Self {
            vocabulary,
            width,
            intermediate: dimension(component, &layer(0), 0)?,
            layers: config::number(component, "num_hidden_layers")?.unwrap_or(present),
            heads,
            exact_gelu,
            projection: None,
        })
    }

    /// With the projection that a component has.
    ///
    /// # Errors
    /// Where it has none.
    pub fn with_projection(self, component: &ComponentWeights) -> Result<Self> {
        Ok(Self { projection: Some(dimension(component, &format!("{PROJECTION}.weight"), 0)?), ..self })
    }
}

/// The layer that makes the pooled vector, beside the levels of `text_model`.
const PROJECTION: &str = "text_projection";

/// The text encoder.
#[derive(Debug)]
pub struct ClipTextEncoder {
    component: Component,
    config: ClipConfig,
    kind: Kind,
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<Shared<Layer>>,
    final_layer_norm: LayerNorm,
    projection: Option<AdaptableLayer>,
}

/// What a text encoder tells a network that reads the states before its last layer.
#[derive(Debug)]
pub struct Penultimate {
    /// States before the last layer, without the final norm, `[captions, states, width]`.
    pub states: Tensor,
    /// The last layer's state of each caption's end, normed and projected, `[captions, projection]`; where the model
    /// has a projection.
    pub pooled: Option<Tensor>,
}

#[derive(Debug)]
struct Layer {
    heads: usize,
    exact_gelu: bool,
    layer_norm1: LayerNorm,
    q_proj: AdaptableLayer,
    k_proj: AdaptableLayer,
    v_proj: AdaptableLayer,
    out_proj: AdaptableLayer,
    layer_norm2: LayerNorm,
    fc1: AdaptableLayer,
    fc2: AdaptableLayer,
}

impl ClipTextEncoder {
    /// Built from its weights.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source has other weights than `config`; out of
    /// memory.
    pub fn new(weights: &Weights<'_>, config: ClipConfig) -> Result<Self> {
        let width = config.width;
        let projection = |outputs| AdaptableLayer::linear(&weights.at(PROJECTION), width, outputs, false);
        let projection = config.projection.map(projection).transpose()?;
        let weights = weights.at("text_model");
        let embeddings = weights.at("embeddings");
        let layers = (0..config.layers)
            .map(|index| Layer::new(&weights.at("encoder.layers").at(index), &config).map(Shared::new));
        Ok(Self {
            component: Component::TEXT_ENCODER,
            config,
            kind: weights.kind(),
            token_embedding: embeddings.at("token_embedding").tensor("weight", &[config.vocabulary, width])?,
            position_embedding: embeddings.at("position_embedding").tensor("weight", &[ROW as usize, width])?,
            layers: layers.collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::new(&weights.at("final_layer_norm"), width)?,
            projection,
        })
    }

    /// The same as another text encoder of a base than the first.
    #[must_use]
    pub fn of(self, component: Component) -> Self {
        Self { component, ..self }
    }

    /// Its sizes.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// Hidden states `[rows, 77, width]` of token rows `[rows, 77]` (int64), final norm applied. `clip_skip` 1 is the
    /// last layer; 2 leaves it out, as for bases trained so; and so on.
    ///
    /// # Errors
    /// Where rows or `clip_skip` do not fit, and where memory runs out.
    pub fn forward(&self, tokens: &Tensor, clip_skip: usize, pass: &Pass) -> Result<Tensor> {
        let layers = (self.config.layers + 1).checked_sub(clip_skip).filter(|_| clip_skip >= 1);
        let Some(layers) = layers else {
            return Err(Error::Input {
                what: "text encoder",
                expected: format!("clip_skip from 1 to {}", self.config.layers),
                found: clip_skip.to_string(),
            });
        };
        let hidden = self.through(&self.layers[..layers], self.embedded(tokens)?, pass)?;
        self.final_layer_norm.forward(&hidden)
    }

    /// Hidden states of captions of `chunks` rows each, `[captions · chunks, 77]`, joined as sd-scripts does: the first
    /// chunk's start, 75 states of every chunk, the last chunk's end. `[captions, chunks · 75 + 2, width]`.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn encode(&self, tokens: &Tensor, chunks: usize, clip_skip: usize, pass: &Pass) -> Result<Tensor> {
        self.joined(self.forward(tokens, clip_skip, pass)?, chunks)
    }

    /// States before the last layer of captions of `chunks` rows each, joined as by [`Self::encode`], and their pooled
    /// vectors. `ends`, `[captions]` (int64), are the places of the end tokens that pooled vectors are read at, counted over all
    /// rows: of a caption's first row, as sd-scripts takes it. Without a projection the last layer is not run.
    ///
    /// # Errors
    /// Where rows do not fit, and where memory runs out.
    pub fn penultimate(&self, tokens: &Tensor, ends: &Tensor, chunks: usize, pass: &Pass) -> Result<Penultimate> {
        let (last, before) = self.layers.split_last().ok_or_else(|| Error::Input {
            what: "text encoder",
            expected: "layers".into(),
            found: "none".into(),
        })?;
        let states = self.through(before, self.embedded(tokens)?, pass)?;
        let pooled = match &self.projection {
            None => None,
            Some(_) => {
                let hidden = self.through(std::slice::from_ref(last), states.shallow_clone(), pass)?;
                Some(self.ending(&hidden, ends, pass)?)
            }
        };
        Ok(Penultimate { states: self.joined(states, chunks)?, pooled })
    }

    /// The states of rows' ends through all layers, the final norm and the projection where there is one, `[rows, width]`; `ends` as
    /// for [`Self::penultimate`].
    ///
    /// # Errors
    /// As [`Self::penultimate`].
    pub fn end(&self, tokens: &Tensor, ends: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.ending(&self.through(&self.layers, self.embedded(tokens)?, pass)?, ends, pass)
    }

    /// The states before the last layer, `[rows, 77, width]`, and [`Self::end`].
    ///
    /// # Errors
    /// As [`Self::penultimate`].
    pub fn states_and_end(&self, tokens: &Tensor, ends: &Tensor, pass: &Pass) -> Result<(Tensor, Tensor)> {
        let last = self.layers.len().saturating_sub(1);
        let states = self.through(&self.layers[..last], self.embedded(tokens)?, pass)?;
        let hidden = self.through(&self.layers[last..], states.shallow_clone(), pass)?;
        Ok((states, self.ending(&hidden, ends, pass)?))
    }

    fn ending(&self, hidden: &Tensor, ends: &Tensor, pass: &Pass) -> Result<Tensor> {
        let ending = Tensor::f_embedding(&hidden.f_flatten(0, 1)?, ends, -1, false, false)?;
        let ending = self.final_layer_norm.forward(&ending)?;
        self.projection.as_ref().map_or(Ok(ending.shallow_clone()), |projection| projection.forward(&ending, pass))
    }

    fn embedded(&self, tokens: &Tensor) -> Result<Tensor> {
        if tokens.size().last() != Some(&ROW) {
            return Err(Error::Input {
                what: "text encoder",
                expected: format!("rows of {ROW} tokens"),
                found: format!("tokens {:?}", tokens.size()),
            });
        }
        let embedded = Tensor::f_embedding(&self.token_embedding, tokens, -1, false, false)?;
        Ok(embedded.f_add(&self.position_embedding)?.f_to_kind(self.kind)?)
    }

    fn through(&self, layers: &[Shared<Layer>], mut hidden: Tensor, pass: &Pass) -> Result<Tensor> {
        for layer in layers {
            let inputs = [&hidden];
            hidden = pass.block(layer, &inputs, |layer, inputs, pass| layer.forward(&inputs[0], pass))?;
        }
        Ok(hidden)
    }

    fn joined(&self, states: Tensor, chunks: usize) -> Result<Tensor> {
        if chunks == 1 {
            return Ok(states);
        }
        let states = states.f_view([-1, chunks as i64, ROW, self.config.width as i64])?;
        let middle = states.f_narrow(2, 1, ROW - 2)?.f_flatten(1, 2)?;
        let start = states.f_select(1, 0)?.f_narrow(1, 0, 1)?;
        let end = states.f_select(1, -1)?.f_narrow(1, ROW - 1, 1)?;
        Ok(Tensor::f_cat(&[start, middle, end], 1)?)
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

impl Layer {
    fn new(weights: &Weights<'_>, config: &ClipConfig) -> Result<Self> {
        let attention = weights.at("self_attn");
        let width = config.width;
        let square = |name: &str| AdaptableLayer::linear(&attention.at(name), width, width, true);
        Ok(Self {
            heads: config.heads,
            exact_gelu: config.exact_gelu,
            layer_norm1: LayerNorm::new(&weights.at("layer_norm1"), width)?,
            q_proj: square("q_proj")?,
            k_proj: square("k_proj")?,
            v_proj: square("v_proj")?,
            out_proj: square("out_proj")?,
            layer_norm2: LayerNorm::new(&weights.at("layer_norm2"), width)?,
            fc1: AdaptableLayer::linear(&weights.at("mlp.fc1"), width, config.intermediate, true)?,
            fc2: AdaptableLayer::linear(&weights.at("mlp.fc2"), config.intermediate, width, true)?,
        })
    }

    fn forward(&self, hidden: &Tensor, pass: &Pass) -> Result<Tensor> {
        let normed = self.layer_norm1.forward(hidden)?;
        let query = self.q_proj.forward(&normed, pass)?;
        let key = self.k_proj.forward(&normed, pass)?;
        let value = self.v_proj.forward(&normed, pass)?;
        let mixed = attention(&query, &key, &value, self.heads, true)?;
        let hidden = hidden.f_add(&self.out_proj.forward(&mixed, pass)?)?;

        let inner = self.fc1.forward(&self.layer_norm2.forward(&hidden)?, pass)?;
        let inner = if self.exact_gelu {
            inner.f_gelu("none")?
        } else {
            inner.f_mul(&inner.f_mul_scalar(1.702)?.f_sigmoid()?)?
        };
        Ok(hidden.f_add(&self.fc2.forward(&inner, pass)?)?)
    }
}

impl Adaptable for ClipTextEncoder {
    fn component(&self) -> Component {
        self.component
    }

    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        for layer in &mut self.layers {
            let Layer { q_proj, k_proj, v_proj, out_proj, fc1, fc2, .. } = exclusive(layer)?;
            [q_proj, k_proj, v_proj, out_proj, fc1, fc2].into_iter().for_each(&mut *visit);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lora_torch::tch::Device;

    use super::*;
    use crate::synthetic::SyntheticModel;
    use crate::weights::{Held, SyntheticWeights, TrainedWeights};

    #[test]
    fn adapters_do_not_come_while_a_loss_is_alive() {
        let source = SyntheticWeights::new("text_encoder");
        let held = Held::Trained(TrainedWeights::default());
        let weights = Weights::new(&source, Kind::Float, Device::Cpu).held(held);
        let mut encoder = ClipTextEncoder::new(&weights, SyntheticModel::tiny().text_encoder).unwrap();
        let tokens = Tensor::zeros([1, ROW], (Kind::Int64, Device::Cpu));
        let loss = encoder.forward(&tokens, 1, &Pass { recompute: true, ..Pass::default() }).unwrap();
        assert!(matches!(encoder.adaptable_layers(), Err(Error::InUse)));
        drop(loss);
        assert_eq!(encoder.adaptable_layers().unwrap().len(), 18);
    }
}
