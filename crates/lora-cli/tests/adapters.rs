//! Commands for finished adapters as a user meets them, on adapters that no training made: those are in `lora-trainer`.

use std::process::Command;

use assert_cmd::prelude::*;
use lora_core::random::Stream;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath};
use lora_io::adapter::{self, Format};
use predicates::str::contains;

fn lora() -> Command {
    Command::cargo_bin("lora").unwrap()
}

#[test]
fn what_is_read_is_not_replaced_and_metadata_follow_the_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let random =
        |shape: &[usize], seed| HostTensor::from_f32(shape, Stream::new(seed).normals(shape.iter().product())).unwrap();
    let module = AdapterModule::of_factors(random(&[4, 8], 1), random(&[8, 4], 2), false, 4, 4.0);
    let path = ModulePath::new(Component::UNET, "mid_block.attentions.0.proj_in");
    let mut adapter = Adapter { modules: [(path, module)].into(), ..Adapter::default() };
    adapter.metadata.insert("ss_network_dim".into(), "4".into());
    adapter.metadata.insert("ss_network_alpha".into(), "4.0".into());
    let file = folder.path().join("a.safetensors");
    adapter::write(&file, &adapter, Format::Kohya, DType::F32).unwrap();
    let before = std::fs::read(&file).unwrap();
    let run = |arguments: &[&str]| lora().current_dir(folder.path()).args(arguments).assert();
    run(&["resize", "a.safetensors", "--rank", "2", "--out", "b.safetensors"]).success();
    let metadata = adapter::read(folder.path().join("b.safetensors")).unwrap().adapter.metadata;
    assert_eq!((metadata["ss_network_dim"].as_str(), metadata["ss_network_alpha"].as_str()), ("2", "2.0"));
    for arguments in [
        &["resize", "a.safetensors", "--rank", "2", "--out", "./a.safetensors"][..],
        &["convert", "a.safetensors", "--to", "diffusers", "--out", "a.safetensors"],
        &["combine", "--lora", "b.safetensors:1", "--lora", "a.safetensors:1", "--out", "a.safetensors"],
        &["merge", "--base", "b.safetensors", "--lora", "a.safetensors", "--out", "a.safetensors"],
        &["extract", "--base", "b.safetensors", "--tuned", "a.safetensors", "--out", "a.safetensors"],
        &["check", "a.safetensors", "--picture", "a.safetensors"],
    ] {
        run(arguments).failure().stderr(contains("which is read"));
        assert_eq!(std::fs::read(&file).unwrap(), before, "{arguments:?}");
    }
}

#[test]
fn adapters_of_language_models_are_combined_into_a_folder_of_pefts() {
    let folder = tempfile::tempdir().unwrap();
    let path = ModulePath::new(Component::LANGUAGE_MODEL, "model.layers.0.self_attn.q_proj");
    let factor =
        |shape: [usize; 2]| HostTensor::from_f32(shape, (0..8).map(|index| index as f32 - 3.0).collect()).unwrap();
    let tensors = [("down".to_owned(), factor([2, 4])), ("up".to_owned(), factor([4, 2]))].into();
    let module = AdapterModule { variant: "lora".into(), tensors, rank: 2, alpha: 2.0 };
    let adapter = Adapter { modules: [(path.clone(), module)].into(), ..Adapter::default() };
    adapter::write(folder.path().join("a"), &adapter, Format::Peft, DType::F32).unwrap();
    let run = |arguments: &[&str]| lora().current_dir(folder.path()).args(arguments).assert();
    run(&["combine", "--lora", "a", "--lora", "a:0.5", "--out", "c"]).success();
    let combined = adapter::read(folder.path().join("c")).unwrap();
    assert_eq!((combined.format, combined.adapter.modules.contains_key(&path)), (Format::Peft, true));
    run(&["resize", "a", "--rank", "1", "--out", "r.safetensors"]).code(2).stderr(contains("is a folder"));
}
