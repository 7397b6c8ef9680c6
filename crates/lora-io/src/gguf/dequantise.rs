//! A language model in GGUF under Hugging Face's names, and its weights as a safetensors file that adapters can be merged
//! into.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{DType, HostTensor};

use super::names::{Architecture, Order, reorder};
use super::{GgufFile, TensorType, config};
use crate::safetensors::{self, Entry, TensorSource};
use crate::{Error, Result, atomic};

/// The divisors of the rotary frequencies: no weights, but a part of the configuration. For all texts, or for short and
/// for long ones.
const DIVISORS: [&str; 3] = ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];

/// A quantised weight as it is stored.
#[derive(Debug, Clone)]
pub struct Packed<'f> {
    /// Whole blocks, row-major, borrowed from the map where rows are in the file's order.
    pub bytes: Cow<'f, [u8]>,
    /// What the blocks mean.
    pub kind: TensorType,
    /// The shape, the slowest axis first.
    pub shape: &'f [usize],
}

/// Architectures whose tensors are Hugging Face's but for names, the order of rows and what norms are stored with.
const READ: [&str; 7] = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"];

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
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] where the file cannot be read or is no model of a known architecture;
    /// [`Error::Tensor`] for a tensor that is no part of such a model.
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
            if DIVISORS.contains(&name) {
                continue;
            }
            let module =
                name.rsplit_once('.').and_then(|(own, kind)| Some(format!("{}.{kind}", architecture.module(own)?)));
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
        let [of_all, short, _] = DIVISORS;
        if self.file.shape(of_all).is_none() {
            if self.file.shape(short).is_none() {
                return Ok(None);
            }
            // Those for short and for long texts are said as they are.
            let scaling = self.config()?.get("rope_scaling").cloned();
            return Ok(scaling.filter(|scaling| !scaling.is_null()));
        }
        let factors = self.file.tensor(of_all)?;
        let theta = self.file.float(&format!("{}.rope.freq_base", self.architecture.name)).unwrap_or(10_000.0);
        let scaling = super::rope::llama3_scaling(&factors.to_f32(), theta);
        let reason = "are factors on the rotary frequencies that no `rope_scaling` known here gives; a model in safetensors \
                      made of this file lacks them";
        scaling.map(Some).ok_or_else(|| Error::tensor(self.file.path(), of_all, reason))
    }

    /// Its architecture.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The file.
    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    /// The `config.json` that Hugging Face's folder of this model would have.
    ///
    /// # Errors
    /// If the header lacks a size, or scales rotary positions in a way that is not known here.
    pub fn config(&self) -> Result<serde_json::Value> {
        let vocabulary = self.shape("model.embed_tokens.weight").and_then(|shape| shape.first().copied());
        let divisors = |name: &str| match self.file.shape(name) {
            Some(_) => Ok(Some(self.file.tensor(name)?.to_f32().into_owned())),
            None => Ok(None),
        };
        let [all, short, long] = DIVISORS.map(divisors);
        let divisors = match (all?, short?, long?) {
            (Some(all), ..) => Some([all.clone(), all]),
            (None, Some(short), Some(long)) => Some([short, long]),
            _ => None,
        };
        let tied = !self.entries.contains_key("lm_head.weight");
        config::of(&self.file, &self.architecture, vocabulary, tied, divisors)
    }

    /// The configuration of a folder with the weights in this type: as [`Self::config`], with the model's class, and with
    /// factors on rotary frequencies in the words that the model was published with, where these are known.
    ///
    /// # Errors
    /// As [`Self::config`].
    pub fn folder_config(&self, dtype: DType) -> Result<serde_json::Value> {
        let mut config = self.config()?;
        config["architectures"] = serde_json::json!([self.architecture.class()]);
        config["torch_dtype"] = torch_name(dtype).into();
        if let Ok(Some(scaling)) = self.rope_scaling() {
            config["rope_scaling"] = scaling;
        }
        Ok(config)
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
    ///
    /// # Errors
    /// If there is no such tensor, or its type is not read here.
    pub fn tensor(&self, name: &str) -> Result<HostTensor> {
        let stored = self.stored(name)?;
        let tensor = self.file.tensor(stored)?;
        let shift = self.architecture.shift(name);
        if shift != 0.0 {
            let values = tensor.to_f32().iter().map(|value| value - shift).collect();
            let values = HostTensor::from_f32(tensor.shape(), values);
            return values.map_err(|error| Error::tensor(self.file.path(), stored, error.to_string()));
        }
        let Some(heads) = self.reordered(name) else { return Ok(tensor) };
        let rows = tensor.shape().first().copied().unwrap_or(0);
        let ordered = reorder(&tensor.to_f32(), rows, heads, Order::FromGguf);
        let ordered = ordered.ok_or_else(|| self.no_pairs(stored, rows, heads))?;
        let ordered = HostTensor::from_f32(tensor.shape(), ordered);
        let ordered = ordered.map_err(|error| Error::tensor(self.file.path(), stored, error.to_string()))?;
        Ok(ordered.to_dtype(tensor.dtype()))
    }

    /// A quantised matrix as it is stored; `None` for one of plain numbers (F32, F16, BF16), and for what is no matrix.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn packed(&self, name: &str) -> Result<Option<Packed<'_>>> {
        let Some(mut own) = self.packed_as_stored(name)? else { return Ok(None) };
        if let Some(heads) = self.reordered(name) {
            // A row is whole blocks, so that rows can change places as they are.
            let rows = own.shape[0];
            let ordered = reorder(&own.bytes, rows, heads, Order::FromGguf);
            own.bytes =
                Cow::Owned(ordered.ok_or_else(|| self.no_pairs(self.stored(name).unwrap_or(name), rows, heads))?);
        }
        Ok(Some(own))
    }

    /// The same with its rows in the file's order: for whom sizes are enough, as nothing is read.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn packed_as_stored(&self, name: &str) -> Result<Option<Packed<'_>>> {
        let stored = self.stored(name)?;
        let (kind, bytes) = self.file.blocks(stored)?;
        let Some(shape @ &[_, _]) = self.file.shape(stored) else { return Ok(None) };
        Ok((kind.block().0 > 1).then_some(Packed { bytes: Cow::Borrowed(bytes), kind, shape }))
    }

    /// Numbers of a tensor of Hugging Face's model as the file has them: the other way round from [`Self::tensor`].
    ///
    /// # Errors
    /// If its rows are no pairs of the heads.
    pub(crate) fn to_stored(&self, name: &str, tensor: &HostTensor) -> Result<Vec<f32>> {
        let shift = self.architecture.shift(name);
        let values = tensor.to_f32();
        let Some(heads) = self.reordered(name) else {
            return Ok(values.iter().map(|value| value + shift).collect());
        };
        let rows = tensor.shape().first().copied().unwrap_or(0);
        reorder(&values, rows, heads, Order::ToGguf).ok_or_else(|| self.no_pairs(name, rows, heads))
    }

    /// The name of a tensor in the file.
    pub fn stored_name(&self, name: &str) -> Option<&str> {
        self.entries.get(name).map(String::as_str)
    }

    /// Tells the kernel that a tensor's pages are not needed any more.
    pub fn release(&self, name: &str) {
        if let Some(stored) = self.entries.get(name) {
            self.file.release(stored);
        }
    }

    /// The file's name of a tensor.
    fn stored(&self, name: &str) -> Result<&str> {
        let missing = || Error::tensor(self.file.path(), name, "is missing");
        Ok(self.entries.get(name).ok_or_else(missing)?)
    }

    /// The heads of a tensor whose rows the file has in another order.
    fn reordered(&self, name: &str) -> Option<usize> {
        self.architecture.reordered(name.rsplit_once('.').map_or(name, |(module, _)| module))
    }

    fn no_pairs(&self, stored: &str, rows: usize, heads: usize) -> Error {
        Error::tensor(self.file.path(), stored, format!("{rows} rows are no pairs in {heads} heads"))
    }
}

