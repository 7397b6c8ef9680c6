//! Writing a checkpoint in the original (single-file) layout, one tensor in memory at a time.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Component, DType, HostTensor};

use super::Checkpoint;
use crate::family::Family;
use crate::family::tree::{Piece, Share};
use crate::safetensors::{Entry, TensorSource, write};
use crate::{Error, Result};

/// Where the weights of a checkpoint to be written come from, under diffusers' and transformers' names.
pub trait CheckpointSource {
    /// What kind of base it is.
    fn family(&self) -> &'static Family;
    /// What the checkpoint is made of.
    fn components(&self) -> Vec<Component>;
    /// Names and shapes of a component's weights.
    fn weights(&self, component: Component) -> Vec<(String, Vec<usize>)>;
    /// One of them.
    ///
    /// # Errors
    /// Where there is no such weight, or reading it fails.
    fn values(&self, component: Component, name: &str, shape: &[usize]) -> Result<HostTensor>;
    /// Names of tensors without elements that say something of the base by being there (see [`Checkpoint::is_marked`]).
    fn marks(&self) -> Vec<String> {
        Vec::new()
    }
}

/// A checkpoint as it is, but for some weights.
#[derive(Debug)]
pub struct Replaced<'c> {
    /// The checkpoint.
    pub checkpoint: &'c Checkpoint,
    /// Weights that take the place of its own.
    pub weights: BTreeMap<(Component, String), HostTensor>,
}

impl CheckpointSource for Replaced<'_> {
    fn family(&self) -> &'static Family {
        self.checkpoint.family()
    }

    fn components(&self) -> Vec<Component> {
        self.checkpoint.components().map(|(component, _)| component).collect()
    }

    fn weights(&self, component: Component) -> Vec<(String, Vec<usize>)> {
        let Ok(weights) = self.checkpoint.component(component) else { return Vec::new() };
        weights.names().map(|name| (name.to_owned(), weights.shape(name).unwrap_or_default().to_vec())).collect()
    }

    fn values(&self, component: Component, name: &str, _shape: &[usize]) -> Result<HostTensor> {
        match self.weights.get(&(component, name.to_owned())) {
            Some(own) => Ok(own.clone()),
            None => self.checkpoint.component(component)?.values(name),
        }
    }

    fn marks(&self) -> Vec<String> {
        self.checkpoint.marks.iter().filter(|(_, empty)| **empty).map(|(name, _)| name.clone()).collect()
    }
}

/// Writes all components into one file with floating-point weights in `dtype`; returns its size in bytes.
///
/// # Errors
///
/// If the family has no single-file layout that is known here, if a weight has no place in it, or if a tensor that
/// holds several weights would lack one of them.
pub fn write_single_file(
    path: impl AsRef<Path>,
    source: &dyn CheckpointSource,
    dtype: DType,
    metadata: &BTreeMap<String, String>,
) -> Result<u64> {
    let path = path.as_ref();
    let mut tensors = BTreeMap::new();
    for component in source.components() {
        place(path, source, component, &mut tensors)?;
    }
    for (stored, tensor) in &tensors {
        tensor.check().map_err(|reason| Error::tensor(path, stored, reason))?;
    }
    write(path, &SingleFile { source, tensors, marks: source.marks(), dtype }, metadata)
}

/// A tensor of the file: the weights that it is made of, in order.
struct Stored {
    component: Component,
    weights: Vec<Weight>,
}

struct Weight {
    name: String,
    shape: Vec<usize>,
    piece: Piece,
}

impl Weight {
    /// Rows of one part of the tensor that it is some parts of; `None` where it has none.
    fn rows_of_a_part(&self) -> Option<usize> {
        let parts = if let Piece::Rows(share) = self.piece { share.count } else { 1 };
        match self.shape.first() {
            Some(rows) => rows.is_multiple_of(parts).then(|| rows / parts),
            None => (parts == 1).then_some(1),
        }
    }
}

impl Stored {
    fn shares(&self) -> impl Iterator<Item = Share> {
        self.weights.iter().filter_map(|weight| match weight.piece {
            Piece::Rows(share) => Some(share),
            _ => None,
        })
    }

