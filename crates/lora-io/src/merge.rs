//! Merging adapters into a base checkpoint: streamed from the memory map into place, one tile of a tensor at a time, on all
//! cores. The arithmetic is `lora-core`'s; which tensor a module means is `targets`'s business.
//!
//! Tensors that no adapter changes are copied as they are. The others are added up in f32 and rounded once, to nearest
//! even, to the base's type or another. The output appears whole or not at all, and is never one of the inputs.
//!
//! | here | what |
//! |---|---|
//! | `folder` | the files of a base |
//! | `targets` | which tensors a module changes |
//! | `tied` | output layers that are embeddings |
//! | `numbers` | stored numbers as f32 and back |
//! | `reduce` | plain LoRAs from checkpoints |

mod folder;
mod numbers;
mod reduce;
mod targets;
mod tied;

pub use reduce::{extract, flatten};

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use lora_core::backend::CpuBackend;
use lora_core::merge::{Applied, geometry, merged_bias, merged_weight};
use lora_core::variant::{BIAS_VALUE, FrozenLayer, LoraFactors, Parameters, VariantRegistry, WEIGHT_VALUE};
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, Strength};
use rayon::prelude::*;

use crate::adapter::{damage, damaged};
use crate::safetensors::{Entry, SafetensorsFile, StoredDType, header};
use crate::{Error, Result, atomic};
use folder::Base;
pub(crate) use folder::walk;
use numbers::{all_finite, factor_of, from_f32, is_float, is_readable, to_f32};
use targets::{Edit, Edits};

/// An adapter and how strongly it is merged.
#[derive(Debug, Clone)]
pub struct Weighted {
    /// Its name, for messages and the output's metadata.
    pub name: String,
    /// Its content.
    pub adapter: Adapter,
    /// Factors on its updates.
    pub strength: Strength,
}

/// How to merge.
#[derive(Debug, Clone, Default)]
pub struct MergeOptions {
    /// Type of all floating-point tensors of the output; the base's own if none is given.
    pub dtype: Option<DType>,
    /// Take the adapters out again instead: exact up to rounding for additive variants, an error for those that cannot be
    /// taken out.
    pub unmerge: bool,
}

/// What was merged.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct MergeReport {
    /// Files written, in order.
    pub files: Vec<PathBuf>,
    /// Tensors that changed.
    pub changed: usize,
    /// Tensors that were copied.
    pub copied: usize,
    /// Things worth knowing.
    pub notes: Vec<String>,
}

/// Bytes of a tensor that are worked on at once by one thread.
const TILE: usize = 512 << 10;

/// Merges adapters into a base: a safetensors file into a file, or a folder (diffusers, sharded Hugging Face) into a new
/// folder. `progress` is told the bytes that are done and all there are.
///
/// # Errors
/// [`Error::Unmatched`] with the modules that do not fit the base, [`Error::Module`] for one that is damaged or cannot
/// be merged, [`Error::Format`] where the output is the base itself or lies in it, [`Error::Io`] where a file cannot be
/// read or written. No file is left behind then.
pub fn merge(
    base: impl AsRef<Path>,
    adapters: &[Weighted],
    output: impl AsRef<Path>,
    options: &MergeOptions,
    variants: &VariantRegistry<CpuBackend>,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<MergeReport> {
    let (base, output) = (base.as_ref(), output.as_ref());
    let base = Base::open(base)?;
    guard(&base, output)?;
    for adapter in adapters {
        if let Some((module, tensor)) = damaged(&adapter.adapter) {
            let reason = format!("`{}`: {}", adapter.name, damage(tensor));
            return Err(Error::Module { module: module.to_string(), reason });
        }
    }
    let edits = Edits::new(&base, adapters, variants)?;
    let total = base.files.iter().map(|file| file.data().len() as u64).sum();
    let done = std::sync::atomic::AtomicU64::new(0);
    let advance = |bytes: u64| {
        let before = done.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        progress(before + bytes, total);
    };
    let job = Job { base: &base, edits: &edits, adapters, options, variants, advance: &advance };
    let mut report = MergeReport { notes: edits.notes.clone(), ..MergeReport::default() };
    if !base.is_folder() {
        job.merge_file(0, output, &mut report)?;
        return Ok(report);
    }
    // The folder is made beside its place and renamed, as files are.
    let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let partial = tempfile::Builder::new()
        .prefix(".lora-partial-")
        .tempdir_in(parent)
        .map_err(Error::io(parent, "create a folder in it"))?;
    report.notes.extend(base.copy_others(partial.path())?);
    for (index, file) in base.files.iter().enumerate() {
        let target = partial.path().join(base.relative(file.path()));
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder, "create the folder"))?;
        }
        job.merge_file(index, &target, &mut report)?;
    }
    job.untie(partial.path(), &mut report)?;
    let made = partial.keep();
    fs::rename(&made, output).map_err(Error::io(output, "put into place"))?;
    let place = |file: &PathBuf| output.join(file.strip_prefix(&made).unwrap_or(file));
    report.files = report.files.iter().map(place).collect();
    Ok(report)
}

