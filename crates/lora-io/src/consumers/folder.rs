//! Names and config of a PEFT folder, for the four consumers that read one.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::builder::OpinionBuilder;
use super::{Cure, Effect, Inventory};
use crate::adapter::parts;

/// What a name ends in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// `lora_A.weight`
    A,
    /// `lora_B.weight`
    B,
    /// `lora_A.<adapter>.weight`, where a tool left the adapter's name in.
    NamedA,
    /// `lora_B.<adapter>.weight`
    NamedB,
    /// `lora_B.bias`
    BiasOfB,
    /// `lora_embedding_A`
    EmbeddingA,
    /// `lora_embedding_B`
    EmbeddingB,
    /// `lora_magnitude_vector`, with `.weight` in files of older releases.
    Magnitude,
    /// `base_layer.weight`: an embedding saved whole beside its adapter.
    BaseLayer,
    /// `token_adapter.trainable_tokens_delta`
    Tokens,
    /// `bias` of the base model's layer.
    Bias,
    /// `weight` of a layer that was trained whole (`modules_to_save`).
    Full,
    /// Anything else.
    Other,
}

/// PEFT's prefix of a module path.
pub(super) const PREFIX: &str = "base_model.model.";

/// What names of PEFT's tuners hold after the module path.
const MARKERS: [&str; 8] = [".lora_", ".hada_", ".lokr_", ".ia3_", ".oft_", ".boft_", ".vera_", ".hra_"];

/// Module path without PEFT's prefix, and what follows it.
pub(super) fn split(key: &str) -> (&str, Part) {
    let name = key.strip_prefix(PREFIX).unwrap_or(key);
    let parts = [
        (".lora_A.weight", Part::A),
        (".lora_B.weight", Part::B),
        (".lora_B.bias", Part::BiasOfB),
        (".lora_embedding_A", Part::EmbeddingA),
        (".lora_embedding_B", Part::EmbeddingB),
        (".lora_magnitude_vector", Part::Magnitude),
        (".lora_magnitude_vector.weight", Part::Magnitude),
        (".base_layer.weight", Part::BaseLayer),
        (".base_layer.bias", Part::Bias),
        (".token_adapter.trainable_tokens_delta", Part::Tokens),
    ];
    if let Some((module, part)) = parts.iter().find_map(|(end, part)| Some((name.strip_suffix(end)?, *part))) {
        return (module, part);
    }
    if let Some(stem) = name.strip_suffix(".weight") {
        for (middle, part) in [(".lora_A.", Part::NamedA), (".lora_B.", Part::NamedB)] {
            if let Some((module, _)) = stem.split_once(middle) {
                return (module, part);
            }
        }
        if !MARKERS.iter().any(|marker| stem.contains(marker)) {
            return (stem, Part::Full);
        }
    }
    // Tensors of other tuners, and of AdaLoRA, which has no `.weight`.
    if let Some((module, _)) = MARKERS.iter().find_map(|marker| name.split_once(marker)) {
        return (module, Part::Other);
    }
    match name.strip_suffix(".bias") {
        Some(stem) => (stem, Part::Bias),
        None => (name, Part::Other),
    }
}

/// Which parts each module has.
pub(super) fn modules<'a>(keys: impl Iterator<Item = &'a String>) -> BTreeMap<&'a str, BTreeSet<Part>> {
    let mut modules: BTreeMap<&str, BTreeSet<Part>> = BTreeMap::new();
    for key in keys {
        let (module, part) = split(key);
        modules.entry(module).or_default().insert(part);
    }
    modules
}

/// The other half of a pair.
pub(super) fn partner(part: Part) -> Option<Part> {
    Some(match part {
        Part::A => Part::B,
        Part::B => Part::A,
        Part::NamedA => Part::NamedB,
        Part::NamedB => Part::NamedA,
        Part::EmbeddingA => Part::EmbeddingB,
        Part::EmbeddingB => Part::EmbeddingA,
        _ => return None,
    })
}

