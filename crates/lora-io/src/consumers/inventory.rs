//! What a file shows, and which base model it speaks of.

use std::collections::BTreeMap;
use std::path::Path;

use crate::Result;
use crate::adapter::{names, parts, peft};
use crate::family::adapter::Module;
use crate::family::{self, FAMILIES, Family, language, sd1, sdxl};
use crate::gguf::{GgufFile, TensorType};
use crate::safetensors::{SafetensorsFile, StoredDType};

/// What an adapter file shows of itself.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Inventory {
    /// Element type and shape of each tensor, by its name in the file.
    pub tensors: BTreeMap<String, (StoredDType, Vec<usize>)>,
    /// The tensors' names in the order of the file, where it is known.
    pub order: Vec<String>,
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
    "transformer.transformer_blocks.",
    "transformer.single_transformer_blocks.",
    "text_encoder",
    "diffusion_model.",
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "text_model.",
];

impl Inventory {
    /// From an adapter file or a PEFT folder. Files that [`crate::adapter::read`] refuses are read too, since what others
    /// would make of them is the question; a file without any part of an adapter is not.
    ///
    /// # Errors
    /// [`crate::Error::Io`] or [`crate::Error::Format`] where the file cannot be read or holds no part of an adapter.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (weights, config) = match path.is_dir() {
            true => (path.join("adapter_model.safetensors"), Some(path.join("adapter_config.json"))),
            false => (path.to_owned(), None),
        };
        if path.is_dir() && !weights.exists() {
            return Err(peft::without_config(path));
        }
        if weights.is_file() && crate::adapter::is_gguf(&weights)? {
            let file = GgufFile::open(&weights)?;
            crate::adapter::gguf::is_adapter(&file)?;
            return Ok(Self::of_gguf(&file));
        }
        let file = SafetensorsFile::open(&weights)?;
        crate::adapter::is_adapter(&file)?;
        let order = file.names_in_file_order().into_iter().map(str::to_owned).collect();
        let mut inventory = Self { order, metadata: file.metadata().clone(), ..Self::default() };
        for name in file.names() {
            let view = file.get(name)?;
            if name.ends_with(".alpha") {
                inventory.scalars.insert(name.to_owned(), view.scalar()?);
            }
            inventory.tensors.insert(name.to_owned(), (view.dtype(), view.shape().to_vec()));
        }
        if let Some(config) = config.filter(|config| config.exists()) {
            inventory.config = Some(crate::json::read(&config)?);
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

    /// The family of the base model that names, shapes and metadata speak of. A U-Net in diffusers' names with nothing
    /// else to tell by is taken for Stable Diffusion 1.x, and names that are no U-Net's for no model that is known here.
    pub fn base(&self) -> Option<&'static Family> {
        if self.gguf {
            return Some(&language::FAMILY);
        }
        let modules = self.modules();
        if let Some(family) = family::adapter::by_name(&modules) {
            return Some(family);
        }
        let any = |test: &dyn Fn(&str) -> bool| self.tensors.keys().any(|name| test(name));
        let bare = |name: &str| name.strip_prefix("base_model.model.").unwrap_or(name).to_owned();
        if !any(&|name| IMAGE_PREFIXES.iter().any(|prefix| bare(name).starts_with(prefix))) {
            let starts = ["base_model.", "model.", "lm_head."];
            let language = any(&|name| {
                name.contains(".layers.") || name.contains(".h.") || starts.iter().any(|start| name.starts_with(start))
            });
            return language.then_some(&language::FAMILY);
        }
        family::adapter::told(&modules, &self.metadata).or_else(|| self.usual())
    }

    /// The family whose adapters usually have such names.
    fn usual(&self) -> Option<&'static Family> {
        let any = |test: &dyn Fn(&str) -> bool| self.tensors.keys().any(|name| test(name));
        let starts = |starts: &[&str]| any(&|name| starts.iter().any(|start| name.starts_with(start)));
        let contains = |parts: &[&str]| any(&|name| parts.iter().any(|part| name.contains(part)));
        let blocks = ["down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks"];
        let ends = ["conv_in", "conv_out", "time_embed", "add_embedding", "label_emb"];
        // Transformers have `lora_unet_` names too, and blocks of other names.
        let unet = starts(&["lora_unet_", "oft_unet_", "lycoris_", "unet.", "diffusion_model."]);
        if unet && !contains(&blocks) && !contains(&ends) || starts(&["transformer."]) {
            return None;
        }
        // Only SDXL's native names are those of the original tree.
        let original = starts(&["lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_"]);
        let first_encoder = starts(&["lora_te_", "text_encoder."]);
        Some(if original && !first_encoder { &sdxl::FAMILY } else { &sd1::FAMILY })
    }

    /// Outputs of a module's layer, where a tensor beside shows them.
    fn outputs(&self, module: &str) -> Option<usize> {
        [".lora_up.weight", ".lora_B.weight"].iter().find_map(|part| {
            let (_, shape) = self.tensors.get(&format!("{module}{part}"))?;
            shape.first().copied()
        })
    }

    /// The modules that the tensors' names speak of.
    fn modules(&self) -> Vec<Module<'_>> {
        let tensors = self.tensors.iter().map(|(name, (_, shape))| {
            let (module, part) = parts::split(name).unwrap_or((name, ""));
            let path =
                if names::is_kohya(name) { names::from_kohya(module, &FAMILIES) } else { names::from_dotted(module) };
            let inputs = ["lora_down", "hada_w1_b"].contains(&part).then(|| shape.get(1).copied()).flatten();
            let outputs = self.outputs(module);
            Module { name: module, path, inputs, outputs }
        });
        tensors.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::*;
    use super::*;
    use crate::family::{sd2, sd3};

    #[test]
    fn families_are_told_apart() {
        assert_eq!(sd1().base(), Some(&sd1::FAMILY));
        assert_eq!(sd2().base(), Some(&sd2::FAMILY));
        assert_eq!(sdxl().base(), Some(&sdxl::FAMILY));
        assert_eq!(language_model().base(), Some(&language::FAMILY));
        assert_eq!(Inventory::default().base(), None);
        let joint = Inventory::default().tensor("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", &[4, 8]);
        assert_eq!(joint.base(), Some(&sd3::FAMILY));
        let transformer = Inventory::default().lora("lora_unet_blocks_0_self_attn_q", 8, 8);
        assert_eq!(transformer.base(), None);
    }

    #[test]
    fn shapes_weigh_more_than_metadata_and_metadata_more_than_names() {
        let name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight";
        let ldm = Inventory::default().tensor(name, &[4, 99]);
        assert_eq!(ldm.base(), Some(&sdxl::FAMILY));
        let mut said = ldm.clone();
        said.metadata.insert("ss_base_model_version".into(), "sd_v1".into());
        assert_eq!(said.base(), Some(&sd1::FAMILY));
        assert_eq!(said.tensor(name, &[4, 1024]).base(), Some(&sd2::FAMILY));
    }

    #[test]
    fn a_peft_folder_is_of_an_image_model_where_its_modules_are() {
        let unet = Inventory::default().tensor(
            "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
            &[4, 768],
        );
        assert_eq!(unet.base(), Some(&sd1::FAMILY));
        let gpt2 = Inventory::default().tensor("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", &[4, 768]);
        assert_eq!(gpt2.base(), Some(&language::FAMILY));
    }
}
