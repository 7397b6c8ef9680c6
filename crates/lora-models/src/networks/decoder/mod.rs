//! Causal language models: one decoder for many families, which differ in a few switches ([`DecoderConfig`]). Names and
//! arithmetic are transformers'. Tokenizers, templates and data are not here.
//!
//! | here | what |
//! |---|---|
//! | `config` | the switches, read from a `config.json` |
//! | `families` | what families decide about them |
//! | `keys` | keys of a `config.json` |
//! | `rotary` | positions |
//! | `attention` | which tokens see which, and the sums |
//! | `feed_forward` | gated, or a mixture of experts |
//! | `experts` | such a mixture |
//! | `layer` | one layer out of these |
//! | `loss` | logits and the loss of next tokens |
//! | `generate` | writing texts |

mod attention;
mod config;
mod experts;
mod families;
mod feed_forward;
mod generate;
mod keys;
mod layer;
mod loss;
mod rotary;

pub use config::{DecoderConfig, Experts, LayerConfig, LayerNorms, QueryKeyNorm, Shares};
pub use generate::Sampling;
pub use loss::{LossOptions, NO_LABEL};
pub use rotary::Rope;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use lora_core::Component;
use lora_torch::checkpoint::Shared;
use lora_torch::tch::{Device, Kind, Tensor};

use self::attention::{Mask, Sight};
use self::feed_forward::linear;
use self::generate::KeyValues;
use self::layer::{Beside, Layer, RmsNorm};
use self::loss::Head;
use self::rotary::{Frequencies, Tables};
use crate::layers::{Adaptable, AdaptableLayer, Pass, exclusive};
use crate::weights::Weights;
use crate::{Error, Result};

/// A causal language model.
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    kind: Kind,
    embed_tokens: AdaptableLayer,
    layer_inputs: Option<LayerInputs>,
    layers: Vec<Shared<Layer>>,
    norm: RmsNorm,
    head: Shared<Head>,
    frequencies: Vec<Frequencies>,
}

/// Tokens in rows. All tensors are int64 on the decoder's device.
#[derive(Debug)]
pub struct Rows {
    /// `[batch, tokens]`.
    pub tokens: Tensor,
    /// The place of each token in its document, from 0, `[batch, tokens]`, or `[1, tokens]` for all rows.
    pub positions: Tensor,
    /// Which document of its row a token is of, `[batch, tokens]`: numbers from 0 and below the number of tokens. Tokens
    /// of a document lie side by side and see none of another; padding is a document of its own. Without, a row is one.
    pub documents: Option<Tensor>,
    /// How many tokens of a row are not padding, where padding is behind them: no token sees padding, not even its own.
    pub unpadded: Option<usize>,
    /// Added to the embeddings, `[batch, tokens, width]`, f32: noise, while training (NEFTune).
    pub noise: Option<Tensor>,
    /// What the tokens look up, where that was done before the pass.
    pub looked_up: LookedUp,
}

/// Rows of the embeddings of tokens, looked up beforehand ([`Decoder::look_up`]): in the compute dtype, on the decoder's
/// device. Where there are none the pass looks them up.
#[derive(Debug, Default)]
pub struct LookedUp {
    /// Of `embed_tokens`, `[batch, tokens, width]`.
    pub tokens: Option<Tensor>,
    /// Of the table of layers' own inputs, `[batch, tokens, layers · own width]`.
    pub layer_inputs: Option<Tensor>,
}

impl LookedUp {
    /// The same tensors once more.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let of = |own: &Option<Tensor>| own.as_ref().map(Tensor::shallow_clone);
        Self { tokens: of(&self.tokens), layer_inputs: of(&self.layer_inputs) }
    }
}

impl Rows {
    /// Rows `[batch, tokens]` of one document each, whose first token is at a position.
    ///
    /// # Errors
    /// If the tensor has other axes.
    pub fn of(tokens: &Tensor, first: i64) -> Result<Self> {
        let (_, count) = tokens.size2()?;
        let positions = Tensor::f_arange_start(first, first + count, (Kind::Int64, tokens.device()))?;
        Ok(Self {
            tokens: tokens.shallow_clone(),
            positions: positions.f_unsqueeze(0)?,
            documents: None,
            unpadded: None,
            noise: None,
            looked_up: LookedUp::default(),
        })
    }

