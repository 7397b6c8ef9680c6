//! Merging adapters into a base checkpoint: streamed from the memory map into place, one tile of a tensor at a time, on all
//! cores. The arithmetic is `lora-core`'s; which tensor a module means is `targets`'s business.
//!
//! Tensors that no adapter changes are copied as they are. The others are added up in f32 and rounded once, to nearest
//! even, to the base's type or another. The output appears whole or not at all, and is never one of the inputs.

mod reduce;
mod targets;

pub use reduce::{extract, flatten};

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use lora_core::backend::CpuBackend;
use lora_core::merge::{Applied, geometry, merged_bias, merged_weight};
use lora_core::variant::{FrozenLayer, LoraFactors, Parameters, VariantRegistry};
use lora_core::{Adapter, AdapterModule, Component, DType, HostData, HostTensor, Strength};
use rayon::prelude::*;

use crate::safetensors::{Entry, SafetensorsFile, StoredDType, header};
use crate::{Error, Result, atomic};
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
pub fn merge(
    base: impl AsRef<Path>,
    adapters: &[Weighted],
    output: impl AsRef<Path>,
    options: &MergeOptions,
    variants: &VariantRegistry<CpuBackend>,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<MergeReport> {
    let (base, output) = (base.as_ref(), output.as_ref());
    let folder = fs::metadata(base).map_err(Error::io(base, "open the base model"))?.is_dir();
    guard(base, output, folder)?;
    let (paths, files) = open_base(base)?;
    let edits = Edits::new(base, &files, adapters, variants)?;
    let total = files.iter().map(|file| file.data().len() as u64).sum();
    let done = std::sync::atomic::AtomicU64::new(0);
    let advance = |bytes: u64| {
        let before = done.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        progress(before + bytes, total);
    };
    let mut report = MergeReport::default();
    if !folder {
        merge_file(&files[0], edits.of_file(0), output, adapters, options, variants, &advance, &mut report)?;
        return Ok(report);
    }
    // The folder is made beside its place and renamed, as files are.
    let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let partial = tempfile::Builder::new()
        .prefix(".lora-partial-")
        .tempdir_in(parent)
        .map_err(Error::io(parent, "create a folder in it"))?;
    copy_others(base, partial.path(), &mut report)?;
    for (index, (path, file)) in paths.iter().zip(&files).enumerate() {
        let relative = path.strip_prefix(base).unwrap_or(path);
        let target = partial.path().join(relative);
        merge_file(file, edits.of_file(index), &target, adapters, options, variants, &advance, &mut report)?;
    }
    fs::rename(partial.keep(), output).map_err(Error::io(output, "put into place"))?;
    report.files = report.files.iter().map(|file| output.join(file.file_name().unwrap_or_default())).collect();
    Ok(report)
}

/// Whether every module of an adapter names a layer of this base; the error lists those that do not.
pub fn matches(base: impl AsRef<Path>, adapter: Adapter) -> Result<()> {
    let base = base.as_ref();
    let (_, files) = open_base(base)?;
    let weighted = Weighted { name: "adapter".into(), adapter, strength: Strength::default() };
    Edits::new(base, &files, &[weighted], &VariantRegistry::default()).map(drop)
}

/// The weight files of a base.
fn open_base(base: &Path) -> Result<(Vec<PathBuf>, Vec<SafetensorsFile>)> {
    let folder = fs::metadata(base).map_err(Error::io(base, "open the base model"))?.is_dir();
    let paths = if folder { weight_files(base)? } else { vec![base.to_owned()] };
    let files = paths.iter().map(SafetensorsFile::open).collect::<Result<_>>()?;
    Ok((paths, files))
}

/// The output must not be an input, nor lie in the way of anything.
fn guard(base: &Path, output: &Path, folder: bool) -> Result<()> {
    let same = match (base.canonicalize(), output.canonicalize()) {
        (Ok(base), Ok(output)) => base == output || folder && output.starts_with(&base),
        _ => false,
    };
    if same {
        return Err(Error::format(output, "is the base itself; a merge never overwrites what it reads"));
    }
    if folder && output.exists() {
        return Err(Error::format(output, "exists already; name a new folder"));
    }
    if !folder && output.is_dir() {
        return Err(Error::format(output, "is a folder; name a file"));
    }
    Ok(())
}

/// All safetensors files below a folder, by path.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = walk(folder)?.into_iter().filter(|path| is_weights(path)).collect();
    files.sort();
    if files.is_empty() {
        return Err(Error::format(folder, "has no .safetensors files"));
    }
    Ok(files)
}

