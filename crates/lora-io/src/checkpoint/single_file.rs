//! Writing a checkpoint in the single-file (LDM) layout, one tensor in memory at a time. Reading is the module above.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Component, DType, HostTensor};

use super::{Checkpoint, LdmNames};
use crate::safetensors::{Entry, TensorSource, write};
use crate::{Error, Result};

/// Where the weights of a checkpoint to be written come from, under diffusers' and transformers' names.
pub trait CheckpointSource {
    /// What the checkpoint is made of.
    fn components(&self) -> Vec<Component>;
    /// Names and shapes of a component's weights.
    fn weights(&self, component: Component) -> Vec<(String, Vec<usize>)>;
    /// One of them.
    fn values(&self, component: Component, name: &str, shape: &[usize]) -> Result<HostTensor>;
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
            None => self.checkpoint.component(component)?.tensor(name)?.to_host(),
        }
    }
}

/// Writes all components into one file with floating-point weights in `dtype`; returns its size in bytes.
pub fn write_single_file(
    path: impl AsRef<Path>,
    source: &dyn CheckpointSource,
    dtype: DType,
    metadata: &BTreeMap<String, String>,
) -> Result<u64> {
    let path = path.as_ref();
    let lists: Vec<_> =
        source.components().into_iter().map(|component| (component, source.weights(component))).collect();
    let names = |wanted: Component| -> Vec<&str> {
        let own = lists.iter().filter(|(component, _)| *component == wanted);
        own.flat_map(|(_, list)| list.iter().map(|(name, _)| name.as_str())).collect()
    };
    let layout = LdmNames::of_diffusers(&names(Component::UNET), &names(Component::VAE));
    let mut tensors = BTreeMap::new();
    for (component, list) in &lists {
        for (name, shape) in list {
            let original = layout
                .original(*component, name)
                .ok_or_else(|| Error::tensor(path, name, "has no place in the single-file layout"))?;
            tensors.insert(original, (*component, name.clone(), shape.clone()));
        }
    }
    write(path, &Layout { source, tensors, dtype }, metadata)
}

struct Layout<'s> {
    source: &'s dyn CheckpointSource,
    tensors: BTreeMap<String, (Component, String, Vec<usize>)>,
    dtype: DType,
}

impl TensorSource for Layout<'_> {
    fn entries(&self) -> Vec<Entry> {
        let entry = |(name, (component, _, shape)): (&String, &(Component, String, Vec<usize>))| {
            // The original keeps the autoencoder's attention as 1×1 convolutions.
            let convolution = *component == Component::VAE && name.contains("mid.attn_1.") && shape.len() == 2;
            let shape = if convolution { [shape.as_slice(), &[1, 1]].concat() } else { shape.clone() };
            Entry { name: name.clone(), dtype: self.dtype.into(), shape }
        };
        self.tensors.iter().map(entry).collect()
    }

    fn bytes(&self, entry: &Entry) -> Result<Cow<'_, [u8]>> {
        let (component, name, shape) = &self.tensors[&entry.name];
        let values = self.source.values(*component, name, shape)?;
        if values.shape().iter().product::<usize>() != shape.iter().product::<usize>() {
            let reason = format!("has {:?} values; expected {shape:?}", values.shape());
            return Err(Error::Module { module: name.clone(), reason });
        }
        Ok(Cow::Owned(values.to_dtype(self.dtype).bytes().to_vec()))
    }
}
