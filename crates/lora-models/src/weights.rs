//! Where a network's weights come from, and the scoped path that lets constructors read like a checkpoint.
//!
//! Sources present weights under diffusers' and transformers' names. [`SyntheticWeights`] makes them from their names
//! alone, the same in every run and in the Python scripts that make the golden files; nothing needs to be stored.

use std::cell::RefCell;
use std::sync::{Arc, Mutex};

use lora_core::random::{fnv1a64, philox4x32};
use lora_core::{DType, HostTensor};
use lora_io::gguf::{Packed, TensorType};
use lora_io::safetensors::StoredDType;
use lora_torch::dry;
use lora_torch::frozen::{FrozenWeight, Storage};
use lora_torch::staging::Staging;
use lora_torch::tch::{Device, Kind, Tensor};

use crate::layers::LayerWeight;
use crate::{Error, Result};

/// A named collection of weights.
pub trait WeightSource {
    /// What to call it in errors: a file or a folder.
    fn name(&self) -> String;
    /// Whether it has a weight.
    fn contains(&self, name: &str) -> bool;
    /// The shape of a weight that it has.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// A weight in its final dtype and place. `shape` is what the architecture needs; a source that
    /// knows the shape may ignore it: the caller compares the two.
    ///
    /// # Errors
    /// Where it cannot be read; out of memory.
    fn load(&self, name: &str, shape: &[usize], kind: Kind, device: Device) -> Result<Tensor>;
    /// A matrix as the blocks that a file holds it in; `None` where the source has its numbers. On a device without
    /// memory its rows may be in any order.
    ///
    /// # Errors
    /// As [`Self::load`].
    fn packed(&self, _name: &str, _device: Device) -> Result<Option<Packed<'_>>> {
        Ok(None)
    }
    /// Says that a weight is not read again: its pages may go.
    fn release(&self, _name: &str) {}
}

/// One side of a weight's shape, where an architecture's sizes are read off; a weight that is missing or has fewer axes
/// is an error that names it.
pub(crate) fn dimension(source: &dyn WeightSource, name: &str, axis: usize) -> Result<usize> {
    let missing = || Error::MissingWeight { source_name: source.name(), name: name.to_owned() };
    let shape = source.shape(name).ok_or_else(missing)?;
    shape.get(axis).copied().ok_or_else(|| Error::WeightShape {
        source_name: source.name(),
        name: name.to_owned(),
        expected: vec![1; axis + 1],
        found: shape.clone(),
    })
}

/// Layers' weights of fewer elements are not worth storing otherwise, or elsewhere.
pub const SMALL: usize = 1024;

/// How a network holds its weights.
#[derive(Debug, Clone)]
pub enum Held {
    /// They do not change.
    Frozen(Frozen),
    /// They are trained: f32 leaves that require gradients, cast to the compute dtype where they are used.
    Trained(TrainedWeights),
}

impl Default for Held {
    fn default() -> Self {
        Self::Frozen(Frozen::default())
    }
}

/// How frozen weights of layers are held; what is not a layer's weight (norms, biases) is in the compute dtype on the
/// device. Tables of words are on the device too, in few bytes ([`Weights::tables`]).
#[derive(Debug, Clone, Default)]
pub struct Frozen {
    /// In fewer bytes, where they are not small; in the compute dtype without.
    pub storage: Option<Storage>,
    /// Without a storage: those that a file holds in blocks (GGUF's) stay as they are.
    pub packed: bool,
    /// In host memory, from where they pass through this ring.
    pub staging: Option<Staging>,
}

impl Frozen {
    /// In fewer bytes, or as the file holds them where that is in blocks, or in the compute dtype.
    pub fn stored(storage: Option<Storage>) -> Self {
        Self { packed: storage.is_none(), storage, staging: None }
    }
}

/// The trained weights of a network, collected while it is built: names as the source has them, in the constructor's
/// order.
#[derive(Debug, Clone, Default)]
pub struct TrainedWeights(Arc<Mutex<Vec<(String, Tensor)>>>);

impl TrainedWeights {
    /// All of them, the very tensors that the network computes with.
    pub fn all(&self) -> Vec<(String, Tensor)> {
        let list = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        list.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    fn add(&self, name: String, tensor: &Tensor) {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((name, tensor.shallow_clone()));
    }
}

/// A source, a prefix, and where weights go.
#[derive(Clone)]
pub struct Weights<'s> {
    source: &'s dyn WeightSource,
    prefix: String,
    kind: Kind,
    device: Device,
    held: Held,
}

