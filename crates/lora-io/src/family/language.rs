//! Causal language models in Hugging Face's layout. Their files lie in the folder itself; `gguf::names` has llama.cpp's
//! names. Where a model of several kinds of input wraps a language model, only the latter's weights are read.

use lora_core::Component;

use super::adapter::Signs;
use super::{ComponentNames, Family};

/// The family.
pub static FAMILY: Family = Family {
    name: "language",
    title: "a language model",
    image: false,
    tells: |base| ["model.layers.", WRAPPED, WRAPPED_BEFORE].iter().any(|start| base.begins(start)),
    components: &[ComponentNames {
        component: Component::LANGUAGE_MODEL,
        folder: None,
        single_file: None,
        kohya: None,
        required: true,
    }],
    words: &[],
    signs: Signs { alone: |module| module.path.component == Component::LANGUAGE_MODEL, ..Signs::NONE },
    labels: None,
    layers: Vec::new,
    block_factors: None,
};

/// How layers begin inside of a wrapper.
const WRAPPED: &str = "model.language_model.layers.";
/// And how they began in files of transformers before version 4.52.
const WRAPPED_BEFORE: &str = "language_model.model.layers.";

/// The canonical name of a stored tensor: that of the language model by itself. `None` for a part of a wrapper that is
/// none of its language model.
pub fn canonical(stored: &str) -> Option<String> {
    let inner = stored.strip_prefix("language_model.").unwrap_or(stored);
    let inner = match inner.strip_prefix("model.language_model.") {
        Some(rest) => format!("model.{rest}"),
        None => inner.to_owned(),
    };
    let known = ["model.embed_tokens", "model.layers.", "model.norm.", "model.per_layer_", "lm_head."];
    known.iter().any(|start| inner.starts_with(start)).then_some(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrappers_language_model_has_the_names_of_one_by_itself() {
        for (stored, name) in [
            ("model.layers.0.mlp.up_proj.weight", Some("model.layers.0.mlp.up_proj.weight")),
            ("model.language_model.layers.0.mlp.up_proj.weight", Some("model.layers.0.mlp.up_proj.weight")),
            ("language_model.model.embed_tokens.weight", Some("model.embed_tokens.weight")),
            ("language_model.lm_head.weight", Some("lm_head.weight")),
            ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", None),
            ("vision_tower.blocks.0.norm.weight", None),
        ] {
            assert_eq!(canonical(stored).as_deref(), name, "{stored}");
        }
    }
}
