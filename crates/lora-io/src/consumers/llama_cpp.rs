//! llama.cpp: `convert_lora_to_gguf.py` and its runtime, at commit 0b03adaa.
//!
//! The scale is always alpha over the tensor's rank. What is neither half of a pair nor a base layer's copy ends the
//! conversion.

use super::builder::OpinionBuilder;
use super::folder::{self, Part};
use super::{Consumer, Cure, Effect, Inventory, Opinion};

pub(super) const VERSION: &str = "commit 0b03adaa";

pub(super) fn opinion(inventory: &Inventory) -> Opinion {
    let mut builder = OpinionBuilder::default();
    let modules = folder::modules(inventory.tensors.keys());
    for key in inventory.tensors.keys() {
        let (module, part) = folder::split(key);
        let paired = folder::partner(part).is_none_or(|partner| modules[module].contains(&partner));
        match part {
            Part::A | Part::B | Part::EmbeddingA | Part::EmbeddingB if paired => builder.load(key),
            Part::A | Part::B | Part::EmbeddingA | Part::EmbeddingB => {
                builder.refuse(key, "the other half of its pair is missing", None);
            }
            Part::BaseLayer => {
                builder.ignore(key, Effect::Part, "an embedding saved whole is passed over", Cure::Merge);
            }
            Part::Magnitude => builder.refuse(key, "DoRA ends the conversion", Cure::Flatten),
            Part::Tokens => builder.refuse(key, "single trained tokens are not supported", None),
            Part::Full | Part::Bias | Part::BiasOfB => {
                builder.refuse(key, "layers trained whole and biases end the conversion", Cure::Merge);
            }
            Part::NamedA | Part::NamedB | Part::Other => {
                let what = "a name that is not half of a pair ends the conversion";
                builder.refuse(key, what, folder::of_another_kind(key));
            }
        }
    }
    let Some(config) = folder::config(&mut builder, inventory) else {
        return builder.finish(Consumer::LlamaCpp);
    };
    folder::require(&mut builder, config, &["lora_alpha"]);
    if config.get("base_model_name_or_path").is_none() {
        let cure = Cure::Setting("--base FOLDER".into());
        builder.problem(Effect::Fatal, None, "`base_model_name_or_path` is missing, so the base has to be given", cure);
    }
    if config.flag("use_dora") {
        builder.problem(Effect::Fatal, None, "`use_dora`: DoRA is not supported", Cure::Flatten);
    }
    if config.flag("use_rslora") {
        let what = "`use_rslora` is not looked at: the scale is alpha / r, not alpha / sqrt(r)";
        builder.problem(Effect::Wrong, None, what, Cure::ToPortable);
    }
    // Ranks are the tensors' own, so a rank_pattern alone does no harm.
    if config.holds("alpha_pattern") {
        builder.problem(Effect::Wrong, None, "`alpha_pattern` is not looked at: one alpha for all", Cure::ToPortable);
    }
    folder::mutated_base(&mut builder, Effect::Wrong, config);
    builder.finish(Consumer::LlamaCpp)
}