impl std::fmt::Debug for Weights<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weights({}, {}, {:?}, {:?})", self.source.name(), self.prefix, self.kind, self.device)
    }
}

impl<'s> Weights<'s> {
    /// The root of a source; tensors will be of `kind` on `device`.
    pub fn new(source: &'s dyn WeightSource, kind: Kind, device: Device) -> Self {
        Self { source, prefix: String::new(), kind, device, held: Held::default() }
    }

    /// Weights are held in this way.
    #[must_use]
    pub fn held(self, held: Held) -> Self {
        Self { held, ..self }
    }

    /// The same for tables of words, an embedding or a head. Frozen ones are held as layers are, but on the device, and
    /// in 8-bit integers where layers are in 4 bits or in 8-bit floats: a row has one factor there, so that it can be
    /// looked up by itself, and words that are seldom used keep their small differences.
    #[must_use]
    pub fn tables(&self) -> Self {
        let held = match &self.held {
            Held::Frozen(Frozen { storage, packed, .. }) => {
                let storage = storage.map(|own| match own {
                    Storage::Nf4 | Storage::Float8 => Storage::Int8,
                    Storage::Half | Storage::BFloat16 | Storage::Int8 => own,
                });
                Held::Frozen(Frozen { storage, packed: *packed, staging: None })
            }
            trained @ Held::Trained(_) => trained.clone(),
        };
        Self { held, ..self.clone() }
    }

    /// The same for the few layers of a network that every number passes, or that say how all others are scaled: its
    /// way in, its way out, what embeds times and pooled text. Frozen ones are in the compute dtype on the device, however
    /// the others are held.
    #[must_use]
    pub(crate) fn plain(&self) -> Self {
        let held = match &self.held {
            Held::Frozen(_) => Held::default(),
            trained @ Held::Trained(_) => trained.clone(),
        };
        Self { held, ..self.clone() }
    }

    /// Whether weights are trained.
    pub(crate) fn is_trained(&self) -> bool {
        matches!(self.held, Held::Trained(_))
    }

    /// Whether frozen layers live in host memory.
    pub(crate) fn in_host(&self) -> bool {
        matches!(&self.held, Held::Frozen(Frozen { staging: Some(_), .. }))
    }

    /// The weight of a layer, held as was asked for; small frozen ones are in the compute dtype on the device.
    pub(crate) fn layer(&self, name: &str, shape: &[usize]) -> Result<LayerWeight> {
        if let Some(weight) = self.packed(name, shape)? {
            return Ok(LayerWeight::Frozen(weight));
        }
        let weight = self.tensor(name, shape)?;
        self.hold(name, weight)
    }

    /// A matrix in the blocks of its file, where it has such and is to stay in them.
    fn packed(&self, name: &str, shape: &[usize]) -> Result<Option<FrozenWeight>> {
        let Held::Frozen(Frozen { storage: None, packed: true, staging }) = &self.held else { return Ok(None) };
        let path = self.path(name);
        let Some(stored) = self.source.packed(&path, self.device)? else { return Ok(None) };
        let (TensorType::Blocks(blocks), &[outputs, inputs]) = (stored.kind, stored.shape) else {
            return Ok(None);
        };
        if stored.shape != shape {
            let (source_name, expected, found) = (self.source.name(), shape.to_vec(), stored.shape.to_vec());
            return Err(Error::WeightShape { source_name, name: path, expected, found });
        }
        let weight = FrozenWeight::packed(&stored.bytes, blocks, [outputs, inputs], self.kind, self.device)?;
        self.source.release(&path);
        Ok(Some(match staging {
            Some(staging) if outputs * inputs >= SMALL => weight.staged(staging)?,
            _ => weight,
        }))
    }

    /// The same of a tensor that is there already: a weight, or a part of a trained leaf.
    pub(crate) fn hold(&self, name: &str, weight: Tensor) -> Result<LayerWeight> {
        let Held::Frozen(Frozen { storage, staging, .. }) = &self.held else {
            return Ok(LayerWeight::Trained { leaf: weight, kind: self.kind });
        };
        let large = weight.dim() >= 2 && weight.numel() >= SMALL;
        let weight = match storage {
            Some(storage) if large => {
                FrozenWeight::stored(&weight, *storage).map_err(|error| self.refused(name, error))?
            }
            _ => FrozenWeight::plain(weight),
        };
        Ok(LayerWeight::Frozen(match staging {
            Some(staging) if large => weight.staged(staging)?,
            _ => weight,
        }))
    }

