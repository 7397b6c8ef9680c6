//! Host memory while a base model is loaded: `cargo run --release --bin load_base FILE_OR_FOLDER [fp16|fp32]`. The peak
//! must stay near the weights' own size: no second copy.

use std::time::Instant;

use lora_io::checkpoint::Checkpoint;
use lora_models::networks::{load_text_encoder, load_unet, load_vae};
use lora_models::weights::Held;
use lora_torch::memory::host_memory;
use lora_torch::tch::{Device, Kind};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("expected a file or folder")?;
    let kind = if std::env::args().nth(2).as_deref() == Some("fp32") { Kind::Float } else { Kind::Half };
    let mib = |bytes: u64| bytes >> 20;
    let before = host_memory().ok_or("the kernel does not tell")?;
    let start = Instant::now();
    let checkpoint = Checkpoint::open(path)?;
    let parts = (
        load_text_encoder(&checkpoint, kind, Device::Cpu, Held::default())?,
        load_vae(&checkpoint, kind, Device::Cpu, Held::default())?,
        load_unet(&checkpoint, kind, Device::Cpu, Held::default())?,
    );
    let after = host_memory().ok_or("the kernel does not tell")?;
    println!(
        "loaded in {:.1} s as {kind:?}: resident {} MiB before, {} MiB after, {} MiB at the peak",
        start.elapsed().as_secs_f64(),
        mib(before.resident),
        mib(after.resident),
        mib(after.peak)
    );
    drop(parts);
    Ok(())
}
