//! Which tensors of a base an adapter's modules change.
//!
//! A base's tensors are known under canonical paths where its family names them (see [`crate::family`]), and under their
//! own names otherwise. Where a tensor holds several weights, as OpenCLIP's query, key and value, a module changes its rows
//! alone. A module of a model that is not known is looked up by its name with dots and underscores taken as the same; if
//! that leaves two tensors, it is refused.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use lora_core::backend::CpuBackend;
use lora_core::variant::{BiasChange, Changes, VariantRegistry};
use lora_core::{AdapterModule, Component, ModulePath, Strength};

use super::Weighted;
use crate::adapter::names;
use crate::checkpoint::{self, Group};
use crate::error::listed;
use crate::family::tree::Piece;
use crate::family::{BaseNames, FAMILIES, Family, sd1};
use crate::safetensors::SafetensorsFile;
use crate::{Error, Result};

/// What one module does to one tensor.
#[derive(Debug, Clone)]
pub(super) struct Edit {
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

/// What is done to which tensors, by file.
#[derive(Debug)]
pub(super) struct Edits {
    files: Vec<BTreeMap<String, Vec<Edit>>>,
}

/// A layer of the base.
#[derive(Debug, Clone)]
pub(super) struct StoredLayer {
    pub(super) file: usize,
    pub(super) weight: String,
    bias: Option<String>,
    pub(super) rows: Option<Range<usize>>,
}

impl StoredLayer {
    /// The layer of a name in a file, which has tensors of its own.
    fn of_name(file_index: usize, file: &SafetensorsFile, name: &str) -> Self {
        let bias = format!("{name}.bias");
        let bias = file.contains(&bias).then_some(bias);
        Self { file: file_index, weight: format!("{name}.weight"), bias, rows: None }
    }
}

impl Edits {
    pub(super) fn new(
        base: &Path,
        files: &[SafetensorsFile],
        adapters: &[Weighted],
        variants: &VariantRegistry<CpuBackend>,
    ) -> Result<Self> {
        let layers = StoredLayers::new(base, files);
        let mut all = Self { files: files.iter().map(|_| BTreeMap::new()).collect() };
        for (index, adapter) in adapters.iter().enumerate() {
            layers.check_blocks(base, &adapter.strength)?;
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
                if let Err(reason) = all.add(index, path, module, layer, variants) {
                    problems.push(format!("`{path}` ({reason})"));
                }
            }
            if !problems.is_empty() {
                let list = format!("of `{}` against {}: {}", adapter.name, base.display(), listed(&problems));
                return Err(Error::Unmatched { path: base.to_owned(), count: problems.len(), list });
            }
        }
        Ok(all)
    }

    /// Adds what a module does to its layer, or says why it cannot.
    fn add(
        &mut self,
        adapter: usize,
        path: &ModulePath,
        module: &AdapterModule,
        layer: &StoredLayer,
        variants: &VariantRegistry<CpuBackend>,
    ) -> Result<(), &'static str> {
        let edits = &mut self.files[layer.file];
        let edit = |bias: bool| Edit {
            adapter,
            module: path.clone(),
            rows: layer.rows.clone(),
            bias,
            partner: if bias { Some(layer.weight.clone()) } else { layer.bias.clone() },
        };
        // An unknown variant is an error where its update is worked out.
        let effect = variants.get(&module.variant).map_or(Changes::WEIGHT, |variant| variant.changes(&module.tensors));
        match (&layer.bias, effect.bias) {
            (Some(bias), BiasChange::Always | BiasChange::WhereThere) => {
                edits.entry(bias.clone()).or_default().push(edit(true));
            }
            (None, BiasChange::Always) => return Err("changes a bias, and this layer of the base has none"),
            _ => {}
        }
        if effect.weight {
            edits.entry(layer.weight.clone()).or_default().push(edit(false));
        }
        Ok(())
    }

    pub(super) fn of_file(&self, file: usize) -> &BTreeMap<String, Vec<Edit>> {
        &self.files[file]
    }
}

/// The base's layers by canonical path, and by their own names with underscores.
pub(super) struct StoredLayers {
    family: Option<&'static Family>,
    pub(super) known: BTreeMap<ModulePath, StoredLayer>,
    /// Own name, dots as underscores → layers of that name.
    spelt: BTreeMap<String, Vec<StoredLayer>>,
}

