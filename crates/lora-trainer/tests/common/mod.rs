//! The command `lora` with this crate's program behind it, and what tests train on.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::Path;
use std::process::Command;

use lora_core::DType;
use lora_models::synthetic::SyntheticModel;

/// `lora`, which becomes the program under test. Cargo builds it beside that one with all of the workspace, or with
/// `cargo test -p lora-train-cli -p lora-trainer`.
pub(crate) fn lora() -> Command {
    let trainer = Path::new(env!("CARGO_BIN_EXE_lora-trainer"));
    let lora = trainer.with_file_name(format!("lora{}", std::env::consts::EXE_SUFFIX));
    assert!(lora.is_file(), "{} is missing: cargo test -p lora-train-cli -p lora-trainer", lora.display());
    let mut command = Command::new(lora);
    command.env("LORA_TRAINER", trainer).env_remove("LORA_API_KEY");
    command
}

/// A folder with a tiny base, four pictures and a configuration.
pub(crate) fn workspace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    SyntheticModel::tiny().write(folder.path().join("base.safetensors"), DType::F16).unwrap();
    std::fs::create_dir(folder.path().join("data")).unwrap();
    for index in 0..4u8 {
        let picture = image::RgbImage::from_pixel(64, 64, image::Rgb([60 * index, 90, 120]));
        picture.save(folder.path().join(format!("data/{index}.png"))).unwrap();
        std::fs::write(folder.path().join(format!("data/{index}.txt")), format!("colour {index}")).unwrap();
    }
    let config = "base_model = \"base.safetensors\"\ntrain_data_dir = \"data\"\noutput_dir = \"out\"\nmax_resolution = 64\n\
                  device = \"cpu\"\nlora_rank = 2\ntarget_modules = [\"q_proj\", \"v_proj\"]\nmax_train_steps = 2\n";
    std::fs::write(folder.path().join("config.toml"), config).unwrap();
    folder
}