/// Whether every module of an adapter names a layer of this base and fits it; the error lists those that do not. Returns
/// what else speaks against the two together.
///
/// # Errors
/// [`Error::Unmatched`] with the modules that name no layer or do not fit theirs; otherwise what opening the base
/// gives.
pub fn matches(base: impl AsRef<Path>, adapter: Adapter) -> Result<Vec<String>> {
    let base = Base::open(base.as_ref())?;
    let weighted = Weighted { name: "adapter".into(), adapter, strength: Strength::default() };
    Edits::new(&base, &[weighted], &VariantRegistry::default()).map(|edits| edits.notes)
}

/// The output must not be the base, nor lie in it or in the way of anything.
fn guard(base: &Base, output: &Path) -> Result<()> {
    crate::overwrite::refuse([base.path.as_path()], output)?;
    let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let within = match (base.path.canonicalize(), parent.canonicalize()) {
        (Ok(base), Ok(parent)) => parent.starts_with(base),
        _ => false,
    };
    let folder = base.is_folder();
    if folder && within {
        return Err(Error::format(output, "lies in the base's own folder; name another place"));
    }
    if folder && output.exists() {
        return Err(Error::format(output, "exists already; name a new folder"));
    }
    if !folder && output.is_dir() {
        return Err(Error::format(output, "is a folder; name a file"));
    }
    Ok(())
}

/// A piece of work: bytes to copy, or rows of a tensor to compute.
struct Piece<'f> {
    entry: Entry,
    /// The tensor that the numbers come from.
    source: (&'f SafetensorsFile, String),
    /// Where the piece goes in the output.
    offset: u64,
    /// Rows of the tensor's first axis; all bytes for a copy.
    rows: std::ops::Range<usize>,
    edits: &'f [Edit],
}

/// One call of [`merge`].
struct Job<'j> {
    base: &'j Base,
    edits: &'j Edits,
    adapters: &'j [Weighted],
    options: &'j MergeOptions,
    variants: &'j VariantRegistry<CpuBackend>,
    advance: &'j (dyn Fn(u64) + Sync),
}

