//! Adapter files: each format a reader into and a writer from the canonical [`lora_core::Adapter`], so that a conversion is
//! a read and a write. No base model is needed; [`fit`] holds an adapter against one.
//!
//! Reading is strict: a tensor that nothing takes, half a pair, two spellings of one module, a configuration field that
//! changes the mathematics and is not supported are errors that list what is wrong.

pub mod diffusers;
pub mod gguf;
pub mod kohya;
pub mod names;
pub(crate) mod parts;
pub mod peft;
pub mod portable;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use lora_core::target::TargetLayer;
use lora_core::variant::LoraFactors;
use lora_core::{Adapter, AdapterModule, DType, HostTensor, ModulePath};

use crate::error::listed;
use crate::family::adapter::Module;
use crate::family::{self, FAMILIES, Family};
use crate::safetensors::{SafetensorsFile, StoredDType};
use crate::{Error, Result};
use parts::{Parts, PeftContext, Tool};

/// Layout of an adapter file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Format {
    /// kohya's and the WebUI's, with LyCORIS' suffixes for other variants: read by nearly everything for images.
    Kohya,
    /// diffusers' dotted names.
    Diffusers,
    /// diffusers' names before its release 0.22.
    DiffusersOld,
    /// PEFT's folder of `adapter_config.json` and `adapter_model.safetensors`.
    Peft,
    /// llama.cpp's, of language models.
    Gguf,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 5] = [Format::Kohya, Format::Diffusers, Format::DiffusersOld, Format::Peft, Format::Gguf];

    /// Its name on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Format::Kohya => "kohya",
            Format::Diffusers => "diffusers",
            Format::DiffusersOld => "diffusers-old",
            Format::Peft => "peft",
            Format::Gguf => "gguf",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An adapter as it was read.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its content.
    pub adapter: Adapter,
    /// The layout.
    pub format: Format,
    /// The kind of base it was made for, as far as it shows.
    pub family: Option<&'static Family>,
    /// Element types of its factors.
    pub dtypes: BTreeSet<StoredDType>,
}

impl AdapterFile {
    /// The narrowest type that holds what the file holds.
    pub fn dtype(&self) -> DType {
        match (self.dtypes.contains(&StoredDType::F16), self.dtypes.contains(&StoredDType::BF16), self.dtypes.len()) {
            (true, false, 1) => DType::F16,
            (false, true, 1) => DType::BF16,
            _ => DType::F32,
        }
    }
}

/// Reads an adapter of any format: a `.safetensors` or `.gguf` file, or a PEFT folder.
pub fn read(path: impl AsRef<Path>) -> Result<AdapterFile> {
    read_among(path, &FAMILIES)
}

