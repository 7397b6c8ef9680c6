//! Names of a language model's tensors in GGUF and in Hugging Face's files, and the order of rows that differs: for
//! `llama` and some other architectures llama.cpp stores the query and key projections with each head's rotary pairs
//! side by side, where Hugging Face keeps the halves apart.

use std::collections::BTreeSet;
use std::path::Path;

use super::{GgufFile, Value};
use crate::{Error, Result};

/// What of a model has to be known to translate its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Architecture {
    /// llama.cpp's name.
    pub name: String,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
}

/// Hugging Face's `model_type` and llama.cpp's name of architectures whose layers have the names below.
const ARCHITECTURES: &[(&str, &str)] = &[
    ("llama", "llama"),
    ("mistral", "llama"),
    ("ministral", "llama"),
    ("ministral3", "mistral3"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("qwen3_moe", "qwen3moe"),
    ("smollm3", "smollm3"),
    ("gemma", "gemma"),
    ("gemma2", "gemma2"),
    ("gemma3_text", "gemma3"),
    ("gemma4_text", "gemma4"),
    ("phi3", "phi3"),
    ("olmo2", "olmo2"),
    ("olmo3", "olmo2"),
    ("granite", "granite"),
    ("glm", "chatglm"),
    ("glm4", "glm4"),
    ("seed_oss", "seed_oss"),
    ("gpt_oss", "gpt-oss"),
];

/// Architectures that llama.cpp turns by neighbouring numbers and Hugging Face by halves of a head: the rows of their
/// query and key projections are stored in llama.cpp's order. (Source: llama.cpp, `llama_model_rope_type` and the
/// converter.)
const REORDERED: &[&str] = &["llama", "mistral3", "smollm3", "granite"];

/// Parts of a layer: GGUF after `blk.N.`, Hugging Face after `model.layers.N.`.
const LAYER: &[(&str, &str)] = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
];

/// Parts that architectures with norms on either side of attention and feed-forward name otherwise.
const NORMS_ON_BOTH_SIDES: &[(&str, &str)] = &[
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// Further parts of Gemma 4.
const PER_LAYER_INPUTS: &[(&str, &str)] = &[("inp_gate", "per_layer_input_gate"), ("proj", "per_layer_projection")];

/// What chooses experts.
const ROUTER: &[(&str, &str)] = &[("ffn_gate_inp", "mlp.gate")];

/// Parts that are several in one.
const FUSED: &[(&str, &str)] = &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")];

const WHOLE: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// The module of Hugging Face's model that a GGUF tensor (without `.weight`) belongs to.
pub fn from_gguf(name: &str) -> Option<String> {
    if let Some((_, module)) = WHOLE.iter().find(|(own, _)| *own == name) {
        return Some((*module).to_owned());
    }
    let (index, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let index: u32 = index.parse().ok()?;
    let (_, module) = LAYER.iter().find(|(own, _)| *own == part)?;
    Some(format!("model.layers.{index}.{module}"))
}

/// The GGUF name, without `.weight`, of a module of Hugging Face's model.
pub(crate) fn to_gguf(module: &str) -> Option<String> {
    if let Some((name, _)) = WHOLE.iter().find(|(_, own)| *own == module) {
        return Some((*name).to_owned());
    }
    let (index, part) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let index: u32 = index.parse().ok()?;
    let (name, _) = LAYER.iter().find(|(_, own)| *own == part)?;
    Some(format!("blk.{index}.{name}"))
}

impl Architecture {
    /// Of a base model: a GGUF file, or a Hugging Face folder with its `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] where the file cannot be read, or its architecture or number of heads is not
    /// known.
    pub fn of_base(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Self::of_gguf(&GgufFile::open(path)?);
        }
        let config = path.join("config.json");
        let json = crate::json::read(&config)?;
        let kind = json["model_type"].as_str().unwrap_or_default();
        let Some((_, name)) = ARCHITECTURES.iter().find(|(own, _)| *own == kind) else {
            let known: Vec<_> = ARCHITECTURES.iter().map(|(own, _)| *own).collect();
            let reason = format!("`model_type` is `{kind}`; known here are {}", known.join(", "));
            return Err(Error::format(&config, reason));
        };
        let heads = json["num_attention_heads"].as_u64();
        Self::checked(&config, name, heads, json["num_key_value_heads"].as_u64().or(heads))
    }

    /// Of a GGUF file, model or adapter.
    pub(crate) fn of_gguf(file: &GgufFile) -> Result<Self> {
        let name = file.text("general.architecture").unwrap_or_default();
        if !ARCHITECTURES.iter().any(|(_, own)| *own == name) {
            let known: BTreeSet<_> = ARCHITECTURES.iter().map(|(_, own)| *own).collect();
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            let reason =
                format!("`general.architecture` is `{name}`; of language models, which go here, are known {known}");
            return Err(Error::format(file.path(), reason));
        }
        let heads = file.number(&format!("{name}.attention.head_count"));
        let kv_heads = file.number(&format!("{name}.attention.head_count_kv")).or(heads);
        Self::checked(file.path(), name, heads, kv_heads)
    }

    fn checked(path: &Path, name: &str, heads: Option<u64>, kv_heads: Option<u64>) -> Result<Self> {
        let count = |number: Option<u64>| number.and_then(|number| usize::try_from(number).ok()).filter(|n| *n > 0);
        let (Some(heads), Some(kv_heads)) = (count(heads), count(kv_heads)) else {
            return Err(Error::format(path, "does not say how many attention heads the model has"));
        };
        Ok(Self { name: name.to_owned(), heads, kv_heads })
    }

    /// The module of Hugging Face's model that a GGUF tensor (without `.weight`) belongs to.
    pub fn module(&self, name: &str) -> Option<String> {
        let own = self.own_parts();
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let own = layer.and_then(|(index, part)| Some((index, own.iter().find(|(stored, _)| *stored == part)?.1)));
        match own {
            Some((index, module)) => Some(format!("model.layers.{}.{module}", index.parse::<u32>().ok()?)),
            None => from_gguf(name),
        }
    }

    /// The GGUF name, without `.weight`, of a module of Hugging Face's model.
    pub fn stored(&self, module: &str) -> Option<String> {
        let layer = module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let own = layer.and_then(|(index, part)| {
            let (stored, _) = self.own_parts().iter().find(|(_, own)| *own == part)?;
            Some(format!("blk.{}.{stored}", index.parse::<u32>().ok()?))
        });
        own.or_else(|| to_gguf(module))
    }

    /// What this architecture names otherwise than most.
    fn own_parts(&self) -> &'static [(&'static str, &'static str)] {
        match self.name.as_str() {
            "gemma2" | "gemma3" => NORMS_ON_BOTH_SIDES,
            "gemma4" => PER_LAYER_INPUTS,
            "phi3" | "glm4" | "chatglm" => FUSED,
            "qwen3moe" => ROUTER,
            _ => &[],
        }
    }

    /// What is added to the numbers of a tensor of Hugging Face's model (with `.weight`) where llama.cpp stores it.
    pub(super) fn shift(&self, name: &str) -> f32 {
        if self.name.starts_with("gemma") && name.ends_with("norm.weight") { 1.0 } else { 0.0 }
    }

    /// Hugging Face's `model_type`; the first of several.
    pub(super) fn model_type(&self) -> &'static str {
        ARCHITECTURES.iter().find(|(_, own)| *own == self.name).map_or("", |(kind, _)| kind)
    }

    /// transformers' class of the whole model.
    pub(super) fn class(&self) -> &'static str {
        match self.name.as_str() {
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            "gemma" => "GemmaForCausalLM",
            "gemma2" => "Gemma2ForCausalLM",
            "gemma3" => "Gemma3ForCausalLM",
            "phi3" => "Phi3ForCausalLM",
            _ => "LlamaForCausalLM",
        }
    }

    /// The header values that say it.
    pub(crate) fn values(&self) -> [(String, Value); 3] {
        let key = |part: &str| format!("{}.attention.{part}", self.name);
        [
            ("general.architecture".into(), Value::Text(self.name.clone())),
            (key("head_count"), Value::Unsigned(self.heads as u64)),
            (key("head_count_kv"), Value::Unsigned(self.kv_heads as u64)),
        ]
    }

    /// Heads of a module whose rows are stored in llama.cpp's order.
    pub(crate) fn reordered(&self, module: &str) -> Option<usize> {
        let is = |end: &str| is_reordered(&self.name) && module.ends_with(end);
        match module {
            _ if is(".q_proj") => Some(self.heads),
            _ if is(".k_proj") => Some(self.kv_heads),
            _ => None,
        }
    }
}

