//! Plain LoRAs from checkpoints: the difference of two, and any adapter's updates on a base.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lora_core::backend::CpuBackend;
use lora_core::compose::{self, ExtractOptions, Outcome};
use lora_core::target::{TargetLayer, Targets};
use lora_core::variant::{BiasChange, FrozenLayer, Parameters, VariantRegistry};
use lora_core::{Adapter, AdapterModule, Component, HostTensor, LayerGeometry, ModulePath};
use rayon::prelude::*;

use super::folder::Base;
use super::scales::Scales;
use super::targets::{StoredLayer, StoredLayers};
use crate::adapter::{self, Format};
use crate::family::Family;
use crate::family::tree::Piece;
use crate::metadata;
use crate::{Error, Result};

/// Names of tensors that a note lists.
const LISTED: usize = 3;

/// An open checkpoint with its layers.
struct Model {
    base: Base,
    layers: StoredLayers,
    scales: Scales,
}

impl Model {
    fn open(path: &Path) -> Result<Self> {
        let base = Base::open(path)?;
        Ok(Self { layers: StoredLayers::new(&base), scales: Scales::of(&base), base })
    }

    /// The weight of a layer, in f32.
    fn weight(&self, layer: &StoredLayer) -> Result<HostTensor> {
        let stored = self.scales.numbers(&self.base, layer.file, &layer.weight, layer.rows.as_ref())?;
        Ok(layer.order.exchanged(stored))
    }

    /// The bias of a layer that has one, in f32.
    fn bias(&self, layer: &StoredLayer) -> Result<Option<HostTensor>> {
        let Some((file, name)) = &layer.bias else { return Ok(None) };
        let stored = self.scales.numbers(&self.base, *file, name, layer.rows.as_ref())?;
        Ok(Some(layer.order.exchanged(stored)))
    }
}

/// What [`extract`] found.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Extracted {
    /// The LoRA, whose metadata names the base's family.
    pub adapter: Adapter,
    /// The ranks of layers as the usual format of the family has them, and what they keep.
    pub outcomes: Vec<Outcome>,
    /// The family of the base.
    pub family: Option<&'static Family>,
    /// What differs between the two models and is not in the LoRA.
    pub notes: Vec<String>,
}

/// The LoRA that leads from a base to a model tuned from it, on the layers that `targets` names. Both have the same
/// layout. Layers that do not differ get no module. Layers that are one in the format that is usual for the base's
/// family share their down-projection, so that they have the rank that is asked for there too.
///
/// # Errors
/// [`Error::Format`] where a pattern matches no layer of the base, the tuned model lacks one, or none of them differs;
/// [`Error::Io`] or [`Error::Tensor`] where a weight cannot be read, differs in shape or holds NaN.
pub fn extract(
    base: impl AsRef<Path>,
    tuned: impl AsRef<Path>,
    targets: &Targets,
    options: &ExtractOptions,
) -> Result<Extracted> {
    let (path, tuned_path) = (base.as_ref(), tuned.as_ref());
    let (base, tuned) = (Model::open(path)?, Model::open(tuned_path)?);
    let family = base.layers.family;
    let layers: Vec<TargetLayer> = base
        .layers
        .known
        .iter()
        .filter_map(|(path, copies)| {
            let geometry = LayerGeometry::of_weight(&copies.first()?.shape(&base.base.files))?;
            let norm = matches!(geometry, LayerGeometry::Norm { .. });
            (!norm).then(|| TargetLayer { path: path.clone(), geometry })
        })
        .collect();
    let chosen = targets.select(&layers).map_err(|error| Error::format(path, error.to_string()))?;
    let chosen: Vec<ModulePath> = chosen.iter().map(|target| target.path.clone()).collect();
    let found: Vec<_> = written_together(&chosen, family)
        .par_iter()
        .map(|together| extract_together(&base, &tuned, together, options))
        .collect::<Result<_>>()?;
    let mut adapter = Adapter::default();
    let mut outcomes = Vec::new();
    for (modules, kept) in found.into_iter().flatten() {
        outcomes.extend(modules.first_key_value().map(|(path, module)| Outcome {
            module: path.clone(),
            rank: module.rank,
            kept,
        }));
        adapter.modules.extend(modules);
    }
    if adapter.modules.is_empty() {
        return Err(Error::format(tuned_path, "does not differ from the base in any of these layers"));
    }
    match family {
        Some(family) if !family.image => {
            adapter.metadata.insert("base_model_name_or_path".into(), path.display().to_string());
        }
        _ => metadata::describe(&mut adapter, family),
    }
    let notes = left_out(&base, &tuned, &chosen).into_iter().collect();
    Ok(Extracted { adapter, outcomes, family, notes })
}

