//! What an adapter is in the format that it is written in: which format is usual for a base, which layers that format
//! has, and writing for a base that is known.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Adapter, AdapterModule, Component, DType};

use super::{Format, canonical, diffusers, gguf, kohya, names, peft};
use crate::family::{FAMILIES, Family, sd3};
use crate::{Error, Result};

/// The layout that most programs load of adapters for a family: PEFT's for language models, else kohya's; of plain
/// LoRAs for Stable Diffusion 3 diffusers', since diffusers passes over kohya's there. Dotted names of a model that is
/// not known have no form in kohya's; they stay as they are in diffusers'.
pub fn usual_format(adapter: &Adapter, family: Option<&Family>) -> Format {
    let is_plain = |module: &AdapterModule| module.factors().is_some_and(|factors| !factors.embedding);
    match family {
        Some(family) if !family.image => Format::Peft,
        Some(family) if *family == sd3::FAMILY && adapter.modules.values().all(is_plain) => Format::Diffusers,
        None if adapter.modules.keys().any(|path| path.component == Component::MODEL && path.path.contains('.')) => {
            Format::Diffusers
        }
        _ => Format::Kohya,
    }
}

/// Writes an adapter for a base of a family, or of one that is not known; returns what the format could not keep as it
/// was.
///
/// # Errors
/// As of [`super::write()`].
pub fn write_as(
    path: impl AsRef<Path>,
    adapter: &Adapter,
    format: Format,
    family: Option<&Family>,
    dtype: DType,
) -> Result<Vec<String>> {
    match format {
        Format::Kohya => kohya::write(path, adapter, family, dtype),
        Format::Diffusers => diffusers::write(path, adapter, dtype),
        Format::DiffusersOld => diffusers::write_old(path, adapter, dtype),
        Format::Peft => peft::write(path, adapter, dtype, &peft::Extra::default()),
        Format::Gguf => gguf::write(path.as_ref(), adapter, dtype),
    }
}

/// An adapter with a module for each layer of the format, for what works on ranks: kohya's layout has the layers of the
/// original tree, where queries, keys and values may be one. The modules of a transformer have that tree's names then,
/// which the layout is written from too. Where modules cannot be put together the adapter stays as it is, and writing
/// it says why.
pub fn in_layers_of(format: Format, adapter: &Adapter, family: Option<&Family>) -> Adapter {
    let has_tree = |family: &&Family| {
        let names = family.component(Component::TRANSFORMER).and_then(|names| names.kohya);
        names.is_some_and(|names| names.tree.is_some())
    };
    let Some(family) = family.filter(has_tree).filter(|_| format == Format::Kohya) else { return adapter.clone() };
    let (own, mut modules): (BTreeMap<_, _>, BTreeMap<_, _>) =
        adapter.modules.clone().into_iter().partition(|(path, _)| path.component == Component::TRANSFORMER);
    let own = Adapter { modules: own, metadata: adapter.metadata.clone() };
    let Ok(fused) = canonical::fused(&own, Some(family), &mut 0) else { return adapter.clone() };
    for (name, (_, module)) in fused {
        let path = if names::is_kohya(&name) { names::from_kohya(&name, &FAMILIES) } else { names::from_dotted(&name) };
        modules.insert(path, module);
    }
    Adapter { modules, metadata: own.metadata }
}

/// The same adapter under canonical names: what was one layer of the original tree is taken apart where it can be.
///
/// # Errors
/// [`Error::Module`] where two modules are on one layer.
pub(crate) fn in_canonical_layers(mut adapter: Adapter) -> Result<Adapter> {
    match canonical::canonical(&mut adapter).into_iter().next() {
        Some(problem) => Err(Error::Module { module: problem, reason: "two modules are on one layer".into() }),
        None => Ok(adapter),
    }
}
