//! Finished adapters on a network, live: any number of them, of any variant, each with its strength. Nothing of them is
//! trained, and the network's weights stay as they are.

use std::path::Path;

use lora_core::compose::{self, Method};
use lora_core::target::TargetLayer;
use lora_core::variant::{Parameters, TOKEN_ROWS, VariantRegistry};
use lora_core::{Adapter, ModulePath, Strength};
use lora_io::adapter;
use lora_io::family::Family;
use lora_models::layers::{Adaptable, AttachedAdapter};
use lora_torch::TchBackend;
use lora_torch::tch::{Kind, Tensor};
use lora_torch::tensor::from_host;

use crate::{Error, Result};

/// Reads an adapter for a base of a family that has these layers; kohya's names in it may be of any of the families.
///
/// # Errors
/// What reading gives; [`Error::NotOfThisBase`] where it adapts a layer that the base lacks, or one of another size.
pub(super) fn read(
    path: &Path,
    family: &Family,
    layers: &[TargetLayer],
    families: &[&'static Family],
) -> Result<Adapter> {
    let read = adapter::read_among(path, families)?;
    read.undamaged()?;
    let mut adapter = read.adapter;
    let other = |reason: String| Error::NotOfThisBase { path: path.to_owned(), reason };
    if let Some(family) = adapter::made_for_another(&adapter, family) {
        return Err(other(family));
    }
    adapter::fit(path, &mut adapter, layers)?;
    let unknown = adapter.modules.keys().find(|module| !layers.iter().any(|layer| layer.path == **module));
    match unknown {
        Some(module) => Err(other(format!("the base has no layer `{module}`; the adapter was made for another model"))),
        None => Ok(adapter),
    }
}

/// Adapters that together do what these do with their strengths: plain LoRAs become their exact sum, others stay.
///
/// # Errors
/// Where plain LoRAs of one layer differ in its size.
pub(super) fn joined(adapters: &[(&Adapter, &Strength)]) -> Result<Vec<(Adapter, Strength)>> {
    if let [(adapter, strength)] = adapters
        && **strength == Strength::default()
    {
        return Ok(vec![((*adapter).clone(), Strength::default())]);
    }
    let part = |adapter: &Adapter, plain: bool| Adapter {
        modules: adapter
            .modules
            .iter()
            .filter(|(_, module)| module.factors().is_some() == plain)
            .map(|(path, module)| (path.clone(), module.clone()))
            .collect(),
        metadata: Default::default(),
    };
    let plain: Vec<Adapter> = adapters.iter().map(|(adapter, _)| part(adapter, true)).collect();
    let weighted: Vec<_> = plain.iter().zip(adapters).map(|(plain, (_, strength))| (plain, *strength)).collect();
    let sum = compose::combine(&weighted, Method::Concatenate)?.0;
    let others = adapters.iter().map(|(adapter, strength)| (part(adapter, false), (*strength).clone()));
    let all = std::iter::once((sum, Strength::default())).chain(others);
    Ok(all.filter(|(adapter, _)| !adapter.modules.is_empty()).collect())
}

/// Hangs adapters on a network's layers, in place of those that hang there.
///
/// # Errors
/// Where a variant is not registered; where memory runs out.
pub(super) fn hang(
    adapters: &[(Adapter, Strength)],
    network: &mut dyn Adaptable,
    variants: &VariantRegistry<TchBackend>,
) -> Result<()> {
    let component = network.component();
    let mut result = Ok(());
    network.visit_layers(&mut |layer| {
        layer.detach();
        let path = ModulePath::new(component, layer.path());
        let mut hang = || -> Result<()> {
            for (adapter, strength) in adapters {
                // Rows of tokens are read at both ends of a tied model.
                let table = layer.tied().map(|path| ModulePath::new(component, path));
                let rows = table.as_ref().and_then(|path| adapter.modules.get(path));
                let rows = rows.filter(|module| module.tensors.contains_key(TOKEN_ROWS));
                let own = adapter.modules.get(&path);
                let strength = strength.of(if own.is_some() { &path } else { table.as_ref().unwrap_or(&path) });
                let Some(module) = own.or(rows).filter(|_| strength != 0.0) else { continue };
                let variant = variants.get(&module.variant)?;
                let half = variant.computes_in_input_dtype(&layer.geometry()) && layer.kind() != Kind::Float;
                let kind = if half { layer.kind() } else { Kind::Float };
                let put = |host| -> Result<Tensor> { Ok(from_host(host, layer.device())?.f_to_kind(kind)?) };
                let tensors = module.tensors.iter().map(|(name, host)| Ok((name.clone(), put(host)?)));
                let tensors = tensors.collect::<Result<_>>()?;
                let parameters = Parameters { tensors, scale: module.alpha / module.rank.max(1) as f64 };
                layer.attach_beside(AttachedAdapter { variant, parameters }, strength);
            }
            Ok(())
        };
        if result.is_ok() {
            result = hang();
        }
    })?;
    result
}
