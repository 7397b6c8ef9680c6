//! Layers, biases and rows of tokens that are trained and saved themselves (PEFT's `modules_to_save`, `bias` and
//! `trainable_token_indices`), against PEFT's own folder, loss and gradients.

#[path = "common/language.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{golden, gradients, loss, prepare, refusal, steps, workspace, workspace_of};
use lora_core::conformance::distance;
use lora_io::adapter;
use lora_io::safetensors::SafetensorsFile;
use lora_torch::tensor::to_host;
use lora_train::Plugins;
use lora_train::inference::{EvaluationOptions, TextModel, TextModelOptions};

/// PEFT's folder, what makes the same run of it beside its targets, its loss, and how many tensors are trained.
const CASES: [(&str, &str, &str, f64, usize); 4] = [
    ("head_saved", "q_proj", "modules_to_save=lm_head", 6.591544175918978, 9),
    ("biases", "q_proj", "bias=all", 6.562820761192469, 20),
    ("new_tokens", "q_proj", "trainable_token_indices=[5, 17, 42]", 6.572549102622402, 9),
    // PEFT's names match ends of names: its `norm` is all of these.
    (
        "norms_saved",
        "v_proj",
        "modules_to_save=[\"norm\", \"input_layernorm\", \"post_attention_layernorm\"]",
        6.592233392960759,
        17,
    ),
];

/// The loss of the base with what was saved on it is that of the run's end.
fn is_in_use(folder: &Path, saved: PathBuf, after: f64) {
    let mut model = TextModelOptions::new(folder.join("base"));
    (model.device, model.adapters) = ("cpu".into(), vec![(saved, 1.0)]);
    let options = EvaluationOptions::new(golden("chat.jsonl"));
    let judged = TextModel::open(&model, &Plugins::default()).unwrap().evaluate(&options, &mut |_, _| {}).unwrap();
    assert!((judged.loss - after).abs() < 1e-5, "{judged} against {after}");
}

