//! Mistakes that headers alone show end a run before anything is encoded or loaded, and a plan before it is made.

mod common;

use std::collections::BTreeMap;

use common::{config, workspace};
use lora_core::HostTensor;
use lora_io::safetensors::{self, SafetensorsFile};
use lora_train::plan::plan;
use lora_train::{Error, Plugins, Session};

/// What a run and a plan say; neither may have begun to work.
fn refused(folder: &std::path::Path, keys: &[&str]) -> (Error, String) {
    let mut begun = Vec::new();
    let error =
        Session::prepare(config(folder, keys), &Plugins::default(), &mut |stage| begun.push(stage)).unwrap_err();
    assert!(begun.is_empty(), "{begun:?} came before {error}");
    let planned = plan(&config(folder, keys), &Plugins::default()).unwrap_err().to_string();
    assert_eq!(planned, error.to_string());
    (error, planned)
}

#[test]
fn keys_that_name_no_layer_are_named_all_at_once() {
    let folder = workspace();
    let keys =
        ["target_modules=[\"q_proj\", \"nonsense\"]", "rank_pattern={ nonexistent = 8 }", "alpha_pattern={ gone = 2 }"];
    let (error, text) = refused(folder.path(), &keys);
    assert!(error.is_usage());
    for fragment in ["`target_modules`: `nonsense`", "`rank_pattern`: `nonexistent`", "`alpha_pattern`: `gone`"] {
        assert!(text.contains(fragment), "`{text}` lacks `{fragment}`");
    }
    assert_eq!(text.lines().count(), 3);
    // With the file and the line, where there are any.
    let path = folder.path().join("c.yaml");
    let lines = format!(
        "base_model: {0}/base.safetensors\ntrain_data_dir: {0}/data\noutput_dir: {0}/out\n",
        folder.path().display()
    );
    std::fs::write(&path, lines + "max_resolution: 64\nrank_pattern: {nonexistent: 8}\n").unwrap();
    let config = lora_train::config::TrainConfig::from_file::<&str>(&path, &[]).unwrap();
    let error = plan(&config, &Plugins::default()).unwrap_err().to_string();
    assert!(error.contains("c.yaml:5: `rank_pattern`: `nonexistent`"), "{error}");
}

#[test]
fn a_rank_beyond_every_layer_is_refused_and_one_beyond_some_is_noted() {
    let folder = workspace();
    let (_, text) = refused(folder.path(), &["lora_rank=100000"]);
    assert!(text.contains("`lora_rank`: rank 100000 is more than") && text.contains("directions"), "{text}");
    refused(folder.path(), &["variant=loha", "lora_rank=100000"]);
    // LyCORIS' way to say: all of the layer.
    let session = Session::prepare(
        config(folder.path(), &["variant=lokr", "lora_rank=100000"]),
        &Plugins::default(),
        &mut |_| {},
    );
    assert!(session.is_ok(), "{:?}", session.err());
    // The layers of the tiny base are of 32 to 64 channels.
    let keys = ["target_modules=attention-mlp", "lora_rank=48"];
    let session = Session::prepare(config(folder.path(), &keys), &Plugins::default(), &mut |_| {}).unwrap();
    let notes = session.summary().notes;
    assert!(notes.iter().any(|note| note.contains("rank 48 is more than")), "{notes:?}");
}

#[test]
fn a_base_for_inpainting_and_one_that_is_not_whole_are_refused() {
    let folder = workspace();
    let path = folder.path().join("base.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    let all: BTreeMap<String, HostTensor> =
        names.iter().map(|name| (name.clone(), file.get(name).unwrap().to_host().unwrap())).collect();
    drop(file);
    let first = "model.diffusion_model.input_blocks.0.0.weight";
    let mut nine = all.clone();
    let shape = nine[first].shape().to_vec();
    nine.insert(first.into(), HostTensor::zeros([shape[0], 9, 3, 3]));
    safetensors::write(&path, &nine, &BTreeMap::new()).unwrap();
    let (_, text) = refused(folder.path(), &[]);
    assert!(
        text.contains("base.safetensors") && text.contains("inpainting") && text.contains("9 input channels"),
        "{text}"
    );
    let mut fewer = all;
    let gone = "model.diffusion_model.output_blocks.0.0.in_layers.2.weight";
    fewer.remove(gone).unwrap();
    safetensors::write(&path, &fewer, &BTreeMap::new()).unwrap();
    let (_, text) = refused(folder.path(), &[]);
    assert!(text.contains("missing") && text.contains("up_blocks.0.resnets.0.conv1.weight"), "{text}");
}

#[test]
fn a_lora_to_go_on_from_that_does_not_fit_is_refused() {
    let folder = workspace();
    common::trained(folder.path(), &["max_train_steps=1"]);
    let lora = folder.path().join("out/lora.safetensors");
    let mut session = common::prepare(folder.path(), &[]);
    session.step().unwrap();
    let saved = session.save("first").unwrap();
    drop(session);
    assert!(!lora.exists() || saved.exists());
    let from = format!("init_from={}", saved.display());
    for (key, what) in [
        ("train_text_encoder=false", "train_text_encoder"),
        ("variant=lokr", "`lora` of rank 4"),
        ("target_modules=*attn2*", "does not train"),
    ] {
        let (error, text) = refused(folder.path(), &[&from, key]);
        assert!(error.is_usage() && text.contains("`init_from`") && text.contains(what), "{text}");
    }
    let (_, text) = refused(folder.path(), &["init_from=gone.safetensors"]);
    assert!(text.contains("`init_from`") && text.contains("gone.safetensors"), "{text}");
}
