//! Adapters in the frozen base: a run with `fuse_adapters` is the run on the base that `lora merge` makes, whatever the base is
//! held in; its file, its state and its samples know of them.

mod common;

use std::path::{Path, PathBuf};

use common::{config, prepare, refusal, tolerance, workspace};
use lora_core::backend::CpuBackend;
use lora_core::variant::VariantRegistry;
use lora_core::{Component, DType, Strength};
use lora_io::adapter;
use lora_io::merge::{MergeOptions, Weighted, merge};
use lora_io::safetensors::SafetensorsFile;
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Session};

/// A style that has been learnt, text encoder and all.
fn style(folder: &Path, keys: &[&str]) -> PathBuf {
    let own = ["save_precision=fp32", "learning_rate=2e-2", "max_train_steps=6"];
    let mut session = prepare(folder, &[&own, keys].concat());
    while session.step().unwrap().is_some() {}
    session.save("style").unwrap()
}

/// The base with an adapter merged into it, in a file of fp32.
fn merged(folder: &Path, file: &Path, strength: f64) -> String {
    let adapter = adapter::read(file).unwrap().adapter;
    let weighted = [Weighted { name: "style".into(), adapter, strength: Strength::from(strength) }];
    let (out, options) =
        (folder.join("merged.safetensors"), MergeOptions { dtype: Some(DType::F32), ..MergeOptions::default() });
    let _ = std::fs::remove_file(&out);
    let variants = VariantRegistry::<CpuBackend>::default();
    merge(folder.join("base.safetensors"), &weighted, &out, &options, &variants, &|_, _| {}).unwrap();
    format!("base_model={}", out.display())
}

fn losses(session: &mut Session) -> Vec<f64> {
    std::iter::from_fn(|| session.step().unwrap()).map(|report| report.loss).collect()
}

fn near(own: &[f64], other: &[f64]) -> bool {
    own.len() == other.len() && own.iter().zip(other).all(|(a, b)| (a - b).abs() < tolerance(1e-6))
}

#[test]
fn a_run_on_fused_adapters_is_the_run_on_the_merged_base() {
    let folder = workspace();
    let plain = losses(&mut prepare(folder.path(), &[]));
    for variant in [&[][..], &["variant=lokr"], &["variant=lycoris-dora", "target_modules=all-conv"]] {
        let file = style(folder.path(), variant);
        let base = merged(folder.path(), &file, 0.7);
        let fuse = format!("fuse_adapters={}:0.7", file.display());
        // Quantised too: the sum is.
        for keys in [&[][..], &["base_storage=nf4"], &["train_text_encoder=false"]] {
            let own = losses(&mut prepare(folder.path(), &[keys, &[&*fuse]].concat()));
            let other = losses(&mut prepare(folder.path(), &[keys, &[&*base]].concat()));
            assert!(near(&own, &other), "{variant:?} {keys:?}: {own:?} {other:?}");
            assert!(!near(&own, &plain), "{keys:?}");
        }
    }
}

#[test]
fn samples_plans_files_and_states_know_of_them() {
    let folder = workspace();
    let file = style(folder.path(), &[]);
    let base = merged(folder.path(), &file, 1.0);
    let fuse = format!("fuse_adapters={}", file.display());
    let draws = ["sample_resolution=64", "sample_steps=2"];
    let picture = |keys: &[&str]| prepare(folder.path(), &[&draws, keys].concat()).sample(&["a".to_owned()]).unwrap();
    assert_eq!(picture(&[&fuse]), picture(&[&base]));
    assert_ne!(picture(&[&fuse]), picture(&[]));
    lora_train::plan::plan(&config(folder.path(), &[&fuse]), &Plugins::default()).unwrap();

    let mut session = prepare(folder.path(), &[&fuse, "output_name=on-top"]);
    let notes = session.summary().notes;
    assert!(notes.iter().any(|note| note.contains("style.safetensors (1)")), "{notes:?}");
    session.step().unwrap();
    let saved = session.save("on-top").unwrap();
    let fused = SafetensorsFile::open(saved).unwrap().metadata()["lora_fused"].clone();
    let fused: serde_json::Value = serde_json::from_str(&fused).unwrap();
    assert_eq!((&fused[0]["name"], &fused[0]["unet"]), (&"style.safetensors".into(), &1.0.into()));

    session.save_state().unwrap();
    prepare(folder.path(), &[&fuse, "output_name=on-top", "resume=true"]);
    for keys in [&[][..], &[&*format!("{fuse}:0.5")]] {
        let error = refusal(folder.path(), &[&["output_name=on-top", "resume=true"], keys].concat());
        assert!(error.contains("base_model was") && error.contains("fuse_adapters"), "{error}");
    }
}

/// What training takes of a file it begins with, and the rest is merged.
#[test]
fn what_a_run_does_not_train_of_its_beginning_is_merged_into_the_base() {
    let folder = workspace();
    let file = style(folder.path(), &["target_modules=attention-mlp"]);
    let keys = ["target_modules=attention", "train_text_encoder=false", &format!("init_from={}", file.display())];
    let error = refusal(folder.path(), &keys);
    assert!(error.contains("does not train") && error.contains("fuse_adapters"), "{error}");
    let fuse = format!("fuse_adapters={}", file.display());
    let mut own = prepare(folder.path(), &[&keys[..], &[&*fuse]].concat());
    let modules = own.adapter().unwrap().modules();
    let notes = own.summary().notes;
    let note = notes.iter().find(|note| note.contains("init_from")).unwrap();
    assert!(note.contains("are merged into the base"), "{note}");
    // As if all were merged: nothing is counted twice and nothing is lost.
    let base = merged(folder.path(), &file, 1.0);
    let whole = ["target_modules=attention", "train_text_encoder=false", &base];
    let (own_loss, other) = (losses(&mut own)[0], losses(&mut prepare(folder.path(), &whole))[0]);
    assert!((own_loss - other).abs() < tolerance(1e-5), "{own_loss} {other}");
    assert!(own.adapter().unwrap().export().unwrap().modules.keys().all(|path| path.component == Component::UNET));
    assert!(modules > 0);
}

#[test]
fn what_cannot_be_merged_is_refused_before_anything_is_loaded() {
    let folder = workspace();
    let error = refusal(folder.path(), &["fuse_adapters=gone.safetensors:0.5"]);
    assert!(error.contains("`fuse_adapters`") && error.contains("gone.safetensors"), "{error}");
    let text = "base_model: b\ntrain_data_dir: d\noutput_dir: o\n";
    let blocks = TrainConfig::from_text(text, Format::Yaml, &["fuse_adapters=style.safetensors:1:1:1,1"]);
    let error = blocks.unwrap_err().to_string();
    assert!(error.contains("fuse_adapters") && error.contains("25 factors"), "{error}");
}
