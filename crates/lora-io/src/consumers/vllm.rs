//! vLLM, as of commits e745bafff and 0306474e: its helper for PEFT configs, its limits and its names.
//!
//! One scale serves all layers, `lora_alpha / r` (over the root of `r` with rsLoRA). Every tensor has to be half of a
//! pair or part of an embedding; an embedding saved whole is passed over.

use super::builder::OpinionBuilder;
use super::folder::{self, Part};
use super::{Consumer, Cure, Effect, Inventory, Opinion};

pub(super) const VERSION: &str = "commit e745bafff (2026)";

/// Ranks that `--max-lora-rank` takes.
const RANKS: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];

/// What it is when not set.
const DEFAULT_RANK: usize = 16;

pub(super) fn opinion(inventory: &Inventory) -> Opinion {
    let mut builder = OpinionBuilder::default();
    let modules = folder::modules(inventory.tensors.keys());
    for key in inventory.tensors.keys() {
        let (module, part) = folder::split(key);
        let paired = folder::partner(part).is_none_or(|partner| modules[module].contains(&partner));
        match part {
            Part::A | Part::B | Part::EmbeddingA | Part::EmbeddingB if paired => builder.load(key),
            // Read, not run.
            Part::A | Part::B | Part::EmbeddingA | Part::EmbeddingB => {
                builder.refuse(key, "the other half of its pair is missing", None);
            }
            Part::BaseLayer if module.ends_with("embed_tokens") || module.ends_with("lm_head") => {
                builder.ignore(key, Effect::Part, "an embedding saved whole is passed over", Cure::Merge);
            }
            Part::Magnitude => builder.refuse(key, "DoRA is not supported", Cure::Flatten),
            Part::Tokens => builder.refuse(key, "single trained tokens are not supported", None),
            Part::Full | Part::BaseLayer | Part::Bias | Part::BiasOfB => {
                builder.refuse(key, "\"unsupported LoRA weight\": layers trained whole and biases", Cure::Merge);
            }
            Part::NamedA | Part::NamedB | Part::Other => {
                builder.refuse(
                    key,
                    "\"unsupported LoRA weight\": not a name that vLLM knows",
                    folder::of_another_kind(key),
                );
            }
        }
    }
    let Some(config) = folder::config(&mut builder, inventory) else {
        return builder.finish(Consumer::Vllm);
    };
    folder::require(&mut builder, config, &["r", "lora_alpha", "target_modules"]);
    if config.flag("use_dora") {
        builder.problem(Effect::Fatal, None, "`use_dora`: DoRA is not supported", Cure::Flatten);
    }
    if config.holds("modules_to_save") {
        builder.problem(Effect::Fatal, None, "`modules_to_save` is not supported", Cure::Merge);
    }
    if config.trains_bias() {
        builder.problem(Effect::Fatal, None, "`bias`: only \"none\" is supported", Cure::Merge);
    }
    if let Some(rank) = config.rank().filter(|rank| *rank > DEFAULT_RANK) {
        let (what, cure) = match RANKS.into_iter().find(|allowed| *allowed >= rank) {
            Some(allowed) => (
                format!("rank {rank} is above the default limit of {DEFAULT_RANK}"),
                Cure::Setting(format!("--max-lora-rank {allowed}").into()),
            ),
            None => (format!("rank {rank} is above the highest limit, {}", RANKS[RANKS.len() - 1]), Cure::Resize),
        };
        builder.problem(Effect::Fatal, None, what, cure);
    }
    for field in ["rank_pattern", "alpha_pattern"] {
        if config.holds(field) {
            let what = format!("`{field}` is not looked at: every layer gets the scale of `lora_alpha` and `r`");
            builder.problem(Effect::Wrong, None, what, Cure::ToPortable);
        }
    }
    folder::mutated_base(&mut builder, Effect::Wrong, config);
    builder.finish(Consumer::Vllm)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::Verdict;
    use super::super::samples::*;
    use super::*;

    fn judge(inventory: &Inventory) -> Opinion {
        opinion_of(Consumer::Vllm, inventory)
    }

    fn with(field: &str, value: Value) -> Opinion {
        judge(&language_model().set(field, value))
    }

    #[test]
    fn three_fields_are_required() {
        for field in ["r", "lora_alpha", "target_modules"] {
            let opinion = with(field, Value::Null);
            assert_eq!(opinion.verdict, Verdict::Refuses, "{field}");
            assert!(opinion.problems[0].what.contains(&format!("`{field}`")));
            assert_eq!(cure(&opinion).unwrap(), "lora convert --to portable");
        }
        assert_eq!(with("task_type", Value::Null).verdict, Verdict::Loads);
        let mut bare = language_model();
        bare.config = None;
        assert_eq!(judge(&bare).verdict, Verdict::Refuses);
    }

    #[test]
    fn ranks_need_a_limit_from_the_set() {
        for rank in [1, 5, 8, 12, 16] {
            assert_eq!(with("r", json!(rank)).verdict, Verdict::Loads, "{rank}");
        }
        for (rank, cured) in [(17, "32"), (32, "32"), (65, "128"), (257, "320"), (321, "512"), (512, "512")] {
            let opinion = with("r", json!(rank));
            assert_eq!(opinion.verdict, Verdict::Refuses, "{rank}");
            assert_eq!(cure(&opinion).unwrap(), format!("--max-lora-rank {cured}"));
        }
        assert_eq!(cure(&with("r", json!(513))).unwrap(), "lora resize");
    }

    #[test]
    fn what_changes_the_scale_by_layer_loads_wrong() {
        for field in ["rank_pattern", "alpha_pattern"] {
            let opinion = with(field, json!({ "q_proj": 4 }));
            assert_eq!(opinion.verdict, Verdict::LoadsWrong);
            assert_eq!(cure(&opinion).unwrap(), "lora convert --to portable");
        }
        assert_eq!(with("use_rslora", json!(true)).verdict, Verdict::Loads);
    }

    #[test]
    fn a_changed_base_loads_wrong() {
        for (init, cured) in
            [("pissa", "--flatten"), ("pissa_niter_16", "--flatten"), ("olora", "--flatten"), ("corda", "again")]
        {
            let opinion = with("init_lora_weights", json!(init));
            assert_eq!(opinion.verdict, Verdict::LoadsWrong, "{init}");
            assert!(cure(&opinion).unwrap().contains(cured), "{init}");
        }
        assert_eq!(with("init_lora_weights", json!("gaussian")).verdict, Verdict::Loads);
    }

    #[test]
    fn dora_biases_and_whole_layers_are_refused() {
        let dora = format!("{QUERY}.lora_magnitude_vector");
        let opinion = judge(&language_model().tensor(&dora, &[64]).set("use_dora", json!(true)));
        assert_eq!(opinion.verdict, Verdict::Refuses);
        assert!(is_refused(&opinion, &dora));
        assert_eq!(cure(&opinion).unwrap(), "lora convert --flatten RANK --base BASE");
        assert_eq!(with("use_dora", json!(true)).verdict, Verdict::Refuses);
        assert_eq!(with("modules_to_save", json!(["lm_head"])).verdict, Verdict::Refuses);
        assert_eq!(with("bias", json!("lora_only")).verdict, Verdict::Refuses);
        for key in ["base_model.model.lm_head.weight", "base_model.model.model.layers.0.self_attn.q_proj.bias"] {
            let opinion = judge(&language_model().tensor(key, &[64]));
            assert!(is_refused(&opinion, key));
            assert_eq!(cure(&opinion).unwrap(), "lora merge");
        }
    }

    #[test]
    fn unknown_names_and_halves_are_refused() {
        for key in ["model.layers.0.q_proj.lora_A.default.weight", "model.layers.0.q_proj.hada_w1_a"] {
            let opinion = judge(&language_model().tensor(key, &[8, 64]));
            assert_eq!(opinion.verdict, Verdict::Refuses);
            assert!(is_refused(&opinion, key));
        }
        let opinion = judge(&language_model().without("layers.0.self_attn.q_proj.lora_B"));
        assert!(is_refused(&opinion, &format!("{QUERY}.lora_A.weight")));
    }

    #[test]
    fn names_without_pefts_prefix_and_embeddings_load() {
        let bare = language_model().renamed(|name| name.replace("base_model.model.", ""));
        assert_eq!(judge(&bare).verdict, Verdict::Loads);
        let embedding = "base_model.model.model.embed_tokens";
        let inventory = language_model()
            .tensor(&format!("{embedding}.lora_embedding_A"), &[8, 99])
            .tensor(&format!("{embedding}.lora_embedding_B"), &[64, 8]);
        assert_eq!(judge(&inventory).verdict, Verdict::Loads);
        let whole = format!("{embedding}.base_layer.weight");
        let opinion = judge(&inventory.tensor(&whole, &[99, 64]));
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert!(is_ignored(&opinion, &whole));
    }
}
