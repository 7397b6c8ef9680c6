//! Language models whose output layer is their embedding. An adapter changes one end alone while it is loaded; so a merge
//! writes the other end as a tensor of its own, and the configuration says that the two are no longer tied.

use lora_core::{Adapter, AdapterModule, HostTensor};

use super::configuration::TIED;
use super::folder::Base;
use super::rows::turn;
use super::targets::is_head;

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
            let inner = config.get("text_config").and_then(|text| text.get(TIED));
            config.get(TIED).or(inner)?.as_bool()
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

    /// Whether an adapter changes both ends in the same way, as PEFT trains them with `ensure_weight_tying`: it is merged
    /// once then, and they stay tied.
    pub(super) fn is_one_adapter(&self, adapter: &Adapter) -> bool {
        let embedding = self.embedding.strip_suffix(".weight").unwrap_or(self.embedding);
        let mut modules = adapter.modules.iter();
        let head = modules.find(|(path, _)| is_head(path)).map(|(_, module)| module);
        let mut modules = adapter.modules.iter();
        let embedding = modules.find(|(path, _)| path.path == embedding).map(|(_, module)| module);
        head.zip(embedding).is_some_and(|(head, embedding)| is_same(head, embedding))
    }
}

/// Whether two modules make the same change of an output layer and of an embedding.
fn is_same(head: &AdapterModule, embedding: &AdapterModule) -> bool {
    if head.scale() != embedding.scale() {
        return false;
    }
    if head.tensors == embedding.tensors {
        return true;
    }
    // An embedding's update is the transposed product.
    let turned = |tensor: &HostTensor| match *tensor.shape() {
        [rows, columns] => turn(&tensor.to_f32(), rows, columns),
        _ => Vec::new(),
    };
    head.factors().zip(embedding.factors()).is_some_and(|(head, own)| {
        !head.embedding
            && own.embedding
            && *head.up.to_f32() == turned(own.down)[..]
            && *head.down.to_f32() == turned(own.up)[..]
    })
}
