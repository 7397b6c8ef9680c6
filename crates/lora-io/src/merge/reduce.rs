//! Plain LoRAs from checkpoints: the difference of two, and any adapter's updates on a base.

use std::path::Path;

use lora_core::backend::CpuBackend;
use lora_core::compose::{self, ExtractOptions, Outcome};
use lora_core::target::{TargetLayer, Targets};
use lora_core::variant::{FrozenLayer, Parameters, VariantRegistry};
use lora_core::{Adapter, HostTensor, LayerGeometry, ModulePath};
use rayon::prelude::*;

use super::folder::Base;
use super::scales::Scales;
use super::targets::{StoredLayer, StoredLayers};
use crate::{Error, Result};

/// The weight of a layer, in f32.
fn weight(base: &Base, scales: &Scales, layer: &StoredLayer) -> Result<HostTensor> {
    Ok(layer.order.exchanged(scales.numbers(base, layer.file, &layer.weight, layer.rows.as_ref())?))
}

/// The LoRA that leads from a base to a model tuned from it, on the layers that `targets` names. Both have the same layout.
/// StoredLayers that do not differ get no module.
///
/// # Errors
/// [`Error::Format`] where a pattern matches no layer of the base, the tuned model lacks one, or none of them differs;
/// [`Error::Io`] or [`Error::Tensor`] where a weight cannot be read, differs in shape or holds NaN.
pub fn extract(
    base: impl AsRef<Path>,
    tuned: impl AsRef<Path>,
    targets: &Targets,
    options: &ExtractOptions,
) -> Result<(Adapter, Vec<Outcome>)> {
    let (base, tuned) = (base.as_ref(), tuned.as_ref());
    let (base_files, tuned_files) = (Base::open(base)?, Base::open(tuned)?);
    let (base_layers, tuned_layers) = (StoredLayers::new(&base_files), StoredLayers::new(&tuned_files));
    let (base_scales, tuned_scales) = (Scales::of(&base_files), Scales::of(&tuned_files));
    let layers: Vec<TargetLayer> = base_layers
        .known
        .iter()
        .filter_map(|(path, copies)| {
            let geometry = LayerGeometry::of_weight(&copies.first()?.shape(&base_files.files))?;
            let norm = matches!(geometry, LayerGeometry::Norm { .. });
            (!norm).then(|| TargetLayer { path: path.clone(), geometry })
        })
        .collect();
    let chosen = targets.select(&layers).map_err(|error| Error::format(base, error.to_string()))?;
    let found: Vec<Option<(ModulePath, _)>> = chosen
        .par_iter()
        .map(|target| {
            let layer = &base_layers.known[&target.path][0];
            let Some(other) = tuned_layers.known.get(&target.path).and_then(|copies| copies.first()) else {
                return Err(Error::format(tuned, format!("has no `{}`, which the base has", target.path)));
            };
            let (before, after) =
                (weight(&base_files, &base_scales, layer)?, weight(&tuned_files, &tuned_scales, other)?);
            let module = compose::extract(&after, &before, options)
                .map_err(|error| Error::tensor(tuned, &other.weight, error.to_string()))?;
            base_files.files[layer.file].release(&layer.weight);
            tuned_files.files[other.file].release(&other.weight);
            Ok(module.map(|module| (target.path.clone(), module)))
        })
        .collect::<Result<_>>()?;
    let mut adapter = Adapter::default();
    let mut outcomes = Vec::new();
    for (path, (module, kept)) in found.into_iter().flatten() {
        outcomes.push(Outcome { module: path.clone(), rank: module.rank, kept });
        adapter.modules.insert(path, module);
    }
    if adapter.modules.is_empty() {
        return Err(Error::format(tuned, "does not differ from the base in any of these layers"));
    }
    Ok((adapter, outcomes))
}

/// Any adapter as a plain LoRA on this base: every update is worked out and taken apart again. Plain modules stay as they
/// are.
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
    let opened = Base::open(base.as_ref())?;
    let layers = StoredLayers::new(&opened);
    let scales = Scales::of(&opened);
    let flat: Vec<(ModulePath, _)> = adapter
        .modules
        .par_iter()
        .map(|(path, module)| {
            if module.factors().is_some() {
                return Ok((path.clone(), (module.clone(), 1.0)));
            }
            let refused = |reason: String| Error::Module { module: path.to_string(), reason };
            let found = layers.find(path).map_err(refused)?;
            let weight = weight(&opened, &scales, &found[0])?;
            let geometry = lora_core::merge::geometry(module, weight.shape())
                .ok_or_else(|| refused(format!("a weight of the shape {:?} is not adapted", weight.shape())))?;
            let frozen = FrozenLayer { backend: CpuBackend, geometry, weight, bias: None };
            let flatten = || -> lora_core::Result<_> {
                let variant = variants.get(&module.variant)?;
                let parameters = Parameters::upload(&CpuBackend, module, &HostTensor::zeros([1]))?;
                let delta = variant.delta_weight(&CpuBackend, &frozen, &parameters)?;
                compose::flatten(&delta, options)
            };
            Ok((path.clone(), flatten().map_err(|error| refused(error.to_string()))?))
        })
        .collect::<Result<_>>()?;
    let mut result = Adapter { metadata: adapter.metadata.clone(), ..Adapter::default() };
    let mut outcomes = Vec::new();
    for (path, (module, kept)) in flat {
        outcomes.push(Outcome { module: path.clone(), rank: module.rank, kept });
        result.modules.insert(path, module);
    }
    Ok((result, outcomes))
}