/// Of a file in its own format, by the runtime's rules (`src/llama-adapter.cpp`).
pub(super) fn opinion_of_gguf(inventory: &Inventory) -> Opinion {
    let mut builder = OpinionBuilder::default();
    for (key, value) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        if inventory.metadata.get(key).map(String::as_str) != Some(value) {
            builder.problem(Effect::Fatal, None, format!("`{key}` is not `{value}`"), None);
        }
    }
    if !inventory.metadata.contains_key("general.architecture") {
        builder.problem(Effect::Fatal, None, "`general.architecture` is missing", None);
    }
    for key in inventory.tensors.keys() {
        let halves = [(".lora_a", ".lora_b"), (".lora_b", ".lora_a")];
        let other = halves.iter().find_map(|(own, other)| Some(format!("{}{other}", key.strip_suffix(own)?)));
        match other {
            Some(other) if inventory.tensors.contains_key(&other) => builder.load(key),
            Some(_) => builder.refuse(key, "the other half of its pair is missing", None),
            None if key.ends_with("_norm.weight") => {
                builder.ignore(key, Effect::Part, "norms are passed over", None);
            }
            None => builder.refuse(key, "a name that is not half of a pair ends the load", None),
        }
    }
    builder.finish(Consumer::LlamaCpp)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::Verdict;
    use super::super::samples::*;
    use super::*;

    fn judge(inventory: &Inventory) -> Opinion {
        opinion_of(Consumer::LlamaCpp, inventory)
    }

    fn with(field: &str, value: Value) -> Opinion {
        judge(&language_model().set(field, value))
    }

    #[test]
    fn the_scale_is_always_alpha_over_rank() {
        for (field, value) in [("use_rslora", json!(true)), ("alpha_pattern", json!({ "q_proj": 4 }))] {
            let opinion = with(field, value);
            assert_eq!(opinion.verdict, Verdict::LoadsWrong, "{field}");
            assert_eq!(cure(&opinion).unwrap(), "lora convert --to portable");
        }
        let opinion = with("init_lora_weights", json!("pissa"));
        assert_eq!(opinion.verdict, Verdict::LoadsWrong);
        assert_eq!(cure(&opinion).unwrap(), "lora convert --flatten RANK --base BASE");
        assert_eq!(with("rank_pattern", json!({ "q_proj": 4 })).verdict, Verdict::Loads);
    }

    #[test]
    fn alpha_and_a_base_are_needed() {
        assert_eq!(with("lora_alpha", Value::Null).verdict, Verdict::Refuses);
        let opinion = with("base_model_name_or_path", Value::Null);
        assert_eq!(opinion.verdict, Verdict::Refuses);
        assert_eq!(cure(&opinion).unwrap(), "--base FOLDER");
        assert_eq!(with("r", Value::Null).verdict, Verdict::Loads);
    }

    #[test]
    fn its_own_format_loads_where_pairs_are_whole() {
        let mut own = Inventory { gguf: true, ..Inventory::default() }
            .tensor("blk.0.attn_q.weight.lora_a", &[4, 64])
            .tensor("blk.0.attn_q.weight.lora_b", &[64, 4]);
        assert_eq!(judge(&own).verdict, Verdict::Refuses);
        for (key, value) in [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", "llama")] {
            own.metadata.insert(key.into(), value.into());
        }
        assert_eq!(judge(&own).verdict, Verdict::Loads);
        assert_eq!(opinion_of(Consumer::Peft, &own).verdict, Verdict::Refuses);
        assert_eq!(judge(&own.tensor("blk.1.attn_q.weight.lora_a", &[4, 64])).verdict, Verdict::Refuses);
    }

    #[test]
    fn what_is_no_pair_ends_the_conversion() {
        for (key, cured) in [
            (format!("{QUERY}.lora_magnitude_vector"), "lora convert --flatten RANK --base BASE"),
            (format!("{QUERY}.bias"), "lora merge"),
            (format!("{QUERY}.lora_B.bias"), "lora merge"),
            ("base_model.model.lm_head.weight".to_owned(), "lora merge"),
            (format!("{QUERY}.lora_A.default.weight"), "lora convert --to portable"),
        ] {
            let opinion = judge(&language_model().tensor(&key, &[64]));
            assert_eq!(opinion.verdict, Verdict::Refuses, "{key}");
            assert!(is_refused(&opinion, &key));
            assert_eq!(cure(&opinion).unwrap(), cured);
        }
        assert_eq!(judge(&language_model().without("v_proj.lora_A")).verdict, Verdict::Refuses);
    }

    #[test]
    fn embeddings_load_and_their_whole_copies_are_passed_over() {
        let embedding = "base_model.model.model.embed_tokens";
        let inventory = language_model()
            .tensor(&format!("{embedding}.lora_embedding_A"), &[8, 99])
            .tensor(&format!("{embedding}.lora_embedding_B"), &[64, 8]);
        assert_eq!(judge(&inventory).verdict, Verdict::Loads);
        let opinion = judge(&inventory.tensor(&format!("{embedding}.base_layer.weight"), &[99, 64]));
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
    }
}
