//! Which tensors of a base an adapter's modules change.
//!
//! A base's tensors are known under canonical paths where its family names them (see [`crate::family`]), and under
//! their own names otherwise. Where a tensor holds several weights, as OpenCLIP's query, key and value, a module
//! changes its rows alone. A module of a model that is not known is looked up by its name with dots and underscores
//! taken as the same; if that leaves two tensors, it is refused.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use lora_core::backend::{CpuBackend, ShapeBackend};
use lora_core::merge::geometry;
use lora_core::variant::{BiasChange, Changes, EXPERTS_DOWN, FrozenLayer, Parameters, TOKEN_ROWS, VariantRegistry};
use lora_core::{AdapterModule, Component, HostTensor, ModulePath, Strength};

use super::folder::Base;
use super::rows::Update;
use super::tied::Tied;
use super::{Weighted, numbers};
use crate::adapter::{self, names};
use crate::checkpoint::{self, Group};
use crate::error::listed;

use crate::family::tree::Piece;
use crate::family::{BaseNames, FAMILIES, Family, sd1};
use crate::safetensors::SafetensorsFile;
use crate::{Error, Result};

/// How the numbers of a layer's weight lie in its tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// As the layer has them.
    Same,
    /// With rows and columns exchanged.
    Transposed,
    /// With the second half of the rows before the first; so do those of its bias.
    Swapped,
}

impl Order {
    /// A tensor of a layer in the order of the file, or the other way round: each order is its own way back.
    pub(super) fn exchanged(self, tensor: HostTensor) -> HostTensor {
        match self {
            Self::Same => tensor,
            Self::Transposed => numbers::transposed(tensor),
            Self::Swapped => numbers::swapped(tensor),
        }
    }
}

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
    /// How the layer's weight is stored.
    pub(super) order: Order,
    /// The layer's other tensor, the bias of a weight or the weight of a bias: its file and its name.
    pub(super) partner: Option<(usize, String)>,
}

/// What is done to the tensors of one file.
#[derive(Debug, Default)]
pub(super) struct FileEdits {
    /// By the tensor's name.
    pub(super) edits: BTreeMap<String, Vec<Edit>>,
    /// Tensors that are made from others: by their name, the index of the file and the name there.
    pub(super) made_of: BTreeMap<String, (usize, String)>,
}

/// What is done to which tensors, by file.
#[derive(Debug)]
pub(super) struct Edits {
    pub(super) files: Vec<FileEdits>,
    /// The ends that are tied in the base and are not in the result.
    pub(super) untied: Option<Tied>,
    /// Things worth knowing.
    pub(super) notes: Vec<String>,
}

/// A layer of the base.
#[derive(Debug, Clone)]
pub(super) struct StoredLayer {
    pub(super) file: usize,
    pub(super) weight: String,
    /// Its file, which may be another shard, and its name.
    pub(super) bias: Option<(usize, String)>,
    pub(super) rows: Option<Range<usize>>,
    pub(super) order: Order,
}

impl StoredLayer {
    /// The shape of the weight as the layer has it.
    pub(super) fn shape(&self, files: &[SafetensorsFile]) -> Vec<usize> {
        let mut shape = files[self.file].shape(&self.weight).unwrap_or_default().to_vec();
        if let (Some(rows), Some(first)) = (&self.rows, shape.first_mut()) {
            *first = rows.len();
        }
        if self.order == Order::Transposed {
            shape.reverse();
        }
        shape
    }
}

