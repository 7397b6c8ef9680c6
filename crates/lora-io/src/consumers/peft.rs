//! Hugging Face PEFT, `PeftModel.from_pretrained`, version 0.21.2 (commit 5d602fdb).
//!
//! The config decides which layers get an adapter; the state is then loaded without asking for every key to be used:
//! missing ones bring a warning, unexpected ones nothing at all.

use super::builder::OpinionBuilder;
use super::folder::{self, Config, PREFIX, Part};
use super::{Consumer, Cure, Effect, Inventory, Opinion, Verdict, is_image};
use crate::family::Family;

pub(super) const VERSION: &str = "0.21.2";

/// Types of adapter and what their tensors' names hold; AdaLoRA's ranks are in masks and not looked at.
const TYPES: [(&str, &str); 9] = [
    ("LORA", ".lora_"),
    ("ADALORA", ".lora_"),
    ("LOHA", ".hada_"),
    ("LOKR", ".lokr_"),
    ("IA3", ".ia3_"),
    ("OFT", ".oft_"),
    ("BOFT", ".boft_"),
    ("VERA", ".vera_"),
    ("HRA", ".hra_"),
];

pub(super) fn opinion(inventory: &Inventory, base: Option<&Family>) -> Opinion {
    let refuses = |what: &'static str, cure: Option<Cure>| Opinion::whole(Consumer::Peft, Verdict::Refuses, what, cure);
    let Some(value) = &inventory.config else {
        let cure = if is_image(base) { Cure::ToPeft } else { Cure::ToPortable };
        let cure = folder::without_config(inventory, cure);
        return refuses("PEFT loads a folder with an adapter_config.json, and there is none beside the file", cure);
    };
    let config = Config(value);
    let Some(kind) = config.text("peft_type") else {
        return refuses("adapter_config.json has no `peft_type`", Some(Cure::ToPortable));
    };
    let Some((_, marker)) = TYPES.into_iter().find(|(name, _)| *name == kind) else {
        let what = format!("no rules are known here for adapters of PEFT's type {kind}");
        return Opinion::whole(Consumer::Peft, Verdict::Unknown, what, None);
    };
    let mut builder = OpinionBuilder::default();
    let modules = folder::modules(inventory.tensors.keys());
    for (key, (_, shape)) in &inventory.tensors {
        let (module, part) = folder::split(key);
        if !key.starts_with(PREFIX) {
            let reason = "without `base_model.model.` no layer has this name: passed over without a message";
            builder.ignore(key, Effect::Part, reason, Cure::ToPeft);
            continue;
        }
        let paired = folder::partner(part).is_none_or(|partner| modules[module].contains(&partner));
        let untargeted = config.targets(module) == Some(false);
        match part {
            Part::Full if !config.saves(module) => {
                let reason = "`modules_to_save` does not name its layer: passed over without a message";
                builder.ignore(key, Effect::Part, reason, None);
            }
            Part::Bias if !config.trains_bias() => {
                builder.ignore(key, Effect::Part, "a bias where the config says none: passed over", None);
            }
            Part::Full | Part::Bias | Part::BaseLayer | Part::Tokens => builder.load(key),
            // The adapter's name is put into each name on loading, and would then stand there twice.
            Part::NamedA | Part::NamedB => {
                let reason = "the adapter's name is in the middle of the name: passed over without a message";
                builder.ignore(key, Effect::Part, reason, Cure::ToPeft);
            }
            _ if !key.contains(marker) => {
                let reason = "not a tensor of the config's `peft_type`: passed over without a message";
                builder.ignore(key, Effect::Part, reason, None);
            }
            _ if untargeted => {
                let reason = "`target_modules` does not name its layer: passed over without a message";
                builder.ignore(key, Effect::Part, reason, Cure::ToPeft);
            }
            Part::Magnitude if !config.flag("use_dora") => {
                let reason = "a DoRA magnitude where the config does not say `use_dora`: the weights are wrong";
                builder.ignore(key, Effect::Wrong, reason, None);
            }
            Part::BiasOfB if !config.flag("lora_bias") => {
                let reason = "a bias of lora_B where the config does not say `lora_bias`: the weights are wrong";
                builder.ignore(key, Effect::Wrong, reason, None);
            }
            // lora_B starts at zero, lora_A (of embeddings the other way round) at random.
            Part::A | Part::EmbeddingB if !paired => {
                builder.ignore(key, Effect::Part, "the other half is missing and stays zero: no effect", None);
            }
            Part::B | Part::EmbeddingA if !paired => {
                let reason = "the other half is missing and stays as it was initialised: the weights are wrong";
                builder.ignore(key, Effect::Wrong, reason, None);
            }
            Part::A | Part::B if kind == "LORA" => match misfit(config, module, part, shape) {
                Some(reason) => builder.refuse(key, reason, None),
                None => builder.load(key),
            },
            _ => builder.load(key),
        }
    }
    if config.flag("use_dora") && !modules.values().any(|parts| parts.contains(&Part::Magnitude)) {
        let what = "`use_dora` without a magnitude in the file: the weights are wrong";
        builder.problem(Effect::Wrong, None, what, None);
    }
    builder.finish(Consumer::Peft)
}

