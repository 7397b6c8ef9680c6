//! How files name a module, and the canonical path behind it.
//!
//! | layout | U-Net | transformer | text encoders | language model |
//! |---|---|---|---|---|
//! | kohya | `lora_unet_` + path with `_` (SDXL: the original tree's) | `lora_unet_` + the original tree's | `lora_te_`, SDXL `lora_te1_`, `lora_te2_` | |
//! | OneTrainer's older | | `lora_transformer_` + path with `_` | | |
//! | LyCORIS' wrapper | `lycoris_` + path with `_` | | | |
//! | sd-scripts' OFT | `oft_unet_` + path with `_` | | | |
//! | diffusers | `unet.` + path | `transformer.` + path | `text_encoder.`, `text_encoder_2.` | |
//! | Anima's text conditioner: kohya, ComfyUI, diffusers | | `lora_unet_llm_adapter_`, `diffusion_model.llm_adapter.`, `text_conditioner.` | | |
//! | PEFT | `base_model.model.` + path | the same | the same | the same |
//! | none | path | path | | |
//! | ComfyUI's generic | `diffusion_model.` + original path | the same | `text_encoders.clip_l.transformer.` and so on | |
//!
//! Layers of transformers that are one in the original tree are taken apart and put together in `adapter::canonical`.
//!
//! An underscore in a kohya name may be a dot or part of a word. The words that these models' paths are made of are
//! known, so the reading is unique; a name made of anything else belongs to [`Component::MODEL`] and keeps its
//! spelling, to be compared with a base's names later.

use lora_core::{Component, ModulePath};

use crate::family::tree::clip::with_text_model;
use crate::family::tree::ldm::LdmUnet;
use crate::family::tree::{Depths, Tree};
use crate::family::{FAMILIES, Family, anima, sd1, sdxl};

use super::canonical::is_transformer;

/// The dotted path of an underscored one that is made of these families' words and numbers; `None` for any other.
fn dotted(name: &str, families: &[&Family]) -> Option<String> {
    let mut path = String::with_capacity(name.len());
    let mut rest = name;
    loop {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let ends = |length: usize| rest.len() == length || rest.as_bytes()[length] == b'_';
        let length = match digits {
            0 => {
                let words = families.iter().flat_map(|family| family.words).copied().flatten();
                words.filter(|word| rest.starts_with(**word) && ends(word.len())).map(|word| word.len()).max()?
            }
            _ if ends(digits) => digits,
            _ => return None,
        };
        path.push_str(&rest[..length]);
        if rest.len() == length {
            return Some(path);
        }
        path.push('.');
        rest = &rest[length + 1..];
    }
}

/// A U-Net path in diffusers' tree, from either tree.
fn unet_path(path: &str) -> Option<String> {
    const ORIGINAL: &[&str] =
        &["input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out."];
    if !ORIGINAL.iter().any(|start| path.starts_with(start)) {
        return Some(path.to_owned());
    }
    let weights = LdmUnet.weights(&format!("{path}.weight"), &Depths::default())?;
    let (canonical, _) = weights.first()?;
    canonical.strip_suffix(".weight").map(str::to_owned)
}

/// Whether a tensor's or module's name is of kohya's kind.
pub(crate) fn is_kohya(name: &str) -> bool {
    let module = name.split_once('.').map_or(name, |(module, _)| module);
    ["lora_", "lycoris_", OFT].iter().any(|prefix| module.starts_with(prefix))
}

/// What sd-scripts' OFT has in place of `lora_`.
const OFT: &str = "oft_";

/// The module that a kohya name means, in adapters for one of these families.
pub(crate) fn from_kohya(name: &str, families: &[&Family]) -> ModulePath {
    if let Some(rest) = name.strip_prefix(OFT) {
        let module = from_kohya(&format!("lora_{rest}"), families);
        return if module.component == Component::MODEL { ModulePath::new(Component::MODEL, name) } else { module };
    }
    let prefixes = families.iter().flat_map(|family| family.components);
    let prefixes = prefixes.filter_map(|names| Some((names.kohya?.prefix, names.component)));
    let others = [("lycoris", Component::UNET), ("lora_transformer", Component::TRANSFORMER)];
    let module = prefixes.chain(others).find_map(|(prefix, component)| {
        let path = dotted(name.strip_prefix(prefix)?.strip_prefix('_')?, families)?;
        if component == Component::UNET && is_transformer(&path) {
            return Some(ModulePath::new(Component::TRANSFORMER, path));
        }
        let path = match component {
            Component::UNET if path.starts_with("text_model.") => return None,
            Component::UNET => unet_path(&path)?,
            Component::TRANSFORMER if !is_transformer(&path) => return None,
            _ => path,
        };
        Some(ModulePath::new(component, path))
    });
    module.unwrap_or_else(|| ModulePath::new(Component::MODEL, name))
}