fn is_weights(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "safetensors")
}

/// Files of a folder and its folders, two levels deep; links to folders are not followed.
fn walk(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![(folder.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder, "list"))? {
            let entry = entry.map_err(Error::io(&folder, "list"))?;
            let kind = entry.file_type().map_err(Error::io(&folder, "list"))?;
            if kind.is_dir() && depth < 2 {
                folders.push((entry.path(), depth + 1));
            } else if !kind.is_dir() {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

/// Copies what is no weights; pickled copies of the weights, which would be the old ones, stay behind.
fn copy_others(base: &Path, to: &Path, report: &mut MergeReport) -> Result<()> {
    for path in walk(base)? {
        let relative = path.strip_prefix(base).unwrap_or(&path);
        let target = to.join(relative);
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder, "create the folder"))?;
        }
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if ["bin", "ckpt", "pt", "pth", "msgpack", "h5", "onnx"].contains(&extension) {
            report.notes.push(format!("{} was left out: it holds the weights before the merge", relative.display()));
        } else if !is_weights(&path) {
            fs::copy(&path, &target).map_err(Error::io(&path, "copy"))?;
        }
    }
    Ok(())
}

/// A piece of work: bytes to copy, or rows of a tensor to compute.
struct Piece<'f> {
    entry: Entry,
    /// Where the piece goes in the output.
    offset: u64,
    /// Rows of the tensor's first axis; all bytes for a copy.
    rows: std::ops::Range<usize>,
    edits: &'f [Edit],
}