impl Edits {
    pub(super) fn new(base: &Base, adapters: &[Weighted], variants: &VariantRegistry<CpuBackend>) -> Result<Self> {
        let layers = StoredLayers::new(base);
        let files = base.files.iter().map(|_| FileEdits::default()).collect();
        let mut all = Self { files, untied: None, notes: Vec::new() };
        for (index, adapter) in adapters.iter().enumerate() {
            if let Some(family) = layers.family {
                check_blocks(&base.path, family, &adapter.strength)?;
            }
            let other = layers.family.and_then(|family| adapter::made_for_another(&adapter.adapter, family));
            let mut problems = Vec::new();
            let ends_are_one = layers.tied.as_ref().is_some_and(|tied| tied.is_one_adapter(&adapter.adapter));
            for (path, module) in &adapter.adapter.modules {
                if adapter.strength.of(path) == 0.0 || ends_are_one && is_head(path) {
                    continue;
                }
                let stays_tied = ends_are_one || module.tensors.contains_key(TOKEN_ROWS) && !is_head(path);
                let found = layers.find(path).map_err(|reason| match module.tensors.get(EXPERTS_DOWN) {
                    Some(down) => {
                        format!("this base has no layer of {} experts there", down.shape().first().unwrap_or(&0))
                    }
                    None => reason,
                });
                let added = found.and_then(|found| {
                    found.iter().try_for_each(|layer| {
                        fits(module, &layer.shape(&base.files), variants)?;
                        all.add(index, path, module, layer, variants)
                    })?;
                    if stays_tied { Ok(()) } else { all.untie(path, &layers, &found, &base.files) }
                });
                if let Err(reason) = added {
                    problems.push(format!("`{path}` ({reason})"));
                }
            }
            if !problems.is_empty() {
                let list = listed(&problems);
                let other = other.map(|other| format!("{other}: ")).unwrap_or_default();
                let list = format!("of `{}` against {}: {other}{list}", adapter.name, base.path.display());
                return Err(Error::Unmatched { path: base.path.clone(), count: problems.len(), list });
            }
            all.notes.extend(other.map(|other| format!("`{}`: {other}; its layers fit all the same", adapter.name)));
        }
        all.train_tokens_of_the_head(adapters);
        Ok(all)
    }

    /// Rows of tokens are trained for both ends of a base that ties them: where the ends are parted, they belong to
    /// each.
    fn train_tokens_of_the_head(&mut self, adapters: &[Weighted]) {
        let Some(tied) = self.untied.clone() else { return };
        for index in 0..self.files.len() {
            let Some((place, _)) = self.files[index].made_of.get(tied.head).cloned() else { continue };
            let of_tokens =
                |edit: &&Edit| adapters[edit.adapter].adapter.modules[&edit.module].tensors.contains_key(TOKEN_ROWS);
            let of_embedding = self.files[place].edits.get(tied.embedding).into_iter().flatten();
            let tokens: Vec<Edit> = of_embedding.filter(of_tokens).cloned().collect();
            if !tokens.is_empty() {
                self.files[index].edits.entry(tied.head.to_owned()).or_default().extend(tokens);
            }
        }
    }

    /// Adds what a module does to its layer, or says why it cannot.
    fn add(
        &mut self,
        adapter: usize,
        path: &ModulePath,
        module: &AdapterModule,
        layer: &StoredLayer,
        variants: &VariantRegistry<CpuBackend>,
    ) -> Result<(), String> {
        let edit = |bias: bool| Edit {
            adapter,
            module: path.clone(),
            rows: layer.rows.clone(),
            bias,
            order: layer.order,
            partner: if bias { Some((layer.file, layer.weight.clone())) } else { layer.bias.clone() },
        };
        // An unknown variant is an error where its update is worked out.
        let effect = variants.get(&module.variant).map_or(Changes::WEIGHT, |variant| variant.changes(&module.tensors));
        match (&layer.bias, effect.bias) {
            (Some((file, bias)), BiasChange::Always | BiasChange::WhereThere) => {
                self.files[*file].edits.entry(bias.clone()).or_default().push(edit(true));
            }
            (None, BiasChange::Always) => return Err("changes a bias, and this layer of the base has none".into()),
            _ => {}
        }
        if effect.weight {
            self.files[layer.file].edits.entry(layer.weight.clone()).or_default().push(edit(false));
        }
        Ok(())
    }