#[test]
fn the_loss_and_gradients_are_pefts() {
    let folder = workspace();
    for (name, targets, key, expected, count) in CASES {
        let init_from = format!("init_from={}", golden(name).display());
        let targets = format!("target_modules={targets}");
        let keys = [&init_from, key, &targets, "max_grad_norm=0", "gradient_accumulation_steps=12"];
        let mut session = prepare(folder.path(), &keys);
        let found = loss(&mut session);
        assert!((found - expected).abs() < 1e-5, "{name}: {found}");
        let file = SafetensorsFile::open(golden(&format!("{name}/gradients.safetensors"))).unwrap();
        let found = gradients(&mut session);
        assert_eq!((found.len(), file.len()), (count, count), "{:?}", found.keys());
        for name in file.names() {
            let own = name.replace("base_model.model.", "").replace(".modules_to_save", "");
            let own = own.replace(".default", "").replace(".base_layer", "");
            let own = own.replace("token_adapter.trainable_tokens_delta", "weight");
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
    is_in_use(folder.path(), saved, after);
    let error = refusal(folder.path(), &[&init_from]);
    assert!(error.contains("init_from") && error.contains("modules_to_save"), "{error}");
}

/// What is trained changes, all else stays, and the loss of what was saved is that of the run: trained on, and in use.
#[test]
fn trained_tokens_and_norms_are_saved_where_peft_has_them() {
    let folder = workspace();
    let keys = ["trainable_token_indices=[5, 17]", "modules_to_save=norm", "lora_dropout=0.1"];
    let mut session = prepare(folder.path(), &keys);
    steps(&mut session);
    let after = loss(&mut session);
    let saved = session.save("voice").unwrap();
    let config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(saved.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["trainable_token_indices"], serde_json::json!({ "model.embed_tokens": [5, 17] }));
    assert_eq!(config["modules_to_save"], serde_json::json!(["model.norm"]));
    let file = SafetensorsFile::open(saved.join("adapter_model.safetensors")).unwrap();
    let rows = file.get("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta").unwrap();
    assert!(rows.shape().len() == 2 && rows.shape()[0] == 2 && file.get("base_model.model.model.norm.weight").is_ok());
    let init_from = format!("init_from={}", saved.display());
    let again = loss(&mut prepare(folder.path(), &[&keys[..2], &[&init_from]].concat()));
    assert!((again - after).abs() < 1e-6, "{after} against {again}");
    is_in_use(folder.path(), saved, after);
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let folder = workspace();
    let keys = ["modules_to_save=norm", "trainable_token_indices=[7]", "bias=all", "max_train_steps=5"];
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
    let ends = ["modules_to_save=[\"lm_head\", \"embed_tokens\"]", "target_modules=q_proj"];
    let rows = ["modules_to_save=norm", "trainable_token_indices=[5, 17]"];
    for (own, key) in ["precision=bf16", "base_storage=nf4", "gradient_checkpointing=true"]
        .into_iter()
        .flat_map(|key| [(ends, key), (rows, key)])
    {
        let reports = steps(&mut prepare(folder.path(), &[&own[..], &[key]].concat()));
        assert!(reports.iter().all(|report| report.gradient_norm.is_some()), "{own:?} {key}");
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
    let error = refusal(folder.path(), &["modules_to_save=nrom"]);
    assert!(error.contains("modules_to_save") && error.contains("norm"), "{error}");
    // Norms carry no adapters.
    let error = refusal(folder.path(), &["target_modules=norm"]);
    assert!(error.contains("target_modules") && error.contains("norm"), "{error}");
    let tokens = "trainable_token_indices=[5, 17]";
    for (keys, said) in [
        (&["trainable_token_indices=[5, 5]"][..], "each once"),
        (&["trainable_token_indices=[100000]"], "no token 100000"),
        (&[tokens, "modules_to_save=embed_tokens"], "one place"),
        (&[tokens, "modules_to_save=lm_head"], "same table"),
        (&[tokens, &format!("init_from={}", golden("new_tokens").display()), "target_modules=q_proj"], "other tokens"),
        (
            &[&format!("init_from={}", golden("new_tokens").display()), "target_modules=q_proj"],
            "trainable_token_indices",
        ),
    ] {
        let error = refusal(folder.path(), keys);
        assert!(error.contains("trainable_token_indices") && error.contains(said), "{keys:?}: {error}");
    }
}

/// Experts' parameters with both of PEFT's names, alone and together, in a run and in use.
#[test]
fn adapters_on_experts_are_trained_and_saved_where_peft_has_them() {
    let folder = workspace_of("qwen3_moe");
    let both = "target_parameters=[\"mlp.experts.gate_up_proj\", \"mlp.experts.down_proj\"]";
    for (key, names, depth) in [
        (both, &["mlp.experts.down_proj", "mlp.experts.gate_up_proj"][..], 1),
        ("target_parameters=down_proj", &["mlp.experts.down_proj"], 0),
        ("target_parameters=gate_up_proj", &["mlp.experts.gate_up_proj"], 0),
    ] {
        let keys = [key, "target_modules=q_proj", "save_precision=fp32"];
        let mut session = prepare(folder.path(), &keys);
        let before = loss(&mut session);
        steps(&mut session);
        let after = loss(&mut session);
        assert!(after < before, "{key}: {before} to {after}");
        let saved = session.save("voice").unwrap();
        let config: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(saved.join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!((&config["target_parameters"], &config["target_modules"]), (&names.into(), &["q_proj"][..].into()));
        let file = SafetensorsFile::open(saved.join("adapter_model.safetensors")).unwrap();
        let wrapped = file.names().filter(|name| name.contains("experts.base_layer.lora_A")).count();
        let outer = file.names().filter(|name| name.contains("experts.lora_A")).count();
        assert_eq!((wrapped > 0, wrapped == depth * outer, outer > 0), (depth == 1, true, true), "{key}");
        let init_from = format!("init_from={}", saved.display());
        let again = loss(&mut prepare(folder.path(), &[&keys[..], &[&init_from]].concat()));
        assert!((again - after).abs() < 1e-6, "{key}: {after} against {again}");
        let mut model = TextModelOptions::new(folder.path().join("base"));
        (model.device, model.adapters) = ("cpu".into(), vec![(saved, 1.0)]);
        let options = EvaluationOptions::new(golden("chat.jsonl"));
        let judged = TextModel::open(&model, &Plugins::default()).unwrap().evaluate(&options, &mut |_, _| {}).unwrap();
        assert!((judged.loss - after).abs() < 1e-5, "{key}: {judged} against {after}");
    }
    for keys in [&[both, "lora_dropout=0.1"][..], &[both, "variant=dora"], &["target_parameters=q_proj"]] {
        let error = refusal(folder.path(), keys);
        assert!(error.contains("target_parameters"), "{keys:?}: {error}");
    }
    let error = refusal(workspace().path(), &[both]);
    assert!(error.contains("no mixture of experts"), "{error}");
}
