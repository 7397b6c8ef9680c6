//! Reading a language model: Hugging Face's folder of weights and `config.json`, or one GGUF file. What both become is one
//! component under transformers' names. Tokenizers and chat templates are lora-data's.

use std::path::Path;
use std::sync::Arc;

use lora_core::Component;

use super::file::WeightFile;
use super::{Checkpoint, ComponentWeights};
use crate::Result;
use crate::family::tree::Piece;
use crate::family::{BaseNames, Family, language};
use crate::gguf::LanguageModel;

/// A folder whose files' names are a language model's.
pub(super) fn open_folder(path: &Path, files: &[Arc<WeightFile>]) -> Result<Checkpoint> {
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

/// Whether language models are among the families that are looked for, and a GGUF file's tensors are no other family's.
pub(super) fn is_one(file: &WeightFile, families: &[&'static Family]) -> bool {
    let mut names = BaseNames::default();
    names.add(None, file.shapes());
    families.contains(&&language::FAMILY) && Family::of_base(&names, families).is_none_or(|family| !family.image)
}

/// One GGUF file.
pub(super) fn open_gguf(path: &Path) -> Result<Checkpoint> {
    let model: LanguageModel = LanguageModel::open(path)?;
    let mut checkpoint = Checkpoint::new(path, &language::FAMILY);
    let mut weights = ComponentWeights::new(path);
    weights.config = Some(model.config()?);
    weights.gguf = Some(model);
    checkpoint.components.insert(Component::LANGUAGE_MODEL, weights);
    checkpoint.complete()
}