impl StoredLayers {
    pub(super) fn new(base: &Path, files: &[SafetensorsFile]) -> Self {
        // The folder of a component; none for a file that is the base itself or lies in the base's folder.
        let folder_of = |file: &SafetensorsFile| {
            let folder = file.path().parent().filter(|folder| base.is_dir() && *folder != base)?;
            Some(folder.file_name()?.to_string_lossy().into_owned())
        };
        let mut names = BaseNames::default();
        for file in files {
            let shapes = file.names().map(|name| (name, file.shape(name).unwrap_or_default()));
            names.add(folder_of(file).as_deref(), shapes);
        }
        let family = Family::of_base(&names, &FAMILIES);
        let mut layers = Self { family, known: BTreeMap::new(), spelt: BTreeMap::new() };
        for (index, file) in files.iter().enumerate() {
            layers.add_spelt(index, file);
            layers.add_known(index, file, folder_of(file).as_deref(), family);
        }
        layers
    }

    /// Factors by block mean other blocks in another family.
    fn check_blocks(&self, base: &Path, strength: &Strength) -> Result<()> {
        let Some((family, count)) = self.family.and_then(|family| Some((family, family.block_factors?))) else {
            return Ok(());
        };
        match strength.blocks.len() {
            0 => Ok(()),
            given if given == count => Ok(()),
            given => Err(Error::format(
                base,
                format!("{given} factors by block are given; this is {family}, which has {count}"),
            )),
        }
    }

    /// The layers of a file by their own names.
    fn add_spelt(&mut self, index: usize, file: &SafetensorsFile) {
        for name in file.names() {
            let Some(own) = name.strip_suffix(".weight") else { continue };
            self.spelt.entry(own.replace('.', "_")).or_default().push(StoredLayer::of_name(index, file, own));
        }
    }

    /// The layers of a file by canonical path, where its family's names tell.
    fn add_known(&mut self, index: usize, file: &SafetensorsFile, folder: Option<&str>, family: Option<&Family>) {
        // A U-Net alone is of no family, and all of them that are in the original tree have the same names.
        let family = family.unwrap_or(&sd1::FAMILY);
        let all: Vec<&str> = file.names().collect();
        let of_folder = folder.and_then(|folder| family.in_folder(folder));
        let groups = match of_folder {
            Some((component, names)) => {
                vec![Group::new(component, names.tree, all.iter().map(|name| (*name, *name)).collect())]
            }
            None if folder.is_none() => checkpoint::groups(family, &all),
            None => Vec::new(),
        };
        for group in &groups {
            // An adapter has no names for the others.
            if family.component(group.component).is_some_and(|names| names.kohya.is_some()) {
                self.add_group(index, file, group);
            }
        }
        if of_folder.is_none() {
            self.add_dotted(index, file);
        }
    }

    /// The layers of a file whose names are canonical ones.
    fn add_dotted(&mut self, index: usize, file: &SafetensorsFile) {
        for name in file.names() {
            let Some(own) = name.strip_suffix(".weight") else { continue };
            let path = names::from_dotted(own);
            if path.component != Component::MODEL {
                self.known.insert(path, StoredLayer::of_name(index, file, own));
            }
        }
    }

    fn add_group(&mut self, index: usize, file: &SafetensorsFile, group: &Group<'_>) {
        let weights = group.weights().flat_map(|(stored, weights)| {
            weights.unwrap_or_default().into_iter().map(move |(name, piece)| (name, (stored, piece)))
        });
        let places: BTreeMap<String, (&str, Piece)> = weights.collect();
        for (name, (stored, piece)) in &places {
            let Some(path) = name.strip_suffix(".weight") else { continue };
            let rows = match *piece {
                Piece::All | Piece::Pointwise => None,
                Piece::Rows { part, parts } => {
                    let rows = file.shape(stored).and_then(|shape| shape.first()).map_or(0, |rows| rows / parts);
                    Some(part * rows..(part + 1) * rows)
                }
                // Nothing adapts what is stored so.
                Piece::Transposed => continue,
            };
            let bias = places.get(&format!("{path}.bias")).map(|(stored, _)| (*stored).to_owned());
            let layer = StoredLayer { file: index, weight: (*stored).to_owned(), bias, rows };
            self.known.insert(ModulePath::new(group.component, path), layer);
        }
    }

    pub(super) fn find(&self, path: &ModulePath) -> Result<&StoredLayer, String> {
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
        let mut found: Vec<&StoredLayer> = Vec::new();
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
