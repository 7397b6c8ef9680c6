//! ComfyUI's loader of 2026 (commits 9c0cf36c and 14c20852); the Forge family's derives from it.
//!
//! It makes a table of names for each layer of the model and asks the file for every name with every suffix it knows.
//! What nobody asks for is logged as `lora key not loaded` and skipped. Shapes are looked at when weights are patched,
//! and a layer that does not fit is skipped with a line in the log.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use lora_core::Component;

use super::builder::OpinionBuilder;
use super::layers::{Kind, Layer, underscored};
use super::{Consumer, Cure, Effect, Inventory, Opinion};
use crate::family::{Family, sd2, sdxl};

pub(super) const VERSION: &str = "commit 9c0cf36c (2026)";

/// Spellings of a pair in the order they are tried: up, down.
const PAIRS: [(&str, &str); 7] = [
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
];

/// Suffixes of the other variants, and of parts that exist and are not asked for.
const SUFFIXES: &[&str] = &[
    ".lora_mid.weight",
    ".alpha",
    ".dora_scale",
    ".reshape_weight",
    ".hada_w1_a",
    ".hada_w1_b",
    ".hada_w2_a",
    ".hada_w2_b",
    ".hada_t1",
    ".hada_t2",
    ".lokr_w1",
    ".lokr_w1_a",
    ".lokr_w1_b",
    ".lokr_w2",
    ".lokr_w2_a",
    ".lokr_w2_b",
    ".lokr_t2",
    ".a1.weight",
    ".a2.weight",
    ".b1.weight",
    ".b2.weight",
    ".oft_blocks",
    ".rescale",
    ".w_norm",
    ".b_norm",
    ".diff",
    ".diff_b",
    ".set_weight",
    ".oft_diag",
    ".scalar",
    ".scale",
    ".bias",
    ".on_input",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".weight",
];

pub(super) fn opinion(inventory: &Inventory, base: &Family, layers: &[Layer]) -> Opinion {
    let names = names(base, layers);
    let mut builder = OpinionBuilder::default();
    let mut modules: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for key in inventory.tensors.keys() {
        match split(key).filter(|(name, _)| names.contains(*name)) {
            Some((name, part)) => {
                modules.entry(name).or_default().insert(part);
            }
            None => {
                let (reason, cure) = unknown(key);
                builder.ignore(key, Effect::Part, reason, cure);
            }
        }
    }
    for (name, parts) in modules {
        module(&mut builder, inventory, name, &parts);
    }
    builder.finish(Consumer::ComfyUi)
}

/// The fates of one layer's parts.
fn module(builder: &mut OpinionBuilder, inventory: &Inventory, name: &str, parts: &BTreeSet<&'static str>) {
    let key = |part: &str| format!("{name}{part}");
    let has = |part: &str| parts.contains(part);
    let mut taken: BTreeSet<&str> = BTreeSet::new();
    let mut need = |builder: &mut OpinionBuilder, first: &'static str, others: &[&'static str]| {
        taken.extend(others.iter().copied().chain([first]));
        if let Some(missing) = others.iter().find(|part| !has(part)) {
            // The others are read without asking whether they are there: Python's KeyError.
            builder.refuse(&key(first), format!("{} is missing, which is a KeyError", &missing[1..]), None);
        }
    };
    if let Some((up, down)) = PAIRS.into_iter().find(|(up, _)| has(up)) {
        need(builder, up, &[down]);
        if up == ".lora_up.weight" {
            taken.insert(".lora_mid.weight");
        }
        taken.insert(".reshape_weight");
    } else if has(".hada_w1_a") {
        need(builder, ".hada_w1_a", &[".hada_w1_b", ".hada_w2_a", ".hada_w2_b"]);
        if has(".hada_t1") {
            need(builder, ".hada_t1", &[".hada_t2"]);
        }
    } else if parts.iter().any(|part| part.starts_with(".lokr_w")) {
        taken.extend(parts.iter().filter(|part| part.starts_with(".lokr_")));
    } else if has(".a1.weight") {
        need(builder, ".a1.weight", &[".a2.weight", ".b1.weight", ".b2.weight"]);
    } else if has(".oft_blocks") {
        taken.insert(".oft_blocks");
        let reason = "OFT: the strength is applied twice, and alpha is taken without the layer's width";
        builder.problem(Effect::Wrong, Some(&key(".oft_blocks")), reason, Cure::Flatten);
    }
    for (part, partner) in [(".w_norm", ".b_norm"), (".diff", ".diff_b"), (".set_weight", "")] {
        if has(part) {
            taken.extend([part, partner]);
        }
    }
    let loads = parts.iter().any(|part| taken.contains(part));
    if loads {
        taken.extend([".alpha", ".dora_scale"]);
    }
    for &part in parts {
        let key = key(part);
        if taken.contains(part) {
            builder.load_unless_refused(&key);
            if part == ".dora_scale" {
                dora(builder, inventory, name, &key);
            }
            continue;
        }
        match part {
            ".alpha" | ".dora_scale" => {
                builder.ignore(&key, Effect::Part, "nothing else of its layer is loaded", Cure::Flatten);
            }
            ".weight" | ".on_input" => builder.ignore(&key, Effect::Part, "IA3 is not supported", Cure::Flatten),
            ".scalar" | ".rescale" | ".lora_magnitude_vector" | ".lora_magnitude_vector.weight" if loads => {
                let reason = "not asked for (`lora key not loaded`), and without this part the weights are wrong";
                builder.ignore(&key, Effect::Wrong, reason, Cure::Flatten);
            }
            _ => builder.ignore(&key, Effect::Part, "not asked for (`lora key not loaded`)", Cure::Flatten),
        }
    }
}

