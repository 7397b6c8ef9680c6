//! What programs make of adapters for transformers that denoise by flow matching: which of the spellings of a layer
//! each knows; what diffusers makes of a layer's tensors is told in [`super::conversions`]. ComfyUI's rules (a commit
//! of October 2025) were seen running on tiny models but for those of FLUX.2, Z-Image, Anima and names without
//! `diffusion_model.`, which were read, not run; sd-scripts' were read, not run.

use std::collections::{BTreeMap, BTreeSet};

use lora_core::Component;

use super::builder::OpinionBuilder;
use super::conversions::{Conversion, Fate, module_of};
use super::{Consumer, Cure, Effect, Inventory, Opinion, Verdict, diffusers};
use crate::adapter::names;
use crate::family::tree::{Depths, Piece};
use crate::family::{FAMILIES, Family, anima, chroma, flux, flux2, qwen_image, sd3, z_image};

/// How a file spells a layer of the transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// `lora_unet_` and underscores.
    Kohya,
    /// `lora_transformer_` and underscores.
    Legacy,
    /// `lycoris_` and underscores.
    Lycoris,
    /// `diffusion_model.` and dots.
    Generic,
    /// `transformer.` and dots.
    Diffusers,
    /// Dots alone.
    Bare,
}

/// A module of the transformer as a file spells it.
pub(super) struct Own {
    pub(super) spelling: Spelling,
    pub(super) path: String,
    /// Whether the original tree has a layer of that name, and diffusers' tree.
    pub(super) original: bool,
    pub(super) canonical: bool,
}

/// Whether adapters for a base of a family are judged here.
pub(super) fn judges(base: &Family) -> bool {
    base.component(Component::TRANSFORMER).is_some_and(|names| names.single_file.is_some())
}

pub(super) fn opinion(consumer: Consumer, inventory: &Inventory, base: &'static Family) -> Opinion {
    if consumer == Consumer::WebUi {
        let what = format!("no rules are known here for {consumer} and {base}; Forge loads with ComfyUI's");
        return Opinion::whole(consumer, Verdict::Unknown, what, None);
    }
    if consumer == Consumer::SdScripts
        && ![&anima::FAMILY, &flux::FAMILY, &chroma::FAMILY, &sd3::FAMILY].contains(&base)
    {
        let what = format!("sd-scripts does not know {base}; musubi-tuner does");
        return Opinion::whole(consumer, Verdict::NothingLoaded, what, None);
    }
    let mut builder = OpinionBuilder::default();
    let conversion = (consumer == Consumer::Diffusers).then(|| Conversion::of(inventory, base));
    for key in inventory.tensors.keys() {
        let module = module_of(key);
        let own = own(module, base);
        let fate = match (&conversion, &own) {
            (Some(_), _) if key.ends_with(".dora_scale") => {
                let reason = "DoRA's magnitude is dropped with a warning; the weights are wrong without it";
                let cure = if *base == sd3::FAMILY { Cure::Merge } else { Cure::Flatten };
                builder.ignore(key, Effect::Wrong, reason, cure);
                continue;
            }
            (Some(conversion), _) if conversion.is_foreign(key) => {
                Fate::Refused("a key without `lora` in its name: \"Invalid LoRA checkpoint\"", Some(Cure::ToDiffusers))
            }
            (Some(_), Some(_)) if key.ends_with(".diff_b") => {
                builder.ignore(key, Effect::Wrong, "trained biases are passed over", Cure::Merge);
                continue;
            }
            (Some(conversion), Some(own)) => conversion.fate(module, own),
            (None, Some(own)) => of_transformer(consumer, base, own),
            (_, None) => of_text(consumer, base, module),
        };
        match fate {
            Fate::Loads => builder.load(key),
            Fate::Said(effect, what, cure) => {
                builder.load(key);
                builder.problem(effect, Some(key), what, cure);
            }
            Fate::Ignored(reason, cure) => builder.ignore(key, Effect::Part, reason, cure),
            Fate::Refused(reason, cure) => builder.refuse(key, reason, cure),
        }
    }
    if consumer == Consumer::Diffusers && *base == flux::FAMILY {
        diffusers::encoders_without_a_sign(&mut builder, &encoders(inventory));
    }
    builder.finish(consumer)
}

/// The parts of the text encoders' modules in kohya's names.
fn encoders(inventory: &Inventory) -> BTreeMap<String, BTreeSet<String>> {
    let mut modules = BTreeMap::<String, BTreeSet<String>>::new();
    let encoders = inventory.tensors.keys().filter(|key| key.starts_with("lora_te1_"));
    for (name, part) in encoders.filter_map(|key| key.split_once('.')) {
        modules.entry(name.to_owned()).or_default().insert(part.to_owned());
    }
    modules
}

