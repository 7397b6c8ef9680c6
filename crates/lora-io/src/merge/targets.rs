//! Which tensors of a base an adapter's modules change.
//!
//! A base's tensors are known under canonical paths where their names tell a known layout (the single original file of SD
//! 1, 2 and XL, diffusers' folders, Hugging Face's language models), and under their own names otherwise. OpenCLIP keeps
//! query, key and value in one tensor: such a module changes its third of the rows. A module of a model that is not known
//! is looked up by its name with dots and underscores taken as the same; if that leaves two tensors, it is refused.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use lora_core::{Component, ModulePath};

use super::Weighted;
use crate::adapter::names;
use crate::checkpoint::LdmNames;
use crate::safetensors::SafetensorsFile;
use crate::{Error, Result};

/// One module's change of one tensor.
#[derive(Debug, Clone)]
pub(super) struct Change {
    /// Index of the adapter.
    pub(super) adapter: usize,
    /// The module.
    pub(super) module: ModulePath,
    /// The rows it changes, if not all.
    pub(super) rows: Option<Range<usize>>,
    /// Whether the tensor is the layer's bias.
    pub(super) bias: bool,
    /// The layer's other tensor: the bias of a weight, the weight of a bias.
    pub(super) partner: Option<String>,
}

/// All changes by file and tensor.
#[derive(Debug)]
pub(super) struct Plan {
    files: Vec<BTreeMap<String, Vec<Change>>>,
}

/// A layer of the base.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) file: usize,
    pub(super) weight: String,
    bias: Option<String>,
    pub(super) rows: Option<Range<usize>>,
}

impl Plan {
    pub(super) fn new(base: &Path, files: &[SafetensorsFile], adapters: &[Weighted]) -> Result<Self> {
        let layers = Layers::new(base, files);
        let mut plan = Self { files: files.iter().map(|_| BTreeMap::new()).collect() };
        for (index, adapter) in adapters.iter().enumerate() {
            let mut problems = Vec::new();
            for (path, module) in &adapter.adapter.modules {
                if adapter.strength.of(path) == 0.0 {
                    continue;
                }
                let layer = match layers.find(path) {
                    Ok(layer) => layer,
                    Err(reason) => {
                        problems.push(format!("`{path}` ({reason})"));
                        continue;
                    }
                };
                let changes = &mut plan.files[layer.file];
                let change = |bias: bool| Change {
                    adapter: index,
                    module: path.clone(),
                    rows: layer.rows.clone(),
                    bias,
                    partner: if bias { Some(layer.weight.clone()) } else { layer.bias.clone() },
                };
                // The variants whose update reaches the bias.
                let own_bias = module.variant == "full" && module.tensors.contains_key("bias");
                let scaled = ["ia3", "peft-glora"].contains(&module.variant.as_str());
                match (&layer.bias, own_bias, scaled) {
                    (Some(bias), true, _) | (Some(bias), _, true) => {
                        changes.entry(bias.clone()).or_default().push(change(true));
                    }
                    (None, true, _) => problems.push(format!("`{path}` (changes a bias that this base has not)")),
                    _ => {}
                }
                if module.variant != "full" || module.tensors.contains_key("weight") {
                    changes.entry(layer.weight.clone()).or_default().push(change(false));
                }
            }
            if !problems.is_empty() {
                let count = problems.len();
                problems.truncate(5);
                let mut list = problems.join("; ");
                if count > 5 {
                    list.push_str("; …");
                }
                let list = format!("of `{}` against {}: {list}", adapter.name, base.display());
                return Err(Error::Unmatched { path: base.to_owned(), count, list });
            }
        }
        Ok(plan)
    }

    pub(super) fn of_file(&self, file: usize) -> &BTreeMap<String, Vec<Change>> {
        &self.files[file]
    }
}

/// The base's layers by canonical path, and by their own names with underscores.
pub(super) struct Layers {
    pub(super) known: BTreeMap<ModulePath, Layer>,
    /// Own name, dots as underscores → layers of that name.
    spelt: BTreeMap<String, Vec<Layer>>,
}

impl Layers {
    pub(super) fn new(base: &Path, files: &[SafetensorsFile]) -> Self {
        let mut layers = Self { known: BTreeMap::new(), spelt: BTreeMap::new() };
        for (index, file) in files.iter().enumerate() {
            let all: Vec<&str> = file.names().collect();
            let ldm = LdmNames::of_ldm(&all);
            let folder = file.path().parent().filter(|folder| *folder != base).and_then(Path::file_name);
            let folder = folder.map(|name| name.to_string_lossy().into_owned()).filter(|_| base.is_dir());
            for name in all {
                if let Some(stem) = name.strip_suffix("in_proj_weight") {
                    layers.add_fused(index, file, name, stem);
                    continue;
                }
                let Some(own) = name.strip_suffix(".weight") else { continue };
                let bias = format!("{own}.bias");
                let bias = file.contains(&bias).then_some(bias);
                let layer = Layer { file: index, weight: name.to_owned(), bias, rows: None };
                if let Some(path) = canonical(own, folder.as_deref(), &ldm) {
                    layers.known.insert(path, layer.clone());
                }
                layers.spelt.entry(own.replace('.', "_")).or_default().push(layer);
            }
        }
        layers
    }

