//! What an adapter file is, without a base model at hand.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::checkpoint::Family;
use crate::safetensors::SafetensorsFile;
use crate::{Error, Result, hash};

/// A summary of an adapter file.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterInfo {
    /// Modules by prefix (`lora_unet`, `lora_te` …).
    pub modules: BTreeMap<String, usize>,
    /// Ranks that occur.
    pub ranks: BTreeSet<usize>,
    /// Alphas that occur; a module without one counts as its rank.
    pub alphas: Vec<f64>,
    /// Element types that occur.
    pub dtypes: BTreeSet<&'static str>,
    /// Numbers in all factors.
    pub parameters: usize,
    /// Names of modules with NaN or infinity.
    pub not_finite: Vec<String>,
    /// The header's free text.
    pub metadata: BTreeMap<String, String>,
    /// SHA-256 of the tensor bytes (AutoV3; the WebUI and Civitai show its first 12 digits).
    pub model_hash: String,
}

impl AdapterInfo {
    /// Reads a file of LoRA pairs, in kohya's (`lora_down`) or PEFT's (`lora_A`) spelling.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = SafetensorsFile::open(path)?;
        let names: Vec<_> = file.names().collect();
        let family = Family::of_names(&names);
        if family != Family::Adapter {
            return Err(Error::format(path, format!("this is {family}; expected a LoRA")));
        }
        let mut info = Self {
            modules: BTreeMap::new(),
            ranks: BTreeSet::new(),
            alphas: Vec::new(),
            dtypes: BTreeSet::new(),
            parameters: 0,
            not_finite: Vec::new(),
            metadata: file.metadata().clone(),
            model_hash: hash::sha256(file.data()),
        };
        for &name in &names {
            let view = file.get(name)?;
            if !view.is_finite() {
                info.not_finite.push(name.to_owned());
            }
            if name.ends_with(".alpha") {
                info.alphas.push(view.scalar()?);
                continue;
            }
            info.parameters += view.shape().iter().product::<usize>();
            info.dtypes.insert(view.dtype().name());
            if let Some(module) = name.strip_suffix(".lora_down.weight").or_else(|| name.strip_suffix(".lora_A.weight"))
            {
                let prefix = match module.strip_prefix("lora_") {
                    Some(rest) => format!("lora_{}", rest.split('_').next().unwrap_or_default()),
                    None => module.split('.').next().unwrap_or_default().to_owned(),
                };
                *info.modules.entry(prefix).or_default() += 1;
                info.ranks.extend(view.shape().first());
            }
        }
        info.alphas.sort_by(f64::total_cmp);
        info.alphas.dedup();
        Ok(info)
    }
}
