//! Writes a base model with made-up weights in the single-file layout, to measure and to try things with:
//! `cargo run --release --bin synthetic_base tiny|full FILE`. `full` has Stable Diffusion 1.5's own sizes (2.1 GB).

use lora_core::DType;
use lora_models::synthetic::SyntheticModel;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (model, path) = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["tiny", path] => (SyntheticModel::tiny(), (*path).to_owned()),
        ["full", path] => (SyntheticModel::full(), (*path).to_owned()),
        _ => return Err("expected `tiny FILE` or `full FILE`".into()),
    };
    model.write(&path, DType::F16)?;
    println!("{path}: random weights, fp16");
    Ok(())
}