/// `adapter_config.json` as its readers see it: a field that is null counts as missing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Config<'a>(pub(super) &'a Value);

impl<'a> Config<'a> {
    pub(super) fn get(self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn text(self, field: &str) -> Option<&'a str> {
        self.get(field)?.as_str()
    }

    pub(super) fn flag(self, field: &str) -> bool {
        self.get(field).and_then(Value::as_bool).unwrap_or(false)
    }

    pub(super) fn rank(self) -> Option<usize> {
        self.get("r")?.as_u64()?.try_into().ok()
    }

    /// Whether a list or map holds anything.
    pub(super) fn holds(self, field: &str) -> bool {
        match self.get(field) {
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(map)) => !map.is_empty(),
            Some(Value::String(text)) => !text.is_empty(),
            _ => false,
        }
    }

    /// Whether biases of the base model were trained.
    pub(super) fn trains_bias(self) -> bool {
        self.text("bias").is_some_and(|bias| bias != "none")
    }

    /// Whether `target_modules` names a module: an item of the list is the path or its end after a dot. `None` where it
    /// is a regex, a word for a set of layers, or missing.
    pub(super) fn targets(self, module: &str) -> Option<bool> {
        let list = self.get("target_modules")?.as_array()?;
        Some(list.iter().filter_map(Value::as_str).any(|item| ends_in(module, item)))
    }

    /// Whether `modules_to_save` names a module.
    pub(super) fn saves(self, module: &str) -> bool {
        let list = self.get("modules_to_save").and_then(Value::as_array);
        list.is_some_and(|list| list.iter().filter_map(Value::as_str).any(|item| ends_in(module, item)))
    }

    /// The rank of a module by `rank_pattern`, in order, or by `r`. `None` where a pattern is a regex, which is not
    /// tried here, or where there is no `r`.
    pub(super) fn rank_of(self, module: &str) -> Option<usize> {
        let patterns = self.get("rank_pattern").and_then(Value::as_object);
        for (pattern, rank) in patterns.into_iter().flatten() {
            let literal = pattern.strip_prefix('^').unwrap_or(pattern);
            if !literal.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c)) {
                return None;
            }
            if module == literal || literal == pattern && ends_in(module, literal) {
                return rank.as_u64()?.try_into().ok();
            }
        }
        self.rank()
    }

    /// The name of an initialisation that changed the base model's weights, so that the adapter fits that base only.
    pub(super) fn mutating_init(self) -> Option<&'a str> {
        let init = self.text("init_lora_weights")?;
        let mutates = ["pissa", "olora", "corda", "lora_ga", "loftq", "kasa"];
        mutates.iter().any(|name| init.to_ascii_lowercase().starts_with(name)).then_some(init)
    }
}

fn ends_in(module: &str, item: &str) -> bool {
    module == item || module.strip_suffix(item).is_some_and(|stem| stem.ends_with('.'))
}

/// The config, or `None` with the problem noted.
pub(super) fn config<'a>(builder: &mut OpinionBuilder, inventory: &'a Inventory) -> Option<Config<'a>> {
    if inventory.config.is_none() {
        let cure = without_config(inventory, Cure::ToPortable);
        builder.problem(Effect::Fatal, None, "there is no adapter_config.json beside the file", cure);
    }
    inventory.config.as_ref().map(Config)
}

/// What cures a missing config: nothing where the names are PEFT's, whose scale stands in it alone.
pub(super) fn without_config(inventory: &Inventory, cure: Cure) -> Option<Cure> {
    let mut keys = inventory.tensors.keys();
    if keys.any(|key| key.starts_with(PREFIX)) {
        return None;
    }
    let is_plain = inventory.tensors.keys().all(|key| is_plain(key));
    Some(if is_plain { cure } else { Cure::FlattenToPeft })
}

/// What cures a name that a program does not take for a part of a LoRA: nothing where it is none.
pub(super) fn of_another_kind(key: &str) -> Option<Cure> {
    parts::split(key).map(|_| if is_plain(key) { Cure::ToPortable } else { Cure::FlattenToPeft })
}