/// The kohya name of a module of a base of a family, or of a family that is not known; `None` for a module that the
/// layout has no name for.
pub fn kohya(module: &ModulePath, family: Option<&Family>) -> Option<String> {
    // Its spelling in the file it came from.
    if module.component == Component::MODEL {
        return (!module.path.contains('.')).then(|| module.path.clone());
    }
    let usual = [&sd1::FAMILY, &sdxl::FAMILY];
    let knows = |family: &&Family| family.component(module.component).is_some_and(|names| names.kohya.is_some());
    family.into_iter().chain(usual).find(knows)?.kohya(module)
}

/// The module that a dotted name (diffusers', PEFT's, ComfyUI's) means.
pub(crate) fn from_dotted(name: &str) -> ModulePath {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    if let Some(path) = name.strip_prefix("unet.") {
        return ModulePath::new(Component::UNET, attention_path(path));
    }
    for component in [Component::TEXT_ENCODER, Component::TEXT_ENCODER_2] {
        if let Some(path) = name.strip_prefix(component.name()).and_then(|rest| rest.strip_prefix('.')) {
            return ModulePath::new(component, with_text_model(path));
        }
    }
    if let Some(module) = in_comfyui(name) {
        return module;
    }
    let of_conditioner =
        ["diffusion_model.llm_adapter.", "text_conditioner."].iter().find_map(|prefix| name.strip_prefix(prefix));
    if let Some(path) = of_conditioner {
        return ModulePath::new(anima::TEXT_CONDITIONER, path);
    }
    let of_transformer = ["transformer.", "diffusion_model."].iter().find_map(|prefix| name.strip_prefix(prefix));
    if let Some(path) = of_transformer.filter(|path| is_transformer(path)) {
        return ModulePath::new(Component::TRANSFORMER, path);
    }
    if let Some(path) = name.strip_prefix("diffusion_model.").and_then(unet_path).filter(|path| is_unet(path)) {
        return ModulePath::new(Component::UNET, path);
    }
    if is_unet(name) {
        return ModulePath::new(Component::UNET, attention_path(name));
    }
    if name.starts_with("text_model.") || name.starts_with("encoder.layers.") && name.contains("self_attn") {
        return ModulePath::new(Component::TEXT_ENCODER, with_text_model(name));
    }
    let causal = [
        "model.layers.",
        "model.embed_tokens",
        "model.per_layer_",
        "lm_head",
        "transformer.h.",
        "model.language_model.",
    ];
    if name == "model.norm" || causal.iter().any(|start| name.starts_with(start)) {
        return ModulePath::new(Component::LANGUAGE_MODEL, name);
    }
    // Without what says where they belong, as ComfyUI reads them for Qwen-Image and Z-Image.
    if is_transformer(name) {
        return ModulePath::new(Component::TRANSFORMER, name);
    }
    ModulePath::new(Component::MODEL, name)
}

/// A text encoder's module as ComfyUI's own nodes name it when they save a LoRA (`comfy_extras/nodes_lora_extract.py`):
/// `text_encoders.` and the name in a checkpoint of several parts. A T5 is another component in each family: which one,
/// `adapter::canonical` tells.
fn in_comfyui(name: &str) -> Option<ModulePath> {
    const OTHERS: &[(&str, Component)] = &[("text_encoders.clip_h.transformer.", Component::TEXT_ENCODER)];
    let path = |path: &str, tree: &dyn Tree| {
        let (canonical, _) = tree.weights(&format!("{path}.weight"), &Depths::default())?.into_iter().next()?;
        canonical.strip_suffix(".weight").map(str::to_owned)
    };
    let of_places = FAMILIES.into_iter().flat_map(|family| family.components).filter_map(|own| {
        let names = own.single_file.filter(|names| names.place.starts_with("text_encoders."))?;
        Some(ModulePath::new(own.component, path(name.strip_prefix(names.place)?, names.tree)?))
    });
    let others = OTHERS
        .iter()
        .filter_map(|(place, component)| Some(ModulePath::new(*component, with_text_model(name.strip_prefix(place)?))));
    of_places.chain(others).next()
}

fn is_unet(path: &str) -> bool {
    const STARTS: &[&str] =
        &["down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding."];
    STARTS.iter().any(|start| path.starts_with(start))
}

