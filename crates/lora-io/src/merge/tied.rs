//! Language models whose output layer is their embedding. An adapter changes one end alone while it is loaded; so a merge
//! writes the other end as a tensor of its own, and the configuration says that the two are no longer tied.

use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::Value;

use super::folder::Base;
use crate::{Error, Result, atomic};

/// Names of embeddings that output layers are tied to.
const EMBEDDINGS: &[&str] = &[
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "transformer.word_embeddings.weight",
];
const HEADS: &[&str] = &["lm_head.weight", "language_model.lm_head.weight"];
const KEY: &str = "tie_word_embeddings";

/// The embedding that is the output layer too, and the output layer's own name.
#[derive(Debug, Clone)]
pub(super) struct Tied {
    pub(super) embedding: &'static str,
    pub(super) head: &'static str,
    /// Whether there is a configuration that can say that they are tied no longer.
    pub(super) has_config: bool,
}

impl Tied {
    /// What a base ties. Without a configuration a missing output layer says so.
    pub(super) fn of(base: &Base) -> Option<Self> {
        let there = |name: &str| base.files.iter().any(|file| file.contains(name));
        let embedding = EMBEDDINGS.iter().copied().find(|name| there(name))?;
        let own_head = HEADS.iter().any(|name| there(name));
        let said = base.config.as_ref().and_then(|config| {
            let inner = config.get("text_config").and_then(|text| text.get(KEY));
            config.get(KEY).or(inner)?.as_bool()
        });
        // Encoders have no output layer at all.
        let has_output =
            base.config.as_ref().and_then(|config| config["architectures"][0].as_str()).is_none_or(|name| {
                ["CausalLM", "LMHead", "ConditionalGeneration"].iter().any(|kind| name.contains(kind))
            });
        let tied = if own_head { said == Some(true) } else { said != Some(false) && has_output };
        let head = if embedding.starts_with("language_model.") { HEADS[1] } else { HEADS[0] };
        tied.then_some(Self { embedding, head, has_config: base.config.is_some() })
    }
}

/// Writes into the copied configuration of a merged folder that nothing is tied, and into the index of its shards where
/// the output layer is: in `file`, with `bytes` bytes.
pub(super) fn untie(folder: &Path, tied: &Tied, file: &str, bytes: u64) -> Result<()> {
    let path = folder.join("config.json");
    let mut config = crate::json::read(&path)?;
    if !config.is_object() {
        return Err(Error::format(&path, "is no JSON object"));
    }
    if config["text_config"].is_object() {
        config["text_config"][KEY] = Value::Bool(false);
    }
    config[KEY] = Value::Bool(false);
    replace(&path, &config)?;
    for entry in fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        let path = entry.map_err(Error::io(folder, "list"))?.path();
        if !path.to_string_lossy().ends_with(".safetensors.index.json") {
            continue;
        }
        let mut index = crate::json::read(&path)?;
        if index["weight_map"][tied.embedding].as_str() != Some(file) || !index["weight_map"][tied.head].is_null() {
            continue;
        }
        index["weight_map"][tied.head] = Value::from(file);
        if let Some(size) = index["metadata"]["total_size"].as_u64() {
            index["metadata"]["total_size"] = Value::from(size + bytes);
        }
        replace(&path, &index)?;
    }
    Ok(())
}

fn replace(path: &Path, json: &Value) -> Result<()> {
    let text = format!("{json:#}\n");
    atomic::write(path, |file| file.write_all(text.as_bytes()))
}
