//! Adapters in the weights of an open checkpoint: whoever reads a weight reads it with their updates, in f32. Nothing is
//! written; a merged base as a file is [`crate::merge`]'s, whose arithmetic this is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lora_core::backend::CpuBackend;
use lora_core::merge::{Applied, geometry, merged_bias, merged_weight};
use lora_core::target::TargetLayer;
use lora_core::variant::{BiasChange, EXPERTS_DOWN, FrozenLayer, Parameters, TOKEN_ROWS, Variant, VariantRegistry};
use lora_core::{AdapterModule, Component, HostTensor, ModulePath};

use super::{Checkpoint, ComponentWeights};
use crate::error::listed;
use crate::hash::sha256;
use crate::merge::{self, Weighted};
use crate::{Error, Result, adapter};

/// What is added to the layers of one component.
#[derive(Debug, Default)]
pub(super) struct Fused {
    /// By the layer's path.
    layers: BTreeMap<String, Vec<FusedModule>>,
    /// Names of the weights that change.
    names: BTreeSet<String>,
}

/// What is said of adapters that were added.
#[derive(Debug)]
pub(super) struct FusedRecord {
    text: String,
    notes: Vec<String>,
}

/// One adapter's module on a layer.
#[derive(Debug)]
struct FusedModule {
    module: AdapterModule,
    variant: Arc<dyn Variant<CpuBackend>>,
    strength: f64,
}

impl Fused {
    /// Whether a weight changes.
    pub(super) fn changes(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// All that is added, for digests.
    pub(super) fn digest(&self) -> String {
        let mut text = String::new();
        for (path, modules) in &self.layers {
            for FusedModule { module, strength, .. } in modules {
                text.push_str(&format!("{path} {} {} {strength}\n", module.variant, module.scale()));
                for (name, tensor) in &module.tensors {
                    text.push_str(&format!("{name} {:?} {}\n", tensor.shape(), sha256(tensor.bytes())));
                }
            }
        }
        sha256(text.as_bytes())
    }

    /// A weight or bias of a layer with everything that is added to it.
    fn merged(
        &self,
        path: &str,
        weight: HostTensor,
        bias: Option<HostTensor>,
        of_bias: bool,
    ) -> lora_core::Result<HostTensor> {
        let modules = self.layers.get(path).map(Vec::as_slice).unwrap_or_default();
        let unchanged =
            |weight: HostTensor, bias: Option<HostTensor>| if of_bias { bias.unwrap_or(weight) } else { weight };
        let Some(geometry) = modules.first().and_then(|first| geometry(&first.module, weight.shape())) else {
            return Ok(unchanged(weight, bias));
        };
        let layer = FrozenLayer { backend: CpuBackend, geometry, weight, bias };
        let applied = modules.iter().map(|own| {
            let parameters = Parameters::upload(&CpuBackend, &own.module, &HostTensor::zeros([1]))?;
            Ok(Applied { variant: &*own.variant, parameters, strength: own.strength })
        });
        let applied = applied.collect::<lora_core::Result<Vec<_>>>()?;
        match of_bias {
            false => merged_weight(&CpuBackend, &layer, &applied),
            true => {
                Ok(merged_bias(&CpuBackend, &layer, &applied)?.unwrap_or_else(|| unchanged(layer.weight, layer.bias)))
            }
        }
    }
}

impl Checkpoint {
    /// Adds adapters to the weights, each with its strength, on top of none: those that were there before leave. Weights that
    /// change are read in f32, and those that a GGUF file holds in blocks are read as numbers.
    ///
    /// # Errors
    /// [`Error::Unmatched`] with the modules that do not fit the base, or that only a merged file can hold (rows of tokens,
    /// experts as one parameter, one end of a base that ties its two); [`Error::Module`] for one that is damaged.
    pub fn fuse(&mut self, adapters: &[Weighted], variants: &VariantRegistry<CpuBackend>) -> Result<()> {
        merge::check_sound(adapters)?;
        self.components.values_mut().for_each(|weights| weights.fused = None);
        let names = adapters.iter().map(|own| format!("{} ({})", own.name, own.strength));
        let names = names.collect::<Vec<_>>().join(", ");
        let mut notes = vec![format!("merged into the base as it is read: {names}; what is trained goes with them")];
        for weighted in adapters {
            merge::check_blocks(&self.path, self.family, &weighted.strength)?;
            let other = adapter::made_for_another(&weighted.adapter, self.family);
            let mut own = weighted.adapter.clone();
            own.modules.retain(|path, _| weighted.strength.of(path) != 0.0);
            let mut problems = Vec::new();
            let mut layers = Vec::new();
            for (path, module) in &own.modules {
                match self.layer(path, module, variants) {
                    Ok(layer) => layers.push(layer),
                    Err(reason) => problems.push(format!("`{path}` ({reason})")),
                }
            }
            if !problems.is_empty() {
                let other = other.map(|other| format!("{other}: ")).unwrap_or_default();
                let list =
                    format!("of `{}` against {}: {other}{}", weighted.name, self.path.display(), listed(&problems));
                return Err(Error::Unmatched { path: self.path.clone(), count: problems.len(), list });
            }
            // Factors of 1×1 convolutions take the axes that the layer has here.
            adapter::fit(&self.path, &mut own, &layers)?;
            for (path, module) in own.modules {
                let strength = weighted.strength.of(&path);
                let variant = variants.get(&module.variant).map_err(|error| refused(&path, &error))?;
                let changes = variant.changes(&module.tensors);
                let Some(weights) = self.components.get_mut(&path.component) else { continue };
                let bias = format!("{}.bias", path.path);
                let has_bias = changes.bias != BiasChange::Never && weights.contains(&bias);
                let fused = weights.fused.get_or_insert_default();
                fused.names.extend(changes.weight.then(|| format!("{}.weight", path.path)));
                fused.names.extend(has_bias.then_some(bias));
                fused.layers.entry(path.path).or_default().push(FusedModule { module, variant, strength });
            }
            notes.extend(other.map(|other| format!("`{}`: {other}; its layers fit all the same", weighted.name)));
        }
        self.fused = Some(FusedRecord { text: merge::record(adapters), notes });
        Ok(())
    }