impl Job<'_> {
    fn module(&self, edit: &Edit) -> &AdapterModule {
        &self.adapters[edit.adapter].adapter.modules[&edit.module]
    }

    /// Whether an edit's rows can be computed alone: other formulas need their whole tensor.
    fn is_tiled(&self, edit: &Edit) -> bool {
        !edit.bias && !edit.transposed && tileable(self.module(edit), self.variants)
    }

    /// Where the numbers of a tensor of the output come from.
    fn source(&self, index: usize, name: &str) -> (&SafetensorsFile, String) {
        match self.edits.files[index].made_of.get(name) {
            Some((file, source)) => (&self.base.files[*file], source.clone()),
            None => (&self.base.files[index], name.to_owned()),
        }
    }

    /// What the output will hold, in the types that it will have.
    fn entries(&self, index: usize) -> Result<Vec<Entry>> {
        let (file, own) = (&self.base.files[index], &self.edits.files[index]);
        let added = own.made_of.keys().map(String::as_str).filter(|name| !file.contains(name));
        let entry = |name: &str| {
            let (file, source) = self.source(index, name);
            let view = file.get(&source)?;
            let factor = factor_of(file, &source).filter(|_| !is_float(view.dtype()));
            let readable = is_readable(view.dtype()) && factor.is_none();
            let dtype = self.options.dtype.filter(|_| readable).map_or(view.dtype(), StoredDType::from);
            if own.edits.contains_key(name) && !is_float(dtype) {
                let stored = view.dtype();
                let reason = match factor {
                    Some(factor) => {
                        format!("is stored as {stored} with factors beside it (`{factor}`), which are not read")
                    }
                    None if readable => {
                        format!("is stored as {stored}; name the type of the output's numbers (--dtype bf16)")
                    }
                    None => format!("is stored as {stored}; an adapter merges into F32, F16 and BF16"),
                };
                return Err(Error::tensor(file.path(), &source, reason));
            }
            Ok(Entry { name: name.to_owned(), dtype, shape: view.shape().to_vec() })
        };
        file.names().chain(added).map(entry).collect()
    }

    /// The header's free text of an output.
    fn metadata(&self, index: usize) -> BTreeMap<String, String> {
        let mut metadata = self.base.files[index].metadata().clone();
        let own = &self.edits.files[index];
        if !own.edits.is_empty() {
            let merged: Vec<_> = self
                .adapters
                .iter()
                .map(|adapter| {
                    let factor = |component| adapter.strength.of_component(component);
                    serde_json::json!({ "name": adapter.name, "unet": factor(Component::UNET),
                        "text_encoder": factor(Component::TEXT_ENCODER),
                        "sshs_model_hash": adapter.adapter.metadata.get("sshs_model_hash") })
                })
                .collect();
            let key = if self.options.unmerge { "lora_unmerged" } else { "lora_merged" };
            metadata.insert(key.into(), serde_json::Value::from(merged).to_string());
        }
        if !own.edits.is_empty() || !own.made_of.is_empty() || self.options.dtype.is_some() {
            // A hash of the tensors before is none of these.
            metadata.remove(crate::metadata::HASH);
        }
        metadata
    }

    /// An output cut into pieces that are computed apart, and its size; `start` is the length of the header.
    fn pieces(&self, index: usize, entries: Vec<Entry>, start: u64) -> (Vec<Piece<'_>>, u64) {
        let mut offset = start;
        let mut pieces = Vec::new();
        for entry in entries {
            let own = self.edits.files[index].edits.get(&entry.name).map_or(&[][..], Vec::as_slice);
            let size = entry.dtype.bytes(entry.shape.iter().product()).unwrap_or(0) as u64;
            let first_axis = entry.shape.first().copied().unwrap_or(1).max(1);
            let row = (size as usize / first_axis).max(1);
            let whole = own.iter().any(|edit| edit.rows.is_some() || !self.is_tiled(edit));
            let step = if whole { first_axis } else { (TILE / row).clamp(1, first_axis) };
            for start in (0..first_axis).step_by(step) {
                let rows = start..(start + step).min(first_axis);
                let at = offset + (start * (size as usize / first_axis)) as u64;
                let source = self.source(index, &entry.name);
                pieces.push(Piece { entry: entry.clone(), source, offset: at, rows, edits: own });
            }
            offset += size;
        }
        (pieces, offset)
    }

    fn merge_file(&self, index: usize, output: &Path, report: &mut MergeReport) -> Result<()> {
        let edits = &self.edits.files[index].edits;
        let (head, entries) = header(output, self.entries(index)?, &self.metadata(index))?;
        let changed = entries.iter().filter(|entry| edits.contains_key(&entry.name)).count();
        report.changed += changed;
        report.copied += entries.len() - changed;
        let (pieces, size) = self.pieces(index, entries, head.len() as u64);
        let mut failed = None;
        let result = atomic::write(output, |writer| {
            writer.write_all(&head)?;
            writer.flush()?;
            let target = writer.get_ref();
            target.set_len(size)?;
            let outcome = pieces.par_iter().try_for_each(|piece| -> Result<()> {
                let bytes = self.compute(piece)?;
                write_at(target, &bytes, piece.offset).map_err(Error::io(output, "write"))?;
                (self.advance)(bytes.len() as u64);
                Ok(())
            });
            outcome.map_err(|error| {
                failed = Some(error);
                std::io::Error::other("a tensor could not be merged")
            })
        });
        match failed {
            Some(error) => return Err(error),
            None => result?,
        }
        report.files.push(output.to_owned());
        Ok(())
    }

    /// Says in the configuration of a merged folder that an output layer of its own is there, where one is.
    fn untie(&self, folder: &Path, report: &mut MergeReport) -> Result<()> {
        let Some(tied) = &self.edits.untied else { return Ok(()) };
        let files = self.edits.files.iter().enumerate();
        for (index, _) in files.filter(|(_, own)| own.made_of.contains_key(tied.head)) {
            let file = &self.base.files[index];
            let (source, name) = self.source(index, tied.head);
            let dtype = self.options.dtype.map_or(source.get(&name)?.dtype(), StoredDType::from);
            let bytes = dtype.bytes(source.shape(&name).unwrap_or_default().iter().product()).unwrap_or(0);
            let name = file.path().file_name().unwrap_or_default().to_string_lossy();
            tied::untie(folder, tied, &name, bytes as u64)?;
        }
        report.notes.push(format!(
            "the base ties its output layer to its embedding, and the adapter changes one of them: `{}` is written of its own, \
             and config.json says `tie_word_embeddings` = false",
            tied.head
        ));
        Ok(())
    }
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_at(file: &File, mut bytes: &[u8], mut offset: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let written = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}

