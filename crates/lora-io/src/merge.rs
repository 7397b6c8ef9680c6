//! Merging adapters into a base checkpoint: streamed from the memory map into place, one tile of a tensor at a time, on
//! all cores. The arithmetic is `lora-core`'s; which tensor a module means is `targets`'s business.
//!
//! Tensors that no adapter changes are copied as they are. The others are added up in f32 and rounded once, to nearest
//! even, to the base's type or another. The output appears whole or not at all, and is never one of the inputs.
//!
//! | here | what |
//! |---|---|
//! | `folder` | the files of a base |
//! | `gguf` | language models in GGUF |
//! | `targets` | which tensors a module changes |
//! | `tied` | output layers that are embeddings |
//! | `experts` | adapters on all experts of a layer, in the form that the base has them in |
//! | `rows` | updates whose rows are computed apart |
//! | `compute` | the numbers of a piece of a tensor |
//! | `numbers` | stored numbers as f32 and back |
//! | `scales` | weights of 8 bits and the scales beside them |
//! | `configuration` | what a merged folder says of itself |
//! | `reduce` | plain LoRAs from checkpoints |

mod compute;
mod configuration;
mod experts;
mod folder;
mod gguf;
mod numbers;
mod reduce;
mod rows;
mod scales;
mod targets;
mod tied;

pub use reduce::{Extracted, extract, flatten};
use scales::Scales;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use lora_core::backend::CpuBackend;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, AdapterModule, Component, DType, Strength};
use rayon::prelude::*;

use crate::adapter::{self, damage, damaged};
use crate::checkpoint::Checkpoint;
use crate::safetensors::{Entry, StoredDType, header};
use crate::{Error, Result, atomic};
use folder::Base;
pub(crate) use folder::walk;
use numbers::{is_float, is_readable};
use rows::Update;

pub use targets::check_blocks;
pub(crate) use targets::fits;
use targets::{Edit, Edits, Order};

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
    /// Take the adapters out again instead: exact up to rounding for additive variants, an error for those that cannot
    /// be taken out.
    pub unmerge: bool,
    /// Quantise tensors of a GGUF file again that an adapter changes; they are not changed otherwise.
    pub requantise: bool,
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

/// Merges adapters into a base: a safetensors file into a file, a folder (diffusers, sharded Hugging Face) into a new
/// folder, or a language model in GGUF into a GGUF file or a new folder, without the tokenizer's files. `progress` is
/// told the bytes that are done and all there are.
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
    atomic::clear_partial(folder_of(output));
    check_sound(adapters)?;
    if base.is_file() && adapter::is_gguf(base)? {
        if options.unmerge {
            return Err(Error::format(base, "is in GGUF, which adapters are not taken out of; name the model before"));
        }
        return gguf::merge(base, adapters, output, options, variants, progress);
    }
    let base = Base::open(base)?;
    guard(&base, output)?;
    let adapters = &*experts::in_form(&base, adapters);
    let edits = Edits::new(&base, adapters, variants)?;
    let scales = Scales::of(&base);
    let total = base.files.iter().map(|file| file.data().len() as u64).sum();
    let done = std::sync::atomic::AtomicU64::new(0);
    let advance = |bytes: u64| {
        let before = done.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        progress(before + bytes, total);
    };
    let job = Job { base: &base, edits: &edits, scales: &scales, adapters, options, variants, advance: &advance };
    let mut report = MergeReport { notes: edits.notes.clone(), ..MergeReport::default() };
    if !base.is_folder() {
        job.merge_file(0, output, &mut report)?;
        return Ok(report);
    }
    // The folder is made beside its place and renamed, as files are.
    let parent = folder_of(output);
    let partial = atomic::NewFolder::begin(parent)?;
    report.notes.extend(base.copy_others(partial.path())?);
    for (index, file) in base.files.iter().enumerate() {
        let target = partial.path().join(base.relative(file.path()));
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder, "create the folder"))?;
        }
        job.merge_file(index, &target, &mut report)?;
    }
    job.finish(partial.path(), &mut report)?;
    let made = partial.path().to_owned();
    partial.finish(output)?;
    let place = |file: &PathBuf| output.join(file.strip_prefix(&made).unwrap_or(file));
    report.files = report.files.iter().map(place).collect();
    Ok(report)
}

/// Refuses adapters of which nothing can be made.
pub(crate) fn check_sound(adapters: &[Weighted]) -> Result<()> {
    for adapter in adapters {
        if let Some((module, tensor)) = damaged(&adapter.adapter) {
            let reason = format!("`{}`: {}", adapter.name, damage(tensor));
            return Err(Error::Module { module: module.to_string(), reason });
        }
    }
    Ok(())
}

/// What files made of a merged base say of the adapters in it, as JSON: name, factors and hash of each.
pub fn record(adapters: &[Weighted]) -> String {
    let of = |adapter: &Weighted| {
        let factor = |component| adapter.strength.of_component(component);
        serde_json::json!({ "name": adapter.name, "unet": factor(Component::UNET),
            "text_encoder": factor(Component::TEXT_ENCODER),
            "sshs_model_hash": adapter.adapter.metadata.get("sshs_model_hash") })
    };
    serde_json::Value::from(adapters.iter().map(of).collect::<Vec<_>>()).to_string()
}

