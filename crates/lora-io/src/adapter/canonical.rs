//! Modules of transformers under the names of their family's original tree, and under the canonical ones. One layer of
//! the original tree may be several here, as queries, keys and values in one: reading takes its module apart, writing
//! puts modules together. Both are exact for plain LoRA.

use std::collections::BTreeMap;

use lora_core::variant::BIAS_VALUE;
use lora_core::{Adapter, AdapterModule, Component, HostTensor, ModulePath};

use super::names;
use super::parts::LORA_BIAS as BIAS;
use crate::family::tree::{Depths, Piece, Share};
use crate::family::{ComponentNames, FAMILIES, Family, Names};

/// Where files in kohya's form say which base they were made for.
const BASE_VERSION: &str = "ss_base_model_version";

/// The name tree of a family's transformer in single files.
fn tree_of(family: &Family) -> Option<Names> {
    family.component(Component::TRANSFORMER)?.single_file
}

/// Whether a path is a module of a transformer that is known here, in either of its family's trees.
pub(super) fn is_transformer(path: &str) -> bool {
    let name = format!("{path}.weight");
    let mut trees = FAMILIES.into_iter().filter_map(tree_of);
    trees.any(|own| own.tree.weights(&name, &Depths::default()).is_some())
}

/// Brings an adapter's modules to canonical names; returns what is wrong with those that cannot be. A module of another
/// variant than plain LoRA cannot be taken apart, and keeps the name of its layer in the original tree.
pub(super) fn canonical(adapter: &mut Adapter) -> Vec<String> {
    // Families share names, and not what lies behind them.
    let family = super::family(adapter);
    let own = family.and_then(tree_of);
    let trees: Vec<Names> = own.into_iter().chain(FAMILIES.into_iter().filter_map(tree_of)).collect();
    let depths = depths(adapter);
    let mut problems = Vec::new();
    for (path, module) in std::mem::take(&mut adapter.modules) {
        let pieces = pieces(&path, &trees, &depths);
        let parts = match pieces.map(|pieces| taken_apart(&module, &pieces)) {
            Some(Ok(parts)) => parts,
            _ => vec![(path.path.clone(), module)],
        };
        for (name, module) in parts {
            let canonical = ModulePath::new(component(&path, family), name);
            if adapter.modules.insert(canonical.clone(), module).is_some() {
                problems.push(format!("`{path}` (`{canonical}` is there under another name already)"));
            }
        }
    }
    // Canonical names of single blocks are several families'; the original ones said whose they are.
    if let Some(labels) = family.filter(|own| super::family(adapter) != Some(*own)).and_then(|own| own.labels.as_ref())
    {
        adapter.metadata.entry(BASE_VERSION.into()).or_insert_with(|| labels.version[0].into());
    }
    problems
}

/// The component of a module: a T5's is the one that is a T5 in the adapter's family.
fn component(path: &ModulePath, family: Option<&Family>) -> Component {
    let is_t5 = path.component.is_text_encoder() && path.path.starts_with("encoder.block.");
    let place = |names: &&ComponentNames| names.single_file.is_some_and(|own| own.place.contains(".t5xxl."));
    let own = family.filter(|_| is_t5).and_then(|family| family.components.iter().find(place));
    own.map_or(path.component, |names| names.component)
}

/// What a module is under canonical names, in the first tree that knows it.
fn pieces(path: &ModulePath, trees: &[Names], depths: &Depths) -> Option<Vec<(String, Piece)>> {
    if path.component != Component::TRANSFORMER {
        return None;
    }
    let name = format!("{}.weight", path.path);
    let pieces = trees.iter().find_map(|own| own.tree.weights(&name, depths))?;
    let path = |(name, piece): (String, Piece)| Some((name.strip_suffix(".weight")?.to_owned(), piece));
    pieces.into_iter().map(path).collect()
}

