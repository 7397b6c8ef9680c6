//! diffusers' own layout: dotted module paths behind the name of the component (`unet.`, `text_encoder.`,
//! `text_encoder_2.`), `lora_A` and `lora_B` for the factors, no alpha. The scale is folded into `lora_B`, so that
//! releases that read the metadata `lora_adapter_metadata` (0.34 and later) and those that do not apply the same. On
//! reading, that metadata is followed.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Adapter, Component, DType, ModulePath};
use serde_json::{Value, json};

use super::parts::{Parts, PeftContext};
use super::patterns::{self, Patterns};
use super::{AdapterFile, Format, folded, names};
use crate::metadata::{HASH, refresh_with};
use crate::safetensors::{SafetensorsFile, TensorSource, verify, write as write_file};
use crate::{Error, Result};

/// Metadata key of diffusers' own record of alphas and ranks.
pub(super) const METADATA: &str = "lora_adapter_metadata";

/// What the header's record says of the modules' scales, by component.
pub(super) struct Scales(BTreeMap<String, Scale>);

#[derive(Default)]
struct Scale {
    alpha: Option<f64>,
    own: Patterns,
    rank_stabilised: bool,
}

impl Scales {
    pub(super) fn of(file: &SafetensorsFile) -> Result<Self> {
        let Some(text) = file.metadata().get(METADATA) else { return Ok(Self(BTreeMap::new())) };
        let wrong = |reason: String| Error::format(file.path(), format!("metadata `{METADATA}`: {reason}"));
        let config: Value = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        let mut scales = BTreeMap::<String, Scale>::new();
        for (key, value) in config.as_object().into_iter().flatten() {
            let Some((component, field)) = key.split_once('.') else { continue };
            let scale = scales.entry(component.to_owned()).or_default();
            match field {
                "lora_alpha" => scale.alpha = value.as_f64(),
                "use_rslora" => scale.rank_stabilised = value.as_bool().unwrap_or(false),
                "alpha_pattern" => {
                    scale.own = Patterns::parse(Some(value)).map_err(|reason| wrong(format!("`{key}`: {reason}")))?;
                }
                _ => {}
            }
        }
        Ok(Self(scales))
    }

    /// The alpha of a module that has no tensor of its own for it.
    pub(super) fn context(&self, path: &ModulePath, parts: &Parts) -> Option<PeftContext> {
        let scale = self.0.get(path.component.name())?;
        let rank = parts.get("lora_down").and_then(|down| down.shape().first().copied()).unwrap_or(1);
        let factor = if scale.rank_stabilised { (rank as f64).sqrt() } else { 1.0 };
        let alpha = scale.own.number(path).or(scale.alpha)? * factor;
        Some(PeftContext { alpha: Some(alpha), ..PeftContext::default() })
    }
}

pub(super) fn from_file(file: &SafetensorsFile) -> Result<AdapterFile> {
    let scales = Scales::of(file)?;
    let old = file.names().any(|name| name.contains(".processor.") || name.contains("_lora."));
    let sorted = super::sort(file, super::Whole::default(), |_| false)?;
    let format = if old { Format::DiffusersOld } else { Format::Diffusers };
    // Old names end in `to_q_lora.down.weight`: the module is what stands before `_lora`.
    super::assemble(file, format, sorted, names::from_dotted, |_, path, parts| scales.context(path, parts))
}

/// Writes the layout of today.
///
/// # Errors
/// [`Error::Module`] for a module that is no plain LoRA or has no name in this layout, [`Error::Io`] where the file
/// cannot be written.
pub fn write(path: impl AsRef<Path>, adapter: &Adapter, dtype: DType) -> Result<Vec<String>> {
    write_with(path.as_ref(), adapter, dtype, |module| {
        let name = names::diffusers(module)?;
        Some((format!("{name}.lora_A.weight"), format!("{name}.lora_B.weight")))
    })
}