    /// Parts the two ends of a base that ties them, where a module changes one: what was added to the embedding under
    /// the output layer's path belongs to a tensor of its own.
    fn untie(
        &mut self,
        path: &ModulePath,
        layers: &StoredLayers,
        found: &[StoredLayer],
        files: &[SafetensorsFile],
    ) -> Result<(), String> {
        let Some(tied) = layers.tied.as_ref().filter(|tied| found.iter().any(|layer| layer.weight == tied.embedding))
        else {
            return Ok(());
        };
        if !tied.has_config {
            return Err(
                "this base ties its output to its embeddings, and merging would change both; name the model's \
                        folder, so that config.json can say otherwise"
                    .into(),
            );
        }
        for layer in found {
            let edits = &mut self.files[layer.file].edits;
            let mut own = Vec::new();
            if is_head(path) {
                let all = edits.remove(tied.embedding).unwrap_or_default();
                let (head, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|edit| edit.module == *path);
                if !rest.is_empty() {
                    edits.insert(tied.embedding.to_owned(), rest);
                }
                own = head;
            }
            // A file may hold the output layer all the same.
            let there = |file: &SafetensorsFile| file.contains(tied.head);
            let place = if there(&files[layer.file]) { None } else { files.iter().position(there) };
            let file = &mut self.files[place.unwrap_or(layer.file)];
            file.made_of.insert(tied.head.to_owned(), (layer.file, tied.embedding.to_owned()));
            if !own.is_empty() {
                file.edits.entry(tied.head.to_owned()).or_default().extend(own);
            }
        }
        self.untied = Some(tied.clone());
        Ok(())
    }
}

/// Whether a module is the output layer of a language model.
pub(super) fn is_head(path: &ModulePath) -> bool {
    path.path == "lm_head" || path.path.ends_with(".lm_head")
}

/// The base's layers by canonical path, and by their own names with underscores.
pub(super) struct StoredLayers {
    pub(super) family: Option<&'static Family>,
    /// Each with its copies in other files, the usual one first.
    pub(super) known: BTreeMap<ModulePath, Vec<StoredLayer>>,
    /// Own name, dots as underscores → layers of that name, each with the folder that it is in.
    spelt: BTreeMap<String, Vec<(PathBuf, StoredLayer)>>,
    tied: Option<Tied>,
    /// Whether layers called as GPT-2's are stored with rows and columns exchanged.
    conv1d: bool,
}

impl StoredLayers {
    pub(super) fn new(base: &Base) -> Self {
        let files = &base.files;
        // The folder of a component; none for a file that is the base itself or lies in the base's folder.
        let folder_of = |file: &SafetensorsFile| {
            let folder = file.path().parent().filter(|folder| base.is_folder() && **folder != base.path)?;
            Some(folder.file_name()?.to_string_lossy().into_owned())
        };
        let mut names = BaseNames::default();
        for file in files {
            let shapes = file.names().map(|name| (name, file.shape(name).unwrap_or_default()));
            names.add(folder_of(file).as_deref(), shapes);
        }
        let family = Family::of_base(&names, &FAMILIES);
        let (known, spelt) = (BTreeMap::new(), BTreeMap::new());
        let mut layers = Self { family, known, spelt, tied: Tied::of(base), conv1d: has_conv1d(base) };
        for (index, file) in files.iter().enumerate() {
            layers.add_spelt(index, files);
            layers.add_known(index, files, folder_of(file).as_deref(), family);
        }
        layers
    }

    /// The layer of a name in a file, which has tensors of its own.
    fn of_name(&self, file_index: usize, files: &[SafetensorsFile], name: &str) -> StoredLayer {
        let file = &files[file_index];
        let bias = format!("{name}.bias");
        // A shard may end between the two.
        let beside = |(_, other): &(usize, &SafetensorsFile)| other.path().parent() == file.path().parent();
        let place = if file.contains(&bias) {
            Some(file_index)
        } else {
            files.iter().enumerate().filter(beside).find(|(_, other)| other.contains(&bias)).map(|(place, _)| place)
        };
        let bias = place.map(|place| (place, bias));
        let order = if self.conv1d && is_conv1d(name) { Order::Transposed } else { Order::Same };
        // The experts of a layer are one tensor without that end.
        let weight = if file.contains(name) { name.to_owned() } else { format!("{name}.weight") };
        StoredLayer { file: file_index, weight, bias, rows: None, order }
    }