/// Layers that are one in the usual format of a family's plain LoRAs, in the order of their rows; each of the others
/// alone.
fn written_together(layers: &[ModulePath], family: Option<&Family>) -> Vec<Vec<ModulePath>> {
    let tree = family.and_then(|family| family.component(Component::TRANSFORMER)?.kohya?.tree);
    let tree = tree.filter(|_| adapter::usual_format(&Adapter::default(), family) == Format::Kohya);
    let mut groups: BTreeMap<String, Vec<(usize, ModulePath)>> = BTreeMap::new();
    let mut all = Vec::new();
    for path in layers {
        let of_tree = tree.filter(|_| path.component == Component::TRANSFORMER);
        let stored = of_tree.and_then(|(tree, depths)| tree.stored(&format!("{}.weight", path.path), &depths));
        match stored {
            Some((name, Piece::Rows(share))) => groups.entry(name).or_default().push((share.first, path.clone())),
            _ => all.push(vec![path.clone()]),
        }
    }
    for mut group in groups.into_values() {
        group.sort();
        all.push(group.into_iter().map(|(_, path)| path).collect());
    }
    all
}

/// The modules of layers that are one where they are written: the rows of their differences are taken apart as one
/// matrix. The share of its norm that is kept comes with them; `None` where nothing differs.
fn extract_together(
    base: &Model,
    tuned: &Model,
    layers: &[ModulePath],
    options: &ExtractOptions,
) -> Result<Option<(BTreeMap<ModulePath, AdapterModule>, f64)>> {
    let mut parts: Vec<(ModulePath, HostTensor)> = Vec::new();
    let mut last = String::new();
    let wrong = |name: &str, error: lora_core::Error| Error::tensor(&tuned.base.path, name, error.to_string());
    for path in layers {
        let layer = &base.layers.known[path][0];
        let Some(other) = tuned.layers.known.get(path).and_then(|copies| copies.first()) else {
            return Err(Error::format(&tuned.base.path, format!("has no `{path}`, which the base has")));
        };
        let (before, after) = (base.weight(layer)?, tuned.weight(other)?);
        let delta = compose::difference(&after, &before, options.minimum_difference)
            .map_err(|error| wrong(&other.weight, error))?;
        base.base.files[layer.file].release(&layer.weight);
        tuned.base.files[other.file].release(&other.weight);
        parts.extend(delta.map(|delta| (path.clone(), delta)));
        last.clone_from(&other.weight);
    }
    let Some((first, delta)) = parts.first() else { return Ok(None) };
    if parts.len() == 1 {
        let (module, kept) = compose::flatten(delta, options).map_err(|error| wrong(&last, error))?;
        return Ok(Some((BTreeMap::from([(first.clone(), module)]), kept)));
    }
    let rows: Vec<usize> = parts.iter().map(|(_, delta)| delta.shape()[0]).collect();
    let columns = delta.elements() / rows[0].max(1);
    let values: Vec<f32> = parts.iter().flat_map(|(_, delta)| delta.to_f32().into_owned()).collect();
    let all = HostTensor::from_f32([rows.iter().sum(), columns], values).map_err(|error| wrong(&last, error))?;
    let (module, kept) = compose::flatten(&all, options).map_err(|error| wrong(&last, error))?;
    let (down, up) = (&module.tensors["down"], module.tensors["up"].to_f32());
    let mut rest = &*up;
    let mut modules = BTreeMap::new();
    for ((path, _), rows) in parts.into_iter().zip(rows) {
        let (own, others) = rest.split_at(rows * module.rank);
        rest = others;
        let up = HostTensor::from_f32([rows, module.rank], own.to_vec()).map_err(|error| wrong(&last, error))?;
        modules.insert(path, AdapterModule::of_factors(down.clone(), up, false, module.rank, module.alpha));
    }
    Ok(Some((modules, kept)))
}

/// What is to be said of tensors that differ and belong to none of the layers.
fn left_out(base: &Model, tuned: &Model, chosen: &[ModulePath]) -> Option<String> {
    let layers = chosen.iter().filter_map(|path| base.layers.known.get(path)).flatten();
    let inside: BTreeSet<(usize, &str)> = layers.map(|layer| (layer.file, layer.weight.as_str())).collect();
    let names =
        base.base.files.iter().enumerate().flat_map(|(index, file)| file.names().map(move |name| (index, name)));
    let others: Vec<(usize, &str)> = names.filter(|place| !inside.contains(place)).collect();
    let differs = |&(index, name): &(usize, &str)| {
        let own = base.base.files[index].get(name).ok()?;
        let file = tuned.base.files.iter().find(|file| file.contains(name))?;
        let other = file.get(name).ok()?;
        let same = match own.dtype() == other.dtype() {
            true => own.bytes() == other.bytes(),
            // Stored in another type: what is more than its rounding is not told from it.
            false => return None,
        };
        base.base.files[index].release(name);
        file.release(name);
        (!same).then(|| name.to_owned())
    };
    let mut differing: Vec<String> = others.par_iter().filter_map(differs).collect();
    differing.sort();
    let shown: Vec<String> = differing.iter().take(LISTED).map(|name| format!("`{name}`")).collect();
    let more = if differing.len() > LISTED { " …" } else { "" };
    (!differing.is_empty()).then(|| {
        format!(
            "{} tensors outside of the targets differ too and are not in the LoRA: {}{more}",
            differing.len(),
            shown.join(", ")
        )
    })
}