    /// What the network computes in.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it computes.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// Whether the source has a weight of this scope.
    pub fn contains(&self, name: &str) -> bool {
        self.source.contains(&self.path(name))
    }

    /// The scope below this one.
    #[must_use]
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: self.path(name), ..self.clone() }
    }

    /// The scope's dotted path.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// A weight of this scope, with the shape that its place needs: in the compute dtype, or a trained leaf in f32.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] where there is none of this name, [`Error::WeightShape`] where it has another shape;
    /// out of memory.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let path = self.checked(name, shape)?;
        let Held::Trained(list) = &self.held else { return self.source.load(&path, shape, self.kind, self.device) };
        let leaf = self.source.load(&path, shape, Kind::Float, self.device)?.f_set_requires_grad(true)?;
        list.add(path, &leaf);
        Ok(leaf)
    }

    /// A frozen weight of this scope, of which a device is given parts, in host memory and the compute dtype. In a dry run it has
    /// the shape and one number.
    ///
    /// # Errors
    /// As of [`Self::tensor`].
    pub(crate) fn in_host_memory(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let path = self.checked(name, shape)?;
        if !dry::is_dry(self.device) {
            return self.source.load(&path, shape, self.kind, Device::Cpu);
        }
        let shape: Vec<i64> = shape.iter().map(|&side| side as i64).collect();
        Ok(Tensor::f_zeros([1], (self.kind, Device::Cpu))?.f_expand(shape, false)?)
    }

    /// The path of a weight that the source has, of this shape where it says one.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<String> {
        let path = self.path(name);
        if !self.source.contains(&path) {
            return Err(Error::MissingWeight { source_name: self.source.name(), name: path });
        }
        if let Some(found) = self.source.shape(&path)
            && found != shape
        {
            return Err(Error::WeightShape {
                source_name: self.source.name(),
                name: path,
                expected: shape.to_vec(),
                found,
            });
        }
        Ok(path)
    }

    fn refused(&self, name: &str, error: lora_torch::Error) -> Error {
        match error {
            source @ lora_torch::Error::Storage { .. } => {
                Error::Storage { source_name: self.source.name(), name: self.path(name), source: Box::new(source) }
            }
            other => other.into(),
        }
    }

    fn path(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}

/// A weight's name and shape.
pub type NamedShape = (String, Vec<usize>);

/// A source that gives tensors without elements: a network built from it has every layer in its place and takes no
/// memory, and shapes are checked all the same. It keeps a list of what was asked for.
pub struct ShapesOnly<'s> {
    source: &'s dyn WeightSource,
    asked: RefCell<Vec<NamedShape>>,
}

impl std::fmt::Debug for ShapesOnly<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ShapesOnly({})", self.source.name())
    }
}

impl<'s> ShapesOnly<'s> {
    /// The shapes of another source.
    pub fn new(source: &'s dyn WeightSource) -> Self {
        Self { source, asked: RefCell::default() }
    }

    /// Names and shapes of all weights asked for so far: the architecture's complete list once a network is built.
    pub fn asked(&self) -> Vec<NamedShape> {
        self.asked.borrow().clone()
    }
}

impl WeightSource for ShapesOnly<'_> {
    fn name(&self) -> String {
        self.source.name()
    }

    fn contains(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.source.shape(name)
    }

    fn load(&self, name: &str, shape: &[usize], kind: Kind, device: Device) -> Result<Tensor> {
        self.asked.borrow_mut().push((name.to_owned(), shape.to_vec()));
        Ok(Tensor::f_empty([0], (kind, device))?)
    }
}

impl WeightSource for lora_io::checkpoint::ComponentWeights {
    fn name(&self) -> String {
        self.path().display().to_string()
    }

    fn contains(&self, name: &str) -> bool {
        self.contains(name)
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shape(name).map(<[usize]>::to_vec)
    }

