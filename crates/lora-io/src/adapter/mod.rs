//! Adapter files: each format a reader into and a writer from the canonical [`lora_core::Adapter`], so that a
//! conversion is a read and a write. No base model is needed; [`fit`] holds an adapter against one.
//!
//! Reading is strict: a tensor that nothing takes, half a pair, two spellings of one module, a configuration field that
//! changes the mathematics and is not supported are errors that list what is wrong.

mod canonical;
pub mod diffusers;
pub mod gguf;
pub mod kohya;
mod named;
pub mod names;
pub(crate) mod parts;
mod patterns;
pub mod peft;
mod peft_experts;
pub mod portable;
mod written;

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
pub use named::find;
use parts::{Parts, PeftContext, Tool};
pub(crate) use written::in_canonical_layers;
pub use written::{in_layers_of, usual_format, write_as};

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
#[non_exhaustive]
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
    /// What a reader should know: parts of the file that are no part of the adapter, statements that contradict each
    /// other.
    pub notes: Vec<String>,
}

impl AdapterFile {
    /// The narrowest type that holds what the file holds. Eight bits fit into either half type.
    pub fn dtype(&self) -> DType {
        let eight = [StoredDType::F8E4M3, StoredDType::F8E5M2];
        let mut others = self.dtypes.iter().filter(|dtype| !eight.contains(dtype));
        match (others.next(), others.next()) {
            (Some(StoredDType::F16), None) => DType::F16,
            (Some(StoredDType::BF16), None) => DType::BF16,
            (None, _) if !self.dtypes.is_empty() => DType::F16,
            _ => DType::F32,
        }
    }

    /// # Errors
    /// If a number is NaN or infinite: names the file, the module and the tensor. Nothing can be made of such an
    /// adapter.
    pub fn undamaged(&self) -> Result<()> {
        match damaged(&self.adapter) {
            Some((module, tensor)) => Err(Error::format(&self.path, format!("`{module}`: {}", damage(tensor)))),
            None => Ok(()),
        }
    }
}

/// The first module, and its tensor, that holds NaN or infinity.
pub fn damaged(adapter: &Adapter) -> Option<(&ModulePath, &str)> {
    let tensors = adapter
        .modules
        .iter()
        .flat_map(|(path, module)| module.tensors.iter().map(move |(name, tensor)| (path, name.as_str(), tensor)));
    let mut damaged = tensors.filter(|(.., tensor)| !tensor.is_finite());
    damaged.next().map(|(path, name, _)| (path, name))
}

/// What is said of a tensor that holds NaN or infinity.
pub(crate) fn damage(tensor: &str) -> String {
    format!(
        "its `{tensor}` holds NaN or infinity, so the adapter is damaged; take an earlier save of the run, or train with \
         a lower learning rate"
    )
}

/// Reads an adapter of any format: a `.safetensors` or `.gguf` file, or a PEFT folder.
///
/// # Errors
/// [`Error::Io`], [`Error::Format`] or [`Error::Tensor`] where it cannot be read or is no adapter; [`Error::Unmatched`]
/// with the keys that are no part of an adapter.
pub fn read(path: impl AsRef<Path>) -> Result<AdapterFile> {
    read_among(path, &FAMILIES)
}

/// The same, where kohya's names may be of any of these families: a program's own beside [`FAMILIES`].
///
/// # Errors
/// As of [`read`].
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
    is_adapter(&file)?;
    if file.names().any(|name| name.starts_with("base_model.model.")) {
        let reason = "these are PEFT names, whose scale stands in `adapter_config.json`; it is not beside the file";
        return Err(Error::format(path, reason));
    }
    if file.names().any(|name| name.ends_with(".norm.query_norm.scale")) {
        // As `_convert_bfl_flux_control_lora_to_diffusers` of diffusers tells them.
        let reason = "a control LoRA for FLUX.1 in Black Forest Labs' form: it holds norms of its own and widens the input by a \
                      picture that guides, so that it goes with diffusers' FluxControlPipeline; it is not read here";
        return Err(Error::format(path, reason));
    }
    // Alphas beside dotted names are its layout too.
    let is_kohya =
        |name: &str| names::is_kohya(name) || name.starts_with("diffusion_model.") && name.ends_with(".alpha");
    let kohya = file.names().any(is_kohya);
    // A file with names of both kinds is read by kohya's reader, which knows either.
    if kohya { kohya::from_file(&file, families) } else { diffusers::from_file(&file) }
}

