//! Any text as the shard index of a diffusers folder, and as its configuration.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_io::checkpoint::Checkpoint;
use lora_io::gguf::names::Architecture;

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for part in ["unet", "vae", "text_encoder"] {
        let part = folder.path().join(part);
        std::fs::create_dir(&part).expect("created");
        std::fs::write(part.join("config.json"), "{}").expect("written");
        std::fs::write(part.join("diffusion_pytorch_model.safetensors.index.json"), bytes).expect("written");
    }
    std::fs::write(folder.path().join("config.json"), bytes).expect("written");
    let _ = Checkpoint::open(folder.path());
    let _ = Architecture::of_base(folder.path());
});