/// The same, where kohya's names may be of any of these families: a program's own beside [`FAMILIES`].
pub fn read_among(path: impl AsRef<Path>, families: &[&'static Family]) -> Result<AdapterFile> {
    let path = path.as_ref();
    if path.is_dir() {
        return peft::read(path);
    }
    let beside = path.parent().map(|folder| folder.join("adapter_config.json"));
    let is_peft = path.file_name().is_some_and(|name| name == "adapter_model.safetensors");
    if let Some(config) = beside.filter(|config| is_peft && config.exists()) {
        return peft::read(config.parent().unwrap_or(path));
    }
    if is_gguf(path)? {
        return gguf::read(path);
    }
    let file = SafetensorsFile::open(path)?;
    let names: Vec<_> = file.names().collect();
    if names.iter().any(|name| name.starts_with("base_model.model.")) {
        let reason = "these are PEFT names, whose scale stands in `adapter_config.json`; it is not beside the file";
        return Err(Error::format(path, reason));
    }
    let kohya = |name: &str| {
        name.split_once('.')
            .is_some_and(|(module, _)| ["lora_", "lycoris_"].iter().any(|prefix| module.starts_with(prefix)))
    };
    if names.iter().any(|name| kohya(name)) { kohya::from_file(&file, families) } else { diffusers::from_file(&file) }
}

/// Whether a file begins as GGUF does.
pub(crate) fn is_gguf(path: &Path) -> Result<bool> {
    let mut start = Vec::new();
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    file.take(4).read_to_end(&mut start).map_err(Error::io(path, "read"))?;
    Ok(start == crate::gguf::MAGIC)
}

/// Writes an adapter; returns what the format could not keep as it was, in words.
pub fn write(path: impl AsRef<Path>, adapter: &Adapter, format: Format, dtype: DType) -> Result<Vec<String>> {
    let path = path.as_ref();
    match format {
        Format::Kohya => kohya::write(path, adapter, family(adapter), dtype),
        Format::Diffusers => diffusers::write(path, adapter, dtype),
        Format::DiffusersOld => diffusers::write_old(path, adapter, dtype),
        Format::Peft => peft::write(path, adapter, dtype, &peft::Extra::default()),
        Format::Gguf => gguf::write(path, adapter, dtype),
    }
}

/// The family of the base that an adapter was made for, as far as it shows.
pub fn family(adapter: &Adapter) -> Option<&'static Family> {
    let modules = adapter.modules.iter();
    let modules: Vec<_> = modules
        .map(|(path, module)| Module { name: &path.path, path: path.clone(), inputs: input_width(module) })
        .collect();
    family::adapter::told(&modules, &adapter.metadata)
}

/// Inputs of the layer that a module adapts, where its tensors show them.
fn input_width(module: &AdapterModule) -> Option<usize> {
    // The factor next to the input, of LoRA and of LoHa.
    ["down", "w1_b"].iter().find_map(|name| module.tensors.get(*name)?.shape().get(1).copied())
}

/// Holds an adapter against the layers of a base: every module must name one of them, and its tensors must fit. The
/// factors of a plain LoRA get the layer's own number of axes.
pub fn fit(path: &Path, adapter: &mut Adapter, layers: &[TargetLayer]) -> Result<()> {
    let by_path: BTreeMap<&ModulePath, &TargetLayer> = layers.iter().map(|layer| (&layer.path, layer)).collect();
    let mut problems = Vec::new();
    for (module_path, module) in &mut adapter.modules {
        let Some(layer) = by_path.get(module_path) else {
            problems.push(format!("`{module_path}` (this base has no such layer)"));
            continue;
        };
        if module.factors().is_none_or(|factors| factors.embedding) {
            continue;
        }
        let rank = module.rank;
        let [down, up] = LoraFactors::names(false);
        let expected = [
            (down, layer.geometry.with_outputs(rank).weight_shape()),
            (up, layer.geometry.pointwise_from(rank).weight_shape()),
        ];
        for (name, shape) in expected {
            let Some(tensor) = module.tensors.get(name) else { continue };
            // The same numbers as 2-D factors of a 1×1 convolution, or the other way round, are the same module.
            match tensor.clone().reshape(shape) {
                Ok(shaped) => drop(module.tensors.insert(name.to_owned(), shaped)),
                Err(_) => {
                    problems.push(format!(
                        "`{module_path}` (its `{name}` {:?} does not fit this base's {:?})",
                        tensor.shape(),
                        layer.geometry
                    ));
                    break;
                }
            }
        }
    }
    unmatched(path, problems)
}

fn unmatched(path: &Path, problems: Vec<String>) -> Result<()> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::Unmatched { path: path.to_owned(), count: problems.len(), list: listed(&problems) })
}

/// Tensors of a file by module and part, and which kinds of numbers they are.
struct Sorted {
    modules: BTreeMap<String, Parts>,
    dtypes: BTreeSet<StoredDType>,
    problems: Vec<String>,
}

