//! A language model in GGUF under Hugging Face's names, and its weights as a safetensors file that adapters can be merged
//! into.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{DType, HostTensor};

use super::GgufFile;
use super::names::{Architecture, Order, from_gguf, reorder};
use crate::safetensors::{self, Entry, TensorSource};
use crate::{Error, Result};

/// Architectures whose tensors are Hugging Face's but for names and the order of rows.
const READ: [&str; 3] = ["llama", "qwen2", "qwen3"];

/// Factors on the rotary frequencies.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// An open model. Tensors stay in the memory map until they are asked for.
#[derive(Debug)]
pub struct LanguageModel {
    file: GgufFile,
    architecture: Architecture,
    /// By Hugging Face's name, the file's.
    entries: BTreeMap<String, String>,
}

impl LanguageModel {
    /// Opens a model; tensors that are not part of it are refused by name.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = GgufFile::open(path)?;
        let architecture = Architecture::of_gguf(&file)?;
        if file.text("general.type").is_some_and(|kind| kind != "model") || !READ.contains(&architecture.name.as_str())
        {
            let reason = format!(
                "this is {} of architecture {}; expected a model of {}",
                file.text("general.type").unwrap_or("a model"),
                architecture.name,
                READ.join(", ")
            );
            return Err(Error::format(file.path(), reason));
        }
        let mut entries = BTreeMap::new();
        for name in file.names() {
            // No weight of Hugging Face's model: its configuration says it, see `rope_scaling`.
            if name == ROPE_FACTORS {
                continue;
            }
            let module = name.rsplit_once('.').and_then(|(own, kind)| Some(format!("{}.{kind}", from_gguf(own)?)));
            let Some(module) = module else {
                return Err(Error::tensor(file.path(), name, "is no part of this architecture that is known here"));
            };
            entries.insert(module, name.to_owned());
        }
        Ok(Self { file, architecture, entries })
    }

    /// The `rope_scaling` that a Hugging Face configuration of this model needs, where the file has factors on its rotary
    /// frequencies; `None` where it has none.
    ///
    /// # Errors
    /// If no scaling that is known here gives the factors: a folder made of the file's weights would lack them.
    pub fn rope_scaling(&self) -> Result<Option<serde_json::Value>> {
        if self.file.shape(ROPE_FACTORS).is_none() {
            return Ok(None);
        }
        let factors = self.file.tensor(ROPE_FACTORS)?;
        let theta = self.file.float(&format!("{}.rope.freq_base", self.architecture.name)).unwrap_or(10_000.0);
        let scaling = super::rope::llama3_scaling(&factors.to_f32(), theta);
        let reason = "are factors on the rotary frequencies that no `rope_scaling` known here gives; a model in safetensors \
                      made of this file lacks them";
        scaling.map(Some).ok_or_else(|| Error::tensor(self.file.path(), ROPE_FACTORS, reason))
    }

    /// Its architecture.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The file.
    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    /// Names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.file.shape(self.entries.get(name)?)
    }

    /// A tensor as Hugging Face's file holds it: F32, F16 and BF16 as they are, quantised ones in f32.
    pub fn tensor(&self, name: &str) -> Result<HostTensor> {
        let missing = || Error::tensor(self.file.path(), name, "is missing");
        let stored = self.entries.get(name).ok_or_else(missing)?;
        let tensor = self.file.tensor(stored)?;
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
        let Some(heads) = self.architecture.reordered(module) else { return Ok(tensor) };
        let rows = tensor.shape().first().copied().unwrap_or(0);
        let wrong = || Error::tensor(self.file.path(), stored, format!("{rows} rows are no pairs in {heads} heads"));
        let ordered = reorder(&tensor.to_f32(), rows, heads, Order::FromGguf).ok_or_else(wrong)?;
        let ordered = HostTensor::from_f32(tensor.shape(), ordered);
        let ordered = ordered.map_err(|error| Error::tensor(self.file.path(), stored, error.to_string()))?;
        Ok(ordered.to_dtype(tensor.dtype()))
    }
}

/// The tensors in one dtype.
struct Source<'m> {
    model: &'m LanguageModel,
    dtype: DType,
    progress: &'m (dyn Fn(u64) + Sync),
}

impl TensorSource for Source<'_> {
    fn entries(&self) -> Vec<Entry> {
        let entry = |name: &str| {
            let shape = self.model.shape(name).unwrap_or_default().to_vec();
            Entry { name: name.to_owned(), dtype: self.dtype.into(), shape }
        };
        self.model.names().map(entry).collect()
    }

    fn bytes(&self, entry: &Entry) -> Result<Cow<'_, [u8]>> {
        let bytes = self.model.tensor(&entry.name)?.to_dtype(self.dtype).bytes().to_vec();
        (self.progress)(bytes.len() as u64);
        Ok(Cow::Owned(bytes))
    }
}

/// Writes the weights of a GGUF model as safetensors under Hugging Face's names, one tensor at a time. `progress` is told
/// the bytes of each tensor. Returns the size of the file. The weights have lost what their quantisation lost; the metadata says so.
pub fn dequantise(
    base: impl AsRef<Path>,
    output: impl AsRef<Path>,
    dtype: DType,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<u64> {
    let model = LanguageModel::open(base)?;
    let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let types = model.file.names().filter_map(|name| model.file.tensor_type(name));
    if let Some(lowest) = types.filter(|kind| kind.block().0 > 1).min_by_key(|kind| {
        let (elements, bytes) = kind.block();
        bytes * 1000 / elements
    }) {
        metadata.insert("lora_dequantised_from".into(), lowest.to_string());
    }
    safetensors::write(output, &Source { model: &model, dtype, progress }, &metadata)
}
