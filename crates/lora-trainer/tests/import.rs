//! `lora train` on another trainer's file.

mod common;

use assert_cmd::prelude::*;
use common::lora;
use lora_core::DType;
use lora_models::synthetic::SyntheticModel;
use predicates::prelude::*;
use predicates::str::contains;

const RUN: &str = "pretrained_model_name_or_path = \"base.safetensors\"\ntrain_data_dir = \"data\"\noutput_dir = \"out\"\nresolution = 64\n\
                   network_module = \"networks.lora\"\nnetwork_dim = 2\nmax_train_steps = 2\nlearning_rate = 1e-4\ncaption_extension = \".txt\"\n\
                   ip_noise_gamma = 0.1\nxformers = true\n";

#[test]
fn a_run_of_sd_scripts_is_trained_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    SyntheticModel::tiny().write(folder.path().join("base.safetensors"), DType::F16).unwrap();
    std::fs::create_dir_all(folder.path().join("data/2_colour")).unwrap();
    for index in 0..2u8 {
        let picture = image::RgbImage::from_pixel(64, 64, image::Rgb([90 * index, 90, 120]));
        picture.save(folder.path().join(format!("data/2_colour/{index}.png"))).unwrap();
    }
    std::fs::write(folder.path().join("run.toml"), RUN).unwrap();
    let assert = lora().current_dir(folder.path()).args(["train", "run.toml", "--set", "device=cpu"]).assert();
    assert
        .success()
        .stdout(contains("out/last.safetensors"))
        .stderr(contains("sd-scripts, 11 keys").and(contains("step 2/2")));
    let info = lora().args(["info", "--json"]).arg(folder.path().join("out/last.safetensors")).assert().success();
    let info: serde_json::Value = serde_json::from_slice(&info.get_output().stdout).unwrap();
    assert_eq!(info["metadata"]["ss_network_alpha"], "1.0");
}
