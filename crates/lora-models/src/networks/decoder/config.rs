//! What a decoder is built like, read from its `config.json`. Families differ in a few switches; keys that a file leaves
//! out have the defaults of its family in transformers. Names and shapes of weights are not checked here.

use lora_io::checkpoint::ComponentWeights;
use lora_torch::activation::Gate;
use lora_torch::norm::RmsWeight;
use serde_json::Value;

use super::attention::Sight;
use super::families::{self, FAMILIES, GPT_OSS, Switches};
use super::keys::Reader;
use super::rotary::Rope;
use crate::weights::dimension;
use crate::{Error, Result};

/// How a decoder is built.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DecoderConfig {
    /// transformers' `model_type`.
    pub architecture: &'static str,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Width of the hidden states.
    pub width: usize,
    /// The layers, first to last.
    pub layers: Vec<LayerConfig>,
    /// The rotary positions that layers choose among.
    pub ropes: Vec<Rope>,
    /// How norms multiply by their weight.
    pub norm: RmsWeight,
    /// Added to the mean square in norms.
    pub epsilon: f64,
    /// Which norms a layer has, and their names.
    pub norms: LayerNorms,
    /// What of queries and keys is normed before they turn.
    pub query_key_norm: QueryKeyNorm,
    /// Whether values are normed, without a weight.
    pub value_norm: bool,
    /// Query, key and value are one layer, `qkv_proj`.
    pub fused_attention: bool,
    /// Gate and up-projection are one layer, `gate_up_proj`.
    pub fused_feed_forward: bool,
    /// Of the feed-forward's gate.
    pub activation: Gate,
    /// Scores of attention are squashed to within ± this.
    pub attention_cap: Option<f64>,
    /// Each query head has a logit of its own that takes part in the softmax and leads nowhere.
    pub sinks: bool,
    /// Logits are squashed to within ± this.
    pub logits_cap: Option<f64>,
    /// Embeddings are multiplied by this, rounded to the compute dtype.
    pub embedding_scale: f64,
    /// What attention and feed-forward add is multiplied by this.
    pub residual_scale: f64,
    /// Logits are multiplied by this.
    pub logits_scale: f64,
    /// The head is the embedding's table.
    pub tied: bool,
    /// Queries grow with the position: the factor on the logarithm, and the length of a step.
    pub query_growth: Option<(f64, usize)>,
    /// Inputs of each layer beside the hidden states, from a second embedding: its rows, and their width by layer.
    pub layer_inputs: Option<(usize, usize)>,
    /// Tokens after which the model's answers end, as its config names them.
    pub end_tokens: Vec<i64>,
}

/// How one layer is built.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LayerConfig {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, which divide the query heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head: usize,
    /// Scores are multiplied by this.
    pub scale: f64,
    /// Tokens that are seen, the token itself among them; all without.
    pub window: Option<usize>,
    /// Beside the window, so many of the document's first tokens are seen (attention sinks, arXiv 2309.17453).
    pub first: usize,
    /// Its rotary positions among [`DecoderConfig::ropes`]; none without.
    pub rope: Option<usize>,
    /// Width inside the feed-forward, or inside one expert.
    pub intermediate: usize,
    /// Its feed-forward is a mixture of experts.
    pub experts: Option<Experts>,
    /// It attends to the keys and values of this earlier layer and has none of its own.
    pub borrows: Option<usize>,
    /// Its keys, before their norm, are its values too.
    pub keys_are_values: bool,
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a token goes through.
    pub chosen: usize,
    /// How much the chosen ones count.
    pub shares: Shares,
    /// All experts' weights are one tensor in the file, gate and up-projection in turn, and biased; gate and up are held
    /// within ± this, and `(up + 1) · gate · sigmoid(1.702 gate)` is what comes out of them.
    pub stacked: Option<f64>,
}

/// How much the experts that a token goes through count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shares {
    /// As the softmax over all experts says.
    OfAll,
    /// The same, divided by their sum.
    Normalised,
    /// As the softmax over the chosen ones says.
    OfChosen,
}