/// The depths that an adapter shows: Stable Diffusion 3's last block shifts and scales its text and has no gates, so
/// that its layer there has twice as many rows as columns.
fn depths(adapter: &Adapter) -> Depths {
    let last = adapter.modules.iter().find_map(|(path, module)| {
        let of_text = ["context_block.adaLN_modulation.1", "norm1_context.linear"];
        let sides = [super::output_width(module)?, super::input_width(module)?];
        let is_last = of_text.iter().any(|end| path.path.ends_with(end)) && sides[0] == 2 * sides[1];
        is_last.then(|| path.path.split('.').nth(1)?.parse::<usize>().ok()).flatten()
    });
    Depths { layers: last.map_or(0, |block| block + 1), ..Depths::default() }
}

/// The modules that one module is: the factor next to the input is all of theirs, the other's rows are cut.
fn taken_apart(module: &AdapterModule, pieces: &[(String, Piece)]) -> Result<Vec<(String, AdapterModule)>, String> {
    let one = |(name, piece): &(String, Piece)| {
        let module = match piece {
            Piece::Rows(share) => cut(module, *share, pieces.len())?,
            Piece::Swapped => exchanged(module)?,
            _ => module.clone(),
        };
        Ok((name.clone(), module))
    };
    let mut parts = pieces.iter().map(one).collect::<Result<Vec<_>, String>>()?;
    // Where modules were put together, a layer between them may have had none.
    let is_nothing = |module: &AdapterModule| {
        let mut trained = module.tensors.iter().filter(|(name, _)| *name != "down");
        trained.all(|(name, tensor)| name != BIAS_VALUE && tensor.to_f32().iter().all(|value| *value == 0.0))
    };
    if parts.len() > 1 && !parts.iter().all(|(_, module)| is_nothing(module)) {
        parts.retain(|(_, module)| !is_nothing(module));
    }
    Ok(parts)
}

/// The tensors of a plain LoRA, with or without a bias, whose first axis is the layer's outputs; an error for another
/// variant.
fn of_outputs(module: &AdapterModule, what: &str) -> Result<Vec<String>, String> {
    let known = |name: &String| ["down", "up", BIAS, BIAS_VALUE].contains(&name.as_str());
    let has = |name| module.tensors.contains_key(name);
    if !module.is_lora() || !has("down") || !has("up") || !module.tensors.keys().all(known) {
        return Err(format!("{} on {what}; only plain LoRA goes over: flatten it first", module.variant));
    }
    Ok(module.tensors.keys().filter(|name| *name != "down").cloned().collect())
}

/// A module on a share of the layer's outputs. Columns of `up` that are nothing there leave it with their rows of
/// `down`: of modules that were put together only their own ranks are left.
fn cut(module: &AdapterModule, share: Share, layers: usize) -> Result<AdapterModule, String> {
    let mut own = module.clone();
    for name in of_outputs(module, &format!("{layers} layers in one"))? {
        let tensor = &module.tensors[&name];
        let all = tensor.shape().first().copied().unwrap_or(0);
        let wrong = || format!("its `{name}` {:?} has not {} parts of equally many rows", tensor.shape(), share.of);
        let range = share.rows(all).filter(|rows| !rows.is_empty()).ok_or_else(wrong)?;
        own.tensors.insert(name, rows(tensor, &range.collect::<Vec<_>>()));
    }
    Ok(without_empty_columns(own))
}

fn without_empty_columns(mut module: AdapterModule) -> AdapterModule {
    let (Some(up), Some(down)) = (module.tensors.get("up"), module.tensors.get("down")) else { return module };
    let &[_, rank] = up.shape() else { return module };
    let values = up.to_f32();
    let is_used = |column: &usize| values.iter().skip(*column).step_by(rank.max(1)).any(|value| *value != 0.0);
    let used: Vec<usize> = (0..rank).filter(is_used).collect();
    if used.is_empty() || used.len() == rank || down.shape().first() != Some(&rank) {
        return module;
    }
    let (up, down) = (columns(up, &used), rows(down, &used));
    // The same scale, which is alpha by rank.
    module.alpha *= used.len() as f64 / module.rank as f64;
    module.rank = used.len();
    module.tensors.extend([("up".to_owned(), up), ("down".to_owned(), down)]);
    module
}