    /// The length of each token's document, or of a row's longest where documents are not told apart, in a shape that
    /// broadcasts to the tokens'.
    fn lengths(&self) -> Result<Tensor> {
        let Some(documents) = &self.documents else {
            return Ok(self.positions.f_amax([1i64], true)?.f_add_scalar(1)?);
        };
        let (batch, tokens) = documents.size2()?;
        let positions = self.positions.f_expand([batch, tokens], false)?;
        // A number beyond the row's length would be read past the end of a table.
        let documents = documents.f_remainder(tokens)?;
        let last = positions.f_zeros_like()?.f_internal_scatter_reduce(1, &documents, &positions, "amax", true)?;
        Ok(last.f_gather(1, &documents, false)?.f_add_scalar(1)?)
    }
}

/// What all layers of a pass read: made once, held by those that are computed again.
#[derive(Debug)]
struct Context {
    tables: Vec<Tables>,
    masks: BTreeMap<Sight, Mask>,
    /// What queries are multiplied by, `[batch, 1, tokens, 1]`.
    growth: Option<Tensor>,
    /// One token behind its keys, of which a window is cut out.
    continues: bool,
}

impl Context {
    fn mask(&self, sight: Sight) -> Result<&Mask> {
        self.masks.get(&sight).ok_or_else(|| Error::Input {
            what: "window of a layer",
            expected: "one of the decoder's".into(),
            found: format!("{sight:?}"),
        })
    }

    fn grown(&self, query: Tensor) -> Result<Tensor> {
        match &self.growth {
            Some(growth) => Ok(query.f_mul(&growth.f_to_kind(query.kind())?)?),
            None => Ok(query),
        }
    }

    fn in_window(&self, key: &Tensor, value: &Tensor, sight: Sight) -> Result<(Tensor, Tensor)> {
        let (tokens, first) = (key.size4()?.2, sight.first as i64);
        match sight.window.map(|window| window as i64).filter(|window| self.continues && window + first < tokens) {
            Some(window) => {
                let seen = |all: &Tensor| -> Result<Tensor> {
                    let last = all.f_narrow(2, tokens - window, window)?;
                    Ok(if first > 0 { Tensor::f_cat(&[all.f_narrow(2, 0, first)?, last], 2)? } else { last })
                };
                Ok((seen(key)?, seen(value)?))
            }
            None => Ok((key.shallow_clone(), value.shallow_clone())),
        }
    }
}

/// Inputs of each layer: a second embedding, and a projection of the first.
#[derive(Debug)]
struct LayerInputs {
    embed_tokens: AdaptableLayer,
    projection: AdaptableLayer,
    norm: RmsNorm,
    width: usize,
}

impl LayerInputs {
    fn new(weights: &Weights<'_>, config: &DecoderConfig, rows: usize, width: usize) -> Result<Self> {
        let all = config.layers.len() * width;
        Ok(Self {
            embed_tokens: AdaptableLayer::embedding(&weights.at("embed_tokens_per_layer"), rows, all, true)?,
            projection: linear(&weights.at("per_layer_model_projection"), config.width, all)?,
            norm: RmsNorm::new(&weights.at("per_layer_projection_norm"), config, width)?,
            width,
        })
    }

    /// `[batch, tokens, layers, width]`.
    fn forward(&self, rows: &Rows, embedded: &Tensor, pass: &Pass) -> Result<Tensor> {
        let split = |all: &Tensor| all.f_unflatten(-1, [-1, self.width as i64]);
        let own = self.embed_tokens.forward_looked_up(&rows.tokens, rows.looked_up.layer_inputs.as_ref(), pass)?;
        let own = scaled(&own, (self.width as f64).sqrt())?;
        let width = embedded.size().last().copied().unwrap_or(1);
        let projected = self.projection.forward(embedded, pass)?.f_mul_scalar((width as f64).powf(-0.5))?;
        let projected = self.norm.forward(&split(&projected)?, pass)?;
        Ok(projected.f_add(&split(&own)?)?.f_mul_scalar(0.5f64.sqrt())?)
    }
}

