//! Modules of transformers under the names of their family's other tree, brought to the canonical ones: renamed, or taken
//! apart where one layer there is several here, as queries, keys and values in one.

use std::collections::BTreeMap;

use lora_core::{Adapter, AdapterModule, Component, HostTensor, ModulePath};

use crate::family::tree::{Depths, Piece};
use crate::family::{FAMILIES, Names};

/// The name trees of transformers in single files.
fn trees() -> impl Iterator<Item = Names> {
    FAMILIES.into_iter().filter_map(|family| family.component(Component::TRANSFORMER)?.single_file)
}

/// Whether a path is a module of a transformer that is known here, in either of its family's trees.
pub(super) fn is_transformer(path: &str) -> bool {
    let name = format!("{path}.weight");
    trees().any(|own| own.tree.weights(&name, &Depths::default()).is_some())
}

/// What a module is under canonical names.
fn pieces(path: &ModulePath) -> Option<Vec<(String, Piece)>> {
    if path.component != Component::TRANSFORMER {
        return None;
    }
    let name = format!("{}.weight", path.path);
    let pieces = trees().find_map(|own| own.tree.weights(&name, &Depths::default()))?;
    let path = |(name, piece): (String, Piece)| Some((name.strip_suffix(".weight")?.to_owned(), piece));
    pieces.into_iter().map(path).collect()
}

/// Brings an adapter's modules to canonical names; returns what is wrong with those that cannot be.
pub(super) fn canonical(adapter: &mut Adapter) -> Vec<String> {
    let mut problems = Vec::new();
    for (path, module) in std::mem::take(&mut adapter.modules) {
        let parts = match pieces(&path) {
            None => vec![(path.path.clone(), module)],
            Some(pieces) => match taken_apart(&module, &pieces) {
                Ok(parts) => parts,
                Err(reason) => {
                    problems.push(format!("`{path}` ({reason})"));
                    continue;
                }
            },
        };
        for (name, module) in parts {
            let canonical = ModulePath::new(path.component, name);
            if adapter.modules.insert(canonical.clone(), module).is_some() {
                problems.push(format!("`{path}` (`{canonical}` is there under another name already)"));
            }
        }
    }
    problems
}

/// The modules that one module is: the factor next to the input is all of theirs, the other's rows are cut.
fn taken_apart(module: &AdapterModule, pieces: &[(String, Piece)]) -> Result<Vec<(String, AdapterModule)>, String> {
    let one = |(name, piece): &(String, Piece)| {
        let Piece::Rows { part, parts } = *piece else { return Ok((name.clone(), module.clone())) };
        if !module.is_lora() {
            let variant = &module.variant;
            return Err(format!(
                "{variant} on {parts} layers in one; only plain LoRA is taken apart: flatten it first"
            ));
        }
        let mut own = module.clone();
        let tensors: Result<BTreeMap<_, _>, String> = std::mem::take(&mut own.tensors)
            .into_iter()
            .map(|(name, tensor)| {
                let cut = if name == "down" { tensor } else { rows(&name, &tensor, part, parts)? };
                Ok((name, cut))
            })
            .collect();
        own.tensors = tensors?;
        Ok((name.clone(), own))
    };
    pieces.iter().map(one).collect()
}

/// One of several parts of equally many rows.
fn rows(name: &str, tensor: &HostTensor, part: usize, parts: usize) -> Result<HostTensor, String> {
    let wrong = || format!("its `{name}` {:?} has not {parts} parts of equally many rows", tensor.shape());
    let [rows, rest @ ..] = tensor.shape() else { return Err(wrong()) };
    if *rows == 0 || rows % parts != 0 {
        return Err(wrong());
    }
    let count = rows / parts;
    let width: usize = rest.iter().product();
    let values = tensor.to_f32()[part * count * width..(part + 1) * count * width].to_vec();
    let cut = HostTensor::from_f32([&[count], rest].concat(), values).map_err(|error| error.to_string())?;
    Ok(cut.to_dtype(tensor.dtype()))
}
