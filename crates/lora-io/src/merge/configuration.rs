//! What a merged folder says of itself: `config.json` and the indices of its shards, where the weights are no longer what the
//! base's say. A file in which nothing has to be said otherwise keeps its bytes.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use lora_core::DType;
use serde_json::Value;

use super::folder::walk;
use super::tied::Tied;
use crate::gguf::dequantise::torch_name;
use crate::safetensors::SafetensorsFile;
use crate::{Error, Result, atomic};

/// The key that says whether output layer and embedding are one tensor.
pub(super) const TIED: &str = "tie_word_embeddings";

/// The key of the weights' type in configurations of transformers 4 and 5.
const DTYPES: &[&str] = &["torch_dtype", "dtype"];

/// Says in a language model's `config.json` what holds for its new weights. With another type, keys that say how the base
/// was stored go, but for those in `kept`.
pub(super) fn rewrite(folder: &Path, untied: bool, dtype: Option<DType>, kept: &[&str]) -> Result<()> {
    let path = folder.join("config.json");
    if !path.exists() || !untied && dtype.is_none() {
        return Ok(());
    }
    let before = crate::json::read(&path)?;
    let mut config = before.clone();
    let Some(top) = config.as_object_mut() else { return Err(Error::format(&path, "is no JSON object")) };
    if untied {
        top.insert(TIED.into(), Value::Bool(false));
        if let Some(inner) = top.get_mut("text_config").and_then(Value::as_object_mut) {
            inner.insert(TIED.into(), Value::Bool(false));
        }
    }
    if let Some(dtype) = dtype {
        let name = torch_name(dtype);
        for key in DTYPES {
            for own in [Some("text_config"), None] {
                let object = match own {
                    Some(own) => top.get_mut(own).and_then(Value::as_object_mut),
                    None => Some(&mut *top),
                };
                if let Some(said) = object.and_then(|object| object.get_mut(*key)) {
                    *said = Value::from(name);
                }
            }
        }
        for key in super::scales::KEYS.iter().filter(|key| !kept.contains(key)) {
            top.remove(*key);
        }
    }
    if config == before { Ok(()) } else { replace(&path, &config) }
}

/// An output layer that the base has not, and the file in which it is.
pub(super) struct Head<'h> {
    pub(super) tied: &'h Tied,
    pub(super) file: &'h str,
}

/// Says in the indices of a folder what its shards hold now: names, bytes and numbers.
pub(super) fn rewrite_indices(folder: &Path, head: Option<Head<'_>>) -> Result<()> {
    for path in walk(folder)? {
        if !path.to_string_lossy().ends_with(".safetensors.index.json") {
            continue;
        }
        let before = crate::json::read(&path)?;
        let mut index = before.clone();
        let Some(map) = index["weight_map"].as_object_mut() else { continue };
        if let Some(head) = head.as_ref().filter(|head| map.contains_key(head.tied.embedding)) {
            map.insert(head.tied.head.into(), Value::from(head.file));
        }
        let shards: BTreeSet<String> = map.values().filter_map(|file| file.as_str().map(str::to_owned)).collect();
        let (mut bytes, mut numbers, mut names) = (0, 0, BTreeSet::new());
        for shard in shards {
            let Ok(file) = SafetensorsFile::open(path.with_file_name(shard)) else { continue };
            for name in file.names() {
                let view = file.get(name)?;
                bytes += view.bytes().len() as u64;
                numbers += view.shape().iter().product::<usize>() as u64;
                names.insert(name.to_owned());
            }
        }
        map.retain(|name, _| names.contains(name));
        for (key, count) in [("total_size", bytes), ("total_parameters", numbers)] {
            if index["metadata"][key].is_number() && index["metadata"][key].as_u64() != Some(count) {
                index["metadata"][key] = Value::from(count);
            }
        }
        if index != before {
            replace(&path, &index)?;
        }
    }
    Ok(())
}

fn replace(path: &Path, json: &Value) -> Result<()> {
    let text = format!("{json:#}\n");
    atomic::write(path, |file| file.write_all(text.as_bytes()))
}