/// A tensor times a number that is rounded to the tensor's dtype first.
fn scaled(input: &Tensor, factor: f64) -> Result<Tensor> {
    let factor = match input.kind() {
        Kind::BFloat16 => f64::from(half::bf16::from_f64(factor)),
        Kind::Half => f64::from(half::f16::from_f64(factor)),
        _ => factor,
    };
    Ok(if factor == 1.0 { input.shallow_clone() } else { input.f_mul_scalar(factor)? })
}

/// The kind of a whole pass.
enum Work<'w> {
    /// The rows by themselves.
    Rows,
    /// Behind those whose keys and values are kept; documents will be as long as this.
    Continued { caches: &'w mut [KeyValues], length: i64 },
}

impl Decoder {
    /// Built from its weights. Embeddings and head are held as [`Weights::tables`] says; a head in few bytes is made whole
    /// for each token that is written, as all layers are. Of SmolLM2 135M in Q4_1, whose head is a fifth of its weights, a
    /// token took 117 ms on two CPU cores, 16 ms more than with a whole head (November 2026).
    ///
    /// # Errors
    /// If a weight is missing or has another shape than the configuration says.
    pub fn load(weights: &Weights<'_>, config: DecoderConfig) -> Result<Self> {
        let model = weights.at("model");
        let embed_tokens =
            AdaptableLayer::embedding(&model.at("embed_tokens"), config.vocabulary, config.width, !config.tied)?;
        // Before the layers: while a table is packed, it is there as a whole beside what has been loaded.
        let lm_head = match config.tied {
            true => AdaptableLayer::tied_to(&embed_tokens, weights.at("lm_head").prefix())?,
            false => linear(&weights.at("lm_head").tables(), config.width, config.vocabulary)?,
        };
        let layers = config.layers.iter().enumerate();
        let layers =
            layers.map(|(index, own)| Layer::new(&model.at("layers").at(index), &config, own).map(Shared::new));
        let layers = layers.collect::<Result<_>>()?;
        let norm = RmsNorm::new(&model.at("norm"), &config, config.width)?;
        let layer_inputs = config.layer_inputs.map(|(rows, width)| LayerInputs::new(&model, &config, rows, width));
        let frequencies = config.ropes.iter().map(|rope| Frequencies::new(rope, weights.kind(), weights.device()));
        Ok(Self {
            kind: weights.kind(),
            embed_tokens,
            layer_inputs: layer_inputs.transpose()?,
            layers,
            norm,
            head: Shared::new(Head { lm_head, scale: config.logits_scale, cap: config.logits_cap }),
            frequencies: frequencies.collect::<Result<_>>()?,
            config,
        })
    }

