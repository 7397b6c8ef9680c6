//! Whole networks that are trained (`train = full`): every weight of the U-Net and, where asked for, of the text encoder.
//! Adapters are `trainable`'s.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Component, DType, HostTensor};
use lora_io::checkpoint::{Checkpoint, Replaced, write_single_file};
use lora_models::weights::TrainedWeights;
use lora_torch::tch::Tensor;
use lora_torch::tensor::to_host;

use crate::Result;
use crate::parameters::ParameterList;

/// The weights of the networks that are trained.
#[derive(Debug, Default)]
pub(crate) struct TrainedNetworks {
    weights: Vec<(Component, String, Tensor)>,
}

impl TrainedNetworks {
    /// Takes a network's weights into the list of what is trained.
    pub(crate) fn add(
        &mut self,
        component: Component,
        weights: &TrainedWeights,
        parameters: &mut ParameterList,
    ) -> Result<()> {
        for (name, leaf) in weights.all() {
            parameters.add(component, format!("{}.{name}", component.name()), false, &leaf)?;
            self.weights.push((component, name, leaf));
        }
        Ok(())
    }

    /// A copy of the weights in host memory.
    pub(crate) fn export(&self) -> Result<BTreeMap<(Component, String), HostTensor>> {
        let copy =
            |(component, name, leaf): &(Component, String, Tensor)| Ok(((*component, name.clone()), to_host(leaf)?));
        self.weights.iter().map(copy).collect()
    }

    /// Writes a whole checkpoint in the single-file layout: these weights, and the base's own for what was not trained.
    pub(crate) fn write(
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