/// What ComfyUI does differently from the trainers with a DoRA magnitude.
fn dora(builder: &mut OpinionBuilder, inventory: &Inventory, name: &str, key: &str) {
    let shape = inventory.tensors[key].1.as_slice();
    let dim = |parts: &[&str], axis: usize| {
        parts.iter().find_map(|part| inventory.tensors.get(&format!("{name}{part}"))?.1.get(axis).copied())
    };
    let outputs = dim(&[".lora_up.weight", ".lora_B.weight"], 0);
    let inputs = dim(&[".lora_down.weight", ".lora_A.weight"], 1);
    if shape.len() == 1 && outputs != inputs {
        // ComfyUI #12938: one axis broadcasts over the wrong one.
        builder.problem(Effect::Wrong, Some(key), "a magnitude of one axis broadcasts wrongly", Cure::Flatten);
    } else if shape.first().copied() == outputs {
        // ComfyUI #15458.
        let reason = "the magnitude is divided by the norm of the base weight, not of the adapted one";
        builder.problem(Effect::Note, Some(key), reason, Cure::Flatten);
    }
}

/// Name and suffix, the longest suffix that fits.
fn split(key: &str) -> Option<(&str, &'static str)> {
    let pairs = PAIRS.iter().flat_map(|&(up, down)| [up, down]);
    let fits = |part: &&'static str| key.len() > part.len() && key.ends_with(part);
    let part = pairs.chain(SUFFIXES.iter().copied()).filter(fits).max_by_key(|part| part.len())?;
    Some((&key[..key.len() - part.len()], part))
}

/// Why no name of the table asks for a key.
fn unknown(key: &str) -> (&'static str, Option<Cure>) {
    if key.starts_with("base_model.model.") {
        ("PEFT's names are in no table for this model (`lora key not loaded`)", Some(Cure::ToKohya))
    } else if key.contains(".to_") {
        let reason = "today's spelling of q, k, v and out in diffusers' layout is in no table (`lora key not loaded`)";
        (reason, Some(Cure::ToKohya))
    } else {
        ("no layer of this base model has this name (`lora key not loaded`)", None)
    }
}