/// The norms of a layer by their names in the file, where there are such.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerNorms {
    /// On what attention reads.
    pub before_attention: Option<&'static str>,
    /// On what attention adds.
    pub after_attention: Option<&'static str>,
    /// On what the feed-forward reads.
    pub before_feed_forward: Option<&'static str>,
    /// On what the feed-forward adds.
    pub after_feed_forward: Option<&'static str>,
}

/// What of queries and keys is normed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryKeyNorm {
    /// Nothing.
    None,
    /// Each head by itself.
    Heads,
    /// All heads together.
    All,
}

impl LayerConfig {
    pub(super) fn sight(&self) -> Sight {
        Sight { window: self.window, first: self.first }
    }
}

impl DecoderConfig {
    /// Names of the architectures that are known here.
    pub fn known() -> impl Iterator<Item = &'static str> {
        FAMILIES.iter().map(|(name, _)| *name)
    }

    /// Of a language model on disk.
    ///
    /// # Errors
    /// As [`Self::read`], and without a `config.json`.
    pub fn detect(component: &ComponentWeights) -> Result<Self> {
        let source = component.path().display().to_string();
        match component.config() {
            Some(config) => Self::read(config, &source),
            None => Err(Error::Architecture { source_name: source, reason: "has no config.json".into() }),
        }
    }

    /// Of a file with Qwen3's weights, or with Qwen2.5's, and no `config.json`: sizes from names and shapes, what they do not show
    /// as published.
    ///
    /// # Errors
    /// If a weight that sizes are read off is missing or lacks axes.
    pub fn of_qwen(component: &ComponentWeights) -> Result<Self> {
        let side = |name: &str, axis| dimension(component, name, axis);
        let layer = |name: &str| format!("model.layers.0.{name}.weight");
        let count = |index: &usize| component.contains(&format!("model.layers.{index}.input_layernorm.weight"));
        // The older family has biases, no norm of queries, and no shape that shows the width of a head.
        let older = component.contains("model.layers.0.self_attn.q_proj.bias");
        let head = if older { 128 } else { side(&layer("self_attn.q_norm"), 0)?.max(1) };
        let config = serde_json::json!({
            "model_type": if older { "qwen2" } else { "qwen3" },
            "vocab_size": side("model.embed_tokens.weight", 0)?,
            "hidden_size": side("model.embed_tokens.weight", 1)?,
            "intermediate_size": side(&layer("mlp.gate_proj"), 0)?,
            "num_hidden_layers": (0..).take_while(count).count(),
            "num_attention_heads": side(&layer("self_attn.q_proj"), 0)? / head,
            "num_key_value_heads": side(&layer("self_attn.k_proj"), 0)? / head,
            "head_dim": head,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000,
        });
        Self::read(&config, &component.path().display().to_string())
    }

    /// Lets layers that see all earlier tokens, or more than a window of them, see that window and the document's `first`
    /// tokens alone. The places of tokens stay what they are.
    pub fn see_a_window(&mut self, window: usize, first: usize) {
        for layer in self.layers.iter_mut().filter(|layer| layer.window.is_none_or(|own| own > window)) {
            (layer.window, layer.first) = (Some(window), first);
        }
    }

    /// Out of a `config.json`; `source` is what to call it in errors. A wrapper of several kinds of input is read where it
    /// describes its language model.
    ///
    /// # Errors
    /// If the architecture is not known, which is never guessed, a key is missing or of another kind, or the weights
    /// are quantised in a way that is not read here.
    pub fn read(config: &Value, source: &str) -> Result<Self> {
        let whole = Reader { values: config, source, defaults: &[] };
        let inner = config.get("text_config").filter(|inner| inner.is_object());
        let mut config = Reader { values: inner.unwrap_or(config), source, defaults: &[] };
        let kind = config.text("model_type")?.unwrap_or_default();
        let Some((architecture, adjust)) = FAMILIES.iter().find(|(name, _)| *name == kind) else {
            let known: Vec<&str> = Self::known().collect();
            let reason = format!("model_type is `{kind}`, which is not built here; known are {}", known.join(", "));
            return Err(config.wrong(reason));
        };
        whole.refuse_quantised()?;
        if inner.is_some() {
            // Of a part of a wrapper, files say only what is not its family's default.
            config.defaults = families::sizes(architecture);
        }
        let layers = config.size("num_hidden_layers")?;
        if layers > MOST_LAYERS {
            return Err(config.wrong(format!("num_hidden_layers is {layers}; expected at most {MOST_LAYERS}")));
        }
        let mut own = Switches::new(layers);
        adjust(&config, &mut own)?;
        if own.reads_types {
            own.slides = config.layer_types(layers)?.unwrap_or(own.slides);
        }
        let ropes = ropes(&config, &own)?;
        let (layers, query_growth) = (config.layers(&own, ropes.len())?, config.query_growth()?);
        let tied = config.flag("tie_word_embeddings")?.or(whole.flag("tie_word_embeddings")?).unwrap_or(own.tied);
        Ok(Self {
            architecture,
            vocabulary: config.size("vocab_size")?,
            width: config.size("hidden_size")?,
            layers,
            ropes,
            norm: own.norm,
            epsilon: config.real("rms_norm_eps")?.unwrap_or(own.epsilon),
            norms: own.norms,
            query_key_norm: own.query_key_norm,
            value_norm: own.value_norm,
            fused_attention: own.fused_attention,
            fused_feed_forward: own.fused_feed_forward,
            activation: config.activation(architecture)?,
            attention_cap: own.attention_cap,
            sinks: architecture == &GPT_OSS,
            logits_cap: own.logits_cap,
            embedding_scale: own.embedding_scale,
            residual_scale: own.residual_scale,
            logits_scale: own.logits_scale,
            tied,
            query_growth,
            layer_inputs: config.layer_inputs(architecture)?,
            end_tokens: config.end_tokens(),
        })
    }
}

