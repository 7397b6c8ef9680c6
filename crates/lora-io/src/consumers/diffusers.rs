//! diffusers' `load_lora_weights`, version 0.42.1.
//!
//! A file is taken for the kohya layout when every key starts with one of its prefixes; it is then renamed, and what is
//! left over is an error. Any other file has to be in diffusers' own dotted names. Layers that the pipeline does not
//! have are passed over with a warning.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use lora_core::Component;

use super::builder::OpinionBuilder;
use super::layers::{Layer, underscored};
use super::{Consumer, Cure, Effect, Inventory, Opinion};
use crate::family::{Family, sdxl};

pub(super) const VERSION: &str = "0.42.1";

/// Prefixes that every key must have for the conversion to happen.
const PREFIXES: [&str; 4] = ["lora_te_", "lora_te1_", "lora_te2_", "lora_unet_"];

pub(super) fn opinion(inventory: &Inventory, base: &Family, layers: &[Layer]) -> Opinion {
    let mut builder = OpinionBuilder::default();
    let kohya = inventory.tensors.keys().all(|key| PREFIXES.iter().any(|prefix| key.starts_with(prefix)));
    // Removed before anything else, in either layout.
    let (magnitudes, keys): (Vec<&str>, Vec<&str>) =
        inventory.tensors.keys().map(String::as_str).partition(|key| key.contains("dora_scale"));
    for key in magnitudes {
        let reason = "DoRA's magnitude is dropped with a warning; the weights are wrong without it";
        builder.ignore(key, Effect::Wrong, reason, Cure::Flatten);
    }
    if kohya {
        converted(&mut builder, inventory, base, layers, &keys);
    } else {
        dotted(&mut builder, inventory, layers, &keys);
    }
    builder.finish(Consumer::Diffusers)
}

