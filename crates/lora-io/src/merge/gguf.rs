//! Merging into a language model in GGUF: into another GGUF file, or into Hugging Face's folder. One tensor at a time is in
//! memory.
//!
//! A quantised tensor that an adapter changes cannot keep its bytes: it is quantised again where that is asked for, since
//! something is lost by it each time, or the matrices are written as plain numbers. What no adapter changes is copied.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use lora_core::backend::CpuBackend;
use lora_core::merge::{Applied, geometry, merged_bias, merged_weight};
use lora_core::variant::{BiasChange, Changes, FrozenLayer, Parameters, TOKEN_ROWS, VariantRegistry};
use lora_core::{AdapterModule, DType, HostTensor, ModulePath};
use rayon::prelude::*;

use super::rows::{Tile, Update};
use super::targets::is_head;
use super::tied::Tied;
use super::{MergeOptions, MergeReport, Weighted};
use crate::error::listed;
use crate::gguf::copy::{Copied, copy};
use crate::gguf::{LanguageModel, TensorType, quantise};
use crate::safetensors::{self, Entry, TensorSource};
use crate::{Error, Result, atomic};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// The output layer's name in GGUF.
const STORED_HEAD: &str = "output.weight";

/// What one module does to one tensor.
#[derive(Debug, Clone)]
struct Edit {
    adapter: usize,
    module: ModulePath,
    bias: bool,
}

/// A model with what is done to it.
pub(super) struct Job<'j> {
    model: LanguageModel,
    adapters: &'j [Weighted],
    options: &'j MergeOptions,
    variants: &'j VariantRegistry<CpuBackend>,
    /// By the tensor's name in Hugging Face's model.
    edits: BTreeMap<String, Vec<Edit>>,
    /// Whether the output layer gets a tensor of its own.
    untied: bool,
}