    fn packed(&self, name: &str, device: Device) -> Result<Option<Packed<'_>>> {
        Ok(if dry::is_dry(device) { self.packed_as_stored(name)? } else { self.packed(name)? })
    }

    fn release(&self, name: &str) {
        self.release(name);
    }

    /// Read from the memory map straight into its final dtype and place; the map's pages are given back at once.
    fn load(&self, name: &str, shape: &[usize], kind: Kind, device: Device) -> Result<Tensor> {
        let Some(view) = self.view(name)? else {
            if dry::is_dry(device) {
                // Nothing is dequantised for nobody.
                let shape: Vec<i64> = shape.iter().map(|&side| side as i64).collect();
                return Ok(Tensor::f_empty(shape, (kind, device))?);
            }
            let values = self.values(name)?;
            self.release(name);
            let shape = values.shape();
            let stored = match values.dtype() {
                DType::F16 => Kind::Half,
                DType::BF16 => Kind::BFloat16,
                _ => Kind::Float,
            };
            return Ok(lora_torch::tensor::from_bytes(name, values.bytes(), stored, shape, kind, device)?);
        };
        let stored = match view.dtype() {
            StoredDType::F16 => Kind::Half,
            StoredDType::BF16 => Kind::BFloat16,
            StoredDType::F32 => Kind::Float,
            StoredDType::F64 => Kind::Double,
            StoredDType::F8E4M3 | StoredDType::F8E5M2 => {
                // Every 8-bit float is a number of fp16.
                let values = view.to_host()?;
                self.release(name);
                return Ok(lora_torch::tensor::from_bytes(
                    name,
                    values.bytes(),
                    Kind::Half,
                    values.shape(),
                    kind,
                    device,
                )?);
            }
            other => {
                return Err(Error::Architecture {
                    source_name: self.path().display().to_string(),
                    reason: format!(
                        "weight `{name}` is stored as {other}; expected F16, BF16, F32, F64 or an 8-bit float"
                    ),
                });
            }
        };
        let tensor = lora_torch::tensor::from_bytes(name, view.bytes(), stored, view.shape(), kind, device)?;
        self.release(name);
        Ok(tensor)
    }
}

/// Weights made from their names by Philox4x32-10: for tests, benches and demonstrations, where the architecture
/// matters and the values do not. The key is the FNV-1a hash of `component.name`; values are uniform with the variance
/// 1 / fan-in, norms' weights 1 ± 0.1, biases ± 0.05.
#[derive(Debug)]
pub struct SyntheticWeights {
    component: &'static str,
    made: RefCell<Vec<(String, Vec<usize>)>>,
}

impl SyntheticWeights {
    /// Weights of a component, `unet`, `vae` or `text_encoder`.
    pub fn new(component: &'static str) -> Self {
        Self { component, made: RefCell::default() }
    }

    /// Names and shapes of all weights asked for so far: the architecture's complete list once a network is built.
    pub fn made(&self) -> Vec<(String, Vec<usize>)> {
        self.made.borrow().clone()
    }

    /// The values of one weight.
    #[expect(clippy::missing_panics_doc, reason = "there are as many values as the shape has")]
    pub fn values(&self, name: &str, shape: &[usize]) -> HostTensor {
        let full = format!("{}.{name}", self.component);
        let uniform = synthetic_uniform(&full, shape.iter().product());
        // Norms' weights, and variances.
        let values: Vec<f32> = if shape.len() == 1 && (name.ends_with(".weight") || name.ends_with(".running_var")) {
            uniform.map(|u| 1.0 + 0.1 * u).collect()
        } else if name.ends_with(".bias") || name.ends_with(".running_mean") {
            uniform.map(|u| 0.05 * u).collect()
        } else {
            let fan_in: usize = shape[1..].iter().product();
            let bound = (3.0 / fan_in as f64).sqrt() as f32;
            uniform.map(|u| bound * u).collect()
        };
        HostTensor::from_f32(shape, values).expect("as many values as the shape has")
    }
}

/// `count` numbers in `[-1, 1)` that belong to a name.
pub fn synthetic_uniform(name: &str, count: usize) -> impl Iterator<Item = f32> + use<> {
    let hash = fnv1a64(name.as_bytes());
    let key = [hash as u32, (hash >> 32) as u32];
    (0..count.div_ceil(4) as u64)
        .flat_map(move |block| philox4x32([block as u32, (block >> 32) as u32, 0, 0], key))
        .map(|word| (word >> 8) as f32 * (1.0 / (1u32 << 23) as f32) - 1.0)
        .take(count)
}

impl WeightSource for SyntheticWeights {
    fn name(&self) -> String {
        format!("synthetic {}", self.component)
    }

    fn contains(&self, _name: &str) -> bool {
        true
    }

    fn shape(&self, _name: &str) -> Option<Vec<usize>> {
        None
    }

    fn load(&self, name: &str, shape: &[usize], kind: Kind, device: Device) -> Result<Tensor> {
        self.made.borrow_mut().push((name.to_owned(), shape.to_vec()));
        let host = self.values(name, shape);
        Ok(lora_torch::tensor::from_host(&host, device)?.f_to_kind(kind)?)
    }
}
