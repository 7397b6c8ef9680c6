//! The golden files of `tests/golden/variants`: one adapted layer of a peer each, with what the peer wrote and computed.
//! Used by the tests of this crate and of `lora-train`.

#![allow(dead_code, reason = "no test uses all of it")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_core::backend::{Backend, CpuBackend};
use lora_core::random::Stream;
use lora_core::{AdapterModule, HostTensor, LayerGeometry};
use lora_io::adapter;
use lora_io::safetensors::{Entry, SafetensorsFile, StoredDType, TensorSource, write};

/// One file.
pub(crate) struct Golden {
    pub(crate) name: String,
    pub(crate) tensors: BTreeMap<String, HostTensor>,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl Golden {
    pub(crate) fn open(path: &Path) -> Self {
        let file = SafetensorsFile::open(path).unwrap();
        let tensor = |name: &str| {
            let view = file.get(name).unwrap();
            // Flags are whole numbers in the peers' files.
            match view.shape() {
                [] => HostTensor::from_f32([], vec![view.scalar().unwrap() as f32]).unwrap(),
                _ => view.to_host().unwrap(),
            }
        };
        let tensors = file.names().map(|name| (name.to_owned(), tensor(name))).collect();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        Self { name, tensors, metadata: file.metadata().clone() }
    }

    /// All of them whose name starts so, sorted.
    pub(crate) fn all(start: &str) -> Vec<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lora-io/tests/golden/variants");
        let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.file_name().unwrap().to_string_lossy().starts_with(start));
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        paths.sort();
        paths.iter().map(|path| Self::open(path)).collect()
    }

    pub(crate) fn geometry(&self) -> LayerGeometry {
        let shape = self.tensors["weight"].shape();
        let number = |key: &str| self.metadata[key].parse::<usize>().unwrap();
        match self.metadata["kind"].as_str() {
            "linear" => LayerGeometry::linear(shape[1], shape[0]),
            "embedding" => LayerGeometry::Embedding { entries: shape[0], width: shape[1] },
            "norm" => LayerGeometry::Norm { features: shape[0] },
            _ => LayerGeometry::Conv2d {
                in_channels: shape[1] * number("groups"),
                out_channels: shape[0],
                kernel: shape[2],
                stride: number("stride"),
                padding: number("padding"),
                groups: number("groups"),
            },
        }
    }

    /// The module, read by this crate from a file as the peer writes it. With `gradients` the trained tensors hold their
    /// gradients instead.
    pub(crate) fn module(&self, gradients: bool) -> lora_io::Result<AdapterModule> {
        let folder = tempfile::tempdir().unwrap();
        let peft = self.metadata["peer"].starts_with("peft");
        let mut tensors = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            let Some(key) = name.strip_prefix("file.") else { continue };
            let tensor = match self.tensors.get(&format!("grad.{key}")) {
                Some(gradient) if gradients => gradient,
                _ => tensor,
            };
            let key = match (peft, key.starts_with("base_model.")) {
                (true, true) => key.to_owned(),
                (true, false) => format!("base_model.model.layer.{key}"),
                (false, _) => format!("lora_unet_mid_block_resnets_0_conv1.{key}"),
            };
            tensors.insert(key, tensor.clone());
        }
        let path = match peft {
            true => {
                let mut options: serde_json::Value = serde_json::from_str(&self.metadata["options"]).unwrap();
                if gradients {
                    // What limits values does not limit their gradients.
                    options["coft"] = false.into();
                }
                std::fs::write(folder.path().join("adapter_config.json"), options.to_string()).unwrap();
                folder.path().join("adapter_model.safetensors")
            }
            false => folder.path().join("a.safetensors"),
        };
        write(&path, &tensors, &BTreeMap::new()).unwrap();
        let read = adapter::read(if peft { folder.path() } else { &path })?;
        assert_eq!(read.adapter.modules.len(), 1, "{}", self.name);
        Ok(read.adapter.modules.into_values().next().unwrap())
    }
}

/// Tensors of any type as a source of a file, by their bytes: what [`write`] of host tensors cannot have.
#[derive(Debug, Default)]
pub(crate) struct Raw(pub(crate) Vec<(Entry, Vec<u8>)>);

impl Raw {
    pub(crate) fn with(mut self, name: &str, dtype: StoredDType, shape: &[usize], bytes: Vec<u8>) -> Self {
        self.0.push((Entry { name: name.into(), dtype, shape: shape.to_vec() }, bytes));
        self
    }
}

impl TensorSource for Raw {
    fn entries(&self) -> Vec<Entry> {
        self.0.iter().map(|(entry, _)| entry.clone()).collect()
    }

    fn bytes(&self, entry: &Entry) -> lora_io::Result<Cow<'_, [u8]>> {
        Ok(Cow::Borrowed(&self.0.iter().find(|(own, _)| own == entry).unwrap().1))
    }
}

/// Numbers of a normal distribution, by a seed.
pub(crate) fn random(shape: &[usize], seed: u64) -> HostTensor {
    HostTensor::from_f32(shape, Stream::new(seed).normals(shape.iter().product())).unwrap()
}

/// Writes tensors without metadata, and the folders on the way.
pub(crate) fn file(path: &Path, tensors: &[(&str, HostTensor)]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let tensors: BTreeMap<String, HostTensor> =
        tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
    write(path, &tensors, &BTreeMap::new()).unwrap();
}

/// One tensor of a file.
pub(crate) fn tensor(path: &Path, name: &str) -> HostTensor {
    SafetensorsFile::open(path).unwrap().get(name).unwrap().to_host().unwrap()
}

/// `scale · up · down` of two matrices.
pub(crate) fn product(up: &HostTensor, down: &HostTensor, scale: f64) -> HostTensor {
    CpuBackend.scale(&CpuBackend.matmul(up, down).unwrap(), scale).unwrap()
}
