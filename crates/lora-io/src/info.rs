//! What an adapter is, without a base model at hand.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::adapter::{self, Format};
use crate::family::Family;
use crate::safetensors::SafetensorsFile;
use crate::{Result, hash};

/// A summary of an adapter file or folder.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AdapterInfo {
    /// The layout.
    pub format: Format,
    /// The kind of base it was made for, as far as it shows.
    pub family: Option<&'static Family>,
    /// Modules by component.
    pub modules: BTreeMap<String, usize>,
    /// Modules by variant.
    pub variants: BTreeMap<String, usize>,
    /// Layers by the last part of their path that is no number.
    pub targets: BTreeMap<String, usize>,
    /// Ranks that occur.
    pub ranks: BTreeSet<usize>,
    /// Alphas that occur; a module without one counts as its rank.
    pub alphas: Vec<f64>,
    /// Element types that occur.
    pub dtypes: BTreeSet<&'static str>,
    /// Numbers in all tensors.
    pub parameters: usize,
    /// Names of modules with NaN or infinity.
    pub not_finite: Vec<String>,
    /// What a reader should know, see [`adapter::AdapterFile::notes`].
    pub notes: Vec<String>,
    /// The header's free text.
    pub metadata: BTreeMap<String, String>,
    /// SHA-256 of the tensor bytes (AutoV3; the WebUI and Civitai show its first 12 digits); of the whole file in GGUF.
    pub model_hash: String,
}

impl AdapterInfo {
    /// Reads an adapter of any format.
    ///
    /// # Errors
    /// As of [`adapter::read`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let read = adapter::read(path)?;
        let weights = if path.is_dir() { path.join("adapter_model.safetensors") } else { path.to_owned() };
        let mut info = Self {
            format: read.format,
            family: read.family,
            modules: BTreeMap::new(),
            variants: BTreeMap::new(),
            targets: BTreeMap::new(),
            ranks: BTreeSet::new(),
            alphas: Vec::new(),
            dtypes: read.dtypes.iter().map(|dtype| dtype.name()).collect(),
            parameters: 0,
            not_finite: Vec::new(),
            notes: read.notes.clone(),
            metadata: read.adapter.metadata.clone(),
            model_hash: match read.format {
                Format::Gguf => hash::file_sha256(&weights)?,
                _ => hash::sha256(SafetensorsFile::open(weights)?.data()),
            },
        };
        for (path, module) in &read.adapter.modules {
            *info.modules.entry(path.component.name().to_owned()).or_default() += 1;
            *info.variants.entry(module.variant.clone()).or_default() += 1;
            let leaf = path.path.rsplit('.').find(|part| part.parse::<u64>().is_err()).unwrap_or_default();
            *info.targets.entry(leaf.to_owned()).or_default() += 1;
            info.ranks.insert(module.rank);
            info.alphas.push(module.alpha);
            info.parameters += module.tensors.values().map(|tensor| tensor.elements()).sum::<usize>();
            if module.tensors.values().any(|tensor| !tensor.is_finite()) {
                info.not_finite.push(path.to_string());
            }
        }
        info.alphas.sort_by(f64::total_cmp);
        info.alphas.dedup();
        Ok(info)
    }
}