/// The table of names.
fn names(base: &Family, layers: &[Layer]) -> HashSet<String> {
    let mut names = HashSet::new();
    for layer in layers {
        let path = &layer.path;
        match layer.component {
            Component::UNET => {
                if let Some(ldm) = &layer.ldm {
                    names.insert(underscored("lora_unet", ldm));
                    names.insert(format!("diffusion_model.{ldm}"));
                }
                names.insert(underscored("lora_unet", path));
                names.insert(underscored("lycoris", path));
                // diffusers before 0.22 kept its LoRA in attention processors, and only that spelling is known.
                let old = path.replace(".to_", ".processor.to_");
                let old = if old.ends_with(".to_out.0") { &old[..old.len() - 2] } else { &old };
                names.extend([old.to_owned(), format!("unet.{old}")]);
            }
            _ if layer.kind == Kind::Target => {
                let second = layer.component == Component::TEXT_ENCODER_2;
                let prefixes: &[&str] = if second { &["lora_te2"] } else { &["lora_te", "lora_te1"] };
                names.extend(prefixes.iter().map(|prefix| underscored(prefix, path)));
                let own = match second {
                    true => "clip_g",
                    false if *base == sd2::FAMILY => "clip_h",
                    false => "clip_l",
                };
                names.insert(format!("text_encoder{}.{path}", if second { "_2" } else { "" }));
                names.insert(format!("text_encoders.{own}.transformer.{path}"));
            }
            _ => {}
        }
    }
    if *base == sdxl::FAMILY {
        names.extend(["lora_te1_text_projection".to_owned(), "lora_te2_text_projection".to_owned()]);
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
        opinion_of(Consumer::ComfyUi, inventory)
    }

    fn with(name: &str, parts: &[&str]) -> Inventory {
        parts.iter().fold(sd1(), |inventory, part| inventory.tensor(&format!("{name}.{part}"), &[4, 4]))
    }

    #[test]
    fn names_of_many_layouts_are_asked_for() {
        let sdxl = sdxl().lora("lora_unet_up_blocks_0_upsamplers_0_conv", 9, 9).lora("lora_te2_text_projection", 9, 9);
        assert_eq!(judge(&sdxl).verdict, Verdict::Loads);
        assert_eq!(judge(&sd1().lora("lora_unet_input_blocks_1_1_proj_in", 320, 320)).verdict, Verdict::Loads);
        assert_eq!(judge(&sd1().lora("lycoris_mid_block_attentions_0_proj_in", 9, 9)).verdict, Verdict::Loads);
        let old = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_";
        let old = Inventory::default()
            .tensor(&format!("{old}q_lora.up.weight"), &[640, 4])
            .tensor(&format!("{old}q_lora.down.weight"), &[4, 640])
            .tensor(&format!("{old}out_lora.up.weight"), &[640, 4])
            .tensor(&format!("{old}out_lora.down.weight"), &[4, 640]);
        assert_eq!(judge(&old).verdict, Verdict::Loads);
        let text = Inventory::default()
            .pair("text_encoder.text_model.encoder.layers.0.mlp.fc1")
            .pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj");
        assert_eq!(judge(&text).verdict, Verdict::Loads);
    }

    #[test]
    fn todays_dotted_attention_is_not_found_and_the_rest_is() {
        let opinion = judge(&dotted_sd1("unet."));
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert_eq!(opinion.loaded(), 2);
        assert!(opinion.problems[0].examples[0].contains(".to_"));
        assert_eq!(cure(&opinion).unwrap(), "lora convert --to kohya");
        assert_eq!(judge(&dotted_sd1("base_model.model.")).verdict, Verdict::NothingLoaded);
    }

    #[test]
    fn an_up_without_its_down_is_an_error_and_a_down_alone_is_skipped() {
        let opinion = judge(&sd1().without("fc1.lora_down"));
        assert_eq!(opinion.verdict, Verdict::Refuses);
        assert!(is_refused(&opinion, &format!("{SD1_TEXT}_mlp_fc1.lora_up.weight")));
        let opinion = judge(&sd1().without("fc1.lora_up"));
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert!(is_ignored(&opinion, &format!("{SD1_TEXT}_mlp_fc1.lora_down.weight")));
        assert!(is_ignored(&opinion, &format!("{SD1_TEXT}_mlp_fc1.alpha")));
    }

    #[test]
    fn variants_load_but_for_ia3_and_oft() {
        let good: &[&[&str]] = &[
            &["lora_up.weight", "lora_down.weight", "lora_mid.weight"],
            &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
            &["lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha"],
            &["a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"],
            &["diff", "diff_b"],
            &["w_norm", "b_norm"],
            &["set_weight"],
        ];
        for parts in good {
            assert_eq!(judge(&with(NAME, parts)).verdict, Verdict::Loads, "{parts:?}");
        }
        let ia3 = judge(&with(NAME, &["weight", "on_input"]));
        assert_eq!(ia3.verdict, Verdict::LoadsPart);
        assert_eq!(ia3.keys[&format!("{NAME}.weight")], Fate::Ignored { reason: "IA3 is not supported".into() });
        assert_eq!(judge(&with(NAME, &["hada_w1_a"])).verdict, Verdict::Refuses);
        let oft = judge(&with(NAME, &["oft_blocks", "rescale"]));
        assert_eq!(oft.verdict, Verdict::LoadsWrong);
        assert!(is_ignored(&oft, &format!("{NAME}.rescale")));
    }

    #[test]
    fn dora_loads_with_a_word_on_its_norm() {
        let name = format!("{SD1_BLOCK}_attn2_to_k");
        let key = format!("{name}.dora_scale");
        let opinion = judge(&sd1().tensor(&key, &[640, 1]));
        assert_eq!(opinion.verdict, Verdict::Loads);
        assert_eq!(opinion.problems[0].effect, Effect::Note);
        assert_eq!(judge(&sd1().tensor(&key, &[640])).verdict, Verdict::LoadsWrong);
        let peft = judge(&sd1().tensor(&format!("{name}.lora_magnitude_vector"), &[640]));
        assert_eq!(peft.verdict, Verdict::LoadsWrong);
    }

    #[test]
    fn unknown_keys_are_skipped() {
        let opinion = judge(&sd1().tensor("bundle_emb.cat.string_to_param.*", &[2, 768]));
        assert_eq!(opinion.verdict, Verdict::LoadsPart);
        assert!(is_ignored(&opinion, "bundle_emb.cat.string_to_param.*"));
    }
}
