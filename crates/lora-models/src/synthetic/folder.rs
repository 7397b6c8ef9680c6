//! A diffusers folder of components with made-up weights, or with none.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Component, DType, HostTensor};
use lora_io::safetensors::write;
use serde_json::Value;

use super::{NamedShape, write_header};
use crate::Result;
use crate::weights::SyntheticWeights;

/// A component: its `config.json`, and names and shapes of its weights.
pub(super) struct Part {
    pub(super) component: Component,
    pub(super) config: Value,
    pub(super) weights: Vec<NamedShape>,
}

impl Part {
    /// The name of its file.
    fn file(&self) -> &'static str {
        if self.component.is_text_encoder() { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" }
    }

    /// Writes it in `dtype`.
    pub(super) fn write(self, folder: &Path, dtype: DType) -> Result<()> {
        let at = folder.join(self.component.name());
        let place = || -> std::io::Result<()> {
            std::fs::create_dir_all(&at)?;
            std::fs::write(at.join("config.json"), self.config.to_string())
        };
        place().map_err(|source| lora_io::Error::Io { path: at.clone(), action: "write", source })?;
        let (file, synthetic) = (self.file(), SyntheticWeights::new(self.component.name()));
        let value = |(name, shape): NamedShape| {
            let values = synthetic.values(&name, &shape).to_dtype(dtype);
            (name, values)
        };
        let tensors: BTreeMap<String, HostTensor> = self.weights.into_iter().map(value).collect();
        Ok(write(at.join(file), &tensors, &BTreeMap::new()).map(drop)?)
    }

    /// Writes its header in 16-bit numbers, and no weights.
    pub(super) fn write_header(self, folder: &Path) -> Result<()> {
        let (at, file) = (folder.join(self.component.name()), self.file());
        write_header(&at, file, &self.config.to_string(), "BF16", self.weights)
    }
}
