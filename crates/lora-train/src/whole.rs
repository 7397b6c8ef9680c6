//! Whole networks that are trained (`train = full`): every weight of the U-Net and, where asked for, of the text encoder.
//! Adapters are `trainable`'s.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Component, DType, HostTensor};
use lora_io::checkpoint::{Checkpoint, Part, Replaced, write_single_file};
use lora_models::weights::TrainedWeights;
use lora_torch::tch::Tensor;
use lora_torch::tensor::to_host;

use crate::Result;
use crate::parameters::ParameterList;

/// The weights of the networks that are trained.
#[derive(Debug, Default)]
pub struct WholeNetworks {
    weights: Vec<(Part, String, Tensor)>,
}

impl WholeNetworks {
    /// Takes a network's weights into the list of what is trained.
    pub fn add(&mut self, part: Part, weights: &TrainedWeights, parameters: &mut ParameterList) -> Result<()> {
        let component = match part {
            Part::TextEncoder => Component::TextEncoder,
            _ => Component::Unet,
        };
        for (name, leaf) in weights.all() {
            parameters.add(component, format!("{}.{name}", part.folder()), false, &leaf)?;
            self.weights.push((part, name, leaf));
        }
        Ok(())
    }

    /// Number of weight tensors.
    pub fn tensors(&self) -> usize {
        self.weights.len()
    }

    /// A copy of the weights in host memory.
    pub fn export(&self) -> Result<BTreeMap<(Part, String), HostTensor>> {
        self.weights.iter().map(|(part, name, leaf)| Ok(((*part, name.clone()), to_host(leaf)?))).collect()
    }

    /// Writes a whole checkpoint in the single-file layout: these weights, and the base's own for what was not trained.
    pub fn write(
        &self,
        path: &Path,
        base: &Checkpoint,
        dtype: DType,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        write_single_file(path, &Replaced { checkpoint: base, weights: self.export()? }, dtype, metadata)?;
        Ok(())
    }
}