    /// Whether all parts are there and fit each other.
    fn check(&self) -> Result<(), String> {
        let Some(first) = self.weights.first() else { return Err("is made of nothing".into()) };
        let whole = match first.piece {
            Piece::Rows(Share { of, .. }) => self.shares().map(|share| share.count).sum::<usize>() == of,
            _ => self.weights.len() == 1,
        };
        let part = first.rows_of_a_part();
        let fits = |weight: &Weight| weight.rows_of_a_part() == part && weight.shape.get(1..) == first.shape.get(1..);
        if whole && part.is_some() && self.weights.iter().all(fits) {
            return Ok(());
        }
        let found: Vec<String> = self.weights.iter().map(|own| format!("`{}` {:?}", own.name, own.shape)).collect();
        Err(format!("cannot be put together from {}", found.join(", ")))
    }

    fn shape(&self) -> Vec<usize> {
        let Weight { shape, piece, .. } = &self.weights[0];
        match (piece, shape.as_slice()) {
            (Piece::Rows(share), [rows, rest @ ..]) => [&[rows / share.count * share.of], rest].concat(),
            (Piece::Pointwise, &[outputs, inputs]) => vec![outputs, inputs, 1, 1],
            (Piece::Transposed, &[rows, columns]) => vec![columns, rows],
            (_, shape) => shape.to_vec(),
        }
    }
}

/// Finds the places of a component's weights.
fn place(
    path: &Path,
    source: &dyn CheckpointSource,
    component: Component,
    tensors: &mut BTreeMap<String, Stored>,
) -> Result<()> {
    let family = source.family();
    let layout = family.component(component).and_then(|names| names.single_file);
    let layout = layout.ok_or_else(|| {
        Error::format(path, format!("{family} has no single-file layout that is known here for its {component}"))
    })?;
    let weights = source.weights(component);
    let names: Vec<&str> = weights.iter().map(|(name, _)| name.as_str()).collect();
    let depths = layout.tree.depths_of_canonical(&names);
    for (name, shape) in weights {
        let missing = || Error::tensor(path, &name, "has no place in the single-file layout");
        let (stored, piece) = layout.tree.stored(&name, &depths).ok_or_else(missing)?;
        for stored in layout.tree.copy_of(&stored, &depths).into_iter().chain([stored]) {
            let tensor = tensors.entry(format!("{}{stored}", layout.place));
            let tensor = tensor.or_insert_with(|| Stored { component, weights: Vec::new() });
            tensor.weights.push(Weight { name: name.clone(), shape: shape.clone(), piece });
            tensor.weights.sort_by_key(|weight| match weight.piece {
                Piece::Rows(share) => share.first,
                _ => 0,
            });
        }
    }
    Ok(())
}

struct SingleFile<'s> {
    source: &'s dyn CheckpointSource,
    tensors: BTreeMap<String, Stored>,
    marks: Vec<String>,
    dtype: DType,
}

impl TensorSource for SingleFile<'_> {
    fn entries(&self) -> Vec<Entry> {
        let entry = |(name, tensor): (&String, &Stored)| Entry {
            name: name.clone(),
            dtype: self.dtype.into(),
            shape: tensor.shape(),
        };
        let mark = |name: &String| Entry { name: name.clone(), dtype: self.dtype.into(), shape: vec![0] };
        self.tensors.iter().map(entry).chain(self.marks.iter().map(mark)).collect()
    }

    fn bytes(&self, entry: &Entry) -> Result<Cow<'_, [u8]>> {
        let Some(stored) = self.tensors.get(&entry.name) else { return Ok(Cow::Borrowed(&[])) };
        let mut bytes = Vec::new();
        for Weight { name, shape, piece } in &stored.weights {
            let values = self.source.values(stored.component, name, shape)?;
            if values.shape().iter().product::<usize>() != shape.iter().product::<usize>() {
                let reason = format!("has {:?} values; expected {shape:?}", values.shape());
                return Err(Error::Module { module: name.clone(), reason });
            }
            let values = values.to_dtype(self.dtype);
            match piece {
                Piece::Transposed => bytes.extend(super::transposed(values.bytes(), shape)),
                Piece::Swapped => bytes.extend(super::swapped(values.bytes())),
                _ => bytes.extend_from_slice(values.bytes()),
            }
        }
        Ok(Cow::Owned(bytes))
    }
}
