//! AUTOMATIC1111's WebUI, as of the 1.10 line.
//!
//! A key is split at its first dot. The name before it is turned into a layer of the loaded model by a list of rules;
//! where no rule finds one, the key is skipped without a message. The parts of a layer that was found then have to make
//! up a known variant, or the whole network fails.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use lora_core::Component;

use super::builder::OpinionBuilder;
use super::layers::{Layer, underscored};
use super::{Consumer, Cure, Effect, Inventory, Opinion};
use crate::family::{Family, sd1, sd2, sdxl};

pub(super) const VERSION: &str = "1.10";

const NOT_KOHYA: &str = "not a name of the kohya layout: no effect and no message";

pub(super) fn opinion(inventory: &Inventory, base: &Family, layers: &[Layer]) -> Opinion {
    let names = names(base, layers);
    let mut builder = OpinionBuilder::default();
    let mut modules: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for key in inventory.tensors.keys() {
        match key.split_once('.') {
            Some((name, part)) => {
                modules.entry(name).or_default().insert(part);
            }
            None => builder.ignore(key, Effect::Part, NOT_KOHYA, Cure::ToKohya),
        }
    }
    for (&name, parts) in &modules {
        let key = |part: &str| format!("{name}.{part}");
        // An embedding packed beside the LoRA loads as one.
        if name == "bundle_emb" {
            parts.iter().for_each(|part| builder.load(&key(part)));
            continue;
        }
        // Old kohya OFT files have their own prefix, which is looked up in the original tree.
        if !names.contains(&name.replace("oft_unet", "lora_unet")) {
            let (reason, cure) = unknown(name, base);
            parts.iter().for_each(|part| builder.ignore(&key(part), Effect::Part, reason, cure.clone()));
            continue;
        }
        let Some(used) = variant(parts) else {
            let reason = "its parts make up no variant that the WebUI knows, which fails the whole network";
            let dotted = |part: &&str| part.starts_with("lora.") || part.starts_with("lora_linear_layer.");
            let cure = parts.iter().any(dotted).then_some(Cure::ToKohya);
            parts.iter().for_each(|part| builder.refuse(&key(part), reason, cure.clone()));
            continue;
        };
        if let Some(missing) = fused_partner(name, base, &modules) {
            let reason = format!("this encoder's attention is fused: without {missing} the layer is skipped");
            parts.iter().for_each(|part| builder.ignore(&key(part), Effect::Part, reason.clone(), None));
            continue;
        }
        for part in parts {
            if used.contains(part) || ["alpha", "scale", "bias", "dora_scale"].contains(part) {
                builder.load(&key(part));
            } else {
                // Parts that a variant does not ask for are passed over without notice.
                let changes = ["scalar", "rescale", "lora_magnitude_vector", "lora_magnitude_vector.weight"];
                let effect = if changes.contains(part) { Effect::Wrong } else { Effect::Part };
                builder.ignore(&key(part), effect, "not asked for beside the other parts of its layer", Cure::Flatten);
            }
        }
    }
    builder.finish(Consumer::WebUi)
}

