//! Causal language models in Hugging Face's layout. Their files lie in the folder itself; `gguf::names` has llama.cpp's
//! names.

use lora_core::Component;

use super::Family;
use super::adapter::Signs;

/// The family.
pub static FAMILY: Family = Family {
    name: "language",
    title: "a language model",
    image: false,
    tells: |base| base.begins("model.layers."),
    components: &[],
    words: &[],
    signs: Signs { alone: |module| module.path.component == Component::LANGUAGE_MODEL, ..Signs::NONE },
    labels: None,
    layers: Vec::new,
    block_factors: None,
};
