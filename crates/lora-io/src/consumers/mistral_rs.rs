//! mistral.rs at commit 9e92262, its dynamic LoRA: everything in the file must be used, and every field that changes
//! the mathematics must be one that it supports.

use serde_json::Value;

use super::builder::OpinionBuilder;
use super::folder::{self, Config, Part};
use super::{Consumer, Cure, Effect, Inventory, Opinion};

pub(super) const VERSION: &str = "commit 9e92262 (2026-08-22)";

/// Highest rank when not set otherwise.
const MAX_RANK: usize = 256;

pub(super) fn opinion(inventory: &Inventory) -> Opinion {
    let mut builder = OpinionBuilder::default();
    let config = folder::config(&mut builder, inventory);
    let modules = folder::modules(inventory.tensors.keys());
    for (key, (_, shape)) in &inventory.tensors {
        let (module, part) = folder::split(key);
        let paired = folder::partner(part).is_none_or(|partner| modules[module].contains(&partner));
        // The rank that the config gives a layer has to be the tensors'.
        let rank = match part {
            Part::A | Part::NamedA => shape.first(),
            _ => shape.get(1),
        };
        let misfit = config.and_then(|config| config.rank_of(module)).zip(rank).filter(|(want, has)| want != *has);
        match part {
            Part::Magnitude => builder.refuse(key, "DoRA is not supported", Cure::Flatten),
            Part::A | Part::B | Part::NamedA | Part::NamedB => {
                if !paired {
                    builder.refuse(key, "the other half of its pair is missing", None);
                } else if module == "lm_head" || module.ends_with(".lm_head") {
                    builder.refuse(key, "adapters of lm_head are not supported", Cure::Merge);
                } else if config.and_then(|config| config.targets(module)) == Some(false) {
                    builder.refuse(key, "`target_modules` does not name its layer", Cure::ToPortable);
                } else if let Some((want, has)) = misfit {
                    builder.refuse(key, format!("rank {has} where the config says {want}"), Cure::ToPortable);
                } else {
                    builder.load(key);
                }
            }
            Part::Tokens => builder.refuse(key, "single trained tokens are not supported", None),
            Part::Full | Part::BaseLayer | Part::Bias | Part::BiasOfB => {
                builder.refuse(key, "not used by any layer: layers trained whole and biases", Cure::Merge);
            }
            Part::EmbeddingA | Part::EmbeddingB => {
                builder.refuse(key, "not used by any layer: embeddings are not supported", Cure::Merge);
            }
            Part::Other => builder.refuse(key, "not used by any layer", folder::of_another_kind(key)),
        }
    }
    if let Some(config) = config {
        fields(&mut builder, config);
    }
    builder.finish(Consumer::MistralRs)
}