/// A tensor's rank that is not the config's: a size mismatch, which is an error even where keys may be missing.
fn misfit(config: Config<'_>, module: &str, part: Part, shape: &[usize]) -> Option<String> {
    // A missing `r` is the default.
    let expected =
        if config.get("r").is_none() && !config.holds("rank_pattern") { 8 } else { config.rank_of(module)? };
    let rank = *shape.get(if part == Part::A { 0 } else { 1 })?;
    (rank != expected).then(|| format!("rank {rank} where the config says {expected}: a size mismatch"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::samples::*;
    use super::*;

    fn judge(inventory: &Inventory) -> Opinion {
        opinion_of(Consumer::Peft, inventory)
    }

    #[test]
    fn a_config_with_a_type_is_needed() {
        let opinion = judge(&sd1());
        assert_eq!(opinion.verdict, Verdict::Refuses);
        assert_eq!(cure(&opinion).unwrap(), "lora convert --to peft");
        assert!(opinion.keys.is_empty());
        assert_eq!(judge(&language_model().set("peft_type", Value::Null)).verdict, Verdict::Refuses);
        assert_eq!(judge(&language_model().set("peft_type", json!("SHIRA"))).verdict, Verdict::Unknown);
        // Everything else has a default.
        assert_eq!(judge(&language_model().set("r", Value::Null)).verdict, Verdict::Loads);
    }

    #[test]
    fn folders_of_image_models_load_too() {
        let mut unet = dotted_sd1("base_model.model.");
        unet.config = Some(json!({ "peft_type": "LORA", "r": 8, "target_modules": ["to_q", "to_out.0", "ff.net.2"] }));
        assert_eq!(judge(&unet).verdict, Verdict::Loads);
    }

    #[test]
    fn unexpected_keys_pass_silently() {
        for key in [
            "model.layers.0.self_attn.q_proj.lora_A.weight".to_owned(),
            format!("{QUERY}.lora_A.default.weight"),
            format!("{QUERY}.hada_w1_a"),
            format!("{QUERY}.bias"),
            "base_model.model.lm_head.weight".to_owned(),
            format!("{}.lora_A.weight", QUERY.replace("q_proj", "k_proj")),
        ] {
            let opinion = judge(&language_model().tensor(&key, &[8, 64]));
            assert_eq!(opinion.verdict, Verdict::LoadsPart, "{key}");
            assert!(is_ignored(&opinion, &key));
            assert_eq!(opinion.loaded(), language_model().tensors.len());
        }
        let opinion = judge(&language_model().pair("base_model.model.model.layers.0.mlp.up_proj"));
        assert_eq!(opinion.problems[0].keys, 2);
        assert!(opinion.problems[0].what.contains("`target_modules`"));
        let bare = language_model().renamed(|name| name.replace(PREFIX, ""));
        assert_eq!(judge(&bare).verdict, Verdict::NothingLoaded);
    }

    #[test]
    fn what_the_config_names_loads() {
        let saved = language_model().tensor("base_model.model.lm_head.weight", &[99, 64]);
        assert_eq!(judge(&saved.set("modules_to_save", json!(["lm_head"]))).verdict, Verdict::Loads);
        let bias = language_model().tensor(&format!("{QUERY}.bias"), &[64]);
        assert_eq!(judge(&bias.set("bias", json!("all"))).verdict, Verdict::Loads);
        let magnitude = format!("{QUERY}.lora_magnitude_vector");
        let dora = language_model().tensor(&magnitude, &[64]);
        assert_eq!(judge(&dora).verdict, Verdict::LoadsWrong);
        assert_eq!(judge(&dora.set("use_dora", json!(true))).verdict, Verdict::Loads);
        assert_eq!(judge(&language_model().set("use_dora", json!(true))).verdict, Verdict::LoadsWrong);
        assert_eq!(judge(&language_model().set("init_lora_weights", json!("pissa"))).verdict, Verdict::Loads);
    }

    #[test]
    fn halves_have_no_effect_or_the_wrong_one() {
        let opinion = judge(&language_model().without("layers.0.self_attn.q_proj.lora_B"));
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert!(is_ignored(&opinion, &format!("{QUERY}.lora_A.weight")));
        let opinion = judge(&language_model().without("layers.0.self_attn.q_proj.lora_A"));
        assert_eq!(opinion.verdict, Verdict::LoadsWrong);
    }

    #[test]
    fn ranks_have_to_be_the_configs() {
        let opinion = judge(&language_model().set("r", json!(4)));
        assert_eq!(opinion.verdict, Verdict::Refuses);
        let pattern = language_model().set("r", json!(4)).set("rank_pattern", json!({ "q_proj": 8, "v_proj": 8 }));
        assert_eq!(judge(&pattern).verdict, Verdict::Loads);
    }

    #[test]
    fn other_types_have_their_own_tensors() {
        let name = QUERY.replace("q_proj", "up_proj");
        let mut loha = Inventory::default().tensor(&format!("{name}.hada_w1_a"), &[64, 8]);
        loha.config = Some(json!({ "peft_type": "LOHA", "r": 8, "target_modules": ["up_proj"] }));
        assert_eq!(judge(&loha).verdict, Verdict::Loads);
        assert_eq!(judge(&loha.set("peft_type", json!("LORA"))).verdict, Verdict::NothingLoaded);
    }
}