    /// Adds a layer beside its copies in other files.
    fn insert(&mut self, path: ModulePath, layer: StoredLayer) {
        let copies = self.known.entry(path).or_default();
        match copies.iter_mut().find(|copy| copy.file == layer.file) {
            Some(copy) => *copy = layer,
            None => copies.push(layer),
        }
    }

    /// The layers of a file by their own names.
    fn add_spelt(&mut self, index: usize, files: &[SafetensorsFile]) {
        let file = &files[index];
        for name in file.names() {
            let Some(own) = layer_name(file, name) else { continue };
            let layer = self.of_name(index, files, own);
            let folder = file.path().parent().unwrap_or(Path::new("")).to_owned();
            self.spelt.entry(own.replace('.', "_")).or_default().push((folder, layer));
        }
    }

    /// The layers of a file by canonical path, where its family's names tell.
    fn add_known(&mut self, index: usize, files: &[SafetensorsFile], folder: Option<&str>, family: Option<&Family>) {
        let file = &files[index];
        let is_unknown = family.is_none();
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
        // A folder that is no component of a known family holds another network, as a ControlNet.
        if folder.is_none() || is_unknown {
            self.add_dotted(index, files);
        }
    }

    /// The layers of a file whose names are canonical ones.
    fn add_dotted(&mut self, index: usize, files: &[SafetensorsFile]) {
        let file = &files[index];
        for name in file.names() {
            let Some(own) = layer_name(file, name) else { continue };
            let path = names::from_dotted(own);
            if path.component != Component::MODEL {
                let layer = self.of_name(index, files, own);
                self.insert(path, layer);
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
                Piece::All | Piece::Pointwise | Piece::Swapped => None,
                Piece::Rows(share) => {
                    let all = file.shape(stored).and_then(|shape| shape.first()).copied().unwrap_or(0);
                    // A tensor without such parts fits no module.
                    Some(share.rows(all).unwrap_or(0..0))
                }
                // Nothing adapts what is stored so.
                Piece::Transposed => continue,
            };
            let bias = places.get(&format!("{path}.bias")).map(|(stored, _)| (index, (*stored).to_owned()));
            let order = if *piece == Piece::Swapped { Order::Swapped } else { Order::Same };
            let layer = StoredLayer { file: index, weight: (*stored).to_owned(), bias, rows, order };
            self.insert(ModulePath::new(group.component, path), layer);
        }
    }

    /// The layers that a module means: one, and its copies in other files.
    pub(super) fn find(&self, path: &ModulePath) -> Result<Vec<StoredLayer>, String> {
        if let Some(tied) = self.tied.as_ref().filter(|_| is_head(path)) {
            return self.find(&names::from_dotted(tied.embedding.strip_suffix(".weight").unwrap_or(tied.embedding)));
        }
        if let Some(layers) = self.known.get(path) {
            return Ok(layers.clone());
        }
        let found = self.find_spelt(&path.path);
        match found.as_slice() {
            [] => Err("this base has no such layer".into()),
            [(folder, first), rest @ ..] => {
                match rest.iter().find(|other| other.0 != *folder || other.1.weight != first.weight) {
                    Some((_, second)) => Err(format!("`{}` and `{}` may both be meant", first.weight, second.weight)),
                    None => Ok(found.iter().map(|(_, layer)| layer.clone()).collect()),
                }
            }
        }
    }

    /// The layers of a name as it stands, and without what adapters' and models' names begin with.
    fn find_spelt(&self, name: &str) -> Vec<&(PathBuf, StoredLayer)> {
        let mut spelling = name.replace('.', "_");
        for prefix in ["lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lycoris_", "oft_unet_"] {
            if let Some(rest) = spelling.strip_prefix(prefix) {
                spelling = rest.to_owned();
                break;
            }
        }
        let bare = ["transformer_", "unet_", "diffusion_model_", "model_"]
            .iter()
            .find_map(|prefix| spelling.strip_prefix(prefix));
        let mut found = Vec::new();
        for wanted in [Some(spelling.as_str()), bare].into_iter().flatten() {
            for begin in ["", "model_diffusion_model_", "diffusion_model_", "transformer_", "model_"] {
                found.extend(self.spelt.get(&format!("{begin}{wanted}")).into_iter().flatten());
            }
            if !found.is_empty() {
                break;
            }
        }
        found
    }
}

