//! Adapters on all experts of a layer at once (PEFT's `target_parameters`), in the form that a base has its experts in: one
//! matrix an expert and a projection, or one tensor for all, which some models store with inputs and outputs exchanged.

use std::borrow::Cow;
use std::collections::BTreeMap;

use lora_core::variant::{EXPERTS_DOWN, EXPERTS_UP};
use lora_core::{AdapterModule, Component, HostTensor, ModulePath};

use super::Weighted;
use super::folder::Base;
use super::rows::{turn, values};

/// Names of the matrices that a fused one is made of, in the order of its rows, as files of two conventions have them.
const PARTS: &[(&str, &[&[&str]])] =
    &[("gate_up_proj", &[&["gate_proj", "up_proj"], &["w1", "w3"]]), ("down_proj", &[&["down_proj"], &["w2"]])];

/// What files of some models call the feed-forward part that transformers calls `mlp`.
const MIXTURES: &[&str] = &["mlp", "block_sparse_moe"];

/// Models whose fused experts are stored `[experts, inputs, outputs]`, where shapes do not tell.
const TURNED: &[&str] = &["gpt_oss", "openai_privacy_filter"];

/// The adapters with their experts in the base's form; borrowed where there are none.
pub(super) fn in_form<'a>(base: &Base, adapters: &'a [Weighted]) -> Cow<'a, [Weighted]> {
    let there = |path: &str| base.files.iter().any(|file| file.contains(path));
    let strange = |(path, module): (&ModulePath, &AdapterModule)| {
        let is_mixture = path.component == Component::LANGUAGE_MODEL && path.path.contains(".mlp.");
        module.tensors.contains_key(EXPERTS_DOWN) || is_mixture && !there(&format!("{}.weight", path.path))
    };
    if !adapters.iter().any(|own| own.adapter.modules.iter().any(strange)) {
        return Cow::Borrowed(adapters);
    }
    let turned = base.config.as_ref().and_then(|config| config["model_type"].as_str());
    let turned = turned.is_some_and(|kind| TURNED.contains(&kind));
    let mut adapters = adapters.to_vec();
    for weighted in &mut adapters {
        let modules = std::mem::take(&mut weighted.adapter.modules);
        for (path, module) in modules {
            let made = match module.tensors.contains_key(EXPERTS_DOWN) {
                true => parted(base, &path, &module).unwrap_or_else(|| vec![fused(base, path, module, turned)]),
                false => vec![(renamed(path, |name| there(&format!("{name}.weight"))), module)],
            };
            weighted.adapter.modules.extend(made);
        }
    }
    Cow::Owned(adapters)
}

/// The path as a base has it, by another name of the mixture.
fn renamed(path: ModulePath, there: impl Fn(&str) -> bool) -> ModulePath {
    let names = MIXTURES.iter().map(|name| path.path.replacen(".mlp.", &format!(".{name}."), 1));
    match names.into_iter().find(|name| there(name)) {
        Some(name) => ModulePath::new(path.component, name),
        None => path,
    }
}

/// One plain LoRA for each matrix, where the base has one for each expert.
fn parted(base: &Base, path: &ModulePath, module: &AdapterModule) -> Option<Vec<(ModulePath, AdapterModule)>> {
    let (stem, parameter) = path.path.rsplit_once('.')?;
    let (_, conventions) = PARTS.iter().find(|(name, _)| *name == parameter)?;
    let stems = MIXTURES.iter().map(|name| stem.replacen(".mlp.", &format!(".{name}."), 1));
    let choices = stems.flat_map(|stem| conventions.iter().map(move |parts| (stem.clone(), *parts)));
    let (down, up) = (&module.tensors[EXPERTS_DOWN], module.tensors.get(EXPERTS_UP)?);
    let (&[experts, rank, inputs], &[_, outputs, _]) = (down.shape(), up.shape()) else { return None };
    let there = |expert: usize, stem: &str, part: &str| {
        let name = format!("{stem}.{expert}.{part}.weight");
        base.files.iter().any(|file| file.contains(&name))
    };
    let has_all = |(stem, parts): &(String, &[&str])| {
        parts.iter().all(|part| there(0, stem, part) && !there(experts, stem, part))
    };
    let (stem, parts) = choices.into_iter().find(has_all)?;
    let rows = outputs / parts.len();
    let mut modules = Vec::with_capacity(experts * parts.len());
    for expert in 0..experts {
        let down =
            HostTensor::from_f32([rank, inputs], values(down, expert * rank * inputs..(expert + 1) * rank * inputs));
        let down = down.ok()?;
        for (place, part) in parts.iter().enumerate() {
            let start = (expert * outputs + place * rows) * rank;
            let up = HostTensor::from_f32([rows, rank], values(up, start..start + rows * rank)).ok()?;
            let own = AdapterModule::of_factors(down.clone(), up, false, rank, module.alpha);
            modules.push((ModulePath::new(path.component, format!("{stem}.{expert}.{part}")), own));
        }
    }
    Some(modules)
}

/// The module for a tensor of all experts, with inputs and outputs as the tensor has them.
fn fused(base: &Base, path: ModulePath, module: AdapterModule, turned: bool) -> (ModulePath, AdapterModule) {
    let shape = base.files.iter().find_map(|file| file.shape(&path.path));
    let (down, up) = (&module.tensors[EXPERTS_DOWN], module.tensors.get(EXPERTS_UP));
    let (Some(&[_, rows, columns]), &[experts, rank, inputs], Some(&[_, outputs, _])) =
        (shape, down.shape(), up.map(HostTensor::shape))
    else {
        return (path, module);
    };
    if [rows, columns] != [inputs, outputs] || rows == columns && !turned {
        return (path, module);
    }
    let each = |tensor: Option<&HostTensor>, rows: usize, columns: usize| {
        let numbers = tensor.map(|tensor| tensor.to_f32().into_owned()).unwrap_or_default();
        let turned = numbers.chunks_exact((rows * columns).max(1)).flat_map(|one| turn(one, rows, columns)).collect();
        HostTensor::from_f32([experts, columns, rows], turned)
    };
    let (Ok(down), Ok(up)) = (each(up, outputs, rank), each(Some(down), rank, inputs)) else { return (path, module) };
    let tensors = BTreeMap::from([(EXPERTS_DOWN.to_owned(), down), (EXPERTS_UP.to_owned(), up)]);
    (path, AdapterModule { tensors, ..module })
}
