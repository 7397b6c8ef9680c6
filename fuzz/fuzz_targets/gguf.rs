//! Any bytes as a GGUF file: an error, or values and tensors that can all be read; and as a language model.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_io::gguf::{GgufFile, LanguageModel};

fuzz_target!(|bytes: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), bytes).expect("written");
    if let Ok(file) = GgufFile::open(file.path()) {
        file.names().for_each(|name| drop(file.tensor(name)));
        file.values().for_each(|(key, _)| drop(file.texts(key)));
    }
    if let Ok(model) = LanguageModel::open(file.path()) {
        model.names().for_each(|name| drop(model.tensor(name)));
    }
});