/// A module on the layer whose rows have their halves exchanged.
fn exchanged(module: &AdapterModule) -> Result<AdapterModule, String> {
    let mut own = module.clone();
    for name in of_outputs(module, "a layer whose rows lie in another order")? {
        let tensor = &module.tensors[&name];
        let all = tensor.shape().first().copied().unwrap_or(0);
        if all == 0 || all % 2 != 0 {
            return Err(format!("its `{name}` {:?} has no two halves of rows", tensor.shape()));
        }
        own.tensors.insert(name, rows(tensor, &(all / 2..all).chain(0..all / 2).collect::<Vec<_>>()));
    }
    Ok(own)
}

/// Some rows of a tensor, in its type.
fn rows(tensor: &HostTensor, chosen: &[usize]) -> HostTensor {
    let width: usize = tensor.shape()[1..].iter().product();
    let values = tensor.to_f32();
    let values = chosen.iter().flat_map(|row| &values[row * width..(row + 1) * width]).copied().collect();
    shaped(&[&[chosen.len()], &tensor.shape()[1..]].concat(), values).to_dtype(tensor.dtype())
}

/// Some columns of a matrix, in its type.
fn columns(tensor: &HostTensor, chosen: &[usize]) -> HostTensor {
    let &[count, width] = tensor.shape() else { return tensor.clone() };
    let values = tensor.to_f32();
    let cut = (0..count).flat_map(|row| chosen.iter().map(move |column| row * width + column));
    shaped(&[count, chosen.len()], cut.map(|place| values[place]).collect()).to_dtype(tensor.dtype())
}

fn shaped(shape: &[usize], values: Vec<f32>) -> HostTensor {
    HostTensor::from_f32(shape, values).expect("as many values as the shape has")
}

/// Modules by their kohya names, each with the component that it is of.
type Fused = BTreeMap<String, (Component, AdapterModule)>;

/// A module that has no form in kohya's layout, and why; without a reason it has no name there.
type Unwritten = (ModulePath, Option<String>);

/// An adapter's modules as they are in the original tree of its family, by their kohya names, each with the component
/// that it is of; `None` for a module that the layout has no name for. Those of layers that are one there become one
/// module. `separate` counts modules that were put together with factors of their own each: then the one has the sum of
/// their ranks.
pub(super) fn fused(adapter: &Adapter, family: Option<&Family>, separate: &mut usize) -> Result<Fused, Unwritten> {
    let tree = family.and_then(|family| {
        let names = family.component(Component::TRANSFORMER)?;
        names.kohya.and_then(|own| own.tree)
    });
    let depths = Depths { layers: depths(adapter).layers, ..tree.map(|(_, depths)| depths).unwrap_or_default() };
    let mut groups: BTreeMap<String, Vec<(Share, &ModulePath, &AdapterModule)>> = BTreeMap::new();
    let mut all = BTreeMap::new();
    for (path, module) in &adapter.modules {
        let name = names::kohya(path, family).ok_or_else(|| (path.clone(), None))?;
        let of_tree = tree.filter(|_| path.component == Component::TRANSFORMER);
        let piece = of_tree.and_then(|(tree, _)| tree.stored(&format!("{}.weight", path.path), &depths));
        match piece.map(|(_, piece)| piece) {
            Some(Piece::Rows(share)) => groups.entry(name).or_default().push((share, path, module)),
            Some(Piece::Swapped) => {
                let own = exchanged(module).map_err(|reason| (path.clone(), Some(reason)))?;
                all.insert(name, (path.component, own));
            }
            _ => drop(all.insert(name, (path.component, module.clone()))),
        }
    }
    for (name, parts) in groups {
        let module = joined(&parts, separate).map_err(|reason| (parts[0].1.clone(), Some(reason)))?;
        all.insert(name, (Component::TRANSFORMER, module));
    }
    Ok(all)
}