/// PyTorch's name of a type.
pub(crate) fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// Writes a GGUF model as a new folder in Hugging Face's layout: `model.safetensors`, as [`dequantise`] writes it, and
/// `config.json`. Returns the size of the weights. Tokenizers are `lora-data`'s.
///
/// # Errors
/// If the folder exists, or as [`dequantise`] and [`LanguageModel::folder_config`].
pub fn dequantise_to_folder(
    base: impl AsRef<Path>,
    folder: impl AsRef<Path>,
    dtype: DType,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<u64> {
    let (base, folder) = (base.as_ref(), folder.as_ref());
    if folder.exists() {
        return Err(Error::format(folder, "exists already; name a new folder"));
    }
    let config = LanguageModel::open(base)?.folder_config(dtype)?;
    let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let partial = tempfile::Builder::new()
        .prefix(".lora-partial-")
        .tempdir_in(parent)
        .map_err(Error::io(parent, "create a folder in it"))?;
    let written = dequantise(base, partial.path().join("model.safetensors"), dtype, progress)?;
    let text = format!("{config:#}\n");
    atomic::write(partial.path().join("config.json"), |file| std::io::Write::write_all(file, text.as_bytes()))?;
    std::fs::rename(partial.keep(), folder).map_err(Error::io(folder, "put into place"))?;
    Ok(written)
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
///
/// # Errors
/// As of [`LanguageModel::open`]; [`Error::Tensor`] for a type of block that is not read here; [`Error::Io`] where the
/// file cannot be written.
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
