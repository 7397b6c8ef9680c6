//! Any text as the `adapter_config.json` of a sound PEFT adapter.

#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use lora_core::HostTensor;
use lora_io::adapter;
use lora_io::consumers::{Inventory, opinions};
use lora_io::safetensors::write;

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let tensor = |name: &str, shape: [usize; 2]| {
        (format!("base_model.model.model.layers.0.self_attn.q_proj.{name}.weight"), HostTensor::zeros(shape))
    };
    let tensors = BTreeMap::from([tensor("lora_A", [2, 4]), tensor("lora_B", [4, 2])]);
    write(folder.path().join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).expect("written");
    std::fs::write(folder.path().join("adapter_config.json"), bytes).expect("written");
    let _ = adapter::read(folder.path());
    if let Ok(inventory) = Inventory::read(folder.path()) {
        opinions(&inventory);
    }
});