/// Whether a tensor is a part of plain LoRA, in any layout: what is no plain LoRA does not become one by other names.
pub(super) fn is_plain(key: &str) -> bool {
    const PLAIN: &[&str] = &["lora_down", "lora_up", "alpha", "embedding_down", "embedding_up", "magnitude"];
    parts::split(key).is_none_or(|(_, part)| PLAIN.contains(&part))
}

/// Notes each of these fields that is missing.
pub(super) fn require(builder: &mut OpinionBuilder, config: Config<'_>, fields: &[&str]) {
    for field in fields.iter().filter(|field| config.get(field).is_none()) {
        builder.problem(Effect::Fatal, None, format!("adapter_config.json has no `{field}`"), Cure::ToPortable);
    }
}

/// What an initialisation that changed the base comes to where it is loaded onto the unchanged one.
pub(super) fn mutated_base(builder: &mut OpinionBuilder, effect: Effect, config: Config<'_>) {
    if let Some(init) = config.mutating_init() {
        // What was taken out of the base follows from it for these two; the base of the others is in no file.
        let follows = ["pissa", "olora"].iter().any(|name| init.to_ascii_lowercase().starts_with(name));
        let cure = if follows {
            Cure::Flatten
        } else {
            Cure::Setting("save it again converted (path_initial_model_for_weight_conversion)".into())
        };
        let what = format!("initialised by `{init}`, which changed the base: wrong on the base as published");
        builder.problem(effect, None, what, cure);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_split_from_the_longest_known_end() {
        for (key, module, part) in [
            ("base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj", Part::A),
            ("model.layers.0.q_proj.lora_B.weight", "model.layers.0.q_proj", Part::B),
            ("a.lora_A.default.weight", "a", Part::NamedA),
            ("a.lora_B.bias", "a", Part::BiasOfB),
            ("a.bias", "a", Part::Bias),
            ("lm_head.weight", "lm_head", Part::Full),
            ("lm_head.base_layer.weight", "lm_head", Part::BaseLayer),
            ("a.lora_magnitude_vector", "a", Part::Magnitude),
            ("a.lora_magnitude_vector.weight", "a", Part::Magnitude),
            ("a.lora_embedding_A", "a", Part::EmbeddingA),
            ("a.lora_A.what", "a", Part::Other),
            ("a.oft_R.weight", "a", Part::Other),
            ("what", "what", Part::Other),
        ] {
            assert_eq!(split(key), (module, part), "{key}");
        }
    }

    #[test]
    fn fields_are_read_by_pefts_rules() {
        let value = json!({
            "r": 8, "lora_alpha": null, "target_modules": ["q_proj", "mlp.up"], "modules_to_save": [],
            "rank_pattern": {"^model.q_proj": 2, "k_proj": 4}, "init_lora_weights": "pissa_niter_16",
        });
        let config = Config(&value);
        assert!(config.get("lora_alpha").is_none());
        assert_eq!(config.targets("model.q_proj"), Some(true));
        assert_eq!(config.targets("model.eq_proj"), Some(false));
        assert_eq!(config.rank_of("model.q_proj"), Some(2));
        assert_eq!(config.rank_of("x.model.q_proj"), Some(8));
        assert_eq!(config.rank_of("model.layers.0.k_proj"), Some(4));
        assert!(!config.holds("modules_to_save"));
        assert_eq!(config.mutating_init(), Some("pissa_niter_16"));
        let regex = json!({ "r": 8, "rank_pattern": {"layers.[0-9]+.q": 2}, "target_modules": ".*q_proj" });
        assert_eq!(Config(&regex).rank_of("q"), None);
        assert_eq!(Config(&regex).targets("q"), None);
        assert_eq!(Config(&json!({ "init_lora_weights": "gaussian" })).mutating_init(), None);
        assert_eq!(Config(&json!({ "init_lora_weights": "eva" })).mutating_init(), None);
    }
}