/// Whether anything in a file is a part of an adapter.
///
/// # Errors
/// If nothing is: says what the file is instead.
pub(crate) fn is_adapter(file: &SafetensorsFile) -> Result<()> {
    // Parts that stand beside others, and that other files have tensors of the same name as.
    const BESIDE: &[&str] = &["alpha", "scalar", "rescale"];
    let is_part = |name: &str| parts::split(name).is_some_and(|(_, part)| !BESIDE.contains(&part));
    let named = |name: &str| is_part(name) || name.contains("lora") || name.starts_with(EMBEDDING);
    if file.is_empty() || file.names().any(named) || file.metadata().contains_key(kohya::CUSTOM_VARIANTS) {
        return Ok(());
    }
    const INVERSION: &[&str] = &["emb_params", "string_to_param", "clip_l", "clip_g", "t5xxl"];
    let inversion = file.names().all(|name| INVERSION.iter().any(|start| name.starts_with(start)));
    let found = if inversion {
        "a textual inversion embedding, not a LoRA".into()
    } else {
        let mut bases = family::BaseNames::default();
        bases.add(None, file.names().map(|name| (name, file.shape(name).unwrap_or_default())));
        match Family::of_base(&bases, &FAMILIES) {
            Some(family) => format!("a whole model ({family}), not a LoRA; are base and LoRA swapped?"),
            None => {
                let views = file.names().filter_map(|name| file.get(name).ok());
                let dtypes = views.map(|view| view.dtype().name()).collect();
                format!("not a LoRA, but {}", family::describe(&bases, &dtypes, &FAMILIES))
            }
        }
    };
    Err(Error::Family { path: file.path().to_owned(), found })
}

/// How tensors of an embedding begin that is packed beside a LoRA (`bundle_emb.NAME.clip_l`).
const EMBEDDING: &str = "bundle_emb.";

/// Whether a file begins as GGUF does.
pub(crate) fn is_gguf(path: &Path) -> Result<bool> {
    let mut start = Vec::new();
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    file.take(4).read_to_end(&mut start).map_err(Error::io(path, "read"))?;
    Ok(start == crate::gguf::MAGIC)
}

/// Writes an adapter; returns what the format could not keep as it was, in words.
///
/// # Errors
/// [`Error::Module`] for a module that the format has no form of, with what helps; [`Error::Io`] where the file cannot
/// be written.
pub fn write(path: impl AsRef<Path>, adapter: &Adapter, format: Format, dtype: DType) -> Result<Vec<String>> {
    write_as(path, adapter, format, family(adapter), dtype)
}

/// Writes an adapter for a base of a family in the layout that most programs load: kohya's, and of plain LoRAs for
/// Stable Diffusion 3 diffusers', since diffusers passes over kohya's there.
///
/// # Errors
/// As of [`write()`].
pub fn write_for(path: impl AsRef<Path>, adapter: &Adapter, family: &Family, dtype: DType) -> Result<Vec<String>> {
    match usual_format(adapter, Some(family)) {
        Format::Diffusers => diffusers::write(path, adapter, dtype),
        _ => kohya::write(path, adapter, Some(family), dtype),
    }
}

/// Takes an adapter whose first values are missing (PEFT's PiSSA and OLoRA as they are saved unconverted) for a plain
/// LoRA, which it is on the changed base that PEFT trained it on.
pub fn on_residual(adapter: &mut Adapter) {
    for module in adapter.modules.values_mut() {
        if lacks_first_values(module) {
            module.variant = "lora".into();
        }
    }
}

/// Whether a module is PEFT's PiSSA or OLoRA as it is saved unconverted.
pub fn lacks_first_values(module: &AdapterModule) -> bool {
    RESIDUAL.contains(&module.variant.as_str()) && !module.tensors.contains_key("initial_up")
}

/// Variants whose first values are taken out of the base.
pub const RESIDUAL: &[&str] = &["pissa", "pissa-fast", "olora"];

/// The family of the base that an adapter was made for, as far as it shows.
pub fn family(adapter: &Adapter) -> Option<&'static Family> {
    let modules = adapter.modules.iter();
    let modules: Vec<_> = modules
        .map(|(path, module)| Module {
            name: &path.path,
            path: path.clone(),
            inputs: input_width(module),
            outputs: output_width(module),
        })
        .collect();
    family::adapter::told(&modules, &adapter.metadata)
}