/// The parts that the first fitting variant takes; `None` where none fits.
fn variant(parts: &BTreeSet<&str>) -> Option<&'static [&'static str]> {
    let all = |wanted: &[&str]| wanted.iter().all(|part| parts.contains(part));
    let factor = |whole: &str, a: &str, b: &str| parts.contains(whole) || all(&[a, b]);
    if all(&["lora_up.weight", "lora_down.weight"]) {
        Some(&["lora_up.weight", "lora_down.weight", "lora_mid.weight"])
    } else if all(&["lora_A.weight", "lora_B.weight"]) {
        Some(&["lora_A.weight", "lora_B.weight", "lora_mid.weight"])
    } else if all(&["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]) {
        Some(&["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"])
    } else if all(&["weight"]) {
        Some(&["weight", "on_input"])
    } else if factor("lokr_w1", "lokr_w1_a", "lokr_w1_b") && factor("lokr_w2", "lokr_w2_a", "lokr_w2_b") {
        Some(&["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"])
    } else if all(&["diff"]) {
        Some(&["diff", "diff_b"])
    } else if all(&["w_norm", "b_norm"]) {
        Some(&["w_norm", "b_norm"])
    } else if all(&["a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"]) {
        Some(&["a1.weight", "a2.weight", "b1.weight", "b2.weight"])
    } else if all(&["oft_blocks"]) || all(&["oft_diag"]) {
        Some(&["oft_blocks", "oft_diag"])
    } else {
        None
    }
}

/// Why a name finds no layer.
fn unknown(name: &str, base: &Family) -> (&'static str, Option<Cure>) {
    if *base == sdxl::FAMILY && name == "lora_unet_up_blocks_0_upsamplers_0_conv" {
        ("diffusers' name of the first upsampler leads to a layer that SDXL does not have", Some(Cure::ToKohya))
    } else if ["lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "oft_unet_"].iter().any(|p| name.starts_with(p)) {
        ("names no layer that the WebUI finds in this base model: skipped without a message", None)
    } else {
        (NOT_KOHYA, Some(Cure::ToKohya))
    }
}

/// q, k, v and out of an OpenCLIP attention (SD2's encoder, SDXL's second) are one layer, which is skipped unless all
/// four are there: the first that is missing.
fn fused_partner(name: &str, base: &Family, modules: &BTreeMap<&str, BTreeSet<&str>>) -> Option<&'static str> {
    let prefix = match () {
        () if *base == sd2::FAMILY => "lora_te_",
        () if *base == sdxl::FAMILY => "lora_te2_",
        () => return None,
    };
    let parts = ["_q_proj", "_k_proj", "_v_proj", "_out_proj"];
    let stem = parts.iter().find_map(|part| name.strip_suffix(part)).filter(|_| name.starts_with(prefix))?;
    let there =
        |part: &str| modules.get(format!("{stem}{part}").as_str()).is_some_and(|parts| variant(parts).is_some());
    parts.into_iter().find(|part| !there(part)).map(|part| &part[1..])
}

