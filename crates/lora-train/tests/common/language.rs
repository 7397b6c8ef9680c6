//! A tiny Qwen2 with random weights, its tokenizer, twelve conversations, and configurations of runs on them.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lora_torch::tch::Tensor;
use lora_train::StepReport;
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Session};

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/language").join(name)
}

/// A folder with the base, as it is published, in `base`.
pub(crate) fn workspace() -> tempfile::TempDir {
    workspace_of("qwen2")
}

/// The same with another base of the tiny ones; the tokenizer is Qwen2's.
pub(crate) fn workspace_of(base: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let weights =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../lora-models/tests/golden/llm").join(base).join("model");
    let base = folder.path().join("base");
    fs::create_dir(&base).unwrap();
    for from in [weights, golden("")] {
        for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
            fs::copy(&entry, base.join(entry.file_name().unwrap())).unwrap();
        }
    }
    folder
}

pub(crate) fn try_config(folder: &Path, keys: &[&str]) -> Result<TrainConfig, String> {
    let text = format!(
        "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\ndevice: cpu\nprecision: fp32\nlora_rank: 4\nlora_alpha: 8\n\
         target_modules: all-linear\nlearning_rate: 5e-3\nmax_seq_length: 160\nmax_train_steps: 6\nbatch_size: 2\n\
         save_precision: fp32\n",
        folder.join("base").display(),
        golden("chat.jsonl").display(),
        folder.join("out").display(),
    );
    TrainConfig::from_text(&text, Format::Yaml, keys).map_err(|error| error.to_string())
}

pub(crate) fn prepare(folder: &Path, keys: &[&str]) -> Session {
    Session::prepare(try_config(folder, keys).unwrap(), &Plugins::default(), &mut |_| {}).unwrap()
}

pub(crate) fn refusal(folder: &Path, keys: &[&str]) -> String {
    let prepared =
        |config| Session::prepare(config, &Plugins::default(), &mut |_| {}).map_err(|error| error.to_string());
    try_config(folder, keys).and_then(prepared).unwrap_err()
}

/// The loss on all conversations.
pub(crate) fn loss(session: &mut Session) -> f64 {
    let validation = session.load_validation(&golden("chat.jsonl")).unwrap();
    session.validation_loss(&validation).unwrap()
}

/// The gradients of a run's first step, by PEFT's names: a tenth of each is AdamW's mean.
pub(crate) fn gradients(session: &mut Session) -> BTreeMap<String, Tensor> {
    session.step().unwrap();
    let state = session.parameters().state().unwrap();
    let named = |(name, mean): (String, Tensor)| {
        let (module, factor) =
            name.strip_prefix("optimiser.language_model.")?.strip_suffix(".mean")?.rsplit_once('.')?;
        let factor = match factor {
            "down" => "lora_A.",
            "up" => "lora_B.",
            "bias_value" => return Some((format!("{module}.bias"), mean / 0.1)),
            _ => "",
        };
        Some((format!("{module}.{factor}weight"), mean / 0.1))
    };
    state.into_iter().filter_map(named).collect()
}

pub(crate) fn steps(session: &mut Session) -> Vec<StepReport> {
    std::iter::from_fn(|| session.step().unwrap()).collect()
}

/// A run in one go and one that goes on from its state after three steps end with the same adapter.
pub(crate) fn goes_on_as_if_never_stopped(folder: &Path, keys: &[&str]) {
    let end = |session: &mut Session| {
        steps(session);
        session.adapter().unwrap().export().unwrap()
    };
    let whole = end(&mut prepare(folder, keys));
    let mut session = prepare(folder, keys);
    for _ in 0..3 {
        session.step().unwrap();
    }
    session.save_state().unwrap();
    drop(session);
    let mut resumed = prepare(folder, &[keys, &["resume=true"]].concat());
    assert_eq!((resumed.steps_done(), end(&mut resumed) == whole), (3, true));
}