/// Whether rows of a module's update can be computed alone.
fn tileable(module: &AdapterModule, variants: &VariantRegistry<CpuBackend>) -> bool {
    let factors = LoraFactors::names(false);
    module.tensors.len() == factors.len()
        && factors.iter().all(|name| module.tensors.contains_key(*name))
        && variants.get(&module.variant).is_ok_and(|variant| variant.merges_by_factors())
}

impl Job<'_> {
    /// The bytes of a piece.
    fn compute<'p>(&self, piece: &'p Piece<'p>) -> Result<std::borrow::Cow<'p, [u8]>> {
        let (file, name) = &piece.source;
        let view = file.get(name)?;
        let first_axis = view.shape().first().copied().unwrap_or(1).max(1);
        let row = view.bytes().len() / first_axis;
        let stored = &view.bytes()[piece.rows.start * row..piece.rows.end * row];
        if piece.edits.is_empty() && piece.entry.dtype == view.dtype() {
            return Ok(std::borrow::Cow::Borrowed(stored));
        }
        let mut values = to_f32(view.dtype(), stored);
        let finite_before = values.iter().all(|value| value.is_finite());
        let wrong = |error: lora_core::Error| Error::tensor(file.path(), name, error.to_string());
        if piece.edits.iter().all(|edit| edit.rows.is_none() && self.is_tiled(edit)) {
            for edit in piece.edits {
                let module = self.module(edit);
                let sign = if self.options.unmerge { -1.0 } else { 1.0 };
                let factor = sign * self.adapters[edit.adapter].strength.of(&edit.module) * module.scale();
                add_rows(&mut values, view.shape(), &piece.rows, module, factor).map_err(wrong)?;
            }
        } else {
            values = self.whole_tensor(values, view.shape(), piece)?;
        }
        let rounded = from_f32(piece.entry.dtype, values);
        if finite_before && !all_finite(piece.entry.dtype, &rounded) {
            return Err(Error::tensor(file.path(), name, self.overflow(piece)));
        }
        Ok(std::borrow::Cow::Owned(rounded))
    }

    /// What is said of a sum that its type cannot hold.
    fn overflow(&self, piece: &Piece<'_>) -> String {
        let dtype = piece.entry.dtype;
        if dtype == StoredDType::F16 {
            return format!("would hold infinity in {dtype} after the merge; write bf16 or fp32 (--dtype)");
        }
        let names: Vec<_> = piece.edits.iter().map(|edit| self.adapters[edit.adapter].name.as_str()).collect();
        format!(
            "would hold infinity in {dtype} after the merge: the numbers of {names:?} or the strength are too large"
        )
    }

    /// The general way: whole tensors through the variants' own formulas.
    fn whole_tensor(&self, values: Vec<f32>, shape: &[usize], piece: &Piece<'_>) -> Result<Vec<f32>> {
        let mut result = values;
        let mut groups: BTreeMap<(usize, usize), Vec<&Edit>> = BTreeMap::new();
        for edit in piece.edits {
            let rows = edit.rows.clone().unwrap_or(0..shape.first().copied().unwrap_or(1));
            groups.entry((rows.start, rows.end)).or_default().push(edit);
        }
        let row = result.len() / shape.first().copied().unwrap_or(1).max(1);
        for ((start, end), edits) in groups {
            let mut shape = shape.to_vec();
            if let Some(first) = shape.first_mut() {
                *first = end - start;
            }
            let part = result[start * row..end * row].to_vec();
            let merged = self.layer(part, &shape, piece, &edits)?;
            result[start * row..end * row].copy_from_slice(&merged.to_f32());
        }
        Ok(result)
    }

    /// One layer with what is done to it.
    fn layer(&self, values: Vec<f32>, shape: &[usize], piece: &Piece<'_>, edits: &[&Edit]) -> Result<HostTensor> {
        let (file, name) = &piece.source;
        let wrong = |error: lora_core::Error| Error::tensor(file.path(), name, error.to_string());
        let turned = edits[0].transposed && !edits[0].bias;
        let own = HostTensor::from_f32(shape, values).map_err(wrong)?;
        let own = if turned { numbers::transposed(own) } else { own };
        let base = frozen(file, edits[0], self.module(edits[0]), own.clone())?;
        let formulas = edits.iter().map(|edit| self.variants.get(&self.module(edit).variant));
        let formulas = formulas.collect::<lora_core::Result<Vec<_>>>().map_err(wrong)?;
        let mut applied: Vec<Applied<'_, CpuBackend>> = Vec::with_capacity(edits.len());
        for (edit, variant) in edits.iter().zip(&formulas) {
            let parameters =
                Parameters::upload(&CpuBackend, self.module(edit), &HostTensor::zeros([1])).map_err(wrong)?;
            let strength = self.adapters[edit.adapter].strength.of(&edit.module);
            applied.push(Applied { variant: &**variant, parameters, strength });
        }
        let replaces = |edit: &&Edit| {
            let value = if edit.bias { BIAS_VALUE } else { WEIGHT_VALUE };
            self.module(edit).tensors.contains_key(value)
        };
        if self.options.unmerge && edits.iter().any(replaces) {
            return Err(Error::tensor(file.path(), name, "was replaced by the adapter's own; there is no way back"));
        }
        let merged = if edits[0].bias {
            if self.options.unmerge {
                applied.iter_mut().for_each(|applied| applied.strength = -applied.strength);
            }
            merged_bias(&CpuBackend, &base, &applied).map_err(wrong)?.unwrap_or(own)
        } else if self.options.unmerge {
            let [one] = applied.as_slice() else {
                return Err(Error::tensor(file.path(), name, "take one adapter out at a time"));
            };
            one.variant.unmerge(&CpuBackend, &base, &one.parameters, one.strength).map_err(wrong)?
        } else {
            merged_weight(&CpuBackend, &base, &applied).map_err(wrong)?
        };
        Ok(if turned { numbers::transposed(merged) } else { merged })
    }
}