/// Merges into a file, if the output is called `.gguf`, or into a new folder with one file of weights and a configuration.
///
/// # Errors
/// If an adapter does not fit the model; if a quantised tensor would have to be quantised again, and that is not asked for.
pub(super) fn merge(
    base: &Path,
    adapters: &[Weighted],
    output: &Path,
    options: &MergeOptions,
    variants: &VariantRegistry<CpuBackend>,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<MergeReport> {
    crate::overwrite::refuse([base], output)?;
    let job = Job::new(base, adapters, options, variants)?;
    if output.extension().is_some_and(|extension| extension == "gguf") {
        return job.write_gguf(output, progress);
    }
    if output.exists() {
        return Err(Error::format(output, "exists already; name a new folder, or a file that ends in .gguf"));
    }
    job.write_folder(output, progress)
}

/// Whether adapters fit a model; the error lists the modules that do not.
pub(super) fn matches(base: &Path, adapters: &[Weighted]) -> Result<()> {
    Job::new(base, adapters, &MergeOptions::default(), &VariantRegistry::default()).map(drop)
}

impl<'j> Job<'j> {
    fn new(
        base: &Path,
        adapters: &'j [Weighted],
        options: &'j MergeOptions,
        variants: &'j VariantRegistry<CpuBackend>,
    ) -> Result<Self> {
        let model = LanguageModel::open(base)?;
        let mut job = Self { model, adapters, options, variants, edits: BTreeMap::new(), untied: false };
        job.find_edits()?;
        Ok(job)
    }

    fn module(&self, edit: &Edit) -> &AdapterModule {
        &self.adapters[edit.adapter].adapter.modules[&edit.module]
    }

    /// Finds what every module changes, or says which modules fit nothing.
    fn find_edits(&mut self) -> Result<()> {
        let adapters = self.adapters;
        let path = self.model.file().path().to_owned();
        let tied =
            self.model.shape(HEAD).is_none().then_some(Tied { embedding: EMBEDDING, head: HEAD, has_config: true });
        for (index, adapter) in adapters.iter().enumerate() {
            let ends_are_one = tied.as_ref().is_some_and(|tied| tied.is_one_adapter(&adapter.adapter));
            let mut problems = Vec::new();
            for (module_path, module) in &adapter.adapter.modules {
                let head = is_head(module_path);
                if adapter.strength.of(module_path) == 0.0 || ends_are_one && head {
                    continue;
                }
                if let Err(reason) = self.find(index, module_path, module, tied.is_some()) {
                    problems.push(format!("`{module_path}` ({reason})"));
                }
                let of_embedding = module_path.path == EMBEDDING.trim_end_matches(".weight");
                let one_end = head || of_embedding && !module.tensors.contains_key(TOKEN_ROWS);
                self.untied |= tied.is_some() && !ends_are_one && one_end;
            }
            if !problems.is_empty() {
                let list = format!("of `{}` against {}: {}", adapter.name, path.display(), listed(&problems));
                return Err(Error::Unmatched { path, count: problems.len(), list });
            }
        }
        if self.untied {
            // Tokens are trained for both ends where the two are one.
            let own = self.edits.get(EMBEDDING).into_iter().flatten();
            let tokens: Vec<Edit> =
                own.filter(|edit| self.module(edit).tensors.contains_key(TOKEN_ROWS)).cloned().collect();
            if !tokens.is_empty() {
                self.edits.entry(HEAD.into()).or_default().extend(tokens);
            }
        }
        Ok(())
    }

    fn find(&mut self, adapter: usize, path: &ModulePath, module: &AdapterModule, tied: bool) -> Result<(), String> {
        let (weight, bias) = (format!("{}.weight", path.path), format!("{}.bias", path.path));
        let of_other = if tied && weight == HEAD { EMBEDDING } else { &weight };
        let shape = self.model.shape(of_other).ok_or("this base has no such layer")?;
        match Update::of(module, self.variants) {
            Some(update) => update.fits(shape).map_err(|reason| format!("its tensors {reason}"))?,
            None => drop(geometry(module, shape).ok_or_else(|| format!("a weight {shape:?} is not adapted"))?),
        }
        let effect = self.variants.get(&module.variant).map_or(Changes::WEIGHT, |own| own.changes(&module.tensors));
        let edit = |bias| Edit { adapter, module: path.clone(), bias };
        match (self.model.shape(&bias).is_some(), effect.bias) {
            (true, BiasChange::Always | BiasChange::WhereThere) => self.edits.entry(bias).or_default().push(edit(true)),
            (false, BiasChange::Always) => return Err("changes a bias, and this layer of the base has none".into()),
            _ => {}
        }
        if effect.weight {
            self.edits.entry(weight).or_default().push(edit(false));
        }
        Ok(())
    }

    /// The tensor that the numbers of one come from.
    fn source<'n>(&self, name: &'n str) -> &'n str {
        if name == HEAD && self.untied { EMBEDDING } else { name }
    }

    /// A tensor of Hugging Face's model with what is done to it.
    fn merged(&self, name: &str) -> Result<HostTensor> {
        let tensor = self.model.tensor(self.source(name))?;
        let Some(edits) = self.edits.get(name) else { return Ok(tensor) };
        let wrong = |error: lora_core::Error| Error::tensor(self.model.file().path(), name, error.to_string());
        let (shape, before) = (tensor.shape().to_vec(), tensor.to_dtype(DType::F32));
        let updates: Option<Vec<Update<'_>>> =
            edits.iter().map(|edit| Update::of(self.module(edit), self.variants).filter(|_| !edit.bias)).collect();
        let merged = match updates {
            Some(updates) => self.add(edits, &updates, &before).map_err(wrong)?,
            None => self.layer(name, edits, before.clone())?,
        };
        if before.is_finite() && !merged.is_finite() {
            let reason = "would hold infinity after the merge: the adapter's numbers or its strength are too large";
            return Err(Error::tensor(self.model.file().path(), name, reason));
        }
        merged.reshape(shape).map_err(wrong)
    }

    /// Updates whose rows are computed apart, on all cores.
    fn add(&self, edits: &[Edit], updates: &[Update<'_>], before: &HostTensor) -> lora_core::Result<HostTensor> {
        const ROWS: usize = 64;
        let shape = before.shape();
        let first = shape.first().copied().unwrap_or(1).max(1);
        let width = before.elements() / first;
        let base = before.to_f32();
        let mut values = base.to_vec();
        values.par_chunks_mut((ROWS * width).max(1)).enumerate().for_each(|(index, values)| {
            let start = index * ROWS;
            let rows = start..(start + ROWS).min(first);
            let base = &base[rows.start * width..rows.end * width];
            for (edit, update) in edits.iter().zip(updates) {
                let scale = if update.replaces() { 1.0 } else { self.module(edit).scale() };
                let factor = self.adapters[edit.adapter].strength.of(&edit.module) * scale;
                update.add(&mut Tile { values, base, rows: rows.clone(), shape }, factor);
            }
        });
        HostTensor::from_f32(shape, values)
    }

    /// The variants' own formulas.
    fn layer(&self, name: &str, edits: &[Edit], own: HostTensor) -> Result<HostTensor> {
        let wrong = |error: lora_core::Error| Error::tensor(self.model.file().path(), name, error.to_string());
        let bias = edits[0].bias;
        let partner = format!("{}.{}", edits[0].module.path, if bias { "weight" } else { "bias" });
        let partner = match self.model.shape(&partner) {
            Some(_) => Some(self.model.tensor(&partner)?.to_dtype(DType::F32)),
            None => None,
        };
        let (weight, bias_value) = if bias { (partner, Some(own.clone())) } else { (Some(own.clone()), partner) };
        let missing = || Error::tensor(self.model.file().path(), name, "has no weight beside it");
        let weight = weight.ok_or_else(missing)?;
        let geometry = geometry(self.module(&edits[0]), weight.shape()).ok_or_else(missing)?;
        let base = FrozenLayer { backend: CpuBackend, geometry, weight, bias: bias_value };
        let formulas = edits.iter().map(|edit| self.variants.get(&self.module(edit).variant));
        let formulas = formulas.collect::<lora_core::Result<Vec<_>>>().map_err(wrong)?;
        let mut applied = Vec::with_capacity(edits.len());
        for (edit, variant) in edits.iter().zip(&formulas) {
            let parameters =
                Parameters::upload(&CpuBackend, self.module(edit), &HostTensor::zeros([1])).map_err(wrong)?;
            let strength = self.adapters[edit.adapter].strength.of(&edit.module);
            applied.push(Applied { variant: &**variant, parameters, strength });
        }
        if bias {
            return Ok(merged_bias(&CpuBackend, &base, &applied).map_err(wrong)?.unwrap_or(own));
        }
        merged_weight(&CpuBackend, &base, &applied).map_err(wrong)
    }

    /// The type of a tensor of the new file; of one that is not read here, none.
    fn kind(&self, stored: &Copied, name: Option<&str>) -> Result<Option<TensorType>> {
        let own = TensorType::from_id(stored.kind);
        if let Some(dtype) = self.options.dtype.filter(|_| stored.shape.len() > 1) {
            return Ok(Some(match dtype {
                DType::F16 => TensorType::F16,
                DType::BF16 => TensorType::BF16,
                _ => TensorType::F32,
            }));
        }
        let is_quantised = own.is_none_or(|own| own.block().0 > 1);
        if name.is_some_and(|name| self.edits.contains_key(name)) && is_quantised && !self.options.requantise {
            let kind = own.map_or_else(|| format!("type {}", stored.kind), |own| own.to_string());
            let reason = format!(
                "is stored in {kind}, and what is merged into it would have to be quantised again, which loses something; \
                 name a folder as the output, or the type of a GGUF file's matrices (--dtype fp16), or --requantise"
            );
            return Err(Error::tensor(self.model.file().path(), &stored.name, reason));
        }
        Ok(own)
    }

    /// The tensors of the new file, in the order of the base's.
    fn tensors(&self, stored: &[Copied], names: &BTreeMap<&str, &str>) -> Result<Vec<Copied>> {
        let mut tensors = Vec::with_capacity(stored.len() + 1);
        for own in stored {
            let name = names.get(own.name.as_str()).copied();
            let mut add = |own: &Copied, name| -> Result<()> {
                let kind = self.kind(own, name)?;
                tensors.push(kind.map_or_else(|| own.clone(), |kind| Copied::of(&own.name, &own.shape, kind)));
                Ok(())
            };
            add(own, name)?;
            if name == Some(EMBEDDING) && self.untied {
                add(&Copied { name: STORED_HEAD.into(), ..own.clone() }, Some(HEAD))?;
            }
        }
        Ok(tensors)
    }

    fn write_gguf(&self, output: &Path, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<MergeReport> {
        let file = self.model.file();
        let mut names: BTreeMap<&str, &str> =
            self.model.names().filter_map(|name| Some((self.model.stored_name(name)?, name))).collect();
        let stored = file.stored();
        let tensors = self.tensors(&stored, &names)?;
        if self.untied {
            names.insert(STORED_HEAD, HEAD);
        }
        let by_name: BTreeMap<&str, &Copied> = stored.iter().map(|own| (own.name.as_str(), own)).collect();
        let mut report = MergeReport { files: vec![output.to_owned()], ..MergeReport::default() };
        let mut again = BTreeMap::<String, usize>::new();
        let (mut done, total) = (0, tensors.iter().map(|tensor| tensor.bytes as u64).sum());
        let file_type = self.options.dtype.map(|dtype| match dtype {
            DType::F16 => 1,
            DType::BF16 => 32,
            _ => 0,
        });
        copy(output, file, &tensors, file_type, |tensor| {
            let name = names.get(tensor.name.as_str()).copied();
            let source = name.and_then(|name| self.model.stored_name(self.source(name))).unwrap_or(&tensor.name);
            let own = by_name[source];
            let edited = name.is_some_and(|name| self.edits.contains_key(name));
            let bytes = match TensorType::from_id(tensor.kind) {
                Some(kind) if edited || own.kind != tensor.kind => {
                    if edited && kind.block().0 > 1 {
                        *again.entry(kind.to_string()).or_default() += 1;
                    }
                    Cow::Owned(self.encoded(tensor, name, kind)?)
                }
                _ => Cow::Borrowed(file.raw(own)),
            };
            report.changed += usize::from(edited);
            report.copied += usize::from(!edited);
            file.release(source);
            done += tensor.bytes as u64;
            progress(done, total);
            Ok(bytes)
        })?;
        if !again.is_empty() {
            let list: Vec<String> = again.iter().map(|(kind, count)| format!("{count} in {kind}")).collect();
            report.notes.push(format!("quantised again, which loses something each time: {}", list.join(", ")));
        }
        report.notes.extend(self.parted().map(|why| format!("{why}: `{STORED_HEAD}` is written of its own")));
        Ok(report)
    }

    /// The bytes of a tensor with what is done to it, in a type.
    fn encoded(&self, tensor: &Copied, name: Option<&str>, kind: TensorType) -> Result<Vec<u8>> {
        let file = self.model.file();
        // What is no weight of the model, as factors of rotary frequencies, nothing is done to.
        let Some(name) = name else { return Ok(quantise(kind, &file.tensor(&tensor.name)?.to_f32())) };
        let merged = self.merged(name)?;
        let bytes = quantise(kind, &self.model.to_stored(name, &merged)?);
        if matches!(kind, TensorType::F16) && merged.is_finite() && !halves_are_finite(&bytes) {
            let reason = "would hold infinity in F16 after the merge; write bf16 or fp32 (--dtype)";
            return Err(Error::tensor(file.path(), &tensor.name, reason));
        }
        Ok(bytes)
    }

    fn write_folder(&self, output: &Path, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<MergeReport> {
        let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let partial = tempfile::Builder::new()
            .prefix(".lora-partial-")
            .tempdir_in(parent)
            .map_err(Error::io(parent, "create a folder in it"))?;
        let dtype = self.options.dtype.unwrap_or(DType::BF16);
        let mut config = self.model.folder_config(dtype)?;
        if self.untied {
            config["tie_word_embeddings"] = false.into();
        }
        let text = format!("{config:#}\n");
        atomic::write(partial.path().join("config.json"), |file| file.write_all(text.as_bytes()))?;
        let mut names: Vec<&str> = self.model.names().collect();
        if self.untied {
            names.push(HEAD);
        }
        let changed = names.iter().filter(|name| self.edits.contains_key(**name)).count();
        let source = Folder { job: self, dtype, names, progress, done: AtomicU64::new(0) };
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::write(partial.path().join("model.safetensors"), &source, &metadata)?;
        let copied = source.names.len() - changed;
        let made = partial.keep();
        fs::rename(&made, output).map_err(Error::io(output, "put into place"))?;
        let files = ["config.json", "model.safetensors"].map(|name| output.join(name)).to_vec();
        let notes = self.parted().map(|why| format!("{why}: `{HEAD}` is written of its own")).into_iter().collect();
        Ok(MergeReport { files, changed, copied, notes })
    }

    /// What is said of ends that are parted.
    fn parted(&self) -> Option<&'static str> {
        self.untied.then_some("the base ties its output layer to its embedding, and the adapter changes one of them")
    }
}

fn halves_are_finite(bytes: &[u8]) -> bool {
    bytes.as_chunks::<2>().0.iter().all(|&two| u16::from_le_bytes(two) & 0x7c00 != 0x7c00)
}

/// The tensors under Hugging Face's names, in one type.
struct Folder<'f> {
    job: &'f Job<'f>,
    dtype: DType,
    names: Vec<&'f str>,
    progress: &'f (dyn Fn(u64, u64) + Sync),
    done: AtomicU64,
}

impl TensorSource for Folder<'_> {
    fn entries(&self) -> Vec<Entry> {
        let entry = |name: &&str| {
            let shape = self.job.model.shape(self.job.source(name)).unwrap_or_default().to_vec();
            Entry { name: (*name).to_owned(), dtype: self.dtype.into(), shape }
        };
        self.names.iter().map(entry).collect()
    }

    fn bytes(&self, entry: &Entry) -> Result<Cow<'_, [u8]>> {
        let tensor = self.job.merged(&entry.name)?;
        let rounded = tensor.to_dtype(self.dtype);
        if tensor.is_finite() && !rounded.is_finite() {
            let reason = format!("would hold infinity in {} after the merge; write bf16 or fp32 (--dtype)", self.dtype);
            return Err(Error::tensor(self.job.model.file().path(), &entry.name, reason));
        }
        self.job.model.release(self.job.source(&entry.name));
        let bytes = rounded.bytes().to_vec();
        let total = self.entries().iter().map(|entry| entry.shape.iter().product::<usize>()).sum::<usize>();
        let done = self.done.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        (self.progress)(done, (total * self.dtype.size()) as u64);
        Ok(Cow::Owned(bytes))
    }
}
