//! Layers and biases that are trained and saved themselves (PEFT's `modules_to_save` and `bias`), against PEFT's own folder, loss and gradients.

#[path = "common/language.rs"]
mod common;

use std::fs;

use common::{golden, gradients, loss, prepare, refusal, steps, workspace};
use lora_core::conformance::distance;
use lora_io::adapter;
use lora_io::safetensors::SafetensorsFile;
use lora_torch::tensor::to_host;
use lora_train::Plugins;
use lora_train::inference::{EvaluationOptions, TextModel, TextModelOptions};

/// PEFT's folder, what makes the same run of it, its loss, and how many tensors are trained.
const CASES: [(&str, &str, f64, usize); 2] =
    [("head_saved", "modules_to_save=lm_head", 6.591544175918978, 9), ("biases", "bias=all", 6.562820761192469, 20)];

#[test]
fn the_loss_and_gradients_are_pefts() {
    let folder = workspace();
    for (name, key, expected, count) in CASES {
        let init_from = format!("init_from={}", golden(name).display());
        let keys = [&init_from, key, "target_modules=q_proj", "max_grad_norm=0", "gradient_accumulation_steps=12"];
        let mut session = prepare(folder.path(), &keys);
        let found = loss(&mut session);
        assert!((found - expected).abs() < 1e-5, "{name}: {found}");
        let file = SafetensorsFile::open(golden(&format!("{name}/gradients.safetensors"))).unwrap();
        let found = gradients(&mut session);
        assert_eq!((found.len(), file.len()), (count, count), "{:?}", found.keys());
        for name in file.names() {
            let own = name.replace("base_model.model.", "").replace(".modules_to_save", "");
            let own = own.replace(".default", "").replace(".base_layer", "");
            let apart = distance(&to_host(&found[&own]).unwrap(), &file.get(name).unwrap().to_host().unwrap());
            assert!(apart < 1e-4, "{name}: {apart:e}");
        }
    }
}

#[test]
fn trained_biases_are_saved_where_peft_has_them() {
    let folder = workspace();
    for (bias, count) in [("all", 12), ("lora_only", 4)] {
        let key = format!("bias={bias}");
        let mut session = prepare(folder.path(), &[&key, "target_modules=q_proj", "lora_dropout=0.1"]);
        steps(&mut session);
        let after = loss(&mut session);
        let saved = session.save(bias).unwrap();
        let config: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(saved.join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!((&config["bias"], &config["modules_to_save"]), (&bias.into(), &serde_json::Value::Null));
        let file = SafetensorsFile::open(saved.join("adapter_model.safetensors")).unwrap();
        assert_eq!(file.names().filter(|name| name.ends_with("bias")).count(), count);
        assert_eq!(file.names().filter(|name| name.ends_with("q_proj.base_layer.bias")).count(), 4);
        let init_from = format!("init_from={}", saved.display());
        let again = loss(&mut prepare(folder.path(), &[&key, "target_modules=q_proj", &init_from]));
        assert!((again - after).abs() < 1e-6, "{bias}: {after} against {again}");
    }
    let error = refusal(folder.path(), &["bias=all", "variant=dora"]);
    assert!(error.contains("bias"), "{error}");
}

#[test]
fn what_is_saved_gives_the_same_loss() {
    let folder = workspace();
    let whole = "modules_to_save=[\"lm_head\", \"embed_tokens\"]";
    let mut session = prepare(folder.path(), &[whole, "max_train_steps=12", "lora_dropout=0.1"]);
    assert_eq!(session.summary().modules.unwrap().0, 30);
    let before = loss(&mut session);
    steps(&mut session);
    let after = loss(&mut session);
    assert!(after < before - 0.3, "{before} to {after}");
    let saved = session.save("voice").unwrap();
    let config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(saved.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["modules_to_save"], serde_json::json!(["lm_head", "model.embed_tokens"]));
    assert!(!config["target_modules"].as_array().unwrap().iter().any(|name| name == "lm_head"), "{config}");
    assert_eq!(adapter::read(&saved).unwrap().adapter.modules.len(), 30);
    let init_from = format!("init_from={}", saved.display());
    let again = loss(&mut prepare(folder.path(), &[whole, &init_from]));
    assert!((again - after).abs() < 1e-6, "{after} against {again}");
    let mut model = TextModelOptions::new(folder.path().join("base"));
    (model.device, model.adapters) = ("cpu".into(), vec![(saved, 1.0)]);
    let options = EvaluationOptions::new(golden("chat.jsonl"));
    let judged = TextModel::open(&model, &Plugins::default()).unwrap().evaluate(&options, &mut |_, _| {}).unwrap();
    assert!((judged.loss - after).abs() < 1e-5, "{judged} against {after}");
    let error = refusal(folder.path(), &[&init_from]);
    assert!(error.contains("init_from") && error.contains("modules_to_save"), "{error}");
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let folder = workspace();
    let keys = ["modules_to_save=lm_head", "bias=all", "max_train_steps=5"];
    let mut whole = prepare(folder.path(), &keys);
    steps(&mut whole);
    let mut session = prepare(folder.path(), &keys);
    session.step().unwrap();
    session.step().unwrap();
    session.save_state().unwrap();
    let mut resumed = prepare(folder.path(), &[&keys[..], &["resume=true"]].concat());
    steps(&mut resumed);
    let [whole, resumed] = [whole, resumed].map(|session| session.adapter().unwrap().export().unwrap());
    assert!(whole == resumed);
}

/// In half precision a copy computes; a packed base is made whole for it.
#[test]
fn half_precision_and_packed_bases_train_too() {
    let folder = workspace();
    for key in ["precision=bf16", "base_storage=nf4", "gradient_checkpointing=true"] {
        let keys = ["modules_to_save=[\"lm_head\", \"embed_tokens\"]", "target_modules=q_proj", key];
        let reports = steps(&mut prepare(folder.path(), &keys));
        assert!(reports.iter().all(|report| report.gradient_norm.is_some()), "{key}");
    }
}

/// The reference of DPO is the base: layers that are trained whole are no part of it.
#[test]
fn the_reference_of_dpo_is_the_base() {
    let folder = workspace();
    let data = format!("train_data_dir={}", golden("preference/pairs.jsonl").display());
    let keys = ["modules_to_save=lm_head", "objective=dpo", &data, "gradient_accumulation_steps=6"];
    let reports = steps(&mut prepare(folder.path(), &keys));
    assert!((reports[0].loss - 2f64.ln()).abs() < 1e-5, "{}", reports[0].loss);
    assert!(reports[5].loss < 0.4 && reports[5].figures["rewards/margins"] > 0.5, "{:?}", reports[5]);
}

#[test]
fn what_cannot_be_saved_whole_is_refused() {
    let folder = workspace();
    let error = refusal(folder.path(), &["modules_to_save=norm"]);
    assert!(error.contains("modules_to_save") && error.contains("norm"), "{error}");
}