/// Names that the rules lead to a layer.
fn names(base: &Family, layers: &[Layer]) -> HashSet<String> {
    let mut names = HashSet::new();
    for layer in layers {
        if let Some(ldm) = &layer.ldm {
            // `lora_unet` is replaced by `diffusion_model`.
            names.insert(underscored("lora_unet", ldm));
        }
        let path = layer.path.as_str();
        let encoder = path.starts_with("text_model.encoder.layers.");
        let found = match layer.component {
            // Index arithmetic for the blocks and these ends; the other ends have no rule. The arithmetic is SD1's and
            // puts SDXL's first upsampler one place too early.
            Component::UNET => {
                let block = ["down_blocks.", "mid_block.", "up_blocks."].iter().any(|part| path.starts_with(part));
                let end = ["conv_in", "conv_out"].contains(&path) || path.starts_with("time_embedding.linear_");
                let misplaced = *base == sdxl::FAMILY && path == "up_blocks.0.upsamplers.0.conv";
                (block || end) && !misplaced
            }
            // In OpenCLIP's tree only the MLP and the attention are renamed; norms are not found.
            Component::TEXT_ENCODER_2 => encoder && !path.contains("layer_norm"),
            _ if *base == sd2::FAMILY => encoder && !path.contains("layer_norm"),
            // SDXL's first encoder is found by its own prefix for any layer.
            _ => encoder || *base == sdxl::FAMILY,
        };
        if found {
            names.insert(underscored(layer.prefix, path));
        }
        // SDXL's prefix of CLIP-L serves SD1 too.
        if *base == sd1::FAMILY && layer.component == Component::TEXT_ENCODER {
            names.insert(underscored("lora_te1", path));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::super::samples::*;
    use super::super::{Cure, Verdict};
    use super::*;

    fn judge(inventory: &Inventory) -> Opinion {
        opinion_of(Consumer::WebUi, inventory)
    }

    #[test]
    fn dotted_names_have_no_effect() {
        for prefix in ["unet.", "base_model.model."] {
            let opinion = judge(&dotted_sd1(prefix));
            assert_eq!(opinion.verdict, Verdict::NothingLoaded);
            assert_eq!(cure(&opinion).unwrap(), "lora convert --to kohya");
            assert_eq!(opinion.problems[0].keys, 6);
        }
        let wrapper = sd1().without("lora_te").renamed(|name| name.replace("lora_unet", "lycoris"));
        assert_eq!(judge(&wrapper).verdict, Verdict::NothingLoaded);
        let strange = sd1().tensor("x", &[1]).tensor("x.", &[1]);
        let opinion = judge(&strange);
        assert!(is_ignored(&opinion, "x") && is_ignored(&opinion, "x."));
        assert_eq!(opinion.keys.len(), strange.tensors.len());
    }

    #[test]
    fn diffusers_names_of_sdxl_load_but_for_the_first_upsampler() {
        let inventory = sdxl()
            .lora("lora_unet_down_blocks_1_attentions_0_proj_in", 640, 640)
            .lora("lora_unet_up_blocks_1_upsamplers_0_conv", 640, 640)
            .lora("lora_unet_up_blocks_0_upsamplers_0_conv", 1280, 1280);
        let opinion = judge(&inventory);
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert!(is_ignored(&opinion, "lora_unet_up_blocks_0_upsamplers_0_conv.lora_up.weight"));
        assert_eq!(opinion.loaded(), inventory.tensors.len() - 3);
        assert_eq!(cure(&opinion), Some(Cure::ToKohya.to_string()));
    }

    #[test]
    fn original_names_load_in_an_sd1_file() {
        let inventory = sd1().lora("lora_unet_input_blocks_1_1_proj_in", 320, 320);
        assert_eq!(judge(&inventory).verdict, Verdict::Loads);
    }

    #[test]
    fn fused_attention_needs_all_four() {
        let layer = "lora_te2_text_model_encoder_layers_31";
        let opinion = judge(&sdxl().without("layers_31_self_attn_out_proj"));
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        for part in ["q", "k", "v"] {
            assert!(is_ignored(&opinion, &format!("{layer}_self_attn_{part}_proj.lora_up.weight")));
        }
        assert_eq!(opinion.keys[&format!("{layer}_mlp_fc1.lora_up.weight")], super::super::Fate::Loaded);
        assert!(opinion.problems[0].what.contains("out_proj"));
        // CLIP's own layers are apart in SD1 and in SDXL's first encoder.
        assert_eq!(judge(&sd1().without("self_attn_out_proj")).verdict, Verdict::Loads);
        assert_eq!(judge(&sdxl().without("layers_0_self_attn_out_proj")).verdict, Verdict::Loads);
        assert_eq!(judge(&sd2().without("self_attn_k_proj")).verdict, Verdict::LoadsPart);
    }

    #[test]
    fn every_variant_is_known() {
        let variants: &[&[&str]] = &[
            &["lora_A.weight", "lora_B.weight"],
            &["lora_up.weight", "lora_down.weight", "lora_mid.weight", "dora_scale"],
            &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"],
            &["weight", "on_input"],
            &["lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"],
            &["diff", "diff_b"],
            &["w_norm", "b_norm"],
            &["a1.weight", "a2.weight", "b1.weight", "b2.weight"],
            &["oft_blocks"],
            &["oft_diag"],
        ];
        for parts in variants {
            let name = "lora_unet_mid_block_attentions_0_proj_in";
            let mut inventory = sd1().alpha(name, 1.0);
            for part in *parts {
                inventory = inventory.tensor(&format!("{name}.{part}"), &[4, 4]);
            }
            assert_eq!(judge(&inventory).verdict, Verdict::Loads, "{parts:?}");
        }
    }

    #[test]
    fn an_unknown_variant_of_a_known_layer_fails_everything() {
        let key = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight";
        let opinion = judge(&sd1().tensor(key, &[4, 1280]));
        assert_eq!(opinion.verdict, Verdict::Refuses);
        assert!(is_refused(&opinion, key));
        assert_eq!(opinion.loaded(), 0);
        let half = judge(&sd1().tensor("lora_unet_mid_block_attentions_0_norm.w_norm", &[4]));
        assert_eq!(half.verdict, Verdict::Refuses);
        assert_eq!(cure(&opinion), None);
        let dotted = judge(&sd1().tensor("lora_unet_mid_block_attentions_0_proj_in.lora.up.weight", &[1280, 4]));
        assert_eq!(cure(&dotted).unwrap(), "lora convert --to kohya");
    }

    #[test]
    fn unknown_layers_are_skipped_and_extra_parts_change_the_weights() {
        let unknown = "lora_unet_mid_block_attentions_7_proj_in.lora_up.weight";
        let opinion = judge(&sd1().tensor(unknown, &[4, 4]));
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert!(is_ignored(&opinion, unknown));
        let scalar = format!("{SD1_BLOCK}_attn1_to_q.scalar");
        let opinion = judge(&sd1().tensor(&scalar, &[]));
        assert_eq!(opinion.verdict, Verdict::LoadsWrong);
        assert_eq!(cure(&opinion).unwrap(), "lora convert --flatten RANK --base BASE");
    }

    #[test]
    fn packed_embeddings_load() {
        assert_eq!(judge(&sd1().tensor("bundle_emb.cat.string_to_param.*", &[2, 768])).verdict, Verdict::Loads);
    }
}