/// One module of those on shares of a layer's outputs.
fn joined(parts: &[(Share, &ModulePath, &AdapterModule)], separate: &mut usize) -> Result<AdapterModule, String> {
    let mut factors = Vec::with_capacity(parts.len());
    for (share, _, module) in parts {
        let others = of_outputs(module, "one of several layers that are one in this layout")?;
        let (Some(down), Some(up)) = (module.tensors.get("down"), module.tensors.get("up")) else {
            return Err("factors that are not there".into());
        };
        if others.iter().any(|name| name == BIAS_VALUE) {
            return Err("a trained bias in the base's place, which has no form in this layout".into());
        }
        let (&[rank, inputs], &[outputs, _]) = (down.shape(), up.shape()) else {
            return Err("factors that are no matrices".into());
        };
        if rank == 0 || outputs % share.count != 0 {
            return Err(format!("{outputs} outputs where {} equal parts are expected", share.count));
        }
        factors.push((*share, down, up, [rank, inputs, outputs / share.count], module.scale()));
    }
    let (first, down, _, [rank, inputs, part], scale) = factors[0];
    if factors.iter().any(|(.., [_, other, rows], _)| (*other, *rows) != (inputs, part)) {
        return Err("layers of other widths than those it is one with in this layout".into());
    }
    let all = part * first.of;
    let shared = factors.iter().all(|(_, other, .., other_scale)| *other == down && *other_scale == scale);
    let total = if shared { rank } else { factors.iter().map(|(.., [rank, ..], _)| rank).sum() };
    let mut up = vec![0.0f32; all * total];
    let mut stacked = Vec::new();
    let mut column = 0;
    for (share, own_down, own_up, [own_rank, ..], own_scale) in &factors {
        if !shared || stacked.is_empty() {
            stacked.extend_from_slice(&own_down.to_f32());
        }
        let factor = own_scale / scale;
        for (row, values) in own_up.to_f32().chunks(*own_rank).enumerate() {
            let start = (share.first * part + row) * total + column;
            let scaled =
                values.iter().map(|value| if factor == 1.0 { *value } else { (f64::from(*value) * factor) as f32 });
            up[start..start + own_rank].iter_mut().zip(scaled).for_each(|(place, value)| *place = value);
        }
        if !shared {
            column += own_rank;
        }
    }
    *separate += if shared { 0 } else { parts.len() };
    let module = parts[0].2;
    let mut tensors = BTreeMap::from([
        ("down".to_owned(), shaped(&[total, inputs], stacked)),
        ("up".to_owned(), shaped(&[all, total], up)),
    ]);
    tensors.extend(joined_bias(parts, all, scale)?.map(|bias| (BIAS.to_owned(), bias)));
    Ok(AdapterModule { variant: module.variant.clone(), tensors, rank: total, alpha: scale * total as f64 })
}

/// The bias of modules on shares of `all` outputs, under one scale; `None` where no module has one.
fn joined_bias(
    parts: &[(Share, &ModulePath, &AdapterModule)],
    all: usize,
    scale: f64,
) -> Result<Option<HostTensor>, String> {
    if !parts.iter().any(|(.., module)| module.tensors.contains_key(BIAS)) {
        return Ok(None);
    }
    let mut values = vec![0.0f32; all];
    for (share, _, module) in parts {
        let Some(bias) = module.tensors.get(BIAS) else { continue };
        let rows = share.rows(all).filter(|rows| rows.len() == bias.elements());
        let rows = rows.ok_or_else(|| format!("its bias {:?} is none of its layer's", bias.shape()))?;
        let factor = module.scale() / scale;
        let own = bias.to_f32();
        values[rows].iter_mut().zip(&*own).for_each(|(place, value)| *place = (f64::from(*value) * factor) as f32);
    }
    Ok(Some(shaped(&[all], values)))
}