fn fields(builder: &mut OpinionBuilder, config: Config<'_>) {
    folder::require(builder, config, &["r", "lora_alpha"]);
    if config.get("target_modules").is_none() && config.get("target_parameters").is_none() {
        let what = "adapter_config.json has neither `target_modules` nor `target_parameters`";
        builder.problem(Effect::Fatal, None, what, Cure::ToPortable);
    }
    if config.flag("use_dora") {
        builder.problem(Effect::Fatal, None, "`use_dora`: DoRA is not supported", Cure::Flatten);
    }
    if config.holds("modules_to_save") {
        builder.problem(Effect::Fatal, None, "`modules_to_save` is not supported", Cure::Merge);
    }
    if config.trains_bias() || config.flag("lora_bias") {
        builder.problem(Effect::Fatal, None, "biases are not supported", Cure::Merge);
    }
    folder::mutated_base(builder, Effect::Fatal, config);
    let patterns = config.get("rank_pattern").and_then(Value::as_object);
    let ranks = patterns.into_iter().flatten().filter_map(|(_, rank)| rank.as_u64()?.try_into().ok());
    if let Some(rank) = ranks.chain(config.rank()).max().filter(|rank| *rank > MAX_RANK) {
        let what = format!("rank {rank} is above the default limit of {MAX_RANK}");
        builder.problem(Effect::Fatal, None, what, Cure::Resize);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Verdict;
    use super::super::samples::*;
    use super::*;

    fn judge(inventory: &Inventory) -> Opinion {
        opinion_of(Consumer::MistralRs, inventory)
    }

    fn with(field: &str, value: Value) -> Opinion {
        judge(&language_model().set(field, value))
    }

    #[test]
    fn fields_that_it_cannot_do_are_refused() {
        for (field, value, cured) in [
            ("r", Value::Null, "lora convert --to portable"),
            ("lora_alpha", Value::Null, "lora convert --to portable"),
            ("target_modules", Value::Null, "lora convert --to portable"),
            ("use_dora", json!(true), "lora convert --flatten RANK --base BASE"),
            ("modules_to_save", json!(["lm_head"]), "lora merge"),
            ("bias", json!("all"), "lora merge"),
            ("lora_bias", json!(true), "lora merge"),
            ("init_lora_weights", json!("pissa"), "lora convert --flatten RANK --base BASE"),
        ] {
            let opinion = with(field, value);
            assert_eq!(opinion.verdict, Verdict::Refuses, "{field}");
            assert_eq!(cure(&opinion).unwrap(), cured, "{field}");
        }
        let experts = language_model().set("target_modules", Value::Null).set("target_parameters", json!(["x"]));
        assert_eq!(judge(&experts).verdict, Verdict::Loads);
        assert_eq!(with("use_rslora", json!(true)).verdict, Verdict::Loads);
        assert_eq!(with("alpha_pattern", json!({ "q_proj": 4 })).verdict, Verdict::Loads);
        assert_eq!(with("init_lora_weights", json!("gaussian")).verdict, Verdict::Loads);
    }

    #[test]
    fn the_config_has_to_give_the_tensors_ranks() {
        let opinion = with("r", json!(4));
        assert_eq!(opinion.verdict, Verdict::Refuses);
        assert!(is_refused(&opinion, &format!("{QUERY}.lora_A.weight")));
        let opinion = with("rank_pattern", json!({ "q_proj": 4 }));
        assert!(is_refused(&opinion, &format!("{QUERY}.lora_B.weight")));
        assert_eq!(opinion.problems[0].keys, 4);
        let high = language_model().set("rank_pattern", json!({ "elsewhere": 257 }));
        assert_eq!(cure(&judge(&high)).unwrap(), "lora resize");
        assert_eq!(with("rank_pattern", json!({ "elsewhere": 256 })).verdict, Verdict::Loads);
    }

    #[test]
    fn everything_has_to_be_used() {
        for key in [
            format!("{QUERY}.lora_magnitude_vector"),
            format!("{QUERY}.bias"),
            "base_model.model.lm_head.weight".into(),
            "base_model.model.model.embed_tokens.lora_embedding_A".into(),
            "something".into(),
            format!("{}.lora_A.weight", QUERY.replace("q_proj", "k_proj")),
        ] {
            let opinion = judge(&language_model().tensor(&key, &[8, 64]));
            assert_eq!(opinion.verdict, Verdict::Refuses, "{key}");
            assert!(is_refused(&opinion, &key));
        }
        assert_eq!(judge(&language_model().without("v_proj.lora_A")).verdict, Verdict::Refuses);
        let untargeted = language_model().pair("base_model.model.model.layers.0.mlp.up_proj");
        assert_eq!(judge(&untargeted).problems[0].what, "`target_modules` does not name its layer");
        let head = language_model()
            .pair("base_model.model.lm_head")
            .set("target_modules", json!(["q_proj", "v_proj", "lm_head"]));
        assert_eq!(judge(&head).verdict, Verdict::Refuses);
    }

    #[test]
    fn an_adapters_name_in_the_middle_is_read() {
        let named = language_model().renamed(|name| name.replace(".weight", ".default.weight"));
        assert_eq!(judge(&named).verdict, Verdict::Loads);
    }
}
