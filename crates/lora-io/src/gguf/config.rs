//! The `config.json` of a language model out of a GGUF file's header. Names of tensors are [`super::names`]'s business.

use serde_json::{Map, Value as Json, json};

use super::GgufFile;
use super::names::Architecture;
use crate::{Error, Result};

/// The configuration in transformers' words. `vocabulary` is the number of rows of the embedding, `divisors` what each
/// rotary frequency is divided by.
///
/// # Errors
/// If the header lacks a size, or scales rotary positions in a way that is not known here.
pub(super) fn of(
    file: &GgufFile,
    architecture: &Architecture,
    vocabulary: Option<usize>,
    tied: bool,
    divisors: Option<Vec<f32>>,
) -> Result<Json> {
    let key = |part: &str| format!("{}.{part}", architecture.name);
    let size = |part: &str| {
        let missing = || Error::format(file.path(), format!("the header has no `{}`; is it a whole model?", key(part)));
        file.number(&key(part)).filter(|number| *number > 0).ok_or_else(missing)
    };
    let width = size("embedding_length")?;
    let head = file.number(&key("attention.key_length")).unwrap_or(width / architecture.heads as u64);
    let mut config = Map::new();
    let mut set = |name: &str, value: Json| drop(config.insert(name.into(), value));
    set("model_type", json!(architecture.model_type()));
    set("hidden_size", json!(width));
    set("num_hidden_layers", json!(size("block_count")?));
    set("intermediate_size", json!(size("feed_forward_length")?));
    set("num_attention_heads", json!(architecture.heads));
    set("num_key_value_heads", json!(architecture.kv_heads));
    set("head_dim", json!(head));
    set("vocab_size", json!(vocabulary));
    set("tie_word_embeddings", json!(tied));
    set("rope_theta", json!(file.float(&key("rope.freq_base")).unwrap_or(10000.0)));
    let numbers = [("max_position_embeddings", key("context_length"))];
    let tokens = ["bos_token_id", "eos_token_id"].map(|name| (name, format!("tokenizer.ggml.{name}")));
    for (name, key) in numbers.into_iter().chain(tokens) {
        if let Some(number) = file.number(&key) {
            set(name, json!(number));
        }
    }
    if let Some(epsilon) = file.float(&key("attention.layer_norm_rms_epsilon")) {
        set("rms_norm_eps", json!(epsilon));
    }
    if let Some(turned) = file.number(&key("rope.dimension_count")).filter(|turned| *turned < head) {
        set("partial_rotary_factor", json!(turned as f64 / head as f64));
    }
    if let Some(scaling) = scaling(file, &key("rope.scaling"), &key("context_length"), divisors)? {
        set("rope_scaling", scaling);
    }
    Ok(Json::Object(config))
}

/// How positions are scaled.
fn scaling(file: &GgufFile, own: &str, context: &str, divisors: Option<Vec<f32>>) -> Result<Option<Json>> {
    if let Some(divisors) = divisors {
        // A divisor for each frequency is what transformers calls longrope; as one list whatever the length, and
        // without its factor on the attention.
        let length = file.number(context).unwrap_or(u64::from(u32::MAX));
        return Ok(Some(json!({
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": length,
        })));
    }
    let kind = match file.text(&format!("{own}.type")) {
        None | Some("none") => return Ok(None),
        Some(kind @ ("linear" | "yarn")) => kind,
        Some(other) => {
            let reason = format!("`{own}.type` is `{other}`; known here are none, linear and yarn");
            return Err(Error::format(file.path(), reason));
        }
    };
    let mut scaling = json!({ "rope_type": kind, "factor": file.float(&format!("{own}.factor")).unwrap_or(1.0) });
    if let Some(length) = file.number(&format!("{own}.original_context_length")) {
        scaling["original_max_position_embeddings"] = json!(length);
    }
    Ok(Some(scaling))
}
