//! What a file shows, and which base model it speaks of.

use std::collections::BTreeMap;
use std::path::Path;

use crate::checkpoint::Family;
use crate::gguf::{GgufFile, TensorType};
use crate::safetensors::{SafetensorsFile, StoredDType};
use crate::{Error, Result};

/// What an adapter file shows of itself.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    /// Element type and shape of each tensor, by its name in the file.
    pub tensors: BTreeMap<String, (StoredDType, Vec<usize>)>,
    /// The header's free text.
    pub metadata: BTreeMap<String, String>,
    /// Whether it is llama.cpp's own format.
    pub gguf: bool,
    /// `adapter_config.json`, where the file lies in a PEFT folder.
    pub config: Option<serde_json::Value>,
    /// Values of the `.alpha` tensors that were read, by their name in the file.
    pub scalars: BTreeMap<String, f64>,
}

/// Prefixes of names in adapters of image models.
const IMAGE_PREFIXES: &[&str] = &[
    "lora_unet_",
    "lora_te",
    "lycoris_",
    "oft_unet_",
    "bundle_emb.",
    "unet.",
    "text_encoder",
    "diffusion_model.",
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "text_model.",
];

impl Inventory {
    /// From an adapter file or a PEFT folder. Files that [`crate::adapter::read`] refuses are read too: what others would
    /// make of them is the question.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (weights, config) = match path.is_dir() {
            true => (path.join("adapter_model.safetensors"), Some(path.join("adapter_config.json"))),
            false => (path.to_owned(), None),
        };
        if weights.is_file() && crate::adapter::is_gguf(&weights)? {
            return Ok(Self::of_gguf(&GgufFile::open(&weights)?));
        }
        let file = SafetensorsFile::open(&weights)?;
        let mut inventory = Self { metadata: file.metadata().clone(), ..Self::default() };
        for name in file.names() {
            let view = file.get(name)?;
            if name.ends_with(".alpha") {
                inventory.scalars.insert(name.to_owned(), view.scalar()?);
            }
            inventory.tensors.insert(name.to_owned(), (view.dtype(), view.shape().to_vec()));
        }
        if let Some(config) = config.filter(|config| config.exists()) {
            let text = std::fs::read(&config).map_err(Error::io(&config, "read"))?;
            let parsed = serde_json::from_slice(&text);
            inventory.config =
                Some(parsed.map_err(|error| Error::format(&config, format!("is not valid JSON: {error}")))?);
        }
        Ok(inventory)
    }

    fn of_gguf(file: &GgufFile) -> Self {
        let tensor = |name: &str| {
            let dtype = match file.tensor_type(name) {
                Some(TensorType::F16) => StoredDType::F16,
                Some(TensorType::BF16) => StoredDType::BF16,
                _ => StoredDType::F32,
            };
            (name.to_owned(), (dtype, file.shape(name).unwrap_or_default().to_vec()))
        };
        let texts = file.values().filter_map(|(key, _)| Some((key.to_owned(), file.text(key)?.to_owned())));
        Self { tensors: file.names().map(tensor).collect(), metadata: texts.collect(), gguf: true, ..Self::default() }
    }

    /// The base model that the names, shapes and metadata speak of. Shapes weigh most, metadata (which conversions
    /// carry along) least; a U-Net in diffusers' names with nothing else to tell by is taken for Stable Diffusion 1.x,
    /// and names that are no U-Net's for no model that is known here.
    pub fn base(&self) -> Family {
        if self.gguf {
            return Family::LanguageModel;
        }
        let any = |test: &dyn Fn(&str) -> bool| self.tensors.keys().any(|name| test(name));
        let contains = |parts: &[&str]| any(&|name| parts.iter().any(|part| name.contains(part)));
        if contains(&["double_blocks", "single_blocks", "single_transformer_blocks"]) {
            return Family::Flux;
        }
        if contains(&["joint_blocks", "joint_transformer_blocks", "lora_te3_"]) {
            return Family::StableDiffusion3;
        }
        let bare = |name: &str| name.strip_prefix("base_model.model.").unwrap_or(name).to_owned();
        if !any(&|name| IMAGE_PREFIXES.iter().any(|prefix| bare(name).starts_with(prefix))) {
            let language = any(&|name| {
                name.starts_with("base_model.") || name.contains(".layers.") || name.contains(".h.") || {
                    name.starts_with("model.") || name.starts_with("lm_head.")
                }
            });
            return if language { Family::LanguageModel } else { Family::Unknown };
        }
        if let Some(family) = self.by_context_width() {
            return family;
        }
        let second = |name: &str| {
            ["lora_te1_", "lora_te2_", "text_encoder_2."].iter().any(|prefix| name.starts_with(prefix))
                || name.contains("transformer_blocks_2_")
                || name.contains(".transformer_blocks.2.")
        };
        if any(&second) {
            return Family::StableDiffusionXl;
        }
        if any(&|name| text_layer(name).is_some_and(|layer| layer >= 12)) {
            return Family::StableDiffusion2;
        }
        if let Some(family) = self.by_metadata() {
            return family;
        }
        let unet = ["lora_unet_", "oft_unet_", "lycoris_", "unet.", "diffusion_model."];
        let blocks = ["down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks"];
        let ends = ["conv_in", "conv_out", "time_embed", "add_embedding", "label_emb"];
        // Transformers have `lora_unet_` names too, and blocks of other names.
        if any(&|name| unet.iter().any(|prefix| name.starts_with(prefix))) && !contains(&blocks) && !contains(&ends) {
            return Family::Unknown;
        }
        let ldm = ["lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_"];
        let first = |name: &str| name.starts_with("lora_te_") || name.starts_with("text_encoder.");
        // Only SDXL's native names are LDM's.
        if any(&|name| ldm.iter().any(|prefix| name.starts_with(prefix))) && !any(&first) {
            return Family::StableDiffusionXl;
        }
        Family::StableDiffusion1
    }

    /// By the width of the text that cross-attention reads: 768, 1024 or 2048.
    fn by_context_width(&self) -> Option<Family> {
        let down = ["lora_down.weight", "lora_A.weight", "lora.down.weight", "to_k_lora.down.weight", "hada_w1_b"];
        self.tensors.iter().find_map(|(name, (_, shape))| {
            let context = name.contains("attn2_to_k.") || name.contains("attn2.to_k.") || name.contains("attn2.proc");
            if !context || !down.iter().any(|part| name.ends_with(part)) || !name.contains("to_k") {
                return None;
            }
            match shape.get(1)? {
                768 => Some(Family::StableDiffusion1),
                1024 => Some(Family::StableDiffusion2),
                2048 => Some(Family::StableDiffusionXl),
                _ => None,
            }
        })
    }

    fn by_metadata(&self) -> Option<Family> {
        let starts = |key: &str, prefix: &str| self.metadata.get(key).is_some_and(|value| value.starts_with(prefix));
        let (version, architecture) = ("ss_base_model_version", "modelspec.architecture");
        if starts(version, "sdxl_") || starts(architecture, "stable-diffusion-xl") {
            Some(Family::StableDiffusionXl)
        } else if starts(version, "sd_v2") || starts("ss_v2", "True") || starts(architecture, "stable-diffusion-v2") {
            Some(Family::StableDiffusion2)
        } else if starts(version, "sd_v1") || starts(architecture, "stable-diffusion-v1") {
            Some(Family::StableDiffusion1)
        } else {
            None
        }
    }
}