#[allow(clippy::too_many_arguments, reason = "the parts of one call of `merge`")]
fn merge_file(
    file: &SafetensorsFile,
    edits: &BTreeMap<String, Vec<Edit>>,
    output: &Path,
    adapters: &[Weighted],
    options: &MergeOptions,
    variants: &VariantRegistry<CpuBackend>,
    advance: &(dyn Fn(u64) + Sync),
    report: &mut MergeReport,
) -> Result<()> {
    let mut entries = Vec::with_capacity(file.len());
    for name in file.names() {
        let view = file.get(name)?;
        let floating = matches!(view.dtype(), StoredDType::F32 | StoredDType::F16 | StoredDType::BF16);
        let dtype = options.dtype.filter(|_| floating).map_or(view.dtype(), StoredDType::from);
        if edits.contains_key(name) && !floating {
            let reason = format!("is stored as {}; an adapter merges into F32, F16 and BF16", view.dtype());
            return Err(Error::tensor(file.path(), name, reason));
        }
        entries.push(Entry { name: name.to_owned(), dtype, shape: view.shape().to_vec() });
    }
    let mut metadata = file.metadata().clone();
    if !edits.is_empty() {
        let merged: Vec<_> = adapters
            .iter()
            .map(|adapter| {
                let factor = |component| adapter.strength.of_component(component);
                serde_json::json!({ "name": adapter.name, "unet": factor(Component::UNET),
                    "text_encoder": factor(Component::TEXT_ENCODER),
                    "sshs_model_hash": adapter.adapter.metadata.get("sshs_model_hash") })
            })
            .collect();
        let key = if options.unmerge { "lora_unmerged" } else { "lora_merged" };
        metadata.insert(key.into(), serde_json::Value::from(merged).to_string());
        // A hash of the tensors before is none of these.
        metadata.remove("modelspec.hash_sha256");
    }
    let (head, entries) = header(output, entries, &metadata)?;
    let mut offset = head.len() as u64;
    let mut pieces = Vec::new();
    for entry in entries {
        let own = edits.get(&entry.name).map_or(&[][..], Vec::as_slice);
        let size = entry.dtype.bytes(entry.shape.iter().product()).unwrap_or(0) as u64;
        let first_axis = entry.shape.first().copied().unwrap_or(1).max(1);
        let row = (size as usize / first_axis).max(1);
        // Only plain low-rank updates are cut into rows: other formulas need their whole tensor.
        let whole = !own.is_empty()
            && !own.iter().all(|edit| tileable(&adapters[edit.adapter].adapter.modules[&edit.module], variants));
        let step = if whole || own.iter().any(|edit| edit.rows.is_some()) {
            first_axis
        } else {
            (TILE / row).clamp(1, first_axis)
        };
        for start in (0..first_axis).step_by(step) {
            let rows = start..(start + step).min(first_axis);
            let at = offset + (start * (size as usize / first_axis)) as u64;
            pieces.push(Piece { entry: entry.clone(), offset: at, rows, edits: own });
        }
        report.changed += usize::from(!own.is_empty());
        report.copied += usize::from(own.is_empty());
        offset += size;
    }
    let mut failed = None;
    let result = atomic::write(output, |writer| {
        writer.write_all(&head)?;
        writer.flush()?;
        let target = writer.get_ref();
        target.set_len(offset)?;
        let outcome = pieces.par_iter().try_for_each(|piece| -> Result<()> {
            let bytes = compute(file, piece, adapters, options, variants)?;
            write_at(target, &bytes, piece.offset).map_err(Error::io(output, "write"))?;
            advance(bytes.len() as u64);
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

/// The bytes of a piece.
fn compute<'f>(
    file: &'f SafetensorsFile,
    piece: &Piece<'_>,
    adapters: &[Weighted],
    options: &MergeOptions,
    variants: &VariantRegistry<CpuBackend>,
) -> Result<std::borrow::Cow<'f, [u8]>> {
    let name = &piece.entry.name;
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
    let all_tiles = piece.edits.iter().all(|edit| {
        edit.rows.is_none() && !edit.bias && tileable(&adapters[edit.adapter].adapter.modules[&edit.module], variants)
    });
    if all_tiles {
        for edit in piece.edits {
            let adapter = &adapters[edit.adapter];
            let module = &adapter.adapter.modules[&edit.module];
            let sign = if options.unmerge { -1.0 } else { 1.0 };
            let factor = sign * adapter.strength.of(&edit.module) * module.scale();
            add_rows(&mut values, view.shape(), &piece.rows, module, factor).map_err(wrong)?;
        }
    } else if !piece.edits.is_empty() {
        values = whole_tensor(values, view.shape(), file, piece, adapters, options, variants)?;
    }
    let rounded = from_f32(piece.entry.dtype, values);
    if finite_before && !all_finite(piece.entry.dtype, &rounded) {
        let reason = format!("would hold NaN or infinity in {} after the merge; write bf16 or fp32", piece.entry.dtype);
        return Err(Error::tensor(file.path(), name, reason));
    }
    Ok(std::borrow::Cow::Owned(rounded))
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

/// The general way: whole tensors through the variants' own formulas.
fn whole_tensor(
    values: Vec<f32>,
    shape: &[usize],
    file: &SafetensorsFile,
    piece: &Piece<'_>,
    adapters: &[Weighted],
    options: &MergeOptions,
    variants: &VariantRegistry<CpuBackend>,
) -> Result<Vec<f32>> {
    let name = &piece.entry.name;
    let wrong = |error: lora_core::Error| Error::tensor(file.path(), name, error.to_string());
    let mut result = values;
    let mut groups: BTreeMap<(usize, usize), Vec<&Edit>> = BTreeMap::new();
    for edit in piece.edits {
        let rows = edit.rows.clone().unwrap_or(0..shape.first().copied().unwrap_or(1));
        groups.entry((rows.start, rows.end)).or_default().push(edit);
    }
    for ((start, end), edits) in groups {
        let row = result.len() / shape.first().copied().unwrap_or(1).max(1);
        let part = result[start * row..end * row].to_vec();
        let mut part_shape = shape.to_vec();
        if let Some(first) = part_shape.first_mut() {
            *first = end - start;
        }
        let own = HostTensor::from_f32(&*part_shape, part).map_err(wrong)?;
        let module_of = |edit: &Edit| &adapters[edit.adapter].adapter.modules[&edit.module];
        let base = frozen(file, edits[0], module_of(edits[0]), own.clone())?;
        let formulas: Vec<_> =
            edits.iter().map(|edit| variants.get(&module_of(edit).variant)).collect::<Result<_, _>>().map_err(wrong)?;
        let mut applied: Vec<Applied<'_, CpuBackend>> = Vec::with_capacity(edits.len());
        for (edit, variant) in edits.iter().zip(&formulas) {
            let parameters =
                Parameters::upload(&CpuBackend, module_of(edit), &HostTensor::zeros([1])).map_err(wrong)?;
            let strength = adapters[edit.adapter].strength.of(&edit.module);
            applied.push(Applied { variant: &**variant, parameters, strength });
        }
        let merged = if edits[0].bias {
            if options.unmerge {
                applied.iter_mut().for_each(|applied| applied.strength = -applied.strength);
            }
            merged_bias(&CpuBackend, &base, &applied).map_err(wrong)?.unwrap_or(own)
        } else if options.unmerge {
            let [one] = applied.as_slice() else {
                return Err(Error::tensor(file.path(), name, "take one adapter out at a time"));
            };
            one.variant.unmerge(&CpuBackend, &base, &one.parameters, one.strength).map_err(wrong)?
        } else {
            merged_weight(&CpuBackend, &base, &applied).map_err(wrong)?
        };
        result[start * row..end * row].copy_from_slice(&merged.to_f32());
    }
    Ok(result)
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
    let all = file.get(name)?.to_host()?.to_dtype(DType::F32);
    let Some(rows) = rows else { return Ok(all) };
    let row = all.elements() / all.shape().first().copied().unwrap_or(1).max(1);
    let values = all.to_f32().get(rows.start * row..rows.end * row).unwrap_or_default().to_vec();
    HostTensor::from_f32([&[rows.len()], &all.shape()[1..]].concat(), values)
        .map_err(|error| Error::tensor(file.path(), name, error.to_string()))
}

fn to_f32(dtype: StoredDType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        StoredDType::F16 => {
            let halves: Vec<f16> = bytes.as_chunks::<2>().0.iter().map(|&two| f16::from_le_bytes(two)).collect();
            halves.to_f32_vec()
        }
        StoredDType::BF16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&two| f32::from_bits(u32::from(u16::from_le_bytes(two)) << 16))
            .collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|&four| f32::from_le_bytes(four)).collect(),
    }
}

fn from_f32(dtype: StoredDType, values: Vec<f32>) -> Vec<u8> {
    let data = match dtype {
        StoredDType::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(&values);
            HostData::F16(halves)
        }
        StoredDType::BF16 => {
            let mut halves = vec![bf16::ZERO; values.len()];
            halves.convert_from_f32_slice(&values);
            HostData::BF16(halves)
        }
        _ => HostData::F32(values),
    };
    let count = match &data {
        HostData::F32(values) => values.len(),
        HostData::F16(values) => values.len(),
        HostData::BF16(values) => values.len(),
        _ => 0,
    };
    HostTensor::new([count], data).map_or_else(|_| Vec::new(), |tensor| tensor.bytes().to_vec())
}

/// Whether no element's exponent is all ones.
fn all_finite(dtype: StoredDType, bytes: &[u8]) -> bool {
    let halves = |mask: u16| bytes.as_chunks::<2>().0.iter().all(|&two| u16::from_le_bytes(two) & mask != mask);
    match dtype {
        StoredDType::F16 => halves(0x7c00),
        StoredDType::BF16 => halves(0x7f80),
        _ => bytes.as_chunks::<4>().0.iter().all(|&four| f32::from_le_bytes(four).is_finite()),
    }
}