fn own(module: &str, base: &Family) -> Option<Own> {
    let spellings = [
        ("lora_unet_", Spelling::Kohya),
        ("lora_transformer_", Spelling::Legacy),
        ("lycoris_", Spelling::Lycoris),
        ("diffusion_model.", Spelling::Generic),
        ("transformer.", Spelling::Diffusers),
    ];
    if module.starts_with("base_model.") {
        return None;
    }
    let spelling = spellings.into_iter().find(|(prefix, _)| module.starts_with(prefix));
    let spelling = spelling.map_or(Spelling::Bare, |(_, spelling)| spelling);
    let path = if names::is_kohya(module) { names::from_kohya(module, &FAMILIES) } else { names::from_dotted(module) };
    if path.component != Component::TRANSFORMER {
        return None;
    }
    let tree = base.component(Component::TRANSFORMER)?.single_file?.tree;
    let name = format!("{}.weight", path.path);
    let weights = tree.weights(&name, &Depths::default())?;
    let canonical = weights == [(name.clone(), Piece::All)];
    let (first, _) = weights.first()?;
    let original = tree.stored(first, &Depths::default()).is_some_and(|(stored, _)| stored == name);
    Some(Own { spelling, path: path.path, original, canonical })
}

/// What becomes of a layer of the transformer anywhere but in diffusers.
fn of_transformer(consumer: Consumer, base: &Family, own: &Own) -> Fate {
    use Fate::{Ignored, Loads, Said};
    let is = |families: &[&Family]| families.contains(&base);
    let convert = Some(if is(&[&sd3::FAMILY]) { Cure::ToDiffusers } else { Cure::ToKohya });
    let read = |what: &'static str| Said(Effect::Note, what, Some(Cure::ToKohya));
    match consumer {
        Consumer::ComfyUi => match own.spelling {
            Spelling::Kohya | Spelling::Generic if own.original => Loads,
            Spelling::Generic if own.canonical && is(&[&z_image::FAMILY]) => Loads,
            Spelling::Diffusers if own.canonical && is(&[&flux2::FAMILY]) => {
                read("diffusers' names of this base were read, not run")
            }
            Spelling::Diffusers if own.canonical && !is(&[&anima::FAMILY]) => Loads,
            Spelling::Legacy if own.canonical && is(&[&flux::FAMILY, &chroma::FAMILY, &sd3::FAMILY]) => Loads,
            // `comfy/lora.py`, read, not run.
            Spelling::Bare | Spelling::Lycoris if own.canonical && is(&[&qwen_image::FAMILY, &z_image::FAMILY]) => {
                Loads
            }
            Spelling::Lycoris if own.canonical && is(&[&flux::FAMILY, &chroma::FAMILY]) => Loads,
            _ => Ignored("no layer of this base model has this name (`lora key not loaded`)", convert),
        },
        _ if own.spelling == Spelling::Kohya && own.original => Loads,
        _ if matches!(own.spelling, Spelling::Generic | Spelling::Diffusers | Spelling::Bare) => {
            Ignored("dotted names are passed over", Some(Cure::ToKohya))
        }
        _ => Ignored("the network has no layer of this name", Some(Cure::ToKohya)),
    }
}

/// What becomes of anything else: a text encoder's layer, or what is none.
fn of_text(consumer: Consumer, base: &Family, module: &str) -> Fate {
    let begins = |starts: &[&str]| starts.iter().any(|start| module.starts_with(start));
    if *base == anima::FAMILY {
        let known = match consumer {
            Consumer::Diffusers => begins(&["diffusion_model.llm_adapter.", "text_conditioner."]),
            Consumer::ComfyUi => begins(&["lora_unet_llm_adapter_", "diffusion_model.llm_adapter.", "text_encoders."]),
            _ => begins(&["lora_unet_llm_adapter_"]),
        };
        return if known { Fate::Loads } else { Fate::Ignored("no layer of this base model has this name", None) };
    }
    let has_encoders = [&flux::FAMILY, &sd3::FAMILY].contains(&base);
    let known = match consumer {
        Consumer::Diffusers if *base == flux::FAMILY => {
            begins(&["lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer."])
        }
        Consumer::Diffusers => *base == sd3::FAMILY && begins(&["text_encoder.", "text_encoder_2."]),
        Consumer::ComfyUi => has_encoders && begins(&["lora_te1_", "lora_te2_", "lora_te3_", "text_encoders."]),
        _ if *base == flux::FAMILY => begins(&["lora_te1_", "lora_te3_"]),
        _ => begins(&["lora_te1_", "lora_te2_", "lora_te3_"]),
    };
    if known { Fate::Loads } else { Fate::Ignored("no layer of this base model has this name", None) }
}

#[cfg(test)]
mod tests {
    use super::super::opinions;
    use super::*;

    fn verdicts(inventory: &Inventory) -> [Verdict; 3] {
        let all = opinions(inventory);
        [Consumer::ComfyUi, Consumer::Diffusers, Consumer::SdScripts]
            .map(|consumer| all.iter().find(|own| own.consumer == consumer).unwrap().verdict)
    }