/// What speaks against an adapter on a base of a family, in words that name both; `None` where nothing does.
pub fn made_for_another(adapter: &Adapter, base: &Family) -> Option<String> {
    family::adapter::foreign(adapter, family, base)
}

/// Inputs of the layer that a module adapts, where its tensors show them.
fn input_width(module: &AdapterModule) -> Option<usize> {
    // The factor next to the input, of LoRA and of LoHa.
    ["down", "w1_b"].iter().find_map(|name| module.tensors.get(*name)?.shape().get(1).copied())
}

/// Holds an adapter against the layers of a base: every module must name one of them, and its tensors must fit. The
/// factors of a plain LoRA get the layer's own number of axes.
///
/// # Errors
/// [`Error::Unmatched`] with all modules that name no layer or do not fit theirs.
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

/// Outputs of that layer, likewise.
fn output_width(module: &AdapterModule) -> Option<usize> {
    ["up", "w1_a"].iter().find_map(|name| module.tensors.get(*name)?.shape().first().copied())
}

fn unmatched(path: &Path, problems: Vec<String>) -> Result<()> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::Unmatched { path: path.to_owned(), count: problems.len(), list: listed(&problems) })
}

/// Tensors of a file by module and part, and which kinds of numbers they are.
#[derive(Default)]
struct Sorted {
    modules: BTreeMap<String, Parts>,
    dtypes: BTreeSet<StoredDType>,
    problems: Vec<String>,
    notes: Vec<String>,
}

/// Which tensors of the base itself are parts of an adapter, trained and saved whole.
#[derive(Debug, Clone, Copy, Default)]
struct Whole {
    biases: bool,
    weights: bool,
}

impl Whole {
    /// The module and the part that such a tensor is.
    fn split(self, name: &str) -> Option<(&str, &'static str)> {
        let ends = [(".bias", parts::BIAS, self.biases || self.weights), (".weight", parts::WEIGHT, self.weights)];
        let (module, part, _) = ends
            .into_iter()
            .find_map(|(end, part, read)| Some((name.strip_suffix(end)?, part, read)).filter(|(.., read)| *read))?;
        match module.strip_suffix(".base_layer") {
            Some(module) if part == parts::BIAS => Some((module, part)),
            Some(_) => None,
            None => Some((module, part)),
        }
    }
}

/// What lies in an adapter's file and is no part of the adapter.
#[derive(Default)]
struct Beside<'n> {
    embeddings: BTreeSet<&'n str>,
    of_base: usize,
}

impl<'n> Beside<'n> {
    /// Whether a tensor is such; it is remembered then.
    fn takes(&mut self, name: &'n str) -> bool {
        if let Some(rest) = name.strip_prefix(EMBEDDING) {
            self.embeddings.insert(rest.split('.').next().unwrap_or_default());
            return true;
        }
        // PEFT writes the base's own embedding beside a LoRA on it.
        let of_base = name.ends_with(".base_layer.weight") || name.ends_with(".base_layer.bias");
        self.of_base += usize::from(of_base);
        of_base
    }

    fn notes(self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.embeddings.is_empty() {
            let names: Vec<_> = self.embeddings.into_iter().map(|name| format!("`{name}`")).collect();
            let list = names.join(", ");
            notes.push(format!(
                "embeddings for prompts are packed in this file ({list}), which are no part of the LoRA"
            ));
        }
        if self.of_base > 0 {
            let count = self.of_base;
            notes.push(format!("{count} weights of the base itself (`base_layer`) are in the file and are not read"));
        }
        notes
    }
}

