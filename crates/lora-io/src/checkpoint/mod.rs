//! Base checkpoints on disk, presented by component under diffusers' and transformers' names whatever their layout.
//! Tensors stay in the memory map until they are asked for. Which names are whose is `family`'s business.
//!
//! | here | what |
//! |---|---|
//! | `ldm` | reading the original layout: one file with a prefix for each component |
//! | `diffusers` | reading a folder with a folder for each component |
//! | `fuse` | adapters added to weights as they are read |
//! | `file` | a file of weights: safetensors, or GGUF under the same names |
//! | `language` | reading a language model: a folder of its own, or one GGUF file |
//! | `part` | a component from elsewhere |
//! | `write` | writing the original layout |

mod diffusers;
mod file;
mod fuse;
mod language;
mod ldm;
mod part;
mod write;

pub(crate) use ldm::groups;
pub use write::{CheckpointSource, Replaced, write_single_file};

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use lora_core::{Component, DType, HostTensor};
use sha2::{Digest, Sha256};

use crate::family::tree::{Depths, Piece, Share, Tree};
use crate::family::{BaseNames, FAMILIES, Family, describe};
use crate::gguf::{GgufFile, LanguageModel, Packed};
use crate::hub;
use crate::safetensors::TensorView;
use crate::{Error, Result};
use file::WeightFile;
use fuse::{Fused, FusedRecord};

/// An open checkpoint of a known family.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    family: &'static Family,
    components: BTreeMap<Component, ComponentWeights>,
    scheduler: Option<serde_json::Value>,
    index: Option<serde_json::Value>,
    metadata: BTreeMap<String, String>,
    /// Names of tensors outside all components, and whether they have no elements.
    marks: BTreeMap<String, bool>,
    unused: Vec<String>,
    /// Adapters that are added to weights as they are read.
    fused: Option<FusedRecord>,
}

/// The weights of one component under diffusers' (U-Net, transformer, autoencoder) or transformers' (text encoder, CLIP's
/// always with its `text_model.` level; language model) names.
#[derive(Debug)]
pub struct ComponentWeights {
    path: PathBuf,
    files: Vec<Arc<WeightFile>>,
    /// Weights of the files.
    entries: BTreeMap<String, Place>,
    /// Or a language model's file that holds all of them under llama.cpp's names, and quantised.
    gguf: Option<LanguageModel>,
    config: Option<serde_json::Value>,
    /// Adapters that are added to weights as they are read.
    fused: Option<Fused>,
}

/// Where a weight lies.
#[derive(Debug)]
struct Place {
    file: usize,
    stored: String,
    shape: Vec<usize>,
    piece: Piece,
    /// Its bytes where they cannot be a range of the file's.
    rearranged: OnceLock<Vec<u8>>,
}

/// A file's tensors that belong to one component.
pub(crate) struct Group<'n> {
    pub(crate) component: Component,
    tree: &'static dyn Tree,
    depths: Depths,
    /// Names in the file, and without the component's prefix.
    tensors: Vec<(&'n str, &'n str)>,
}

impl<'n> Group<'n> {
    pub(crate) fn new(component: Component, tree: &'static dyn Tree, tensors: Vec<(&'n str, &'n str)>) -> Self {
        let names: Vec<&str> = tensors.iter().map(|(_, name)| *name).collect();
        Self { component, tree, depths: tree.depths_of_stored(&names), tensors }
    }

    /// The names in the file, each with the weights that it holds; `None` for one that the component does not know.
    pub(crate) fn weights(&self) -> impl Iterator<Item = (&'n str, Option<Vec<(String, Piece)>>)> {
        self.tensors.iter().map(|(stored, name)| (*stored, self.tree.weights(name, &self.depths)))
    }

    /// The same without the tensors that the model does not read.
    fn used_weights(&self) -> impl Iterator<Item = (&'n str, Option<Vec<(String, Piece)>>)> {
        let used = self.tensors.iter().map(|(_, name)| self.tree.is_used(name, &self.depths));
        self.weights().zip(used).filter_map(|(weights, used)| used.then_some(weights))
    }
}