    #[test]
    fn each_spelling_of_flux_loads_where_it_did_when_it_was_tried() {
        use Verdict::{Loads, LoadsPart, NothingLoaded};
        let kohya = Inventory::default().lora("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216).lora(
            "lora_unet_single_blocks_0_linear1",
            3072,
            21504,
        );
        assert_eq!(kohya.base(), Some(&flux::FAMILY));
        assert_eq!(verdicts(&kohya), [Loads, Loads, Loads]);
        let outside = kohya.lora("lora_unet_img_in", 64, 3072);
        assert_eq!(verdicts(&outside), [Loads, LoadsPart, Loads]);
        let generic = Inventory::default().pair("diffusion_model.double_blocks.0.img_attn.qkv");
        assert_eq!(verdicts(&generic), [Loads, NothingLoaded, NothingLoaded]);
        let diffusers = Inventory::default()
            .pair("transformer.single_transformer_blocks.0.attn.to_q")
            .pair("transformer.transformer_blocks.0.attn.add_q_proj");
        assert_eq!(diffusers.base(), Some(&flux::FAMILY));
        assert_eq!(verdicts(&diffusers), [Loads, Loads, NothingLoaded]);
    }

    #[test]
    fn diffusers_reads_no_kohya_file_of_stable_diffusion_3() {
        use Verdict::{Loads, NothingLoaded};
        let kohya = Inventory::default().lora("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, 4608);
        assert_eq!(kohya.base(), Some(&sd3::FAMILY));
        assert_eq!(verdicts(&kohya), [Loads, NothingLoaded, Loads]);
        let diffusers = opinions(&kohya).into_iter().find(|own| own.consumer == Consumer::Diffusers).unwrap();
        assert_eq!(diffusers.problems[0].cure, Some(Cure::ToDiffusers));
        let dotted = Inventory::default().pair("transformer.transformer_blocks.0.attn2.to_q");
        assert_eq!(verdicts(&dotted), [Loads, Loads, NothingLoaded]);
    }

    #[test]
    fn animas_original_names_load_and_diffusers_where_they_are_known() {
        use Verdict::{Loads, NothingLoaded};
        let kohya = Inventory::default().lora("lora_unet_blocks_0_cross_attn_output_proj", 2048, 2048).lora(
            "lora_unet_llm_adapter_blocks_5_self_attn_o_proj",
            1024,
            1024,
        );
        assert_eq!(kohya.base(), Some(&anima::FAMILY));
        assert_eq!(verdicts(&kohya), [Loads, NothingLoaded, Loads]);
        let generic = Inventory::default()
            .pair("diffusion_model.blocks.0.self_attn.q_proj")
            .pair("diffusion_model.llm_adapter.blocks.0.mlp.2");
        assert_eq!(generic.base(), Some(&anima::FAMILY));
        assert_eq!(verdicts(&generic), [Loads, Loads, NothingLoaded]);
        let name = "transformer.transformer_blocks.0.attn2.to_k";
        let diffusers = Inventory::default()
            .tensor(&format!("{name}.lora_A.weight"), &[8, 1024])
            .tensor(&format!("{name}.lora_B.weight"), &[2048, 8]);
        assert_eq!(diffusers.base(), Some(&anima::FAMILY));
        assert_eq!(verdicts(&diffusers), [NothingLoaded, Loads, NothingLoaded]);
    }

    #[test]
    fn fused_names_of_z_image_load_and_separate_ones_behind_the_generic_prefix() {
        use Verdict::{Loads, NothingLoaded};
        let fused = Inventory::default().lora("lora_unet_layers_0_attention_qkv", 3840, 11520);
        assert_eq!(fused.base(), Some(&z_image::FAMILY));
        assert_eq!(verdicts(&fused), [Loads, Loads, NothingLoaded]);
        let separate = Inventory::default().lora("lora_unet_layers_0_attention_to_q", 3840, 3840);
        assert_eq!(verdicts(&separate), [NothingLoaded, Loads, NothingLoaded]);
        let generic = Inventory::default().pair("diffusion_model.layers.0.attention.to_q");
        assert_eq!(verdicts(&generic), [Loads, Loads, NothingLoaded]);
    }

    #[test]
    fn comfyui_knows_names_without_prefixes_of_two_bases() {
        // Qwen-Image-Lightning's form, and SimpleTuner's.
        for (name, base) in [
            ("transformer_blocks.0.attn.to_q", &qwen_image::FAMILY),
            ("lycoris_transformer_blocks_0_attn_to_q", &qwen_image::FAMILY),
            ("layers.0.attention.to_q", &z_image::FAMILY),
        ] {
            let inventory = Inventory::default().lora(name, 64, 64);
            assert_eq!(opinion(Consumer::ComfyUi, &inventory, base).verdict, Verdict::Loads, "{name}");
        }
        let peft = Inventory::default().pair("base_model.model.transformer_blocks.0.attn.to_q");
        assert_eq!(opinion(Consumer::ComfyUi, &peft, &qwen_image::FAMILY).verdict, Verdict::NothingLoaded);
    }

    #[test]
    fn wide_feed_forwards_tell_flux_2_from_flux_1() {
        let one = Inventory::default().lora("lora_unet_single_blocks_0_linear1", 3072, 7 * 3072);
        let two = Inventory::default().lora("lora_unet_single_blocks_0_linear1", 3072, 9 * 3072);
        assert_eq!((one.base(), two.base()), (Some(&flux::FAMILY), Some(&flux2::FAMILY)));
    }
}
