//! A file of weights: safetensors, or GGUF under the same names, as image transformers are passed on in few bits.
//!
//! Weights in 8-bit floats may have a scale beside them (`….scale_weight`, `….weight_scale`), which belongs to the weight and
//! is no tensor of the model. What a weight's name means is `family`'s business.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use lora_core::HostTensor;

use crate::family::tree::Share;
use crate::gguf::{GgufFile, MAGIC, TensorType, Value};
use crate::safetensors::scale;
use crate::safetensors::{SafetensorsFile, TensorView};
use crate::{Error, Result};

/// The shape that a tensor of GGUF had before it was made to fit blocks: this, and its name.
const ORIGINAL_SHAPE: &str = "comfy.gguf.orig_shape.";

/// An open file.
#[derive(Debug)]
pub(crate) enum WeightFile {
    /// Numbers.
    Safetensors(SafetensorsFile),
    /// Numbers or blocks, and shapes that some had before.
    Gguf(GgufFile, BTreeMap<String, Vec<usize>>),
}

/// Whether a file begins as GGUF does.
pub(super) fn is_gguf(path: &Path) -> Result<bool> {
    let mut start = [0; 4];
    let mut file = File::open(path).map_err(Error::io(path, "open the base model"))?;
    // A file of fewer bytes is not.
    Ok(file.read_exact(&mut start).is_ok() && &start == MAGIC)
}

/// A side of a shape.
fn count(value: &Value) -> Option<usize> {
    match value {
        Value::Unsigned(number) => usize::try_from(*number).ok(),
        Value::Signed(number) => usize::try_from(*number).ok(),
        _ => None,
    }
}

impl WeightFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        if !is_gguf(path)? {
            return Ok(Self::Safetensors(SafetensorsFile::open(path)?));
        }
        let file = GgufFile::open(path)?;
        let mut shapes = BTreeMap::new();
        for name in file.names() {
            let Some(sides) = file.elements(&format!("{ORIGINAL_SHAPE}{name}")) else { continue };
            let sides: Vec<usize> = sides.iter().filter_map(count).collect();
            let elements = |shape: &[usize]| shape.iter().try_fold(1usize, |all, &side| all.checked_mul(side));
            if elements(&sides) != elements(file.shape(name).unwrap_or_default()) {
                let reason = format!("has the shape {:?} and another before: {sides:?}", file.shape(name));
                return Err(Error::tensor(path, name, reason));
            }
            shapes.insert(name.to_owned(), sides);
        }
        Ok(Self::Gguf(file, shapes))
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => file.path(),
            Self::Gguf(file, _) => file.path(),
        }
    }

    /// Names of the weights. A scale that belongs to one of them is not among them.
    pub(super) fn names(&self) -> Vec<&str> {
        match self {
            Self::Safetensors(file) => file.names().filter(|name| !scale::belongs_to_another(file, name)).collect(),
            Self::Gguf(file, _) => file.names().collect(),
        }
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        match self {
            Self::Safetensors(file) => file.shape(name),
            Self::Gguf(file, shapes) => shapes.get(name).map(Vec::as_slice).or_else(|| file.shape(name)),
        }
    }

    /// Names and shapes of the weights.
    pub(super) fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.names().into_iter().map(|name| (name, self.shape(name).unwrap_or_default()))
    }

    /// The header's free text of safetensors.
    pub(super) fn metadata(&self) -> BTreeMap<String, String> {
        match self {
            Self::Safetensors(file) => file.metadata().clone(),
            Self::Gguf(..) => BTreeMap::new(),
        }
    }

    /// What a tensor's numbers are stored as, in words.
    pub(super) fn type_name(&self, name: &str) -> Option<String> {
        match self {
            Self::Safetensors(file) => file.get(name).ok().map(|view| view.dtype().name().to_owned()),
            Self::Gguf(file, _) => file.tensor_type(name).map(|kind| kind.to_string()),
        }
    }

    /// A tensor in the map of safetensors whose numbers are all there is to it: `None` in GGUF, and for one with a scale.
    pub(super) fn view(&self, name: &str) -> Result<Option<TensorView<'_>>> {
        match self {
            Self::Safetensors(file) if scale::of(file, name).is_none() => file.get(name).map(Some),
            _ => Ok(None),
        }
    }

    /// A tensor's blocks or numbers in GGUF.
    pub(super) fn blocks(&self, name: &str) -> Result<Option<(TensorType, &[u8])>> {
        match self {
            Self::Gguf(file, _) => file.blocks(name).map(Some),
            Self::Safetensors(_) => Ok(None),
        }
    }

    /// Rows of a tensor as numbers: F32, F16 and BF16 as they are, blocks and scaled numbers in f32.
    pub(super) fn rows(&self, name: &str, rows: Option<Range<usize>>) -> Result<HostTensor> {
        let shape = self.shape(name).unwrap_or_default();
        let all = shape.first().copied().unwrap_or(1);
        let rows = rows.unwrap_or(0..all);
        let shape: Vec<usize> = match shape {
            [] => Vec::new(),
            [_, rest @ ..] => [&[rows.len()], rest].concat(),
        };
        match self {
            Self::Safetensors(file) => scale::rows(file, name, rows),
            Self::Gguf(file, shapes) => {
                let (kind, bytes) = file.blocks(name)?;
                let wrong = |error: lora_core::Error| Error::tensor(file.path(), name, error.to_string());
                let part = |length: usize| rows.start * (length / all.max(1))..rows.end * (length / all.max(1));
                if shapes.contains_key(name) {
                    // A row need not be whole blocks.
                    let whole = file.tensor(name)?;
                    let values = whole.to_f32()[part(whole.elements())].to_vec();
                    return HostTensor::from_f32(shape, values).map_err(wrong);
                }
                HostTensor::new(shape, kind.decode(&bytes[part(bytes.len())])).map_err(wrong)
            }
        }
    }

    /// Tells the kernel that pages of a part of a tensor are not needed any more.
    pub(super) fn release(&self, name: &str, share: Share) {
        match self {
            Self::Safetensors(file) => file.release_part(name, share),
            // Of the parts of a tensor the last one releases all.
            Self::Gguf(file, _) if share.first + share.count == share.of => file.release(name),
            Self::Gguf(..) => {}
        }
    }

    /// All that a weight is made of, for hashes: its type, and its bytes as they are stored, with those of its scale.
    pub(super) fn stored(&self, name: &str) -> Result<(String, Vec<&[u8]>)> {
        match self {
            Self::Safetensors(file) => {
                let view = file.get(name)?;
                let scale = scale::of(file, name).map(|scale| file.get(&scale).map(|view| view.bytes())).transpose()?;
                Ok((view.dtype().to_string(), [Some(view.bytes()), scale].into_iter().flatten().collect()))
            }
            Self::Gguf(file, _) => {
                let (kind, bytes) = file.blocks(name)?;
                Ok((kind.to_string(), vec![bytes]))
            }
        }
    }

    /// A tensor that says how weights of few bits are scaled and that nothing here applies.
    pub(super) fn unread_scale(&self) -> Option<&str> {
        let Self::Safetensors(file) = self else { return None };
        file.names().find(|name| scale::is_unread(file, name))
    }
}