/// Adds `factor · up[rows] · down` to the rows of a weight.
fn add_rows(
    values: &mut [f32],
    shape: &[usize],
    rows: &std::ops::Range<usize>,
    module: &AdapterModule,
    factor: f64,
) -> lora_core::Result<()> {
    let (down, up) = (&module.tensors["down"], &module.tensors["up"]);
    let rank = down.shape().first().copied().unwrap_or(0);
    let columns = shape.iter().skip(1).product::<usize>();
    if up.elements() != shape.first().copied().unwrap_or(0) * rank || down.elements() != rank * columns || rank == 0 {
        return Err(lora_core::Error::Shape {
            what: "a LoRA of this weight".into(),
            expected: format!("factors of {shape:?}"),
            found: format!("up {:?} and down {:?}", up.shape(), down.shape()),
        });
    }
    if factor == 0.0 {
        return Ok(());
    }
    let up: Vec<f32> = up.to_f32()[rows.start * rank..rows.end * rank]
        .iter()
        .map(|value| (f64::from(*value) * factor) as f32)
        .collect();
    lora_core::linalg::add_product(values, &up, &down.to_f32(), rank);
    Ok(())
}

/// The layer under a module, with `own` as its weight, or as its bias where the change is the bias'.
fn frozen(
    file: &SafetensorsFile,
    edit: &Edit,
    module: &AdapterModule,
    own: HostTensor,
) -> Result<FrozenLayer<CpuBackend>> {
    let other = |name: &Option<String>| -> Result<Option<HostTensor>> {
        let Some(name) = name.as_ref().filter(|name| file.contains(name)) else { return Ok(None) };
        rows_of(file, name, edit.rows.as_ref()).map(Some)
    };
    let partner = other(&edit.partner)?;
    let partner = partner.map(|partner| if edit.transposed { numbers::transposed(partner) } else { partner });
    let (weight, bias) = match edit.bias {
        true => (partner, Some(own)),
        false => (Some(own), partner),
    };
    let weight = weight.ok_or_else(|| Error::tensor(file.path(), &edit.module.path, "has a bias but no weight"))?;
    let geometry = geometry(module, weight.shape()).ok_or_else(|| {
        let reason = format!("has the shape {:?}; adapters go on vectors, matrices and square kernels", weight.shape());
        Error::tensor(file.path(), &edit.module.path, reason)
    })?;
    Ok(FrozenLayer { backend: CpuBackend, geometry, weight, bias })
}

/// Some rows of a tensor, or all of it, in f32.
fn rows_of(file: &SafetensorsFile, name: &str, rows: Option<&std::ops::Range<usize>>) -> Result<HostTensor> {
    let view = file.get(name)?;
    if let Some(factor) = factor_of(file, name).filter(|_| !is_float(view.dtype())) {
        let reason = format!("is stored as {} with factors beside it (`{factor}`), which are not read", view.dtype());
        return Err(Error::tensor(file.path(), name, reason));
    }
    let all = view.to_host()?.to_dtype(DType::F32);
    let Some(rows) = rows else { return Ok(all) };
    let row = all.elements() / all.shape().first().copied().unwrap_or(1).max(1);
    let values = all.to_f32().get(rows.start * row..rows.end * row).unwrap_or_default().to_vec();
    HostTensor::from_f32([&[rows.len()], &all.shape()[1..]].concat(), values)
        .map_err(|error| Error::tensor(file.path(), name, error.to_string()))
}
