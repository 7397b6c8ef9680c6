//! A base model of a program's own (`examples/custom_base`) is trained, saved, resumed and refused as ours are.

#[path = "../../../examples/examples/custom_base/base.rs"]
mod base;

use std::path::Path;

use base::{DENOISER, PIXEL_DENOISER, write_untrained};
use lora_io::adapter;
use lora_train::base::Bases;
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Session};

/// The layers of the network, in the order of their paths.
const LAYERS: [&str; 6] = ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "first", "last"];

fn plugins() -> Plugins {
    let mut plugins = Plugins::default();
    plugins.register_base(PIXEL_DENOISER).unwrap();
    plugins
}

/// A base and four pictures.
fn workspace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_untrained(&folder.path().join("base.safetensors")).unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    for index in 0..4u8 {
        let picture = image::RgbImage::from_fn(64, 64, |x, y| image::Rgb([index * 60, 4 * x as u8, 4 * y as u8]));
        picture.save(data.join(format!("{index}.png"))).unwrap();
    }
    folder
}

fn config(folder: &Path, keys: &[&str]) -> TrainConfig {
    let path = |name: &str| folder.join(name).display().to_string();
    let adapter = match keys.contains(&"train=full") {
        true => "",
        false => "target_modules: [first, \"blocks.*\", last]\nlora_rank: 4\n",
    };
    let text = format!(
        "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\nmax_resolution: 64\ndevice: cpu\nprecision: fp32\n\
         learning_rate: 5e-3\nbatch_size: 2\nmax_train_steps: 8\nstrongest_noise: 0.8\n{adapter}",
        path("base.safetensors"),
        path("data"),
        path("out"),
    );
    TrainConfig::from_text_with(&text, Format::Yaml, keys, &plugins()).unwrap()
}

fn prepare(folder: &Path, keys: &[&str]) -> Session {
    Session::prepare(config(folder, keys), &plugins(), &mut |_| {}).unwrap()
}

fn refusal(folder: &Path, keys: &[&str]) -> String {
    Session::prepare(config(folder, keys), &plugins(), &mut |_| {}).unwrap_err().to_string()
}

fn losses(session: &mut Session) -> Vec<f64> {
    std::iter::from_fn(|| session.step().unwrap()).map(|report| report.loss).collect()
}

#[test]
fn its_loss_falls_on_pictures_that_it_trains_on() {
    let folder = workspace();
    let mut session = prepare(folder.path(), &["max_train_steps=60"]);
    let validation = session.load_validation(&folder.path().join("data")).unwrap();
    let before = session.validation_loss(&validation).unwrap();
    losses(&mut session);
    let after = session.validation_loss(&validation).unwrap();
    assert!(after < 0.8 * before, "{before} → {after}");
}

#[test]
fn its_key_decides_what_is_trained_on() {
    let folder = workspace();
    let loss = |key: &str| losses(&mut prepare(folder.path(), &["max_train_steps=1", key]))[0];
    assert_eq!(loss("strongest_noise=0.8"), loss("lora_rank=4"), "as the file says");
    assert_ne!(loss("strongest_noise=0.8"), loss("strongest_noise=2.0"));
}

#[test]
fn blocks_that_are_computed_again_give_the_same_steps() {
    let folder = workspace();
    let plain = losses(&mut prepare(folder.path(), &[]));
    assert_eq!(plain, losses(&mut prepare(folder.path(), &["gradient_checkpointing=true"])));
}

#[test]
fn its_run_taken_up_again_is_the_run_that_never_stopped() {
    let folder = workspace();
    let mut at_once = prepare(folder.path(), &[]);
    let all = losses(&mut at_once);
    let file = std::fs::read(at_once.save("a").unwrap()).unwrap();

    let mut killed = prepare(folder.path(), &[]);
    for _ in 0..3 {
        killed.step().unwrap();
    }
    killed.save_state().unwrap();
    killed.step().unwrap();
    drop(killed);
    let mut resumed = prepare(folder.path(), &["resume=true"]);
    assert_eq!(losses(&mut resumed), all[3..]);
    assert!(file == std::fs::read(resumed.save("a").unwrap()).unwrap());
    // Its own key is one that a resumed run agrees on.
    let error = refusal(folder.path(), &["resume=true", "strongest_noise=2.0"]);
    assert!(error.contains("strongest_noise was 0.8, is 2.0"), "{error}");
}

#[test]
fn its_lora_reads_back_with_the_layers_that_were_adapted() {
    let folder = workspace();
    let mut session = prepare(folder.path(), &["save_precision=fp32"]);
    losses(&mut session);
    let path = session.save("a").unwrap();
    let read = adapter::read_among(&path, &plugins().bases.families()).unwrap().adapter;
    let paths: Vec<_> = read.modules.keys().map(|module| (module.component, module.path.as_str())).collect();
    assert_eq!(paths, LAYERS.map(|layer| (DENOISER, layer)));
    let learnt = session.adapter().unwrap().export().unwrap();
    assert!(read.modules == learnt.modules);
    // Another run goes on from there.
    let init = format!("init_from={}", path.display());
    let next = prepare(folder.path(), &[&init]).adapter().unwrap().export().unwrap();
    assert!(next.modules == learnt.modules);
}

#[test]
fn a_whole_network_of_its_own_is_written_as_such_a_base() {
    let folder = workspace();
    let mut session = prepare(folder.path(), &["train=full", "save_precision=fp32"]);
    losses(&mut session);
    let path = session.save("whole").unwrap();
    let trained = plugins().bases.checkpoint(&path).unwrap();
    let before = plugins().bases.checkpoint(&folder.path().join("base.safetensors")).unwrap();
    let weight = |checkpoint: &lora_io::checkpoint::Checkpoint| {
        checkpoint.component(DENOISER).unwrap().tensor("last.weight").unwrap().to_host().unwrap()
    };
    assert_ne!(weight(&trained), weight(&before));
}

#[test]
fn keys_of_other_bases_are_refused_by_name() {
    let folder = workspace();
    let error = refusal(folder.path(), &["noise_offset=0.1"]);
    assert!(error.contains("noise_offset") && error.contains("pixel denoiser"), "{error}");
}

#[test]
fn where_it_is_not_registered_its_file_is_refused() {
    let folder = workspace();
    let error = Bases::default().checkpoint(&folder.path().join("base.safetensors")).unwrap_err().to_string();
    assert!(error.contains("base.safetensors") && error.contains("expected Stable Diffusion 1.x"), "{error}");
}