/// Whether an architecture's query and key rows are in llama.cpp's order.
pub(crate) fn is_reordered(architecture: &str) -> bool {
    REORDERED.contains(&architecture)
}

/// Which way rows are put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    ToGguf,
    FromGguf,
}

/// Rows of a `[rows, …]` tensor in the other order: per head, `[2, half]` in Hugging Face's files, `[half, 2]` in
/// llama.cpp's. None where the heads do not divide the rows into pairs.
pub(crate) fn reorder<T: Clone>(values: &[T], rows: usize, heads: usize, order: Order) -> Option<Vec<T>> {
    let side = rows / heads.max(1);
    if rows == 0 || side * heads != rows || !side.is_multiple_of(2) {
        return None;
    }
    let (half, width) = (side / 2, values.len() / rows);
    let mut ordered = Vec::with_capacity(values.len());
    for row in 0..rows {
        let (head, place) = (row / side, row % side);
        let from = match order {
            Order::ToGguf => (place % 2) * half + place / 2,
            Order::FromGguf => (place % half) * 2 + place / half,
        };
        let from = head * side + from;
        ordered.extend_from_slice(&values[from * width..(from + 1) * width]);
    }
    Some(ordered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_translate_both_ways() {
        for module in
            ["model.layers.11.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.embed_tokens", "lm_head"]
        {
            assert_eq!(from_gguf(&to_gguf(module).unwrap()).unwrap(), module);
        }
        assert_eq!(from_gguf("blk.x.attn_q"), None);
        assert_eq!(to_gguf("model.layers.1.block_sparse_moe.gate"), None);
    }

    #[test]
    fn rows_come_back() {
        let rows: Vec<u32> = (0..16).collect();
        let there = reorder(&rows, 8, 2, Order::ToGguf).unwrap();
        assert_eq!(there[..8], [0, 1, 4, 5, 2, 3, 6, 7], "pairs of rows 0, 2, 1, 3 of the first head");
        assert_eq!(reorder(&there, 8, 2, Order::FromGguf).unwrap(), rows);
        assert_eq!(reorder(&rows, 8, 3, Order::ToGguf), None);
    }
}
