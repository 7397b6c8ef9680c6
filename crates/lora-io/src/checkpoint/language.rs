//! Reading a language model: Hugging Face's folder of weights and `config.json`, or one GGUF file. What both become is one
//! component under transformers' names. Tokenizers and chat templates are lora-data's.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use lora_core::Component;

use super::{Checkpoint, ComponentWeights};
use crate::Result;
use crate::family::tree::Piece;
use crate::family::{Family, language};
use crate::gguf::{LanguageModel, MAGIC};
use crate::safetensors::SafetensorsFile;
use crate::{Error, gguf};

/// A folder whose files' names are a language model's.
pub(super) fn open_folder(path: &Path, files: &[Arc<SafetensorsFile>]) -> Result<Checkpoint> {
    let mut checkpoint = Checkpoint::new(path, &language::FAMILY);
    let mut weights = ComponentWeights::new(path);
    for file in files {
        for stored in file.names() {
            match language::canonical(stored) {
                Some(name) => weights.add(file, stored, name, Piece::All)?,
                None => checkpoint.unused.push(stored.to_owned()),
            }
        }
    }
    checkpoint.unused.sort();
    weights.config = Some(crate::json::read(path.join("config.json"))?);
    checkpoint.components.insert(Component::LANGUAGE_MODEL, weights);
    checkpoint.complete()
}

/// Whether a file is GGUF, and language models are among the families that are looked for.
pub(super) fn is_gguf(path: &Path, families: &[&'static Family]) -> Result<bool> {
    let mut start = [0; 4];
    let mut file = File::open(path).map_err(Error::io(path, "open the base model"))?;
    // A file of fewer bytes is not.
    Ok(file.read_exact(&mut start).is_ok() && &start == MAGIC && families.contains(&&language::FAMILY))
}

/// One GGUF file.
pub(super) fn open_gguf(path: &Path) -> Result<Checkpoint> {
    let model: LanguageModel = gguf::LanguageModel::open(path)?;
    let mut checkpoint = Checkpoint::new(path, &language::FAMILY);
    let mut weights = ComponentWeights::new(path);
    weights.config = Some(model.config()?);
    weights.gguf = Some(model);
    checkpoint.components.insert(Component::LANGUAGE_MODEL, weights);
    checkpoint.complete()
}