/// Any adapter as a plain LoRA on this base: every update of a weight is worked out and taken apart again. Plain
/// modules stay as they are, and so does what has no rank: normalisations and biases alone. A change of the bias goes
/// beside the factors, in a tensor `bias` that the module's scale counts for; not every format has a place for one.
///
/// # Errors
/// [`Error::Module`] for a module whose layer the base lacks or whose tensors do not fit it; [`Error::Io`] or
/// [`Error::Tensor`] where a weight cannot be read.
pub fn flatten(
    base: impl AsRef<Path>,
    adapter: &Adapter,
    options: &ExtractOptions,
    variants: &VariantRegistry<CpuBackend>,
) -> Result<(Adapter, Vec<Outcome>)> {
    let model = Model::open(base.as_ref())?;
    let flat: Vec<(ModulePath, _)> = adapter
        .modules
        .par_iter()
        .map(|(path, module)| {
            let flat = match stays(module) {
                true => (module.clone(), 1.0),
                false => flattened(&model, path, module, options, variants)?,
            };
            Ok((path.clone(), flat))
        })
        .collect::<Result<_>>()?;
    let mut result = Adapter { metadata: adapter.metadata.clone(), ..Adapter::default() };
    let mut outcomes = Vec::new();
    for (path, (module, kept)) in flat {
        outcomes.push(Outcome { module: path.clone(), rank: module.rank, kept });
        result.modules.insert(path, module);
    }
    // A variant on several layers in one could not be taken apart, and a plain LoRA can be.
    Ok((adapter::in_canonical_layers(result)?, outcomes))
}

/// Whether a module is plain already, with or without a change of the bias, or has no rank.
fn stays(module: &AdapterModule) -> bool {
    let factors = [["down", "up"], ["embedding_down", "embedding_up"]];
    let is_bias = |name: &String| name.starts_with("bias");
    let of = |names: [&str; 2]| module.tensors.keys().all(|name| names.contains(&name.as_str()) || is_bias(name));
    module.is_of_vectors() || module.is_lora() && factors.into_iter().any(of)
}

/// A module as a plain LoRA, and the share of its update's norm that is kept.
fn flattened(
    model: &Model,
    path: &ModulePath,
    module: &AdapterModule,
    options: &ExtractOptions,
    variants: &VariantRegistry<CpuBackend>,
) -> Result<(AdapterModule, f64)> {
    let refused = |reason: String| Error::Module { module: path.to_string(), reason };
    let core = |error: lora_core::Error| refused(error.to_string());
    let found = model.layers.find(path).map_err(refused)?;
    let weight = model.weight(&found[0])?;
    let geometry = lora_core::merge::geometry(module, weight.shape())
        .ok_or_else(|| refused(format!("a weight of the shape {:?} is not adapted", weight.shape())))?;
    let variant = variants.get(&module.variant).map_err(core)?;
    let changes_bias = variant.changes(&module.tensors).bias != BiasChange::Never;
    let bias = if changes_bias { model.bias(&found[0])? } else { None };
    let frozen = FrozenLayer { backend: CpuBackend, geometry, weight, bias };
    let parameters = Parameters::upload(&CpuBackend, module, &HostTensor::zeros([1])).map_err(core)?;
    let delta = variant.delta_weight(&CpuBackend, &frozen, &parameters).map_err(core)?;
    let (mut flat, kept) = compose::flatten(&delta, options).map_err(core)?;
    let change = match changes_bias {
        true => variant.delta_bias(&CpuBackend, &frozen, &parameters).map_err(core)?,
        false => None,
    };
    let Some(change) = change else { return Ok((flat, kept)) };
    // The bias is kept whole: alpha is the rank, so that its factor is 1.
    let squares = |tensor: &HostTensor| tensor.to_f32().iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
    let (of_weight, of_bias) = (squares(&delta), squares(&change));
    flat.tensors.insert("bias".into(), change);
    let all = of_weight + of_bias;
    Ok((flat, if all == 0.0 { 1.0 } else { ((kept * kept * of_weight + of_bias) / all).sqrt() }))
}