/// The layer of the only text encoder that a name speaks of: 12 and more are found in SD2's alone.
fn text_layer(name: &str) -> Option<usize> {
    let prefixes = ["lora_te_text_model_encoder_layers_", "text_encoder.text_model.encoder.layers."];
    let rest = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix))?;
    rest.split(['_', '.']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::samples::*;
    use super::*;

    #[test]
    fn families_are_told_apart() {
        assert_eq!(sd1().base(), Family::StableDiffusion1);
        assert_eq!(sd2().base(), Family::StableDiffusion2);
        assert_eq!(sdxl().base(), Family::StableDiffusionXl);
        assert_eq!(language_model().base(), Family::LanguageModel);
        assert_eq!(Inventory::default().base(), Family::Unknown);
        let joint = Inventory::default().tensor("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", &[4, 8]);
        assert_eq!(joint.base(), Family::StableDiffusion3);
        let transformer = Inventory::default().lora("lora_unet_blocks_0_self_attn_q", 8, 8);
        assert_eq!(transformer.base(), Family::Unknown);
    }

    #[test]
    fn shapes_weigh_more_than_metadata_and_metadata_more_than_names() {
        let name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight";
        let ldm = Inventory::default().tensor(name, &[4, 99]);
        assert_eq!(ldm.base(), Family::StableDiffusionXl);
        let mut said = ldm.clone();
        said.metadata.insert("ss_base_model_version".into(), "sd_v1".into());
        assert_eq!(said.base(), Family::StableDiffusion1);
        assert_eq!(said.tensor(name, &[4, 1024]).base(), Family::StableDiffusion2);
    }

    #[test]
    fn a_peft_folder_is_of_an_image_model_where_its_modules_are() {
        let unet = Inventory::default().tensor(
            "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
            &[4, 768],
        );
        assert_eq!(unet.base(), Family::StableDiffusion1);
        let gpt2 = Inventory::default().tensor("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", &[4, 768]);
        assert_eq!(gpt2.base(), Family::LanguageModel);
    }
}