/// A file in the kohya layout.
fn converted(builder: &mut OpinionBuilder, inventory: &Inventory, base: &Family, layers: &[Layer], keys: &[&str]) {
    let names = kohya_names(layers);
    let split = |key: &str| key.split_once('.').map(|(name, part)| (name.to_owned(), part.to_owned()));
    let mut modules: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for key in keys {
        if let Some((name, part)) = split(key) {
            modules.entry(name).or_default().insert(part);
        }
    }
    let original = |name: &str| {
        ["lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
    };
    let treelike = |name: &str| {
        ["lora_unet_down_blocks_", "lora_unet_mid_block_", "lora_unet_up_blocks_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
    };
    // Only the SDXL pipelines turn original block names into diffusers' ones.
    let maps = *base == sdxl::FAMILY;
    let mixed = maps && modules.keys().any(|name| original(name)) && modules.keys().any(|name| treelike(name));
    let mut layers_of: BTreeMap<&str, &Layer> = BTreeMap::new();
    for &key in keys {
        let (name, part) = key.split_once('.').unwrap_or((key, ""));
        let has = |part: &str| modules.get(name).is_some_and(|parts| parts.contains(part));
        if mixed && original(name) {
            let reason = "original names beside diffusers' names: the original ones are deleted";
            builder.ignore(key, Effect::Part, reason, Cure::ToKohya);
        } else if !has("lora_down.weight") || !["lora_down.weight", "lora_up.weight", "alpha"].contains(&part) {
            // Names are taken by their lora_down.weight; the rest of the state must be empty then.
            let plain = |part: &String| ["lora_down.weight", "lora_up.weight", "alpha"].contains(&part.as_str());
            let cure = match modules.get(name) {
                Some(_) if has("lora_A.weight") && has("lora_B.weight") => Some(Cure::ToKohya),
                Some(parts) if !parts.iter().all(plain) => Some(Cure::Flatten),
                _ => None,
            };
            builder.refuse(key, "left over after the conversion, which is a ValueError", cure);
        } else if !has("lora_up.weight") {
            builder.refuse(key, "lora_up.weight is missing, which is a KeyError", None);
        } else if let Some(layer) = names.get(name) {
            layers_of.insert(name, layer);
            builder.load(key);
        } else if original(name) && !maps {
            let reason = "only SDXL pipelines know original block names; here they become names of no layer";
            builder.ignore(key, Effect::Part, reason, Cure::ToKohya);
        } else {
            builder.ignore(key, Effect::Part, "the pipeline has no layer of this name", None);
        }
    }
    lost_alphas(builder, inventory, &layers_of);
    encoders_without_a_sign(builder, &modules);
}

/// The kind of a text encoder's part is told by `to_out_lora`, `lora_linear_layer` or `.lora_A.weight`, which only
/// out_proj and the MLP become: q, k and v alone raise "Could not automatically infer state dict type".
pub(super) fn encoders_without_a_sign(builder: &mut OpinionBuilder, modules: &BTreeMap<String, BTreeSet<String>>) {
    for prefixes in [&["lora_te_", "lora_te1_"][..], &["lora_te2_"]] {
        let converted = |parts: &BTreeSet<String>| parts.contains("lora_down.weight");
        let names = || {
            let of = modules.iter().filter(|(_, parts)| converted(parts)).map(|(name, _)| name);
            of.filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
        };
        let sign = |name: &String| ["_out_proj", "_fc1", "_fc2"].iter().any(|end| name.ends_with(end));
        if names().any(sign) {
            continue;
        }
        for name in names() {
            for part in &modules[name] {
                let reason = "a text encoder with nothing but q, k and v is not recognised";
                builder.refuse(&format!("{name}.{part}"), reason, Cure::ToKohya);
            }
        }
    }
}

/// The most frequent alpha of a component becomes `lora_alpha`, others go into `alpha_pattern`, whose keys match no
/// attention layer; and a layer without alpha gets the most frequent one too, not its rank.
fn lost_alphas(builder: &mut OpinionBuilder, inventory: &Inventory, layers_of: &BTreeMap<&str, &Layer>) {
    for component in [Component::UNET, Component::TEXT_ENCODER, Component::TEXT_ENCODER_2] {
        let of = || layers_of.iter().filter(|(_, layer)| layer.component == component);
        let mut counts: Vec<(f64, usize)> = Vec::new();
        for (name, _) in of() {
            if let Some(&alpha) = inventory.scalars.get(&format!("{name}.alpha")) {
                match counts.iter_mut().find(|(value, _)| *value == alpha) {
                    Some((_, count)) => *count += 1,
                    None => counts.push((alpha, 1)),
                }
            }
        }
        let Some(&(common, _)) = counts.iter().max_by_key(|(_, count)| *count) else { continue };
        for (name, layer) in of() {
            let (alpha, down) = (format!("{name}.alpha"), format!("{name}.lora_down.weight"));
            let rank = inventory.tensors[&down].1.first().copied().unwrap_or(0) as f64;
            match inventory.scalars.get(&alpha) {
                Some(&value) if value != common && layer.is_attention => {
                    let reason = "an attention layer's alpha other than the most frequent one is replaced by it";
                    builder.ignore(&alpha, Effect::Wrong, reason, Cure::ToKohya);
                }
                None if !inventory.tensors.contains_key(&alpha) && rank != common => {
                    let reason = "a layer without alpha gets the most frequent alpha of the others, not its rank";
                    builder.problem(Effect::Wrong, Some(&down), reason, Cure::ToKohya);
                }
                _ => {}
            }
        }
    }
}

/// A file in dotted names.
fn dotted(builder: &mut OpinionBuilder, inventory: &Inventory, layers: &[Layer], keys: &[&str]) {
    let names = dotted_names(layers);
    // The U-Net's first key alone decides whether the older spellings of all its keys are renamed.
    let mut order = inventory.order.iter().map(String::as_str).chain(keys.iter().copied());
    let renames = order.find(|key| key.starts_with("unet.")).is_none_or(|first| !first.contains("lora_A"));
    let is_old = |key: &str| key.starts_with("unet.") && [".lora.", "_lora."].iter().any(|part| key.contains(part));
    let all: HashSet<&str> = keys.iter().copied().collect();
    for &key in keys {
        if !key.contains("lora") {
            let reason = "a key without `lora` in a file that is not all kohya: \"Invalid LoRA checkpoint\"";
            builder.refuse(key, reason, Cure::ToKohya);
            continue;
        }
        let known = PAIRS.iter().find_map(|pair| {
            let index = pair.iter().position(|part| key.ends_with(part))?;
            let name = &key[..key.len() - pair[index].len()];
            Some((name, format!("{name}{}", pair[1 - index])))
        });
        match known {
            _ if !renames && is_old(key) => {
                let reason =
                    "the first key of the U-Net has PEFT's spelling, so that this one is not renamed: no effect";
                builder.ignore(key, Effect::Part, reason, Cure::ToKohya);
            }
            Some((name, partner)) if names.contains(name) => {
                if all.contains(partner.as_str()) {
                    builder.load(key);
                } else {
                    builder.ignore(key, Effect::Part, "the other half of its pair is missing: no effect", None);
                }
            }
            _ if key.starts_with("base_model.model.") => {
                let reason = "PEFT's names: diffusers looks for names that start with `unet.` or `text_encoder.`";
                builder.ignore(key, Effect::Part, reason, Cure::ToKohya);
            }
            _ if PREFIXES.iter().any(|prefix| key.starts_with(prefix)) => {
                let reason = "kohya names are converted only where every key of the file is one";
                builder.ignore(key, Effect::Part, reason, Cure::ToKohya);
            }
            _ if key.starts_with("lycoris_") => {
                let reason = "names of LyCORIS' own wrapper belong to no part of a pipeline";
                builder.ignore(key, Effect::Part, reason, Cure::ToKohya);
            }
            _ => builder.ignore(key, Effect::Part, "the pipeline has no layer of this name", None),
        }
    }
}

/// Spellings of a pair: down, up.
const PAIRS: [[&str; 2]; 4] = [
    [".lora_A.weight", ".lora_B.weight"],
    [".lora.down.weight", ".lora.up.weight"],
    [".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"],
    ["_lora.down.weight", "_lora.up.weight"],
];

/// Kohya names and their layers; original names in SDXL alone.
fn kohya_names(layers: &[Layer]) -> HashMap<String, &Layer> {
    let mut names = HashMap::new();
    for layer in layers {
        names.insert(layer.kohya.clone(), layer);
        let prefixes: &[&str] = match layer.component {
            Component::TEXT_ENCODER => &["lora_te", "lora_te1"],
            Component::TEXT_ENCODER_2 => &["lora_te2"],
            _ => &["lora_unet"],
        };
        names.extend(prefixes.iter().map(|prefix| (underscored(prefix, &layer.path), layer)));
    }
    names
}

/// Dotted names with their component: as modules, and as attention processors (before 0.22).
fn dotted_names(layers: &[Layer]) -> HashSet<String> {
    let mut names = HashSet::new();
    for layer in layers {
        let name = format!("{}.{}", layer.component.name(), layer.path);
        let short = name.strip_suffix(".to_out.0").map(|stem| format!("{stem}.to_out"));
        let old = short.as_ref().unwrap_or(&name).replace(".to_", ".processor.to_");
        names.extend(short);
        names.extend([old, name]);
    }
    names
}

#[cfg(test)]
mod tests {
    use super::super::samples::*;
    use super::super::{Fate, Verdict};
    use super::*;

    const NAME: &str = "lora_unet_mid_block_attentions_0_proj_in";

    fn judge(inventory: &Inventory) -> Opinion {
        opinion_of(Consumer::Diffusers, inventory)
    }

    #[test]
    fn the_first_key_of_the_unet_decides_about_the_spelling_of_all() {
        let name = "unet.mid_block.attentions.0.proj_in.lora";
        let (down, up) = (format!("{name}.down.weight"), format!("{name}.up.weight"));
        let mixed = dotted_sd1("unet.").tensor(&down, &[4, 1280]).tensor(&up, &[1280, 4]);
        let opinion = judge(&mixed);
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert!(is_ignored(&opinion, &down) && is_ignored(&opinion, &up));
        assert_eq!(cure(&opinion).unwrap(), "lora convert --to kohya");
        let other = Inventory { order: vec!["text_encoder.x".into(), down], ..mixed };
        assert_eq!(judge(&other).verdict, Verdict::Loads);
    }

    #[test]
    fn dotted_names_of_every_age_load() {
        assert_eq!(judge(&dotted_sd1("unet.")).verdict, Verdict::Loads);
        let new = dotted_sd1("unet.");
        let older = new.renamed(|name| name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"));
        assert_eq!(judge(&older).verdict, Verdict::Loads);
        let block = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora";
        let oldest = Inventory::default()
            .tensor(&format!("{block}.down.weight"), &[4, 640])
            .tensor(&format!("{block}.up.weight"), &[640, 4]);
        assert_eq!(judge(&oldest).verdict, Verdict::Loads);
        let text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer";
        let text = Inventory::default()
            .tensor(&format!("{text}.down.weight"), &[4, 768])
            .tensor(&format!("{text}.up.weight"), &[768, 4]);
        assert_eq!(judge(&text).verdict, Verdict::Loads);
    }

    #[test]
    fn peft_names_and_bare_names_load_nothing() {
        for prefix in ["base_model.model.", ""] {
            assert_eq!(judge(&dotted_sd1(prefix)).verdict, Verdict::NothingLoaded);
        }
        assert_eq!(cure(&judge(&dotted_sd1("base_model.model."))).unwrap(), "lora convert --to kohya");
    }

    #[test]
    fn half_a_dotted_pair_has_no_effect() {
        let opinion = judge(&dotted_sd1("unet.").without("to_q.lora_B"));
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert_eq!(opinion.loaded(), 4);
    }

    #[test]
    fn one_foreign_key_stops_the_conversion() {
        let opinion = judge(&sd1().tensor("bundle_emb.cat.string_to_param.*", &[2, 768]));
        assert_eq!(opinion.verdict, Verdict::Refuses);
        assert!(is_refused(&opinion, "bundle_emb.cat.string_to_param.*"));
        let opinion = judge(&sd1().tensor("oft_unet_x.oft_blocks", &[4, 4]));
        assert_eq!(opinion.verdict, Verdict::Refuses);
        // With `lora` in every key the load goes on, and only the dotted part is found.
        let mixed = sd1().pair("unet.down_blocks.1.attentions.0.proj_in");
        let opinion = judge(&mixed);
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert_eq!(opinion.loaded(), 2);
        let wrapper = Inventory::default().lora("lycoris_mid_block_attentions_0_proj_in", 9, 9);
        assert_eq!(judge(&wrapper).verdict, Verdict::Refuses);
        assert_eq!(judge(&wrapper.without(".alpha")).verdict, Verdict::NothingLoaded);
    }

    #[test]
    fn dora_is_dropped_and_the_weights_are_wrong() {
        let key = format!("{SD1_BLOCK}_attn1_to_q.dora_scale");
        let opinion = judge(&sd1().tensor(&key, &[640, 1]));
        assert_eq!(opinion.verdict, Verdict::LoadsWrong);
        assert!(is_ignored(&opinion, &key));
        assert_eq!(cure(&opinion).unwrap(), "lora convert --flatten RANK --base BASE");
    }

    #[test]
    fn left_over_keys_are_an_error() {
        for part in ["hada_w1_a", "lokr_w1", "diff", "w_norm", "on_input"] {
            let key = format!("{NAME}.{part}");
            let opinion = judge(&sd1().tensor(&key, &[4, 4]));
            assert_eq!(opinion.verdict, Verdict::Refuses, "{part}");
            assert!(is_refused(&opinion, &key));
            assert_eq!(opinion.loaded(), 0);
            assert_eq!(cure(&opinion).unwrap(), "lora convert --flatten RANK --base BASE");
        }
        let mid = "lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight";
        assert!(is_refused(&judge(&sd1().tensor(mid, &[4, 4, 3, 3])), mid));
        for half in ["lora_up", "lora_down"] {
            assert_eq!(judge(&sd1().without(&format!("fc1.{half}"))).verdict, Verdict::Refuses);
        }
        let alpha = format!("{NAME}.alpha");
        assert!(is_refused(&judge(&sd1().tensor(&alpha, &[])), &alpha));
        let peft = judge(&sd1().pair(NAME));
        assert_eq!(cure(&peft).unwrap(), "lora convert --to kohya");
    }

    #[test]
    fn minority_alphas_of_attention_layers_are_lost() {
        let query = format!("{SD1_BLOCK}_attn1_to_q");
        let opinion = judge(&sd1().alpha(&query, 4.0));
        assert_eq!(opinion.verdict, Verdict::LoadsWrong);
        assert!(is_ignored(&opinion, &format!("{query}.alpha")));
        assert_eq!(opinion.problems[0].keys, 1);
        // Elsewhere they are kept, and each component has its own most frequent one.
        assert_eq!(judge(&sd1().alpha("lora_unet_down_blocks_0_resnets_0_conv1", 4.0)).verdict, Verdict::Loads);
        let mut text = sd1();
        for (name, alpha) in text.scalars.iter_mut() {
            if name.starts_with("lora_te_") {
                *alpha = 4.0;
            }
        }
        assert_eq!(judge(&text).verdict, Verdict::Loads);
    }

    #[test]
    fn a_layer_without_alpha_gets_the_others() {
        let opinion = judge(&sd1().without("attn1_to_q.alpha"));
        assert_eq!(opinion.verdict, Verdict::LoadsWrong);
        assert_eq!(judge(&sd1().without(".alpha")).verdict, Verdict::Loads);
    }

    #[test]
    fn a_text_encoder_of_q_k_and_v_alone_is_refused() {
        let lone = sd1().without("out_proj").without("fc1");
        let opinion = judge(&lone);
        assert_eq!(opinion.verdict, Verdict::Refuses);
        assert_eq!(opinion.problems[0].keys, 9);
        assert_eq!(cure(&opinion).unwrap(), "lora convert --to kohya");
        assert_eq!(judge(&sd1().without("fc1")).verdict, Verdict::Loads);
        assert_eq!(judge(&sd1().without("lora_te_")).verdict, Verdict::Loads);
        // CLIP-L goes by either prefix, and the two count as one encoder.
        let either = sd1().renamed(|name| {
            name.replace("lora_te_text_model_encoder_layers_0_mlp", "lora_te1_text_model_encoder_layers_0_mlp")
        });
        assert_eq!(judge(&either.without("out_proj")).verdict, Verdict::Loads);
        // Each encoder is told for itself.
        let second = sdxl()
            .without("te2_text_model_encoder_layers_31_self_attn_out")
            .without("te2_text_model_encoder_layers_31_mlp");
        assert_eq!(judge(&second).verdict, Verdict::Refuses);
    }

    #[test]
    fn original_names_work_in_sdxl_alone_and_not_beside_diffusers_names() {
        let sd1 = sd1().lora("lora_unet_input_blocks_1_1_proj_in", 320, 320);
        let opinion = judge(&sd1);
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert!(is_ignored(&opinion, "lora_unet_input_blocks_1_1_proj_in.lora_up.weight"));
        assert_eq!(cure(&opinion).unwrap(), "lora convert --to kohya");

        let treelike = "lora_unet_down_blocks_1_attentions_1_proj_in";
        let opinion = judge(&sdxl().lora(treelike, 640, 640));
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert_eq!(opinion.keys[&format!("{treelike}.alpha")], Fate::Loaded);
        let original = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight";
        assert!(is_ignored(&opinion, original));
        assert!(opinion.problems[0].what.contains("deleted"));
    }
}