/// Writes the layout of releases before 0.22, which knows the attention layers of U-Nets and CLIP encoders.
pub(crate) fn write_old(path: impl AsRef<Path>, adapter: &Adapter, dtype: DType) -> Result<Vec<String>> {
    write_with(path.as_ref(), adapter, dtype, |module| {
        let (block, layer) = module.path.rsplit_once(".to_")?;
        let layer = layer.strip_suffix(".0").unwrap_or(layer);
        let unet = module.component == Component::UNET && ["q", "k", "v", "out"].contains(&layer);
        unet.then(|| {
            let name = format!("unet.{block}.processor.to_{layer}_lora");
            (format!("{name}.down.weight"), format!("{name}.up.weight"))
        })
    })
}

fn write_with(
    path: &Path,
    adapter: &Adapter,
    dtype: DType,
    name_of: impl Fn(&ModulePath) -> Option<(String, String)>,
) -> Result<Vec<String>> {
    let mut tensors = BTreeMap::new();
    let (mut folded_scales, mut configs) = (0, BTreeMap::<String, Vec<(&ModulePath, usize)>>::new());
    for (module_path, module) in &adapter.modules {
        super::whole(&module_path.to_string(), module)?;
        let (down, up, rank) = folded(module_path, module)?;
        let (down_name, up_name) = name_of(module_path).ok_or_else(|| Error::Module {
            module: module_path.to_string(),
            reason: "this layout has no name for it".into(),
        })?;
        folded_scales += usize::from(module.scale() != 1.0);
        configs.entry(module_path.component.name().to_owned()).or_default().push((module_path, rank));
        for (name, tensor) in [(down_name, down), (up_name, up)] {
            let tensor = tensor.to_dtype(dtype);
            super::finite(&module_path.to_string(), &name, &tensor)?;
            tensors.insert(name, tensor);
        }
    }
    let mut config = serde_json::Map::new();
    for (component, modules) in &configs {
        let rank = most_common(modules.iter().map(|(_, rank)| *rank));
        let paths: Vec<&ModulePath> = modules.iter().map(|(path, _)| *path).collect();
        let other = modules.iter().filter(|(_, own)| *own != rank).map(|(path, own)| (*path, json!(own)));
        let other = patterns::written(other, &paths);
        let targets: Vec<_> = modules.iter().map(|(path, _)| path.path.clone()).collect();
        for (key, value) in [
            ("peft_type", json!("LORA")),
            ("r", json!(rank)),
            ("lora_alpha", json!(rank)),
            ("rank_pattern", Value::Object(other.clone())),
            ("alpha_pattern", Value::Object(other)),
            ("target_modules", json!(targets)),
            ("bias", json!("none")),
            ("use_dora", json!(false)),
            ("use_rslora", json!(false)),
            ("lora_bias", json!(false)),
        ] {
            config.insert(format!("{component}.{key}"), value);
        }
    }
    let mut metadata = adapter.metadata.clone();
    metadata.retain(|key, _| !key.starts_with("sshs_") && key != HASH);
    if folded_scales > 0 {
        let ranks = adapter.modules.values().map(|module| module.rank as f64);
        refresh_with(&mut metadata, &adapter.modules, &ranks.collect::<Vec<_>>());
    }
    metadata.insert("format".into(), "pt".into());
    metadata.insert(METADATA.into(), Value::Object(config).to_string());
    write_file(path, &tensors, &metadata)?;
    verify(path, &tensors.entries())?;
    let mut notes = Vec::new();
    if folded_scales > 0 {
        notes.push(format!("the layout has no alpha: {folded_scales} scales are folded into the factors"));
    }
    Ok(notes)
}

/// The most frequent number, the largest of equally frequent ones.
pub(super) fn most_common(numbers: impl Iterator<Item = usize>) -> usize {
    let mut counts = BTreeMap::new();
    numbers.for_each(|number| *counts.entry(number).or_insert(0usize) += 1);
    counts.into_iter().max_by_key(|&(number, count)| (count, number)).map_or(1, |(number, _)| number)
}