/// Whether every module of an adapter names a layer of this base and fits it; the error lists those that do not.
/// Returns what else speaks against the two together.
///
/// # Errors
/// [`Error::Unmatched`] with the modules that name no layer or do not fit theirs; otherwise what opening the base
/// gives.
pub fn matches(base: impl AsRef<Path>, adapter: Adapter) -> Result<Vec<String>> {
    let base = base.as_ref();
    let weighted = [Weighted { name: "adapter".into(), adapter, strength: Strength::default() }];
    if base.is_file() && adapter::is_gguf(base)? {
        if let Some(mut image) = Checkpoint::open(base).ok().filter(|base| base.family().image) {
            return image.fuse(&weighted, &VariantRegistry::default()).map(|()| Vec::new());
        }
        return gguf::matches(base, &weighted).map(|()| Vec::new());
    }
    let base = Base::open(base)?;
    Edits::new(&base, &experts::in_form(&base, &weighted), &VariantRegistry::default()).map(|edits| edits.notes)
}

/// The folder that a path lies in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The output must not be the base, nor lie in it or in the way of anything.
fn guard(base: &Base, output: &Path) -> Result<()> {
    crate::overwrite::refuse([base.path.as_path()], output)?;
    let parent = folder_of(output);
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
    /// The tensor that the numbers come from: the index of its file, and its name there.
    source: (usize, String),
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
    scales: &'j Scales,
    adapters: &'j [Weighted],
    options: &'j MergeOptions,
    variants: &'j VariantRegistry<CpuBackend>,
    advance: &'j (dyn Fn(u64) + Sync),
}

impl Job<'_> {
    fn module(&self, edit: &Edit) -> &AdapterModule {
        &self.adapters[edit.adapter].adapter.modules[&edit.module]
    }

    /// What an edit does, where rows of it can be computed apart.
    fn update(&self, edit: &Edit) -> Option<Update<'_>> {
        if edit.bias || edit.order != Order::Same { None } else { Update::of(self.module(edit), self.variants) }
    }

    /// Where the numbers of a tensor of the output come from.
    fn source(&self, index: usize, name: &str) -> (usize, String) {
        self.edits.files[index].made_of.get(name).cloned().unwrap_or_else(|| (index, name.to_owned()))
    }

    /// Whether a tensor is written: scales are not where the weights that they belong to are written in another type.
    fn is_kept(&self, name: &str) -> bool {
        self.options.dtype.is_none() || !self.scales.leaves_out(name)
    }

    /// What the output will hold, in the types that it will have.
    fn entries(&self, index: usize) -> Result<Vec<Entry>> {
        let (file, own) = (&self.base.files[index], &self.edits.files[index]);
        let added = own.made_of.keys().map(String::as_str).filter(|name| !file.contains(name));
        let entry = |name: &str| {
            let (place, source) = self.source(index, name);
            let file = &self.base.files[place];
            let view = file.get(&source)?;
            let readable = is_readable(view.dtype());
            let dtype = self.options.dtype.filter(|_| readable).map_or(view.dtype(), StoredDType::from);
            if own.edits.contains_key(name) && !is_float(dtype) {
                let stored = view.dtype();
                let reason = match readable {
                    true => format!("is stored as {stored}; name the type of the output's numbers (--dtype bf16)"),
                    false => {
                        format!("is stored as {stored}; an adapter merges into F32, F16, BF16, F8_E4M3 and F8_E5M2")
                    }
                };
                return Err(Error::tensor(file.path(), &source, reason));
            }
            Ok(Entry { name: name.to_owned(), dtype, shape: view.shape().to_vec() })
        };
        file.names().filter(|name| self.is_kept(name)).chain(added).map(entry).collect()
    }

    /// The header's free text of an output.
    fn metadata(&self, index: usize) -> BTreeMap<String, String> {
        let mut metadata = self.base.files[index].metadata().clone();
        let own = &self.edits.files[index];
        if !own.edits.is_empty() {
            let key = if self.options.unmerge { "lora_unmerged" } else { "lora_merged" };
            metadata.insert(key.into(), record(self.adapters));
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
            let whole = own.iter().any(|edit| edit.rows.is_some() || self.update(edit).is_none());
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

    /// Says in a merged folder what is no longer as it was in the base's: ties, types, places and sizes.
    fn finish(&self, folder: &Path, report: &mut MergeReport) -> Result<()> {
        let untied = self.edits.untied.as_ref();
        let kept = if self.scales.all_read() { &[][..] } else { scales::KEYS };
        configuration::rewrite(folder, untied.is_some(), self.options.dtype, kept)?;
        let mut heads = self.edits.files.iter().enumerate();
        let head = untied.and_then(|tied| {
            let (index, _) = heads.rfind(|(_, own)| own.made_of.contains_key(tied.head))?;
            let file = self.base.files[index].path().file_name()?.to_string_lossy().into_owned();
            Some((tied, file))
        });
        let head = head.as_ref().map(|(tied, file)| configuration::Head { tied, file });
        configuration::rewrite_indices(folder, head)?;
        if let Some(tied) = untied {
            report.notes.push(format!(
                "the base ties its output layer to its embedding, and the adapter changes one of them: `{}` is written of \
                 its own, and config.json says `tie_word_embeddings` = false",
                tied.head
            ));
        }
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
