//! What is planned of a language model's run is what it takes, byte by byte. One test, alone in its process, as whatever another
//! thread allocates would count too (see `plan_memory`).

use std::fs;
use std::path::Path;

use lora_torch::frozen::{FrozenWeight, Storage};
use lora_torch::memory::{count_host_allocations, host_allocations, reset_host_peak};
use lora_torch::tch::{Device, Kind, Tensor};
use lora_train::config::{Format, TrainConfig};
use lora_train::plan::{Phase, plan};
use lora_train::{Plugins, Session};

/// Scalars that tensors are multiplied by have bytes of their own in a run, and none in a plan.
const SCALARS: u64 = 64;

#[test]
fn predictions_for_a_language_model_are_what_is_counted() {
    count_host_allocations().unwrap();
    // NF4's tables, which the process keeps from its first use on, are no part of a prediction.
    let first = Tensor::zeros([64, 64], (Kind::Float, Device::Cpu));
    FrozenWeight::stored(&first, Storage::Nf4).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::create_dir(path("base")).unwrap();
    for from in ["../lora-models/tests/golden/llm/qwen2/model", "tests/golden/language"] {
        let files = fs::read_dir(here.join(from)).unwrap().map(|entry| entry.unwrap().path());
        for file in files.filter(|file| file.is_file()) {
            fs::copy(&file, folder.path().join("base").join(file.file_name().unwrap())).unwrap();
        }
    }
    // One row as long as rows can be, visited four times, as what stands in for it.
    fs::write(path("long.txt"), "Who keeps the light? Nobody now. ".repeat(60)).unwrap();
    let answer = "Nobody now. ".repeat(60);
    let side =
        format!("[{{\"role\":\"user\",\"content\":\"Who?\"}},{{\"role\":\"assistant\",\"content\":\"{answer}\"}}]");
    fs::write(path("pairs.jsonl"), format!("{{\"chosen\":{side},\"rejected\":{side}}}\n")).unwrap();
    let pairs = format!("train_data_dir={}", path("pairs.jsonl"));
    let text = format!(
        "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\nmax_seq_length: 160\nlong_documents: truncate\n\
         device: cpu\nprecision: fp32\ntarget_modules: all-linear\nlora_rank: 16\nmax_train_steps: 2\nrepeats: 4\n",
        path("base"),
        path("long.txt"),
        path("out"),
    );
    let validation = format!("validation_data_dir={}", path("long.txt"));
    for keys in [
        &[][..],
        &["gradient_checkpointing=true"],
        &["gradient_accumulation_steps=2"],
        &["batch_size=2"],
        &["packing=true"],
        &["base_storage=int8"],
        &["base_storage=nf4", "gradient_checkpointing=true"],
        &["optimizer=adamw8bit", "neftune_noise_alpha=5"],
        &["target_modules=[\"all-linear\", \"embed_tokens\", \"lm_head\"]"],
        &[&validation],
        &["modules_to_save=[\"lm_head\", \"embed_tokens\"]"],
        &["modules_to_save=lm_head", "base_storage=nf4", "gradient_checkpointing=true"],
        &["modules_to_save=norm", "trainable_token_indices=[5, 17]"],
        &["bias=all", "target_modules=q_proj"],
        &["sliding_window=32"],
        &["sliding_window=16", "attention_sink_size=2", "packing=true", "gradient_checkpointing=true"],
        &["objective=dpo", &pairs],
        &["objective=dpo", &pairs, "gradient_checkpointing=true", "base_storage=nf4"],
        &["objective=orpo", &pairs, "batch_size=2"],
    ] {
        // Within a budget that is enough, alternatives are not looked for.
        let given = [keys, &["vram_budget=100GiB"]].concat();
        let config = TrainConfig::from_text(&text, Format::Yaml, &given).unwrap();
        let plugins = Plugins::default();
        let plan = plan(&config, &plugins).unwrap();
        let predicted = |phase: Phase| {
            let own = plan.as_configured.phases.iter().filter(|own| own.phase == phase);
            own.map(|own| own.parts.total()).max().unwrap()
        };
        reset_host_peak();
        let before = host_allocations().unwrap().live;
        let agree = |phase: Phase| {
            let counted = host_allocations().unwrap().peak - before;
            reset_host_peak();
            let predicted = predicted(phase);
            println!("{keys:?}, {phase:?}: predicted {predicted}, counted {counted}");
            assert!(predicted.abs_diff(counted) <= SCALARS, "{keys:?}, {phase:?}: {predicted}, counted {counted}");
        };
        let mut unplanned = config.clone();
        unplanned.vram_budget = None;
        let mut session = Session::prepare(unplanned, &plugins, &mut |_| {}).unwrap();
        agree(Phase::Loading);
        if let Some(folder) = config.validation_data_dir.clone() {
            let validation = session.load_validation(&folder).unwrap();
            session.validation_loss(&validation).unwrap();
            agree(Phase::Validation);
        }
        while session.step().unwrap().is_some() {}
        agree(Phase::Training);
    }
}