/// Sorts a file's tensors; `skip` names those that are dealt with elsewhere.
fn sort(file: &SafetensorsFile, skip: impl Fn(&str) -> bool) -> Result<Sorted> {
    let mut sorted = Sorted { modules: BTreeMap::new(), dtypes: BTreeSet::new(), problems: Vec::new() };
    for name in file.names().filter(|name| !skip(name)) {
        let view = file.get(name)?;
        let known = parts::split(name).or_else(|| {
            // LyCORIS' IA3 calls its vector `weight`, which only a flag beside it tells from anything else.
            let module = name.strip_suffix(".weight")?;
            file.contains(&format!("{module}.on_input")).then_some((module, "weight"))
        });
        let Some((module, part)) = known else {
            sorted.problems.push(format!("`{name}` (no part of an adapter that is known here)"));
            continue;
        };
        let tensor = match part {
            "alpha" | "scalar" | "on_input" => HostTensor::from_f32([], vec![view.scalar()? as f32])
                .map_err(|error| Error::tensor(file.path(), name, error.to_string()))?,
            _ => {
                sorted.dtypes.insert(view.dtype());
                view.to_host()?
            }
        };
        if sorted.modules.entry(module.to_owned()).or_default().insert(part, tensor).is_some() {
            sorted.problems.push(format!("`{name}` (the same tensor is there in another spelling)"));
        }
    }
    Ok(sorted)
}

/// Puts sorted tensors together to an adapter.
fn assemble(
    file: &SafetensorsFile,
    format: Format,
    sorted: Sorted,
    path_of: impl Fn(&str) -> ModulePath,
    context: impl Fn(&ModulePath, &Parts) -> Option<PeftContext>,
) -> Result<AdapterFile> {
    let Sorted { modules, dtypes, mut problems } = sorted;
    let mut adapter = Adapter { metadata: file.metadata().clone(), ..Adapter::default() };
    for (name, parts) in modules {
        let path = path_of(&name);
        let tool = context(&path, &parts).map_or(Tool::Lycoris, Tool::Peft);
        match parts::assemble(parts, &tool) {
            Ok(_) if adapter.modules.contains_key(&path) => {
                problems.push(format!("`{name}` (`{path}` is there under another name already)"));
            }
            Ok(module) => drop(adapter.modules.insert(path, module)),
            Err(reason) => problems.push(format!("`{name}` ({reason})")),
        }
    }
    unmatched(file.path(), problems)?;
    if adapter.modules.is_empty() {
        return Err(Error::format(file.path(), "holds no adapter modules"));
    }
    let family = family(&adapter);
    Ok(AdapterFile { path: file.path().to_owned(), adapter, format, family, dtypes })
}

/// A plain LoRA's factors with its scale folded into `up`, so that alpha equals the rank.
fn folded(path: &ModulePath, module: &AdapterModule) -> Result<(HostTensor, HostTensor, usize)> {
    let refused = |reason: String| Error::Module { module: path.to_string(), reason };
    match module.factors() {
        Some(LoraFactors { down, up, embedding: false }) => Ok((down.clone(), scaled(up, module.scale()), module.rank)),
        _ => Err(refused(format!(
            "only plain LoRA is written here, this is {} with {:?}; flatten it to a plain LoRA first",
            module.variant,
            module.tensors.keys().collect::<Vec<_>>()
        ))),
    }
}

/// The tensor times a factor, in f32; as it is if the factor is 1.
fn scaled(tensor: &HostTensor, factor: f64) -> HostTensor {
    if factor == 1.0 {
        return tensor.clone();
    }
    let values = tensor.to_f32().iter().map(|value| (f64::from(*value) * factor) as f32).collect();
    HostTensor::from_f32(tensor.shape(), values).expect("the shape is unchanged")
}

/// The error of a tensor that would not survive its dtype.
fn finite(module: &str, suffix: &str, tensor: &HostTensor) -> Result<()> {
    if tensor.is_finite() {
        return Ok(());
    }
    let reason = format!(
        "`{suffix}` holds NaN or infinity in {}; save as bf16 or fp32, or train with a lower learning rate",
        tensor.dtype()
    );
    Err(Error::Module { module: module.to_owned(), reason })
}