/// The path with the older spellings of attention put right: `attn1.processor.to_q` and `to_out` without its index.
fn attention_path(path: &str) -> String {
    let path = path.replace(".processor.", ".");
    if path.ends_with(".to_out") { format!("{path}.0") } else { path }
}

/// The dotted name of a module in the diffusers layout.
pub(crate) fn diffusers(module: &ModulePath) -> Option<String> {
    match module.component {
        Component::UNET | Component::TRANSFORMER | Component::TEXT_ENCODER | Component::TEXT_ENCODER_2 => {
            Some(module.to_string())
        }
        anima::TEXT_CONDITIONER => Some(module.to_string()),
        Component::MODEL if module.path.contains('.') => Some(module.path.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unet(path: &str) -> ModulePath {
        ModulePath::new(Component::UNET, path)
    }

    #[test]
    fn kohya_names_read_back_as_the_paths_they_were_made_of() {
        let paths = [
            "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
            "down_blocks.1.attentions.1.proj_in",
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
            "up_blocks.0.resnets.2.time_emb_proj",
            "up_blocks.0.upsamplers.0.conv",
            "down_blocks.1.downsamplers.0.conv",
            "mid_block.resnets.1.conv2",
            "up_blocks.2.resnets.0.conv_shortcut",
        ];
        for family in [Some(&sd1::FAMILY), Some(&sdxl::FAMILY)] {
            for path in paths {
                let name = kohya(&unet(path), family).unwrap();
                assert_eq!(from_kohya(&name, &FAMILIES), unet(path), "{name}");
            }
        }
        for (component, prefix) in [(Component::TEXT_ENCODER, "lora_te1_"), (Component::TEXT_ENCODER_2, "lora_te2_")] {
            let module = ModulePath::new(component, "text_model.encoder.layers.11.self_attn.out_proj");
            let name = kohya(&module, Some(&sdxl::FAMILY)).unwrap();
            assert!(name.starts_with(prefix));
            assert_eq!(from_kohya(&name, &FAMILIES), module);
        }
    }

    #[test]
    fn xl_names_are_those_of_the_original_tree() {
        for (path, name) in [
            ("down_blocks.1.attentions.0.proj_in", "lora_unet_input_blocks_4_1_proj_in"),
            ("mid_block.attentions.0.proj_out", "lora_unet_middle_block_1_proj_out"),
            ("up_blocks.1.attentions.2.proj_in", "lora_unet_output_blocks_5_1_proj_in"),
            ("up_blocks.0.upsamplers.0.conv", "lora_unet_output_blocks_2_2_conv"),
            ("down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op"),
            ("up_blocks.2.resnets.2.conv1", "lora_unet_output_blocks_8_0_in_layers_2"),
        ] {
            assert_eq!(kohya(&unet(path), Some(&sdxl::FAMILY)).as_deref(), Some(name));
            assert_eq!(from_kohya(name, &FAMILIES), unet(path));
        }
    }

    #[test]
    fn dotted_names_of_all_spellings_mean_the_same_module() {
        let module = unet("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0");
        for name in [
            "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out",
            "base_model.model.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "diffusion_model.output_blocks.3.1.transformer_blocks.0.attn1.to_out.0",
        ] {
            assert_eq!(from_dotted(name), module, "{name}");
        }
        let text = ModulePath::new(Component::TEXT_ENCODER, "text_model.encoder.layers.0.mlp.fc1");
        assert_eq!(from_dotted("text_encoder.text_model.encoder.layers.0.mlp.fc1"), text);
        assert_eq!(from_dotted("text_encoder.encoder.layers.0.mlp.fc1"), text);
        let language = from_dotted("base_model.model.model.layers.3.self_attn.q_proj");
        assert_eq!(language, ModulePath::new(Component::LANGUAGE_MODEL, "model.layers.3.self_attn.q_proj"));
        assert_eq!(
            from_dotted("base_model.model.model.norm"),
            ModulePath::new(Component::LANGUAGE_MODEL, "model.norm")
        );
    }

    #[test]
    fn names_of_other_models_keep_their_spelling() {
        for name in ["lora_unet_blocks_0_self_attn_q", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "x"] {
            let module = from_kohya(name, &FAMILIES);
            assert_eq!((module.component, module.path.as_str()), (Component::MODEL, name));
            assert_eq!(kohya(&module, None).as_deref(), Some(name));
        }
        assert_eq!(dotted("down_blocks_", &FAMILIES), None);
        assert_eq!(dotted("", &FAMILIES), None);
        assert_eq!(dotted("proj_inside", &FAMILIES), None);
    }
}
