//! The `config.json` of a language model out of a GGUF file's header. Names of tensors are [`super::names`]'s business.

use serde_json::{Map, Value as Json, json};

use super::GgufFile;
use super::names::Architecture;
use crate::{Error, Result};

/// The configuration in transformers' words. `vocabulary` is the number of rows of the embedding, `divisors` what each
/// rotary frequency is divided by in short and in long texts.
///
/// # Errors
/// If the header lacks a size, or scales rotary positions in a way that is not known here.
pub(super) fn of(
    file: &GgufFile,
    architecture: &Architecture,
    vocabulary: Option<usize>,
    tied: bool,
    divisors: Option<[Vec<f32>; 2]>,
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
    let numbers = [("max_position_embeddings", key("context_length"))];
    let tokens = ["bos_token_id", "eos_token_id"].map(|name| (name, format!("tokenizer.ggml.{name}")));
    for (name, key) in numbers.into_iter().chain(tokens) {
        if let Some(number) = file.number(&key) {
            set(name, json!(number));
        }
    }
    let reals = [
        ("rope_theta", "rope.freq_base"),
        ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("rope_local_base_freq", "rope.freq_base_swa"),
    ];
    for (name, part) in reals {
        if let Some(number) = file.float(&key(part)) {
            set(name, json!(number));
        }
    }
    if matches!(architecture.name.as_str(), "gemma2" | "gemma3" | "phi3") {
        set("sliding_window", json!(file.number(&key("attention.sliding_window")).filter(|window| *window > 0)));
    }
    // The header has no key for what scores are divided by the root of: the width of a head, but in the largest models.
    let largest = match architecture.name.as_str() {
        "gemma2" => size("block_count")? == 46,
        "gemma3" => size("block_count")? == 62,
        _ => false,
    };
    if architecture.name.starts_with("gemma") {
        set("query_pre_attn_scalar", json!(if largest { width / architecture.heads as u64 } else { head }));
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
fn scaling(file: &GgufFile, own: &str, context: &str, divisors: Option<[Vec<f32>; 2]>) -> Result<Option<Json>> {
    let original = file.number(&format!("{own}.original_context_length"));
    if let Some([short, long]) = divisors {
        // A divisor for each frequency is what transformers calls longrope, with one list whatever the length too.
        let length = original.or(file.number(context)).unwrap_or(u64::from(u32::MAX));
        return Ok(Some(json!({
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": file.float(&format!("{own}.attn_factor")).unwrap_or(1.0),
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
    if let Some(length) = original {
        scaling["original_max_position_embeddings"] = json!(length);
    }
    Ok(Some(scaling))
}
