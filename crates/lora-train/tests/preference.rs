//! Preference pairs: losses, gradients and what is told of a step against TRL's (tools/golden/llm/preference.py), and that what
//! holds for every run holds for these.

#[path = "common/language.rs"]
mod common;

use std::fs;

use common::{golden, gradients, prepare, refusal, steps, workspace};
use lora_core::conformance::distance;
use lora_io::safetensors::SafetensorsFile;
use lora_torch::tensor::to_host;
use serde_json::Value;

/// All pairs in one step, as the reference takes them.
fn keys(objective: &str) -> Vec<String> {
    let expected = expected();
    let own = match objective {
        "dpo" => format!("dpo_beta={}", expected["dpo_beta"]),
        _ => format!("orpo_lambda={}", expected["orpo_lambda"]),
    };
    let pairs = golden("preference/pairs.jsonl").display().to_string();
    let adapter = golden("adapter").display().to_string();
    [
        format!("objective={objective}"),
        own,
        format!("train_data_dir={pairs}"),
        format!("init_from={adapter}"),
        "learning_rate=1e-3".into(),
        "weight_decay=0.01".into(),
        "max_grad_norm=0".into(),
        "gradient_accumulation_steps=6".into(),
        "max_train_steps=20".into(),
    ]
    .into()
}

fn of<'k>(own: &'k [String], further: &[&'k str]) -> Vec<&'k str> {
    own.iter().map(String::as_str).chain(further.iter().copied()).collect()
}

fn expected() -> Value {
    serde_json::from_str(&fs::read_to_string(golden("preference/expected.json")).unwrap()).unwrap()
}

fn numbers(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

#[test]
fn losses_gradients_and_metrics_are_those_of_trl() {
    let (folder, expected) = (workspace(), expected());
    let file = SafetensorsFile::open(golden("preference/gradients.safetensors")).unwrap();
    for objective in ["dpo", "orpo"] {
        let (keys, expected) = (keys(objective), &expected[objective]);
        let found = gradients(&mut prepare(folder.path(), &of(&keys, &[])));
        let peers: Vec<&str> = file.names().filter(|name| name.starts_with(&format!("{objective}."))).collect();
        assert_eq!((found.len(), peers.len()), (56, 56), "{:?}", found.keys());
        for name in peers {
            let peer = file.get(name).unwrap().to_host().unwrap();
            let apart = distance(&to_host(&found[name.split_once('.').unwrap().1]).unwrap(), &peer);
            assert!(apart < 1e-4, "{name}: {apart:e}");
        }
        let reports = steps(&mut prepare(folder.path(), &of(&keys, &[])));
        for (own, [loss, norm]) in reports.iter().zip(
            numbers(&expected["losses"]).into_iter().zip(numbers(&expected["gradient_norms"])).map(<[f64; 2]>::from),
        ) {
            assert!((own.loss / loss - 1.0).abs() < 1e-4, "step {}: {} against {loss}", own.step, own.loss);
            let found = own.gradient_norm.unwrap();
            assert!((found / norm - 1.0).abs() < 1e-3, "step {}: {found} against {norm}", own.step);
        }
        for (report, place) in [(&reports[0], "first"), (&reports[19], "last")] {
            for (name, expected) in expected[place].as_object().unwrap() {
                let (found, expected) = (report.figures[&**name], expected.as_f64().unwrap());
                assert!((found - expected).abs() < 1e-3, "{place} {name}: {found} against {expected}");
            }
            assert_eq!((report.items, report.measure), (6, 156.0));
        }
    }
}

/// However a step is split, computed again or laid out, it is the same step.
#[test]
fn a_step_does_not_depend_on_how_it_is_computed() {
    let folder = workspace();
    for objective in ["dpo", "orpo"] {
        let keys = keys(objective);
        let whole = steps(&mut prepare(folder.path(), &of(&keys, &["max_train_steps=3"])));
        for other in [
            &["gradient_checkpointing=true", "batch_size=1"][..],
            &["packing=true"],
            &["batch_size=6", "gradient_accumulation_steps=1", "max_seq_length=128", "packing=true"],
        ] {
            let further = [&["max_train_steps=3"], other].concat();
            let steps = steps(&mut prepare(folder.path(), &of(&keys, &further)));
            for (a, b) in whole.iter().zip(&steps) {
                assert!((a.loss - b.loss).abs() < 2e-5, "{objective} {other:?}: {} and {}", a.loss, b.loss);
                for (name, own) in &a.figures {
                    assert!((own - b.figures[name]).abs() < 2e-4, "{objective} {other:?}: {name}");
                }
            }
        }
    }
}

/// A new adapter is the base: half of the pairs' odds, whatever the layers that are adapted.
#[test]
fn dpo_begins_at_the_base() {
    let folder = workspace();
    let data = format!("train_data_dir={}", golden("preference/pairs.jsonl").display());
    for targets in ["all-linear", "[\"q_proj\", \"embed_tokens\", \"lm_head\"]"] {
        for further in [&[][..], &["base_storage=nf4"], &["neftune_noise_alpha=1e-9"], &["label_smoothing=0.2"]] {
            let targets = format!("target_modules={targets}");
            let keys = [&["objective=dpo", &data, &targets, "max_train_steps=1"], further].concat();
            let report = prepare(folder.path(), &keys).step().unwrap().unwrap();
            assert!((report.loss - 2f64.ln()).abs() < 1e-5, "{keys:?}: {}", report.loss);
            assert!(report.gradient_norm.unwrap() > 0.0);
        }
    }
}

#[test]
fn a_resumed_run_on_pairs_ends_with_the_same_bits() {
    let folder = workspace();
    let data = format!("train_data_dir={}", golden("preference/pairs.jsonl").display());
    let keys = ["objective=dpo", &data, "lora_dropout=0.1", "label_smoothing=0.1"];
    common::goes_on_as_if_never_stopped(folder.path(), &keys);
    let error = refusal(folder.path(), &[&keys[..], &["resume=true", "dpo_beta=0.3"]].concat());
    assert!(error.contains("dpo_beta"), "{error}");
}

#[test]
fn what_does_not_fit_an_objective_is_refused() {
    let folder = workspace();
    let data = format!("train_data_dir={}", golden("preference/pairs.jsonl").display());
    for (keys, said) in [
        (&[&*data][..], "objective"),
        (&["objective=dpo"], "`chosen`"),
        (&["dpo_beta=0.1"], "dpo_beta"),
        (&["objective=dpo", &data, "orpo_lambda=0.1"], "orpo_lambda"),
        (&["objective=orpo", &data, "label_smoothing=0.1"], "label_smoothing"),
        (&["objective=kto"], "sft, dpo, orpo"),
    ] {
        let error = refusal(folder.path(), keys);
        assert!(error.contains(said), "{keys:?}: {error}");
    }
}