/// Sorts a file's tensors; `skip` names those that are dealt with elsewhere.
fn sort(file: &SafetensorsFile, whole: Whole, skip: impl Fn(&str) -> bool) -> Result<Sorted> {
    let mut sorted = Sorted::default();
    let mut beside = Beside::default();
    for name in file.names().filter(|name| !skip(name)) {
        let of_whole = if parts::split(name).is_none() { whole.split(name) } else { None };
        if of_whole.is_none() && beside.takes(name) {
            continue;
        }
        let view = file.get(name)?;
        let known = of_whole.or_else(|| parts::split(name)).or_else(|| {
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
    sorted.notes = beside.notes();
    Ok(sorted)
}

/// Puts sorted tensors together to an adapter.
fn assemble(
    file: &SafetensorsFile,
    format: Format,
    sorted: Sorted,
    path_of: impl Fn(&str) -> ModulePath,
    context: impl Fn(&str, &ModulePath, &Parts) -> Option<PeftContext>,
) -> Result<AdapterFile> {
    let Sorted { modules, dtypes, mut problems, mut notes } = sorted;
    let mut adapter = Adapter { metadata: file.metadata().clone(), ..Adapter::default() };
    let mut without_alpha = Vec::new();
    for (name, parts) in modules {
        let path = path_of(&name);
        let context = context(&name, &path, &parts);
        if !parts.contains_key("alpha") && context.as_ref().is_none_or(|context| context.alpha.is_none()) {
            without_alpha.push(path.clone());
        }
        match parts::assemble(parts, &context.map_or(Tool::Lycoris, Tool::Peft)) {
            Ok(_) if adapter.modules.contains_key(&path) => {
                problems.push(format!("`{name}` (`{path}` is there under another name already)"));
            }
            Ok(module) => drop(adapter.modules.insert(path, module)),
            Err(reason) => problems.push(format!("`{name}` ({reason})")),
        }
    }
    problems.extend(canonical::canonical(&mut adapter));
    unmatched(file.path(), problems)?;
    if adapter.modules.is_empty() {
        return Err(Error::format(file.path(), "holds no adapter modules"));
    }
    notes.extend(contradicted_alpha(&adapter, &without_alpha));
    let family = family(&adapter);
    Ok(AdapterFile { path: file.path().to_owned(), adapter, format, family, dtypes, notes })
}

/// What is to be said of modules without an alpha of their own whose file names one in its header. Loaders look at
/// tensors alone, so such modules count with alpha = rank here too.
fn contradicted_alpha(adapter: &Adapter, without_alpha: &[ModulePath]) -> Option<String> {
    const KEYS: &[&str] = &["ss_network_alpha", "network_alpha", "lora_alpha", "alpha"];
    let (key, alpha) = KEYS.iter().find_map(|key| {
        let alpha = adapter.metadata.get(*key)?.trim().parse::<f64>().ok()?;
        (alpha.is_finite() && alpha > 0.0).then_some((key, alpha))
    })?;
    let modules = without_alpha.iter().filter_map(|path| adapter.modules.get(path));
    let ranks: Vec<usize> = modules
        .filter(|module| parts::has_scale(module) && module.rank as f64 != alpha)
        .map(|module| module.rank)
        .collect();
    let rank = *ranks.first()?;
    Some(format!(
        "{} modules have no alpha tensor and count with alpha = rank ({rank}), as all programs take them; the header says \
         otherwise (`{key}` = {alpha}): if the header is right, the adapter was trained with a strength of {}",
        ranks.len(),
        alpha / rank as f64
    ))
}

/// A plain LoRA's factors with its scale folded into `up`, so that alpha equals the rank.
fn folded(path: &ModulePath, module: &AdapterModule) -> Result<(HostTensor, HostTensor, usize)> {
    let refused = |reason: String| Error::Module { module: path.to_string(), reason };
    match module.factors() {
        Some(LoraFactors { embedding: false, .. }) => {
            let same = module.with_alpha(module.rank as f64);
            let factors = same.as_ref().and_then(AdapterModule::factors).map(|own| (own.down.clone(), own.up.clone()));
            let (down, up) = factors.ok_or_else(|| refused("has no factors".into()))?;
            Ok((down, up, module.rank))
        }
        _ if module.is_lora() && module.tensors.keys().any(|name| name.starts_with("bias")) => {
            Err(refused("changes a bias, which this layout has no place for; write peft, or merge it".into()))
        }
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

/// The error of a module that is damaged before it is written.
fn whole(name: &str, module: &AdapterModule) -> Result<()> {
    match module.tensors.iter().find(|(_, tensor)| !tensor.is_finite()) {
        Some((tensor, _)) => Err(Error::Module { module: name.to_owned(), reason: damage(tensor) }),
        None => Ok(()),
    }
}

/// The error of a tensor that would not survive its dtype.
fn finite(module: &str, suffix: &str, tensor: &HostTensor) -> Result<()> {
    if tensor.is_finite() {
        return Ok(());
    }
    let wider = match tensor.dtype() {
        DType::F16 => "; save as bf16 or fp32",
        DType::BF16 => "; save as fp32",
        _ => "",
    };
    let reason = format!("`{suffix}` has numbers too large for {}{wider}", tensor.dtype());
    Err(Error::Module { module: module.to_owned(), reason })
}