/// More layers than any model has: a number in a file must not make anyone reserve memory.
const MOST_LAYERS: usize = 1024;

/// The rotary positions of full attention, and behind them those of layers with a window where they differ.
fn ropes(config: &Reader<'_>, own: &Switches) -> Result<Vec<Rope>> {
    let full = config.rope(FULL, own)?;
    let slides = own.window.is_some() && own.slides.contains(&true);
    let sliding = if slides { Some(config.rope(SLIDING, own)?) } else { None };
    Ok([full].into_iter().chain(sliding).collect())
}

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

impl Reader<'_> {
    /// Whether each layer has a window, as the file lists it.
    fn layer_types(&self, layers: usize) -> Result<Option<Vec<bool>>> {
        let Some(list) = self.list("layer_types")? else { return Ok(None) };
        if list.len() != layers {
            return Err(self.wrong(format!("layer_types has {} entries for {layers} layers", list.len())));
        }
        let slides = |kind: &Value| match kind.as_str() {
            Some(FULL) => Ok(false),
            Some(SLIDING) => Ok(true),
            _ => Err(self.wrong(format!("layer_types names {kind}; known here are {FULL} and {SLIDING}"))),
        };
        list.iter().map(slides).collect::<Result<_>>().map(Some)
    }

    /// The rotary positions of a type of layers.
    fn rope(&self, layers: &str, own: &Switches) -> Result<Rope> {
        let none = Value::Null;
        let object = |key: &str| self.value(key).filter(|value| value.is_object());
        let (parameters, mut defaults) = match (object("rope_parameters"), object("rope_scaling")) {
            (Some(all), _) if all.get(FULL).or(all.get(SLIDING)).is_some() => {
                (all.get(layers).unwrap_or(&none), own.rope)
            }
            (Some(all), _) => (all, own.rope),
            (None, scaling) => (scaling.unwrap_or(&none), own.rope),
        };
        // Older files say of layers with a window their base alone: they are not scaled.
        let old = object("rope_parameters").is_none();
        let differs = matches!(self.text("model_type")?, Some("gemma3_text" | "olmo3"));
        let top = *self;
        let head = self.head(layers, own)?;
        if layers == SLIDING && old && differs {
            defaults.theta = match self.real("rope_local_base_freq")? {
                Some(theta) => theta,
                None if self.text("model_type")? == Some("gemma3_text") => 10000.0,
                None => self.real("rope_theta")?.unwrap_or(defaults.theta),
            };
            let plain = Reader { values: &none, source: self.source, defaults: &[] };
            return Rope::read(&plain, &plain, head, defaults);
        }
        if layers == SLIDING && matches!(self.text("model_type")?, Some("gemma3_text" | "gemma4_text")) {
            defaults.theta = 10000.0;
        }
        Rope::read(&Reader { values: parameters, source: self.source, defaults: &[] }, &top, head, defaults)
    }

    /// The width of heads in a type of layers.
    fn head(&self, layers: &str, own: &Switches) -> Result<usize> {
        let general = match self.count("head_dim")?.or(own.head) {
            Some(head) => head,
            None => self.size("hidden_size")? / self.size("num_attention_heads")?,
        };
        if layers == SLIDING || self.text("model_type")? != Some("gemma4_text") {
            return Ok(general);
        }
        // Gemma 4's full attention has wider heads, said in one of two ways.
        if self.value("global_head_dim").is_some() {
            return self.size("global_head_dim");
        }
        let by_layer = self.value("per_layer_config").and_then(Value::as_object);
        let full = by_layer.and_then(|layers| layers.values().find_map(|own| own.get("head_dim")?.as_u64()));
        Ok(full
            .and_then(|head| usize::try_from(head).ok())
            .filter(|head| (1..1 << 16).contains(head))
            .unwrap_or(general))
    }

    /// The layers one by one.
    fn layers(&self, own: &Switches, ropes: usize) -> Result<Vec<LayerConfig>> {
        let heads = self.size("num_attention_heads")?;
        let kv_heads = self.size_or("num_key_value_heads", heads)?;
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("{heads} query heads are no multiple of {kv_heads} key and value heads");
            return Err(self.wrong(reason));
        }
        let intermediate = self.size("intermediate_size")?;
        let count = own.slides.len();
        let shared = self.count_or("num_kv_shared_layers", 0)?;
        let own_keys = count.checked_sub(shared).filter(|first| shared == 0 || *first > 0);
        let own_keys = own_keys.ok_or_else(|| self.wrong(format!("num_kv_shared_layers is {shared} of {count}")))?;
        let doubled = self.flag("use_double_wide_mlp")?.unwrap_or(false);
        let keys_are_values = self.flag("attention_k_eq_v")?.unwrap_or(false);
        let global_kv = self.count("num_global_key_value_heads")?;
        let mut layers = Vec::with_capacity(count);
        for index in 0..count {
            let slides = own.window.is_some() && own.slides[index];
            let head = self.head(if slides { SLIDING } else { FULL }, own)?;
            if head == 0 || !head.is_multiple_of(2) {
                return Err(self.wrong(format!("heads are {head} wide; expected an even number")));
            }
            let borrows = match index >= own_keys {
                false => None,
                true => {
                    Some((0..own_keys).rfind(|&earlier| own.slides[earlier] == own.slides[index]).ok_or_else(|| {
                        self.wrong(format!("layer {index} shares keys with an earlier one of its type; there is none"))
                    })?)
                }
            };
            let (experts, intermediate) = match self.experts(index)? {
                Some((experts, width)) => (Some(experts), width),
                None => (None, if doubled && borrows.is_some() { 2 * intermediate } else { intermediate }),
            };
            layers.push(LayerConfig {
                heads,
                kv_heads: global_kv.filter(|_| keys_are_values && !slides).unwrap_or(kv_heads),
                head,
                scale: own.scale.unwrap_or((head as f64).powf(-0.5)),
                window: own.window.filter(|_| slides),
                first: 0,
                rope: (!own.no_rope[index]).then_some(if slides { ropes - 1 } else { 0 }),
                intermediate,
                experts,
                borrows,
                keys_are_values: keys_are_values && !slides,
            });
        }
        Ok(layers)
    }

    /// A layer's experts and their width.
    fn experts(&self, layer: usize) -> Result<Option<(Experts, usize)>> {
        let kind = self.text("model_type")?.unwrap_or_default();
        if kind == GPT_OSS {
            let (count, chosen) = (self.size_or("num_local_experts", 128)?, self.size_or("num_experts_per_tok", 4)?);
            self.check_experts(count, chosen)?;
            let stacked = Some(self.real("swiglu_limit")?.unwrap_or(7.0));
            let experts = Experts { count, chosen, shares: Shares::OfChosen, stacked };
            return Ok(Some((experts, self.size("intermediate_size")?)));
        }
        if kind != "qwen3_moe" {
            return Ok(None);
        }
        let plain = self.list("mlp_only_layers")?.is_some_and(|list| list.iter().any(|own| own == layer));
        if plain || !(layer + 1).is_multiple_of(self.size_or("decoder_sparse_step", 1)?) {
            return Ok(None);
        }
        let count = if self.value("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
        let count = self.size_or(count, 128)?;
        let chosen = self.size_or("num_experts_per_tok", 8)?;
        self.check_experts(count, chosen)?;
        let normalised = self.flag("norm_topk_prob")?.unwrap_or(false);
        let shares = if normalised { Shares::Normalised } else { Shares::OfAll };
        Ok(Some((Experts { count, chosen, shares, stacked: None }, self.size_or("moe_intermediate_size", 768)?)))
    }

    fn check_experts(&self, count: usize, chosen: usize) -> Result<()> {
        if chosen > count || count > 1 << 16 {
            return Err(self.wrong(format!("{chosen} of {count} experts a token")));
        }
        Ok(())
    }

    fn activation(&self, architecture: &str) -> Result<Gate> {
        let gemma = architecture.starts_with("gemma");
        let named = self.text("hidden_activation")?.or(self.text("hidden_act")?);
        match named.unwrap_or(if gemma { "gelu_pytorch_tanh" } else { "silu" }) {
            "silu" | "swish" => Ok(Gate::Silu),
            // Files of the first Gemma say `gelu` and mean this form.
            "gelu_pytorch_tanh" => Ok(Gate::GeluTanh),
            "gelu" if gemma => Ok(Gate::GeluTanh),
            other => Err(self.wrong(format!("the activation is `{other}`; known here are silu and gelu_pytorch_tanh"))),
        }
    }

    /// Ministral 3's growth of queries.
    fn query_growth(&self) -> Result<Option<(f64, usize)>> {
        let Some(parameters) = self.value("rope_parameters").or(self.value("rope_scaling")) else { return Ok(None) };
        let parameters = Reader { values: parameters, source: self.source, defaults: &[] };
        let Some(beta) = parameters.real("llama_4_scaling_beta")? else { return Ok(None) };
        Ok(Some((beta, parameters.size("original_max_position_embeddings")?)))
    }

    fn layer_inputs(&self, architecture: &str) -> Result<Option<(usize, usize)>> {
        if architecture != "gemma4_text" {
            return Ok(None);
        }
        match self.count_or("hidden_size_per_layer_input", 256)? {
            0 => Ok(None),
            width => Ok(Some((self.size_or("vocab_size_per_layer_input", 262_144)?, width))),
        }
    }

    fn end_tokens(&self) -> Vec<i64> {
        match self.value("eos_token_id") {
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_i64).collect(),
            Some(one) => one.as_i64().into_iter().collect(),
            None => Vec::new(),
        }
    }

    /// Weights that another program has quantised are none that are read here.
    fn refuse_quantised(&self) -> Result<()> {
        let Some(quantisation) = self.value("quantization_config") else { return Ok(()) };
        let method = quantisation.get("quant_method").and_then(Value::as_str).unwrap_or("a method without a name");
        Err(self.wrong(format!(
            "the weights are quantised by {method}, which is not read here; take the model in bf16 or fp16, or as GGUF"
        )))
    }
}
