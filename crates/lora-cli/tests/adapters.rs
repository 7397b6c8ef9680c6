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

#[test]
fn rules_and_strengths_that_leave_nothing_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let factor = |shape: [usize; 2]| HostTensor::from_f32(shape, (0..8).map(|index| index as f32).collect()).unwrap();
    let module = AdapterModule::of_factors(factor([2, 4]), factor([4, 2]), false, 2, 2.0);
    let path = ModulePath::new(Component::UNET, "mid_block.attentions.0.proj_in");
    let adapter = Adapter { modules: [(path, module)].into(), ..Adapter::default() };
    adapter::write(folder.path().join("a.safetensors"), &adapter, Format::Kohya, DType::F32).unwrap();
    let run = |arguments: &[&str]| lora().current_dir(folder.path()).args(arguments).assert();
    for rule in [["--rank", "0"], ["--sv-ratio", "0"], ["--sv-fro", "nan"], ["--sv-cumulative", "1.5"]] {
        let arguments = [&["resize", "a.safetensors", "--out", "b.safetensors"][..], &rule].concat();
        run(&arguments).code(2).stderr(contains("expected"));
    }
    run(&["convert", "a.safetensors", "--to", "kohya", "--flatten", "0", "--base", "b", "--out", "c"]).code(2);
    run(&["combine", "a.safetensors:0", "--out", "b.safetensors"]).code(1).stderr(contains("nothing is left"));
}

#[test]
fn a_combined_adapter_says_which_base_it_is_for_and_has_the_format_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let factor = |shape: [usize; 2]| HostTensor::from_f32(shape, (0..8).map(|index| index as f32).collect()).unwrap();
    let module = || AdapterModule::of_factors(factor([2, 4]), factor([4, 2]), false, 2, 2.0);
    let run = |arguments: &[&str]| lora().current_dir(folder.path()).args(arguments).assert();
    // Chroma's names are FLUX.1's: one of the two files says so, in one of its keys.
    let path = ModulePath::new(Component::TRANSFORMER, "single_transformer_blocks.0.proj_out");
    let adapter = Adapter { modules: [(path, module())].into(), ..Adapter::default() };
    let family = lora_io::family::FAMILIES.into_iter().find(|family| family.name == "chroma");
    let mut marked = adapter.clone();
    marked.metadata.insert("modelspec.architecture".into(), "chroma/lora".into());
    for (name, own) in [("a.safetensors", &adapter), ("b.safetensors", &marked)] {
        adapter::write_as(folder.path().join(name), own, Format::Kohya, family, DType::F32).unwrap();
    }
    run(&["combine", "a.safetensors", "b.safetensors", "--out", "c.safetensors"]).success();
    let combined = adapter::read(folder.path().join("c.safetensors")).unwrap();
    assert_eq!(combined.family, family);
    assert_eq!(combined.adapter.metadata["modelspec.architecture"], "chroma/lora");
    run(&["combine", "a.safetensors", "b.safetensors", "--to", "diffusers", "--out", "d.safetensors"]).success();
    assert_eq!(adapter::read(folder.path().join("d.safetensors")).unwrap().format, Format::Diffusers);
    // Dotted names of a model that is not known stay dotted.
    let path = ModulePath::new(Component::MODEL, "diffusion_model.blocks.0.self_attn.q");
    let adapter = Adapter { modules: [(path, module())].into(), ..Adapter::default() };
    adapter::write(folder.path().join("w.safetensors"), &adapter, Format::Diffusers, DType::F32).unwrap();
    run(&["combine", "w.safetensors", "w.safetensors:0.5", "--out", "v.safetensors"]).success();
    assert_eq!(adapter::read(folder.path().join("v.safetensors")).unwrap().adapter.modules.len(), 1);
}
