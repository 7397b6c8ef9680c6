//! kohya's sd-scripts, version 0.10.1, `networks.lora` with its weights from a file.
//!
//! Modules are made for those layers of the model for which the file holds `<kohya name>.lora_down…`; the state is then
//! loaded without asking for every key to be used, so what has no module is passed over (read, not run).

use std::collections::HashSet;

use lora_core::Component;

use super::builder::OpinionBuilder;
use super::layers::{Kind, Layer, underscored};
use super::{Consumer, Cure, Effect, Inventory, Opinion, folder};
use crate::family::{Family, sdxl};

pub(super) const VERSION: &str = "0.10.1";

pub(super) fn opinion(inventory: &Inventory, base: &Family, layers: &[Layer]) -> Opinion {
    let names = names(base, layers);
    let mut builder = OpinionBuilder::default();
    // Modules of other variants are none under other names either.
    let special = inventory.tensors.keys().filter(|key| !folder::is_plain(key));
    let special: HashSet<&str> =
        special.map(|key| key.split_once('.').map_or(key.as_str(), |(name, _)| name)).collect();
    for key in inventory.tensors.keys() {
        let (name, part) = key.split_once('.').unwrap_or((key, ""));
        if !names.contains(name) {
            let kohya = name.starts_with("lora_unet_") || name.starts_with("lora_te");
            let (reason, cure) = if kohya && !part.is_empty() {
                ("sd-scripts adapts no layer of this name in this base model", None)
            } else {
                let cure = if special.contains(name) { Cure::Flatten } else { Cure::ToKohya };
                ("not a name of the kohya layout, which is the only one that sd-scripts reads", Some(cure))
            };
            builder.ignore(key, Effect::Part, reason, cure);
            continue;
        }
        let has = |part: &str| inventory.tensors.contains_key(&format!("{name}.{part}"));
        if !has("lora_down.weight") {
            let reason = "no lora_down.weight beside it, so no module is made for its layer";
            let cure = match part {
                "lora_up.weight" => None,
                _ if has("lora_up.weight") => None,
                _ if has("lora_A.weight") => Some(Cure::ToKohya),
                _ => Some(Cure::Flatten),
            };
            builder.ignore(key, Effect::Part, reason, cure);
        } else if has("lora_mid.weight") {
            // The module's factor has the layer's kernel, the Tucker form's has none: the shapes differ.
            let reason = "the Tucker form (lora_mid) has other shapes than the module that is made for it";
            builder.refuse(key, reason, Cure::Flatten);
        } else if !has("lora_up.weight") {
            builder.ignore(key, Effect::Part, "lora_up.weight is missing and stays zero: no effect", None);
        } else if ["lora_down.weight", "lora_up.weight", "alpha"].contains(&part) {
            builder.load(key);
        } else if part == "dora_scale" || part == "scalar" {
            let reason = "only lora_down, lora_up and alpha are read; without this part the weights are wrong";
            builder.ignore(key, Effect::Wrong, reason, Cure::Flatten);
        } else {
            builder.ignore(key, Effect::Part, "only lora_down, lora_up and alpha are read", Cure::Flatten);
        }
    }
    builder.finish(Consumer::SdScripts)
}

/// Native names of the layers that sd-scripts adapts; SDXL files in diffusers' names are converted on loading.
fn names(base: &Family, layers: &[Layer]) -> HashSet<String> {
    let adapted = |layer: &&Layer| layer.kind != Kind::Other;
    let mut names: HashSet<String> = layers.iter().filter(adapted).map(|layer| layer.kohya.clone()).collect();
    if *base == sdxl::FAMILY {
        let unet = layers.iter().filter(adapted).filter(|layer| layer.component == Component::UNET);
        names.extend(unet.map(|layer| underscored("lora_unet", &layer.path)));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::samples::*;
    use super::*;

    fn judge(inventory: &Inventory) -> Opinion {
        opinion_of(Consumer::SdScripts, inventory)
    }

    #[test]
    fn kohya_names_alone_are_read() {
        let opinion = judge(&dotted_sd1("unet."));
        assert_eq!(opinion.verdict, Verdict::NothingLoaded);
        assert_eq!(cure(&opinion).unwrap(), "lora convert --to kohya");
        let mixed = sd1().tensor("unet.conv_in.lora_A.weight", &[4, 4]);
        assert_eq!(judge(&mixed).verdict, Verdict::LoadsPart);
    }

    #[test]
    fn sdxl_in_diffusers_names_is_converted_and_sd1_in_original_names_is_not() {
        let converted = sdxl().lora("lora_unet_up_blocks_0_upsamplers_0_conv", 1280, 1280);
        assert_eq!(judge(&converted).verdict, Verdict::Loads);
        let opinion = judge(&sd1().lora("lora_unet_input_blocks_1_1_proj_in", 320, 320));
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert!(is_ignored(&opinion, "lora_unet_input_blocks_1_1_proj_in.alpha"));
    }

    #[test]
    fn other_variants_have_no_effect_or_the_wrong_one() {
        let name = format!("{SD1_BLOCK}_attn1_to_q");
        let opinion = judge(&sd1().tensor(&format!("{name}.dora_scale"), &[640, 1]));
        assert_eq!(opinion.verdict, Verdict::LoadsWrong);
        assert_eq!(cure(&opinion).unwrap(), "lora convert --flatten RANK --base BASE");
        let loha = sd1().tensor("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", &[4, 4]);
        assert_eq!(judge(&loha).verdict, Verdict::LoadsPart);
        let mid = sd1().tensor("lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight", &[4, 4, 3, 3]);
        assert_eq!(judge(&mid).verdict, Verdict::Refuses);
        let end = sd1().lora("lora_unet_conv_in", 4, 320);
        assert_eq!(judge(&end).verdict, Verdict::LoadsPart);
    }

    #[test]
    fn a_lone_half_has_no_effect() {
        for part in ["lora_up", "lora_down"] {
            let inventory = sd1().without(&format!("fc1.{part}"));
            let opinion = judge(&inventory);
            assert_eq!(opinion.verdict, Verdict::LoadsPart);
            assert_eq!(opinion.loaded(), inventory.tensors.len() - 2);
            assert_eq!(cure(&opinion), None);
        }
    }
}