/// Factors by block mean other blocks in another family, and nothing in one that has none: `base` is what is of the
/// family, a base or an adapter for one.
///
/// # Errors
/// [`Error::Format`] with how many the family has.
pub fn check_blocks(base: &Path, family: &Family, strength: &Strength) -> Result<()> {
    let given = strength.blocks.len();
    if given == 0 || family.block_factors == Some(given) {
        return Ok(());
    }
    let has = family.block_factors.map_or_else(|| "none".to_owned(), |count| count.to_string());
    Err(Error::format(base, format!("{given} factors by block are given; this is {family}, which has {has}")))
}

/// Whether a module's tensors fit a layer whose weight has this shape; shapes alone are looked at.
pub(crate) fn fits(
    module: &AdapterModule,
    shape: &[usize],
    variants: &VariantRegistry<CpuBackend>,
) -> Result<(), String> {
    // Some variants take the weight itself apart, which shapes do not tell more about.
    let of_factors = adapter::RESIDUAL.contains(&module.variant.as_str()) && module.tensors.len() == 2;
    let plain = || AdapterModule { variant: "lora".into(), ..module.clone() };
    let reason = if let Some(update) = Update::of(module, variants) {
        update.fits(shape).err()
    } else if of_factors {
        Update::of(&plain(), variants).and_then(|update| update.fits(shape).err())
    } else {
        let geometry = geometry(module, shape)
            .ok_or_else(|| format!("this base has it with the shape {shape:?}, which no adapter goes on"))?;
        // A variant of a program's own is looked at where its update is worked out.
        let Ok(variant) = VariantRegistry::<ShapeBackend>::default().get(&module.variant) else { return Ok(()) };
        let layer = FrozenLayer { backend: ShapeBackend, geometry, weight: shape.to_vec(), bias: None };
        let fits = Parameters::upload(&ShapeBackend, module, &Vec::new())
            .and_then(|parameters| variant.delta_weight(&ShapeBackend, &layer, &parameters))
            .is_ok_and(|delta| delta == shape);
        (!fits).then(|| format!("do not fit this base's weight {shape:?}"))
    };
    let Some(reason) = reason else { return Ok(()) };
    let tensors = module.tensors.iter().map(|(name, tensor)| format!("`{name}` {:?}", tensor.shape()));
    let list = tensors.collect::<Vec<_>>().join(", ");
    Err(format!("its {list} {reason}"))
}

/// The layer whose weight a tensor is.
fn layer_name<'n>(file: &SafetensorsFile, name: &'n str) -> Option<&'n str> {
    let is_experts = || name.contains(".experts.") && file.shape(name).is_some_and(|shape| shape.len() == 3);
    name.strip_suffix(".weight").or_else(|| is_experts().then_some(name))
}

/// Whether a layer is called as those of GPT-2 that `Conv1D` implements.
fn is_conv1d(name: &str) -> bool {
    ["c_attn", "q_attn", "c_proj", "c_fc"].iter().any(|leaf| name.rsplit('.').next() == Some(leaf))
}

/// Whether a base stores such layers as `[in, out]`. Other models have layers of these names that are stored as usual,
/// so those that are not square decide, and the configuration where there are none.
fn has_conv1d(base: &Base) -> bool {
    let shapes = |end: &'static str| {
        let names = base.files.iter().flat_map(|file| file.names().map(move |name| (file, name)));
        names.filter(move |(_, name)| name.ends_with(end)).filter_map(|(file, name)| match *file.shape(name)? {
            [rows, columns] if rows != columns => Some(rows < columns),
            _ => None,
        })
    };
    if let Some(wider) = shapes(".c_attn.weight").chain(shapes(".c_fc.weight")).next() {
        return wider;
    }
    let kind = base.config.as_ref().and_then(|config| config["model_type"].as_str());
    kind.is_some_and(|kind| ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"].contains(&kind))
}