    /// OpenCLIP's fused query, key and value.
    fn add_fused(&mut self, index: usize, file: &SafetensorsFile, name: &str, stem: &str) {
        let Some((component, block)) = open_clip(stem.trim_end_matches("attn.")) else { return };
        let Some(third) = file.shape(name).and_then(|shape| shape.first()).map(|rows| rows / 3) else { return };
        let bias = format!("{stem}in_proj_bias");
        let bias = file.contains(&bias).then_some(bias);
        for (place, part) in ["q_proj", "k_proj", "v_proj"].iter().enumerate() {
            let path = ModulePath::new(component, format!("{block}.self_attn.{part}"));
            let rows = Some(place * third..(place + 1) * third);
            self.known.insert(path, Layer { file: index, weight: name.to_owned(), bias: bias.clone(), rows });
        }
    }

    pub(super) fn find(&self, path: &ModulePath) -> Result<&Layer, String> {
        if let Some(layer) = self.known.get(path) {
            return Ok(layer);
        }
        if path.component == Component::LANGUAGE_MODEL && path.path == "lm_head" {
            return Err(
                "this base ties its output to its embeddings and has no lm_head.weight; merging would change both"
                    .into(),
            );
        }
        // The name as it stands, and without what adapters' and models' names begin with.
        let mut spelling = path.path.replace('.', "_");
        for prefix in ["lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lycoris_"] {
            if let Some(rest) = spelling.strip_prefix(prefix) {
                spelling = rest.to_owned();
                break;
            }
        }
        let bare = ["transformer_", "unet_", "diffusion_model_", "model_"]
            .iter()
            .find_map(|prefix| spelling.strip_prefix(prefix));
        let mut found: Vec<&Layer> = Vec::new();
        for wanted in [Some(spelling.as_str()), bare].into_iter().flatten() {
            for begin in ["", "model_diffusion_model_", "diffusion_model_", "transformer_", "model_"] {
                if let Some(layers) = self.spelt.get(&format!("{begin}{wanted}")) {
                    found.extend(layers);
                }
            }
            if !found.is_empty() {
                break;
            }
        }
        match found.as_slice() {
            [one] => Ok(one),
            [] => Err("this base has no such layer".into()),
            [first, second, ..] => Err(format!("`{}` and `{}` may both be meant", first.weight, second.weight)),
        }
    }
}

/// The canonical path of a base's layer, where its name tells.
fn canonical(own: &str, folder: Option<&str>, ldm: &LdmNames) -> Option<ModulePath> {
    let text = |path: &str| format!("text_model.{}", path.strip_prefix("text_model.").unwrap_or(path));
    match folder {
        Some("unet") => return Some(ModulePath::new(Component::UNET, own)),
        Some("text_encoder") => return Some(ModulePath::new(Component::TEXT_ENCODER, text(own))),
        Some("text_encoder_2") => return Some(ModulePath::new(Component::TEXT_ENCODER_2, text(own))),
        _ => {}
    }
    if let Some(path) = own.strip_prefix("conditioner.embedders.0.transformer.") {
        return Some(ModulePath::new(Component::TEXT_ENCODER, text(path)));
    }
    if let Some((component, block)) = open_clip(own) {
        let (block, layer) = block.rsplit_once(".layers.").map(|(start, rest)| (start, rest.to_owned()))?;
        let (number, layer) = layer.split_once('.')?;
        let layer = match layer {
            "attn.out_proj" => "self_attn.out_proj",
            "mlp.c_fc" => "mlp.fc1",
            "mlp.c_proj" => "mlp.fc2",
            _ => return None,
        };
        return Some(ModulePath::new(component, format!("{block}.layers.{number}.{layer}")));
    }
    if let Some((component, path)) = ldm.canonical(&format!("{own}.weight")) {
        let path = path.strip_suffix(".weight")?;
        return (component != Component::VAE).then(|| ModulePath::new(component, path));
    }
    let path = names::from_dotted(own);
    (path.component != Component::MODEL).then_some(path)
}

/// The text encoder and block of an OpenCLIP name: `…transformer.resblocks.N.rest` as `text_model.encoder.layers.N.rest`.
fn open_clip(own: &str) -> Option<(Component, String)> {
    let (component, rest) = match own.strip_prefix("conditioner.embedders.1.model.") {
        Some(rest) => (Component::TEXT_ENCODER_2, rest),
        None => (Component::TEXT_ENCODER, own.strip_prefix("cond_stage_model.model.")?),
    };
    let rest = rest.strip_prefix("transformer.resblocks.")?;
    Some((component, format!("text_model.encoder.layers.{}", rest.trim_end_matches('.'))))
}