    /// The layer that a module is for, or why its update is not added to it.
    fn layer(
        &self,
        path: &ModulePath,
        module: &AdapterModule,
        variants: &VariantRegistry<CpuBackend>,
    ) -> std::result::Result<TargetLayer, String> {
        const MERGE: &str = "merge it into a file with `lora merge` and name that as the base";
        let has = |tensor: &str| module.tensors.contains_key(tensor);
        if has(TOKEN_ROWS) || has(EXPERTS_DOWN) {
            return Err(format!("rows of tokens and experts are not added while a base is read: {MERGE}"));
        }
        let weights = self.components.get(&path.component);
        let weights = weights.ok_or_else(|| format!("this base has no {}", path.component))?;
        let tied = path.component == Component::LANGUAGE_MODEL && !weights.contains("lm_head.weight");
        if tied && (path.path == "lm_head" || path.path.ends_with("embed_tokens")) {
            return Err(format!("this base ties its output to its embeddings: {MERGE}"));
        }
        let shape = weights.shape(&format!("{}.weight", path.path)).ok_or("this base has no such layer")?;
        let bias = variants.get(&module.variant).map(|variant| variant.changes(&module.tensors).bias);
        if bias.is_ok_and(|bias| bias == BiasChange::Always) && !weights.contains(&format!("{}.bias", path.path)) {
            return Err("changes a bias, and this layer of the base has none".into());
        }
        merge::fits(module, shape, variants)?;
        let geometry =
            geometry(module, shape).ok_or_else(|| format!("a weight of the shape {shape:?} is not adapted"))?;
        Ok(TargetLayer { path: path.clone(), geometry })
    }

    /// What was added, as files made of this base say it ([`merge::record`]); `None` where nothing was.
    pub fn fused_record(&self) -> Option<&str> {
        self.fused.as_ref().map(|fused| fused.text.as_str())
    }

    /// What to know of what was added.
    pub fn fused_notes(&self) -> &[String] {
        self.fused.as_ref().map_or(&[], |fused| &fused.notes)
    }

    /// A digest of everything that was added ([`Self::fuse`]); `None` where nothing was.
    pub fn fused_digest(&self) -> Option<String> {
        let mut text = String::new();
        for (component, weights) in &self.components {
            if let Some(fused) = &weights.fused {
                text.push_str(&format!("{component} {}\n", fused.digest()));
            }
        }
        (!text.is_empty()).then(|| sha256(text.as_bytes()))
    }
}

impl ComponentWeights {
    /// A weight with what is added to it, in f32; `None` for one that is as it is stored.
    pub(super) fn fused_values(&self, name: &str) -> Result<Option<HostTensor>> {
        let Some(fused) = self.fused.as_ref().filter(|fused| fused.changes(name)) else { return Ok(None) };
        let (path, of_bias) = match name.strip_suffix(".bias") {
            Some(path) => (path, true),
            None => (name.strip_suffix(".weight").unwrap_or(name), false),
        };
        let wrong = |error: lora_core::Error| Error::tensor(&self.path, name, error.to_string());
        let numbers = |name: &str| -> Result<HostTensor> {
            let stored = self.stored_values(name)?;
            HostTensor::from_f32(stored.shape(), stored.to_f32().into_owned()).map_err(wrong)
        };
        let bias = format!("{path}.bias");
        let bias = self.contains(&bias).then(|| numbers(&bias)).transpose()?;
        fused.merged(path, numbers(&format!("{path}.weight"))?, bias, of_bias).map(Some).map_err(wrong)
    }
}

fn refused(path: &ModulePath, error: &lora_core::Error) -> Error {
    Error::Module { module: path.to_string(), reason: error.to_string() }
}
