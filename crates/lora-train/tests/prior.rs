//! Prior preservation without pictures, in whole runs: nothing is to keep before anything is learnt, what is learnt moves the
//! kept prompts less, and plans, states and files know of it. What is kept is held against two bases apart in `base`.

mod common;

use common::{config, losses, prepare, refusal, tolerance, trained, workspace};
use lora_io::safetensors::SafetensorsFile;
use lora_train::Plugins;
use lora_train::plan::plan;

const KEPT: [&str; 3] = ["prior_prompt=a thing", "prior_prompt_weight=2", "prior_blank_weight=1"];

#[test]
fn nothing_is_to_keep_at_the_first_step_and_less_moves_later() {
    let folder = workspace();
    for of_networks in [&["train_text_encoder=false"][..], &[], &["caption_dropout_rate=0.5"]] {
        let keys = [of_networks, &["max_train_steps=12", "learning_rate=1e-2", "seed=3"]].concat();
        let plain = losses(folder.path(), &keys);
        let (_, kept) = trained(folder.path(), &[&keys[..], &KEPT].concat());
        assert!(
            (kept[0].loss - plain[0]).abs() < tolerance(1e-6) && kept[0].figures["prior_loss"].abs() < 1e-9,
            "{keys:?}"
        );
        let largest = kept.iter().map(|report| report.figures["prior_loss"]).fold(0.0, f64::max);
        assert!(largest > 1e-8 && kept.iter().all(|report| report.loss >= report.figures["prior_loss"]), "{kept:?}");
        // Told but hardly counted, it grows further.
        let weak = ["prior_prompt=a thing", "prior_prompt_weight=2e-6", "prior_blank_weight=1e-6"];
        let (_, free) = trained(folder.path(), &[&keys[..], &weak].concat());
        let last = |reports: &[lora_train::StepReport]| reports.last().unwrap().figures["prior_loss"];
        assert!(last(&kept) < 0.8 * 1e6 * last(&free), "{of_networks:?}: {} {}", last(&kept), 1e6 * last(&free));
    }
}

#[test]
fn computing_again_and_smaller_batches_are_the_same_run() {
    let folder = workspace();
    let run = |keys: &[&str]| losses(folder.path(), &[&KEPT[..], &["max_train_steps=3"], keys].concat());
    let whole = run(&["batch_size=2"]);
    for keys in [&["batch_size=2", "gradient_checkpointing=true"][..], &["gradient_accumulation_steps=2"]] {
        let other = run(keys);
        assert!(
            whole.iter().zip(&other).all(|(a, b)| (a - b).abs() < tolerance(1e-5)),
            "{keys:?}: {whole:?} {other:?}"
        );
    }
}

#[test]
fn plans_states_and_files_know_of_it() {
    let folder = workspace();
    let bytes = |keys: &[&str]| plan(&config(folder.path(), keys), &Plugins::default()).unwrap().to_string();
    assert_ne!(bytes(&KEPT), bytes(&[]));
    let mut session = prepare(folder.path(), &KEPT);
    session.step().unwrap();
    let saved = session.save("kept").unwrap();
    assert_eq!(SafetensorsFile::open(saved).unwrap().metadata()["lora_prior_prompt"], "a thing");
    session.save_state().unwrap();
    prepare(folder.path(), &[&KEPT[..], &["resume=true"]].concat());
    let error = refusal(folder.path(), &["resume=true"]);
    assert!(error.contains("prior_prompt was") && error.contains("a thing"), "{error}");
    let error = config_error("train=full", "prior_prompt=a");
    assert!(error.contains("prior_prompt"), "{error}");
}

fn config_error(mode: &str, key: &str) -> String {
    let text = "base_model: b\ntrain_data_dir: d\noutput_dir: o\n";
    let read = lora_train::config::TrainConfig::from_text(text, lora_train::config::Format::Yaml, &[mode, key]);
    read.unwrap_err().to_string()
}
