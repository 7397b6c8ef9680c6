//! Any bytes as an adapter file: read, judged by every consumer's rules, written again in every format.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_core::DType;
use lora_io::AdapterInfo;
use lora_io::adapter::{self, Format};
use lora_io::consumers::{Inventory, opinions};

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("a.safetensors");
    std::fs::write(&path, bytes).expect("written");
    if let Ok(inventory) = Inventory::read(&path) {
        opinions(&inventory);
    }
    let _ = AdapterInfo::read(&path);
    if let Ok(read) = adapter::read(&path) {
        let _ = lora_core::health::health(&read.adapter);
        for format in Format::ALL {
            let _ = adapter::write(folder.path().join(format.name()), &read.adapter, format, DType::F16);
        }
    }
});