    /// How it is built.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.embed_tokens.device()
    }

    /// What tokens `[batch, tokens]` in host memory look up in tables that are there too: a CUDA graph cannot do that. Such
    /// are tables that only rows are read of, where the weights are in few bytes or live in host memory.
    ///
    /// # Errors
    /// If a token is not of the vocabulary, or memory runs out.
    pub fn look_up(&self, tokens: &Tensor) -> Result<LookedUp> {
        let layer_inputs = self.layer_inputs.as_ref().map(|own| own.embed_tokens.looked_up(tokens)).transpose()?;
        Ok(LookedUp { tokens: self.embed_tokens.looked_up(tokens)?, layer_inputs: layer_inputs.flatten() })
    }

    fn head(&self) -> &Shared<Head> {
        &self.head
    }

    /// Hidden states `[batch, tokens, width]` after the last layer and the final norm, in the compute dtype.
    ///
    /// # Errors
    /// If the rows' tensors do not fit each other, or memory runs out.
    pub fn hidden(&self, rows: &Rows, pass: &Pass) -> Result<Tensor> {
        let mut states = self.states(rows, &[self.layers.len()], pass)?;
        states.pop().ok_or_else(|| rows_error(rows))
    }

    /// Hidden states after so many layers each, in the order asked for: 0 is the embedding, and after all of them comes
    /// the final norm, as in transformers' `hidden_states`. Layers behind the last that is asked for are not computed.
    ///
    /// # Errors
    /// As [`Self::hidden`], and where the decoder has fewer layers than that.
    pub fn states(&self, rows: &Rows, after: &[usize], pass: &Pass) -> Result<Vec<Tensor>> {
        self.check(rows, after)?;
        self.run(rows, after, pass, Work::Rows)
    }

    /// Hidden states of rows behind those whose keys and values are kept.
    fn continue_hidden(&self, rows: &Rows, length: i64, caches: &mut [KeyValues], pass: &Pass) -> Result<Tensor> {
        let mut states = self.run(rows, &[self.layers.len()], pass, Work::Continued { caches, length })?;
        states.pop().ok_or_else(|| rows_error(rows))
    }

    fn check(&self, rows: &Rows, after: &[usize]) -> Result<()> {
        let (batch, tokens) = rows.tokens.size2()?;
        let fits = |of: &Tensor| of.size() == [batch, tokens] || of.size() == [1, tokens];
        if tokens == 0
            || !fits(&rows.positions)
            || rows.documents.as_ref().is_some_and(|own| own.size() != [batch, tokens])
        {
            return Err(rows_error(rows));
        }
        match after.iter().find(|&&count| count > self.layers.len()) {
            None => Ok(()),
            Some(count) => Err(Error::Input {
                what: "layers",
                expected: format!("at most {}", self.layers.len()),
                found: count.to_string(),
            }),
        }
    }

    fn run(&self, rows: &Rows, after: &[usize], pass: &Pass, mut work: Work<'_>) -> Result<Vec<Tensor>> {
        let context = Shared::new(self.context(rows, &work)?);
        let embedded = self.embed_tokens.forward_looked_up(&rows.tokens, rows.looked_up.tokens.as_ref(), pass)?;
        let mut embedded = embedded.f_to_kind(self.kind)?;
        if let Some(noise) = &rows.noise {
            embedded = embedded.f_add(&noise.f_to_kind(self.kind)?)?;
        }
        let mut hidden = scaled(&embedded, self.config.embedding_scale)?;
        let inputs = self.layer_inputs.as_ref().map(|own| own.forward(rows, &hidden, pass)).transpose()?;
        let depth = after.iter().copied().max().unwrap_or(0);
        let mut states: BTreeMap<usize, Tensor> = BTreeMap::new();
        let mut lent: BTreeMap<usize, [Tensor; 2]> = BTreeMap::new();
        for index in 0..=depth {
            if after.contains(&index) {
                let last = index == self.layers.len();
                states.insert(index, if last { self.norm.forward(&hidden, pass)? } else { hidden.shallow_clone() });
            }
            if index < depth {
                let input = inputs.as_ref().map(|all| all.f_select(2, index as i64)).transpose()?;
                hidden = match &mut work {
                    Work::Rows => self.step(index, &hidden, input.as_ref(), &mut lent, &context, pass)?,
                    Work::Continued { caches, .. } => {
                        let borrowed = self.config.layers[index].borrows.and_then(|from| lent.get(&from));
                        let beside = Beside {
                            layer_input: input.as_ref(),
                            borrowed: borrowed.map(|[key, value]| [key, value]),
                            cache: caches.get_mut(index),
                        };
                        let (hidden, own) = self.layers[index].forward(&hidden, beside, &context, pass)?;
                        lent.extend(own.map(|own| (index, own)));
                        hidden
                    }
                };
            }
        }
        Ok(after.iter().filter_map(|index| states.get(index)).map(Tensor::shallow_clone).collect())
    }

    /// One layer, whose activations may be computed again. Keys and values that later layers borrow leave it beside the
    /// hidden states.
    fn step(
        &self,
        index: usize,
        hidden: &Tensor,
        layer_input: Option<&Tensor>,
        lent: &mut BTreeMap<usize, [Tensor; 2]>,
        context: &Shared<Context>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let own = &self.config.layers[index];
        let lends = self.config.layers.iter().any(|other| other.borrows == Some(index));
        let borrowed = own.borrows.and_then(|from| lent.get(&from));
        let (has_input, borrows) = (layer_input.is_some(), borrowed.is_some());
        let beside = layer_input.into_iter().chain(borrowed.into_iter().flatten());
        let inputs: Vec<&Tensor> = [hidden].into_iter().chain(beside).collect();
        let context = context.clone();
        let output = pass.block(&self.layers[index], &inputs, move |layer, inputs, pass| {
            let (layer_input, rest) = inputs[1..].split_at(usize::from(has_input));
            let borrowed = if let (true, [key, value]) = (borrows, rest) { Some([key, value]) } else { None };
            let beside = Beside { layer_input: layer_input.first(), borrowed, cache: None };
            let (hidden, keys_values) = layer.forward(&inputs[0], beside, &context, pass)?;
            let Some(keys_values) = keys_values.filter(|_| lends) else { return Ok(hidden) };
            let flat = |heads: &Tensor| heads.f_transpose(1, 2)?.f_flatten(2, 3);
            Ok(Tensor::f_cat(&[hidden, flat(&keys_values[0])?, flat(&keys_values[1])?], 2)?)
        })?;
        if !lends {
            return Ok(output);
        }
        let (width, keys) = (self.config.width as i64, (own.kv_heads * own.head) as i64);
        let heads = |from: i64| -> Result<Tensor> {
            let split = output.f_narrow(2, from, keys)?.f_unflatten(2, [own.kv_heads as i64, own.head as i64])?;
            Ok(split.f_transpose(1, 2)?)
        };
        lent.insert(index, [heads(width)?, heads(width + keys)?]);
        Ok(output.f_narrow(2, 0, width)?)
    }

    fn context(&self, rows: &Rows, work: &Work<'_>) -> Result<Context> {
        let device = rows.tokens.device();
        let lengths = match work {
            Work::Rows if self.frequencies.iter().any(Frequencies::depends_on_lengths) => rows.lengths()?,
            Work::Rows => rows.positions.shallow_clone(),
            Work::Continued { length, .. } => Tensor::f_full([1, 1], *length, (Kind::Int64, device))?,
        };
        let tables = self.frequencies.iter().map(|own| own.tables(&rows.positions, &lengths));
        let tokens = rows.tokens.size2()?.1;
        let continues = matches!(work, Work::Continued { caches, .. } if tokens == 1 && !caches.is_empty());
        let of_rows = attention::Rows {
            documents: rows.documents.as_ref(),
            unpadded: rows.unpadded.map(|count| count as i64),
            tokens,
            kind: self.kind,
            device,
            block: attention::BLOCK,
        };
        let looked_at = self.config.attention_cap.is_some() || self.config.sinks;
        let mut masks = BTreeMap::new();
        for layer in &self.config.layers {
            if let Entry::Vacant(place) = masks.entry(layer.sight()) {
                place.insert(if continues { Mask::All } else { of_rows.mask(layer.sight(), looked_at)? });
            }
        }
        let growth = self.config.query_growth.map(|(factor, length)| -> Result<Tensor> {
            let steps = rows.positions.f_to_kind(Kind::Float)?.f_div_scalar(length as f64)?.f_floor()?;
            let growth = steps.f_log1p()?.f_mul_scalar(factor)?.f_add_scalar(1.0)?;
            Ok(growth.f_unsqueeze(1)?.f_unsqueeze(-1)?)
        });
        Ok(Context { tables: tables.collect::<Result<_>>()?, masks, growth: growth.transpose()?, continues })
    }
}

fn rows_error(rows: &Rows) -> Error {
    Error::Input {
        what: "rows",
        expected: "tokens, positions and documents of one shape [batch, tokens]".into(),
        found: format!(
            "tokens {:?}, positions {:?}, documents {:?}",
            rows.tokens.size(),
            rows.positions.size(),
            rows.documents.as_ref().map(Tensor::size)
        ),
    }
}

impl Adaptable for Decoder {
    fn component(&self) -> Component {
        Component::LANGUAGE_MODEL
    }

    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        visit(&mut self.embed_tokens);
        if let Some(LayerInputs { embed_tokens, projection, norm, .. }) = &mut self.layer_inputs {
            visit(embed_tokens);
            visit(projection);
            norm.visit(visit);
        }
        for layer in &mut self.layers {
            exclusive(layer)?.visit(visit)?;
        }
        self.norm.visit(visit);
        visit(&mut exclusive(&mut self.head)?.lm_head);
        Ok(())
    }
}
