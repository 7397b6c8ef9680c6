//! Any bytes as a safetensors file: an error, or tensors that can all be read; and as a checkpoint.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_io::checkpoint::Checkpoint;
use lora_io::safetensors::SafetensorsFile;

fuzz_target!(|bytes: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), bytes).expect("written");
    if let Ok(file) = SafetensorsFile::open(file.path()) {
        for name in file.names() {
            let view = file.get(name).expect("a name of its own");
            let _ = (view.to_host(), view.scalar());
            file.release(name);
        }
    }
    let _ = Checkpoint::open(file.path());
});
