//! Stable Diffusion 2.x, added beside 1.x by its rows and its registration alone: whole runs on a tiny model of its kind, in both
//! layouts. The numbers of its networks, gradients and steps are held by `trajectory` and by lora-models' parity tests.

mod common;

use std::path::Path;

use common::{config, prepare};
use lora_core::DType;
use lora_io::adapter;
use lora_models::synthetic::SyntheticModel;
use lora_train::Plugins;
use lora_train::plan::plan;

/// Pictures, and a base of SD 2's kind in one file that does not say what it predicts.
fn workspace() -> tempfile::TempDir {
    let folder = common::workspace();
    SyntheticModel::tiny_sd2().write(folder.path().join("base.safetensors"), DType::F16).unwrap();
    folder
}

fn losses(folder: &Path, keys: &[&str]) -> Vec<f64> {
    let mut session = prepare(folder, keys);
    std::iter::from_fn(|| session.step().unwrap()).map(|report| report.loss).collect()
}

#[test]
fn what_the_base_predicts_is_never_guessed() {
    let folder = workspace();
    let error = common::refusal(folder.path(), &[]);
    assert!(error.contains("v_parameterization = true") && error.contains("Stable Diffusion 2.x"), "{error}");
    // A plan says so too, before anything is loaded.
    let error = plan(&config(folder.path(), &[]), &Plugins::default()).unwrap_err().to_string();
    assert!(error.contains("v_parameterization"), "{error}");
    let (noise, velocity) =
        (losses(folder.path(), &["v_parameterization=false"]), losses(folder.path(), &["v_parameterization=true"]));
    assert!(noise.iter().zip(&velocity).all(|(a, b)| a.is_finite() && (a - b).abs() > 1e-3), "{noise:?} {velocity:?}");
}

#[test]
fn runs_are_trained_saved_resumed_planned_and_sampled() {
    let folder = workspace();
    let keys = ["v_parameterization=true", "min_snr_gamma=5", "max_train_steps=4"];
    let (session, mut resumed) = common::in_one_go_and_resumed(folder.path(), &keys);
    let picture = resumed.sample(&["a cat".to_owned()]).unwrap().remove(0).into_picture().unwrap();
    assert_eq!((picture.width(), picture.height()), (64, 64));

    // Another answer to what the base predicts is another run.
    let error = common::refusal(folder.path(), &["v_parameterization=false", "min_snr_gamma=5", "resume=true"]);
    assert!(error.contains("base_model"), "{error}");

    let file = adapter::read(folder.path().join("out/lora.safetensors")).unwrap().adapter;
    assert_eq!(file.modules.len(), session.targets().len());
    let said = |key: &str| file.metadata.get(key).map(String::as_str).unwrap_or_default();
    assert_eq!((said("ss_base_model_version"), said("ss_v2")), ("sd_v2_v", "True"));
    assert_eq!(said("modelspec.architecture"), "stable-diffusion-v2-768-v/lora");

    let plan = plan(&config(folder.path(), &keys), &Plugins::default()).unwrap();
    assert!(plan.as_configured.phases.len() == 4 && plan.as_configured.peak() > 0);
}

#[test]
fn whole_networks_and_frozen_text_encoders_train_too() {
    let folder = workspace();
    for keys in [
        &["v_parameterization=true", "train=full"][..],
        &["v_parameterization=false", "train_text_encoder=false", "base_storage=nf4"],
        &["v_parameterization=true", "gradient_checkpointing=true", "precision=bf16", "sample_prompts=a"],
    ] {
        let losses = losses(folder.path(), keys);
        assert!(losses.iter().all(|loss| loss.is_finite() && *loss > 0.0), "{keys:?}: {losses:?}");
    }
}