impl Checkpoint {
    /// Opens a single file in the original layout, a diffusers folder, or a language model: Hugging Face's folder or one
    /// GGUF file.
    ///
    /// # Errors
    ///
    /// If the base is of no known family, if its family is not opened from a single file, or if a component that the
    /// family requires is missing; the message says what there is.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_among(path, &FAMILIES)
    }

    /// The same for a base of one of these families, the first that fits: a program's own beside [`FAMILIES`].
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_among(path: impl AsRef<Path>, families: &[&'static Family]) -> Result<Self> {
        let path = &*hub::place(path.as_ref())?;
        let kind = fs::metadata(path).map_err(Error::io(path, "open the base model"))?;
        if kind.is_dir() {
            diffusers::open(path, families)
        } else {
            let file = WeightFile::open(path)?;
            match file {
                // Image models are passed on as GGUF under their own names.
                WeightFile::Gguf(..) if language::is_one(&file, families) => language::open_gguf(path),
                file => ldm::open(path, Arc::new(file), families),
            }
        }
    }

    fn new(path: &Path, family: &'static Family) -> Self {
        Self {
            path: path.to_owned(),
            family,
            components: BTreeMap::new(),
            scheduler: None,
            index: None,
            metadata: BTreeMap::new(),
            marks: BTreeMap::new(),
            unused: Vec::new(),
            fused: None,
        }
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What kind of base it is.
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// The weights of a component.
    ///
    /// # Errors
    ///
    /// If the checkpoint has no such component.
    pub fn component(&self, component: Component) -> Result<&ComponentWeights> {
        self.components.get(&component).ok_or_else(|| self.lacks(component))
    }

    /// All components, in their order.
    pub fn components(&self) -> impl Iterator<Item = (Component, &ComponentWeights)> {
        self.components.iter().map(|(component, weights)| (*component, weights))
    }

    /// `scheduler_config.json` of a diffusers folder.
    pub fn scheduler(&self) -> Option<&serde_json::Value> {
        self.scheduler.as_ref()
    }

    /// `model_index.json` of a diffusers folder, which describes its pipeline.
    pub fn index(&self) -> Option<&serde_json::Value> {
        self.index.as_ref()
    }

    /// The header's free text of a single file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Whether a single file holds a tensor of this name outside all components. Some say by an empty tensor how a base
    /// was trained: `v_pred`, `ztsnr`.
    pub fn is_marked(&self, name: &str) -> bool {
        self.marks.contains_key(name)
    }

    /// Tensors of the files that no component takes (EMA copies and the schedule's buffers apart).
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// The first tensor that says how weights of few bits are scaled and that nothing here applies: the weights are not to be
    /// read without it.
    pub fn unread_scale(&self) -> Option<&str> {
        self.components.values().flat_map(|weights| &weights.files).find_map(|file| file.unread_scale())
    }

    /// Takes a component's weights out of a file.
    fn add(&mut self, at: &Path, file: &Arc<WeightFile>, group: &Group<'_>) -> Result<()> {
        let own = self.components.entry(group.component).or_insert_with(|| ComponentWeights::new(at));
        for (stored, weights) in group.used_weights() {
            match weights {
                Some(weights) => {
                    for (canonical, piece) in weights {
                        own.add(file, stored, canonical, piece)?;
                    }
                }
                None => self.unused.push(stored.to_owned()),
            }
        }
        Ok(())
    }

    fn complete(self) -> Result<Self> {
        let there = |component| self.components.get(&component).is_some_and(|weights| weights.names().next().is_some());
        let required = self.family.components.iter().filter(|names| names.required);
        match required.map(|names| names.component).find(|&component| !there(component)) {
            Some(component) => Err(self.lacks(component)),
            None => Ok(self),
        }
    }

    fn lacks(&self, component: Component) -> Error {
        let name = component.name().replace('_', " ");
        Error::format(&self.path, format!("has no {name}; expected a whole {} checkpoint", self.family))
    }
}

/// The error of a base that is not opened: of a family, or of none of these families.
fn refused(
    path: &Path,
    family: Result<&Family, &[&'static Family]>,
    names: &BaseNames<'_>,
    files: &[Arc<WeightFile>],
) -> Error {
    let found = match family {
        Ok(family) => format!(
            "{family}, whose networks are not opened from this layout; adapters for it are merged, converted and checked"
        ),
        Err(families) => {
            let types = files.iter().flat_map(|file| file.names().into_iter().filter_map(|name| file.type_name(name)));
            let types: BTreeSet<String> = types.collect();
            describe(names, &types.iter().map(String::as_str).collect(), families)
        }
    };
    Error::Family { path: path.to_owned(), found }
}

impl Place {
    /// The place of a weight in a stored tensor, or what is wrong with the tensor's shape.
    fn new(file: usize, stored: &str, found: &[usize], piece: Piece) -> Result<Self, String> {
        let shape = match (piece, found) {
            (Piece::All, shape) => shape.to_vec(),
            (Piece::Pointwise, &[outputs, inputs, 1, 1]) => vec![outputs, inputs],
            (Piece::Pointwise, shape) => shape.to_vec(),
            (Piece::Rows(share), shape) => match shape
                .split_first()
                .and_then(|(&all, rest)| Some((share.rows(all)?, rest)))
            {
                Some((rows, rest)) => [&[rows.len()], rest].concat(),
                None => {
                    return Err(format!("has the shape {shape:?}; expected {} parts of equally many rows", share.of));
                }
            },
            (Piece::Swapped, shape) if shape.first().is_some_and(|rows| rows.is_multiple_of(2)) => shape.to_vec(),
            (Piece::Swapped, shape) => return Err(format!("has the shape {shape:?}; expected two halves of rows")),
            (Piece::Transposed, &[rows, columns]) => vec![columns, rows],
            (Piece::Transposed, shape) => return Err(format!("has the shape {shape:?}; expected a matrix")),
        };
        Ok(Self { file, stored: stored.to_owned(), shape, piece, rearranged: OnceLock::new() })
    }
}

impl ComponentWeights {
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            files: Vec::new(),
            entries: BTreeMap::new(),
            gguf: None,
            config: None,
            fused: None,
        }
    }

    fn add(&mut self, file: &Arc<WeightFile>, stored: &str, canonical: String, piece: Piece) -> Result<()> {
        let index = match self.files.iter().position(|known| Arc::ptr_eq(known, file)) {
            Some(index) => index,
            None => {
                self.files.push(Arc::clone(file));
                self.files.len() - 1
            }
        };
        let place = Place::new(index, stored, file.shape(stored).unwrap_or_default(), piece)
            .map_err(|reason| Error::tensor(file.path(), stored, reason))?;
        match self.entries.insert(canonical.clone(), place) {
            None => Ok(()),
            Some(other) => {
                let reason =
                    format!("and `{}` are both `{canonical}` of the model; expected one of them", other.stored);
                Err(Error::tensor(file.path(), stored, reason))
            }
        }
    }

    /// The file or folder it is in.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder's `config.json`, or what a GGUF file's header says in its words; `None` in a single safetensors file.
    pub fn config(&self) -> Option<&serde_json::Value> {
        self.config.as_ref()
    }

    /// Names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str).chain(self.gguf.iter().flat_map(LanguageModel::names))
    }

    /// Whether there is a weight.
    pub fn contains(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    /// The shape of a weight.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        match &self.gguf {
            Some(model) => model.shape(name),
            None => self.entries.get(name).map(|place| place.shape.as_slice()),
        }
    }

    /// The name that the tensor with a weight has in its file: inside of a wrapper with the wrapper's prefix, which an
    /// adapter for the wrapper has before its modules too.
    pub fn stored_name(&self, name: &str) -> Option<&str> {
        match &self.gguf {
            Some(model) => model.stored_name(name),
            None => self.entries.get(name).map(|place| place.stored.as_str()),
        }
    }

    /// The language model's GGUF file that holds the weights, with the tokenizer in its header; `None` for all others.
    pub fn gguf(&self) -> Option<&GgufFile> {
        self.gguf.as_ref().map(LanguageModel::file)
    }

    /// A weight's values, copied: F32, F16 and BF16 as they are, quantised ones, those with a scale and those that adapters
    /// are added to in f32.
    ///
    /// # Errors
    ///
    /// If there is no such weight, or its element type is not read here.
    pub fn values(&self, name: &str) -> Result<HostTensor> {
        match self.fused_values(name)? {
            Some(fused) => Ok(fused),
            None => self.stored_values(name),
        }
    }

    /// The same without what is added to it.
    fn stored_values(&self, name: &str) -> Result<HostTensor> {
        if let Some(model) = &self.gguf {
            return model.tensor(name);
        }
        let (file, place) = self.place(name)?;
        if let Some(view) = self.stored_view(name)? {
            return view.to_host();
        }
        let wrong = |error: lora_core::Error| Error::tensor(file.path(), &place.stored, error.to_string());
        let all = file.shape(&place.stored).and_then(|shape| shape.first().copied()).unwrap_or(1);
        let values = match place.piece {
            Piece::Rows(share) => file.rows(&place.stored, share.rows(all))?,
            _ => file.rows(&place.stored, None)?,
        };
        let values = match place.piece {
            Piece::Swapped => halves_exchanged(&values).map_err(wrong)?,
            Piece::Transposed => {
                let numbers = HostTensor::from_f32(values.shape(), values.to_f32().into_owned()).map_err(wrong)?;
                let turned = transposed(numbers.bytes(), numbers.shape());
                let turned = turned.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
                HostTensor::from_f32(place.shape.as_slice(), turned).map_err(wrong)?
            }
            _ => values,
        };
        values.reshape(place.shape.as_slice()).map_err(wrong)
    }

    /// A quantised matrix of a GGUF file as it is stored, its rows in the model's order; `None` for all others.
    ///
    /// # Errors
    ///
    /// As [`Self::values`].
    pub fn packed(&self, name: &str) -> Result<Option<Packed<'_>>> {
        if self.is_fused(name) {
            return Ok(None);
        }
        if let Some(model) = &self.gguf {
            return model.packed(name);
        }
        let Ok((file, place)) = self.place(name) else { return Ok(None) };
        let (Some((kind, bytes)), [_, inputs]) = (file.blocks(&place.stored)?, place.shape.as_slice()) else {
            return Ok(None);
        };
        // Rows are whole blocks, as long as they are as wide as they lie in the file.
        if kind.block().0 == 1 || !inputs.is_multiple_of(kind.block().0) {
            return Ok(None);
        }
        let bytes = match place.piece {
            Piece::All | Piece::Pointwise => Cow::Borrowed(bytes),
            Piece::Rows(Share { first, count, of }) => {
                let part = bytes.len() / of;
                Cow::Borrowed(&bytes[first * part..(first + count) * part])
            }
            Piece::Swapped => Cow::Owned(swapped(bytes)),
            Piece::Transposed => return Ok(None),
        };
        Ok(Some(Packed { bytes, kind, shape: &place.shape }))
    }

    /// The same with its rows in any order: for whom sizes are enough, as nothing is read.
    ///
    /// # Errors
    ///
    /// As [`Self::values`].
    pub fn packed_as_stored(&self, name: &str) -> Result<Option<Packed<'_>>> {
        match &self.gguf {
            Some(_) if self.is_fused(name) => Ok(None),
            Some(model) => model.packed_as_stored(name),
            None => self.packed(name),
        }
    }

    /// A weight in the memory map of a safetensors file. One that lies there in another order is copied when it is first
    /// asked for. `None` in GGUF, for a weight with a scale and for one that adapters are added to, which have
    /// [`Self::values`] and no view.
    ///
    /// # Errors
    ///
    /// If there is no such weight.
    pub fn view(&self, name: &str) -> Result<Option<TensorView<'_>>> {
        if self.is_fused(name) { Ok(None) } else { self.stored_view(name) }
    }

    /// Whether adapters are added to a weight.
    fn is_fused(&self, name: &str) -> bool {
        self.fused.as_ref().is_some_and(|fused| fused.changes(name))
    }

    fn stored_view(&self, name: &str) -> Result<Option<TensorView<'_>>> {
        if self.gguf.is_some() {
            return Ok(None);
        }
        let (file, place) = self.place(name)?;
        let Some(view) = file.view(&place.stored)? else { return Ok(None) };
        Ok(Some(match place.piece {
            Piece::All | Piece::Pointwise => view.with_shape(&place.shape),
            Piece::Rows(share) => view.part(share, &place.shape),
            Piece::Transposed => {
                let bytes = place.rearranged.get_or_init(|| transposed(view.bytes(), view.shape()));
                view.with_bytes(bytes, &place.shape)
            }
            Piece::Swapped => {
                let bytes = place.rearranged.get_or_init(|| swapped(view.bytes()));
                view.with_bytes(bytes, &place.shape)
            }
        }))
    }

    /// The same where a view is all that is asked for.
    ///
    /// # Errors
    ///
    /// As [`Self::view`], and where there is none.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let none =
            || Error::tensor(&self.path, name, "is in GGUF, has a scale or an adapter: it has values and no view");
        self.view(name)?.ok_or_else(none)
    }

    /// The file of a weight, and its place there.
    fn place(&self, name: &str) -> Result<(&WeightFile, &Place)> {
        let place = self.entries.get(name).ok_or_else(|| Error::tensor(&self.path, name, "is missing"))?;
        Ok((&self.files[place.file], place))
    }

    /// SHA-256 of all weights with their names and shapes, and of what is added to them: what caches of this component's outputs are kept apart by.
    ///
    /// # Errors
    /// [`Error::Tensor`] where a tensor cannot be read.
    pub fn sha256(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for name in self.names() {
            if let Some(model) = &self.gguf {
                let values = model.tensor(name)?;
                hash.update(format!("{name} {} {:?}\n", values.dtype(), values.shape()));
                hash.update(values.bytes());
                model.release(name);
                continue;
            }
            if let Some(tensor) = self.stored_view(name)? {
                hash.update(format!("{name} {} {:?}\n", tensor.dtype(), tensor.shape()));
                hash.update(tensor.bytes());
                continue;
            }
            let (file, place) = self.place(name)?;
            let (kind, parts) = file.stored(&place.stored)?;
            hash.update(format!("{name} {kind} {:?} {:?}\n", place.shape, place.piece));
            parts.into_iter().for_each(|bytes| hash.update(bytes));
        }
        if let Some(fused) = &self.fused {
            hash.update(fused.digest());
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Tells the kernel that a weight's pages are not needed any more.
    pub fn release(&self, name: &str) {
        if let Some(model) = &self.gguf {
            model.release(name);
        }
        if let Some(place) = self.entries.get(name) {
            let share = match place.piece {
                Piece::Rows(share) => share,
                _ => Share::one(0, 1),
            };
            self.files[place.file].release(&place.stored, share);
        }
    }
}

/// The bytes of a tensor with the second half of its rows before the first.
fn swapped(bytes: &[u8]) -> Vec<u8> {
    let (first, second) = bytes.split_at(bytes.len() / 2);
    [second, first].concat()
}

/// A tensor with the second half of its rows before the first, in its number type.
fn halves_exchanged(values: &HostTensor) -> Result<HostTensor, lora_core::Error> {
    let numbers = values.to_f32();
    let (first, second) = numbers.split_at(numbers.len() / 2);
    let exchanged = HostTensor::from_f32(values.shape(), [second, first].concat())?;
    Ok(match values.dtype() {
        DType::F32 => exchanged,
        dtype => exchanged.to_dtype(dtype),
    })
}

/// The bytes of a matrix of a shape with rows and columns exchanged.
fn transposed(bytes: &[u8], shape: &[usize]) -> Vec<u8> {
    let &[rows, columns] = shape else { return bytes.to_vec() };
    let size = bytes.len() / (rows * columns).max(1);
    if size * rows * columns != bytes.len() {
        // Elements of less than a byte, which nothing here computes with.
        return bytes.to_vec();
    }
    let element = |row: usize, column: usize| &bytes[(row * columns + column) * size..][..size];
    (0..columns).flat_map(|column| (0..rows).flat_map(move |row| element(row, column))).copied().collect()
}
