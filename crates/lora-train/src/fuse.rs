//! Adapters that are merged into the frozen base as it is read (`fuse_adapters`): which files, how strongly, and which modules
//! of the file that training begins with. The arithmetic is `lora_io::checkpoint`'s.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use lora_core::backend::CpuBackend;
use lora_core::merge::geometry;
use lora_core::target::{TargetLayer, Targets};
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, DType, ModulePath};
use lora_io::adapter;
use lora_io::checkpoint::Checkpoint;
use lora_io::merge::Weighted;
use lora_torch::tch::Device;

use crate::base::{Bases, Opening};
use crate::config::TrainConfig;
use crate::trainable::{adaptable, parameters_of_experts, savable, target_parameters};
use crate::{Error, Result};

/// Adds the adapters of a configuration to an open base.
///
/// # Errors
/// [`Error::Config`] with the file that cannot be merged; what reading it gives.
pub(crate) fn fuse(mut checkpoint: Checkpoint, config: &TrainConfig, bases: &Bases) -> Result<Checkpoint> {
    if config.fuse_adapters.is_empty() {
        return Ok(checkpoint);
    }
    let refused = |error: Error| Error::from(config.refused([("fuse_adapters", error.to_string())]));
    let mut adapters = Vec::new();
    for own in &config.fuse_adapters {
        let read = adapter::read_among(&own.path, &bases.families()).map_err(|error| refused(error.into()))?;
        let mut adapter = read.adapter;
        if begins(config, &own.path) {
            let trained = trained_modules(&adapter, config, bases)?;
            adapter.modules.retain(|path, _| !trained.contains(path));
        }
        let name = own.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        adapters.push(Weighted { name, adapter, strength: own.strength.clone() });
    }
    checkpoint.fuse(&adapters, &VariantRegistry::<CpuBackend>::default()).map_err(|error| refused(error.into()))?;
    Ok(checkpoint)
}

/// Whether a file that is merged is the one that training begins with: then what training takes of it is left out of the merge.
fn begins(config: &TrainConfig, path: &Path) -> bool {
    let canonical = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    config.init_from.as_ref().is_some_and(|from| canonical(from) == canonical(path))
}

/// Whether the rest of the file that training begins with is merged into the base.
pub(crate) fn takes_the_rest(config: &TrainConfig) -> bool {
    config.fuse_adapters.iter().any(|own| begins(config, &own.path))
}

/// The modules of an adapter whose layers a run trains. Its networks are not built yet: what keys name is looked up among the
/// adapter's own layers.
fn trained_modules(adapter: &Adapter, config: &TrainConfig, bases: &Bases) -> Result<BTreeSet<ModulePath>> {
    let mut plain = config.clone();
    plain.fuse_adapters.clear();
    let checkpoint = Arc::new(bases.configured(&plain)?);
    let base = bases.open(&Opening::new(config, &checkpoint, Device::Cpu, DType::F32))?;
    let trains = |component| base.networks().iter().any(|network| network.trains && network.component == component);
    let mut layers = Vec::new();
    for (path, module) in &adapter.modules {
        let shape =
            checkpoint.component(path.component).ok().and_then(|own| own.shape(&format!("{}.weight", path.path)));
        let geometry = shape.and_then(|shape| geometry(module, shape));
        layers.extend(geometry.map(|geometry| TargetLayer { path: path.clone(), geometry }));
    }
    layers.retain(|layer: &TargetLayer| trains(layer.path.component));
    let mut trained = Targets::parse(&config.target_modules)?.matched(&adaptable(&layers));
    if let Some(names) = config.extra.texts("modules_to_save").filter(|names| !names.is_empty()) {
        trained.extend(Targets::parse(names)?.matched(&savable(&layers)));
    }
    if let Some(names) = target_parameters(config) {
        trained.extend(Targets::parse(names)?.matched(&parameters_of_experts(&layers)));
    }
    Ok(trained.into_iter().map(|layer| layer.path).collect())
}
