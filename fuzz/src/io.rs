//! Readers of lora-io: weights, adapters, checkpoints.

use std::collections::BTreeMap;
use std::fs;

use lora_core::{DType, HostTensor};
use lora_io::AdapterInfo;
use lora_io::adapter::{self, Format};
use lora_io::checkpoint::Checkpoint;
use lora_io::consumers::{Inventory, opinions};
use lora_io::gguf::names::Architecture;
use lora_io::gguf::{GgufFile, LanguageModel};
use lora_io::safetensors::{SafetensorsFile, write};

use crate::{choose, empty_folder, file};

/// Any bytes as a safetensors file: an error, or tensors that can all be read; and as a checkpoint.
pub fn safetensors(bytes: &[u8]) {
    let path = file("a.safetensors", bytes);
    if let Ok(file) = SafetensorsFile::open(&path) {
        for name in file.names() {
            let view = file.get(name).expect("a name of its own");
            let _ = (view.to_host(), view.scalar());
            file.release(name);
        }
    }
    let _ = Checkpoint::open(&path);
}

/// Any bytes as a GGUF file: an error, or values and tensors that can all be read; and as a language model.
pub fn gguf(bytes: &[u8]) {
    let path = file("a.gguf", bytes);
    if let Ok(file) = GgufFile::open(&path) {
        file.names().for_each(|name| drop(file.tensor(name)));
        file.values().for_each(|(key, _)| drop(file.texts(key)));
    }
    if let Ok(model) = LanguageModel::open(&path) {
        model.names().for_each(|name| drop(model.tensor(name)));
    }
}

/// Any bytes as an adapter file: read, judged by every consumer's rules, written again in every format.
pub fn adapter(bytes: &[u8]) {
    let path = file("adapter.safetensors", bytes);
    if let Ok(inventory) = Inventory::read(&path) {
        opinions(&inventory);
    }
    let _ = AdapterInfo::read(&path);
    if let Ok(read) = adapter::read(&path) {
        let _ = lora_core::health::health(&read.adapter);
        let folder = empty_folder("written");
        for format in Format::ALL {
            let _ = adapter::write(folder.join(format.name()), &read.adapter, format, DType::F16);
        }
    }
}

/// Any text as the `adapter_config.json` of a sound PEFT adapter.
pub fn peft_folder(bytes: &[u8]) {
    let folder = empty_folder("peft");
    let tensor = |name: &str, shape: [usize; 2]| {
        (format!("base_model.model.model.layers.0.self_attn.q_proj.{name}.weight"), HostTensor::zeros(shape))
    };
    let tensors = BTreeMap::from([tensor("lora_A", [2, 4]), tensor("lora_B", [4, 2])]);
    write(folder.join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).expect("written");
    fs::write(folder.join("adapter_config.json"), bytes).expect("written");
    let _ = adapter::read(&folder);
    if let Ok(inventory) = Inventory::read(&folder) {
        opinions(&inventory);
    }
}

/// Any text as the index of a folder's shards, as a part's configuration, or as a language model's.
pub fn checkpoint_folder(bytes: &[u8]) {
    let Some((kind, bytes)) = choose(bytes, &["index", "part", "model", "language"]) else { return };
    let folder = empty_folder("checkpoint");
    let text = |own: &str| if own == kind { bytes } else { b"{}" };
    for part in ["unet", "vae", "text_encoder"] {
        let part = folder.join(part);
        fs::create_dir(&part).expect("created");
        fs::write(part.join("config.json"), text("part")).expect("written");
        fs::write(part.join("diffusion_pytorch_model.safetensors.index.json"), text("index")).expect("written");
    }
    fs::write(folder.join("config.json"), text("model")).expect("written");
    let _ = Checkpoint::open(&folder);
    let _ = Architecture::of_base(&folder);

    let folder = empty_folder("language");
    fs::write(folder.join("config.json"), text("language")).expect("written");
    fs::write(folder.join("model.safetensors.index.json"), text("index")).expect("written");
    let _ = Checkpoint::open(&folder);
    let _ = Architecture::of_base(&folder);
}
