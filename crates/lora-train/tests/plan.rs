//! Plans of Stable Diffusion 1.5's own sizes, from headers alone: what fits, in which order, and what cannot. Whether the
//! numbers are true is `plan_memory`'s to say.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Mutex, OnceLock};

use lora_core::DType;
use lora_models::synthetic::SyntheticModel;
use lora_train::config::{Format, TrainConfig};
use lora_train::plan::{MemoryPart as Memory, Phase, PhasePeak, Plan, plan};
use lora_train::{Error, Plugins, Session};

const GIB: u64 = 1 << 30;

/// A diffusers folder of SD 1.5's sizes whose files have a header and nothing in them: sparse files of zeros.
fn base() -> &'static Path {
    static BASE: OnceLock<tempfile::TempDir> = OnceLock::new();
    BASE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        SyntheticModel::full().write_headers(folder.path()).unwrap();
        folder
    })
    .path()
}

fn config(keys: &[&str]) -> TrainConfig {
    let text = format!(
        "base_model: {}\ntrain_data_dir: none\noutput_dir: none\ndevice: cuda\nprecision: fp16\nlora_rank: 8\n",
        base().display()
    );
    TrainConfig::from_text(&text, Format::Yaml, keys).unwrap()
}

fn planned(keys: &[&str]) -> Plan {
    plan(&config(keys), &Plugins::default()).unwrap()
}

fn changed(plan: &Plan) -> Vec<&'static str> {
    plan.remedies.iter().flat_map(|remedy| remedy.settings.iter().map(|setting| setting.key)).collect()
}

#[test]
fn without_a_budget_there_is_a_prediction_and_what_each_remedy_would_save() {
    let plan = planned(&["precision=fp32", "batch_size=4", "cache_latents=false"]);
    assert!(plan.budget.is_none() && plan.remedies.is_empty() && plan.spend.is_empty());
    // 859,520,964 weights of the U-Net, 4 bytes each, each tensor in units of 512 bytes.
    let training = plan.as_configured.phases.iter().find(|phase| phase.phase == Phase::Training).unwrap();
    let unet = training.parts.of(Memory::Weights("U-Net"));
    assert!((4 * 859_520_964..4 * 859_520_964 + 700 * 512).contains(&unet), "{unet}");
    let keys: Vec<&str> = plan.alternatives.iter().map(|remedy| remedy.settings[0].key).collect();
    for key in ["batch_size", "gradient_checkpointing", "cache_latents", "precision", "base_storage"] {
        assert!(keys.contains(&key), "{key}: {keys:?}");
    }
    assert!(!keys.contains(&"max_resolution"), "not allowed");
    assert!(plan.alternatives.iter().all(|remedy| remedy.peak_after < remedy.peak_before && !remedy.cost.is_empty()));
    let text = plan.to_string();
    assert!(text.contains("saved activations") && text.contains("each alone"), "{text}");
    let recordings = plan.as_configured.recordings.unwrap();
    assert!(recordings.bytes >= training.parts.of(Memory::Saved) && recordings.bytes < training.parts.total());
    assert_eq!(recordings.most, recordings.bytes + plan.as_configured.peak());
    assert!(text.contains("CUDA graphs keep"), "{text}");
    for other in ["cuda_graphs=false", "lora_dropout=0.1", "device=cpu"] {
        assert!(planned(&[other]).as_configured.recordings.is_none(), "{other}");
    }
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["as_configured"]["phases"].as_array().unwrap().len(), plan.as_configured.phases.len());
}

#[test]
fn the_mildest_remedies_that_suffice_are_taken() {
    let wanted = config(&["precision=fp32", "batch_size=4"]);
    let mut peaks = Vec::new();
    for budget in ["30GiB", "9GiB", "7GiB", "5.5GiB", "3GiB", "2.2GiB"] {
        let own = planned(&["precision=fp32", "batch_size=4", &format!("vram_budget={budget}")]);
        assert!(own.planned.peak() <= own.budget.unwrap(), "{budget}: {own}");
        let now = own.config();
        assert_eq!(now.batch_size * now.gradient_accumulation_steps, 4, "the effective batch is kept");
        assert_eq!(now.datasets[0].batch_size, now.batch_size);
        assert_eq!(now.max_resolution, wanted.max_resolution);
        // Without any one of them it does not fit.
        for left_out in 0..own.remedies.len() {
            let mut keys = vec!["precision=fp32".to_owned(), "batch_size=4".to_owned()];
            for (index, remedy) in own.remedies.iter().enumerate() {
                if index != left_out {
                    keys.extend(remedy.settings.iter().map(|setting| format!("{}={}", setting.key, setting.to)));
                }
            }
            let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
            assert!(planned(&keys).as_configured.peak() > own.budget.unwrap(), "{budget}: {left_out} of {own}");
        }
        // What a plan predicts is what its configuration predicts.
        assert_eq!(plan(now, &Plugins::default()).unwrap().as_configured.peak(), own.planned.peak());
        peaks.push((budget, changed(&own)));
    }
    assert!(peaks[0].1.is_empty(), "{peaks:?}");
    assert_eq!(peaks[1].1, ["batch_size", "gradient_accumulation_steps"], "{peaks:?}");
    assert!(peaks[4].1.contains(&"precision") && !peaks[4].1.contains(&"base_storage"), "{peaks:?}");
    assert!(peaks[5].1.contains(&"base_storage"), "{peaks:?}");
}

#[test]
fn resolution_falls_only_where_it_may() {
    let keys = [
        "batch_size=1",
        "gradient_checkpointing=true",
        "train_text_encoder=false",
        "base_storage=nf4",
        "optimizer=adamw8bit",
        "cpu_offload_checkpointing=true",
        "offload_base=true",
        "vae_tiling=true",
    ];
    let least = match plan(&config(&[&keys[..], &["vram_budget=600MiB"]].concat()), &Plugins::default()) {
        Err(error @ Error::Budget { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(
        least.contains("600.0 MiB is too little") && least.contains("at least") && least.contains("as it is"),
        "{least}"
    );
    let keys = ["gradient_checkpointing=true", "train_text_encoder=false"];
    let budget = format!("vram_budget={}", planned(&keys).as_configured.peak() - 1);
    let own = planned(&[&keys[..], &[&budget]].concat());
    assert_eq!(changed(&own), ["base_storage"], "{own}");
    let own = planned(&[&keys[..], &[&budget, "allow_lower_resolution=true"]].concat());
    assert_eq!(changed(&own), ["max_resolution", "sample_resolution"], "{own}");
    assert_eq!(own.config().max_resolution, (448, 448));
}

#[test]
fn memory_that_is_left_is_offered() {
    let keys = ["gradient_checkpointing=true", "gradient_accumulation_steps=4", "vram_budget=24GiB"];
    let own = planned(&keys);
    assert!(own.remedies.is_empty());
    let text = own.to_string();
    for key in ["gradient_checkpointing = false", "batch_size = 4", "lora_rank = 16"] {
        assert!(text.contains(key), "{key}: {text}");
    }
    assert!(own.spend.iter().all(|wish| wish.peak_after <= own.budget.unwrap()));
}

#[test]
fn bad_budgets_are_refused() {
    for (budget, part) in [("8", "unit"), ("much", "8GiB"), ("true", "text"), ("-1GiB", "8GiB")] {
        let text = format!("base_model: a\ntrain_data_dir: b\noutput_dir: c\nvram_budget: {budget}\n");
        let error = TrainConfig::from_text(&text, Format::Yaml, &[] as &[&str]).unwrap_err().to_string();
        assert!(error.contains("vram_budget") && error.contains(part), "{error}");
    }
}

/// A run takes its plan over before it loads anything, and says so.
#[test]
fn a_run_applies_its_plan() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    SyntheticModel::tiny().write(path("base.safetensors"), DType::F16).unwrap();
    std::fs::create_dir(path("data")).unwrap();
    for index in 0..4 {
        image::RgbImage::new(256, 256).save(folder.path().join("data").join(format!("{index}.png"))).unwrap();
    }
    let text = format!(
        "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\nmax_resolution: 256\ndevice: cpu\nprecision: fp32\n\
         batch_size: 4\nmax_train_steps: 1\ntarget_modules: attention\n",
        path("base.safetensors"),
        path("data"),
        path("out"),
    );
    let config = |keys: &[&str]| TrainConfig::from_text(&text, Format::Yaml, keys).unwrap();
    // On the CPU the program itself counts, which grows as it runs, most at the first plan: the second is close to what
    // the run finds, and halfway down is far from either end.
    plan(&config(&[]), &Plugins::default()).unwrap();
    let whole = plan(&config(&[]), &Plugins::default()).unwrap();
    let halved = &whole.alternatives[0];
    assert_eq!(halved.settings[0].key, "batch_size");
    let smallest = whole.alternatives.iter().map(|remedy| remedy.peak_after).min().unwrap();
    let budget = format!("vram_budget={}", (whole.as_configured.peak() + smallest) / 2);
    let mut session = Session::prepare(config(&[&budget]), &Plugins::default(), &mut |_| {}).unwrap();
    let now = session.config();
    assert!(now.batch_size < 4 || now.gradient_checkpointing, "{now:?}");
    assert_eq!(now.batch_size * now.gradient_accumulation_steps, 4);
    assert_eq!(session.step().unwrap().unwrap().items, 4);
    assert!(session.summary().notes.iter().any(|note| note.contains("to fit")), "{:?}", session.summary().notes);
    // All that is free is more than enough.
    let session = Session::prepare(config(&["auto=true"]), &Plugins::default(), &mut |_| {}).unwrap();
    assert_eq!(session.config().batch_size, 4);
}

/// The tables of docs/memory.md, which are predictions.
#[test]
fn the_documentation_shows_what_is_predicted() {
    let mut table = String::from(
        "| | batch | weights | saved activations | adapter, gradients, optimiser | working | beside tensors | peak |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    let rows: [(&str, &[&str]); 10] = [
        ("fp32", &["precision=fp32"]),
        ("fp16", &[]),
        ("fp16, text encoder frozen", &["train_text_encoder=false"]),
        ("fp16, `recompute_feed_forward`", &["recompute_feed_forward=true"]),
        ("fp16, `gradient_checkpointing`", &["gradient_checkpointing=true"]),
        ("fp16, `gradient_checkpointing`, int8 base", &["gradient_checkpointing=true", "base_storage=int8"]),
        (
            "the same, text encoder frozen",
            &["gradient_checkpointing=true", "base_storage=int8", "train_text_encoder=false"],
        ),
        ("the same, NF4 base", &["gradient_checkpointing=true", "base_storage=nf4", "train_text_encoder=false"]),
        (
            "the same, `cpu_offload_checkpointing`",
            &[
                "gradient_checkpointing=true",
                "base_storage=nf4",
                "train_text_encoder=false",
                "cpu_offload_checkpointing=true",
            ],
        ),
        (
            "the same, `offload_base`",
            &[
                "gradient_checkpointing=true",
                "base_storage=nf4",
                "train_text_encoder=false",
                "cpu_offload_checkpointing=true",
                "offload_base=true",
            ],
        ),
    ];
    for (name, keys) in rows {
        for batch in ["1", "2"] {
            let batch_key = format!("batch_size={batch}");
            let own = planned(&[keys, &[&batch_key]].concat());
            let training = own.as_configured.phases.iter().find(|phase| phase.phase == Phase::Training).unwrap();
            let sum = |parts: &[Memory]| parts.iter().map(|&part| training.parts.of(part)).sum::<u64>();
            let cells = [
                training.parts.weights(),
                sum(&[Memory::Saved]),
                sum(&[Memory::Adapter, Memory::Gradients, Memory::Optimiser]),
                sum(&[Memory::Working]),
                training.overhead,
                training.total(),
            ];
            write!(table, "| {name} | {batch} |").unwrap();
            for bytes in cells {
                write!(table, " {:.2} |", bytes as f64 / GIB as f64).unwrap();
            }
            table.push('\n');
        }
    }
    documented("predicted", &table);
}

/// Every phase of a run, with the autoencoder on whole pictures and in tiles.
#[test]
fn the_documentation_shows_the_phases() {
    let mut table = String::from(
        "| | encode pictures | train | draw samples | in tiles: encode pictures | draw samples |\n|---|---|---|---|---|---|\n",
    );
    let nf4 = ["gradient_checkpointing=true", "base_storage=nf4", "train_text_encoder=false"];
    let rows: [(&str, &[&str]); 3] = [
        ("fp16", &[]),
        ("fp16, `gradient_checkpointing`", &["gradient_checkpointing=true"]),
        ("the same, NF4 base, text encoder frozen", &nf4),
    ];
    for (name, keys) in rows {
        for side in ["512", "768"] {
            let (pictures, samples) = (format!("max_resolution={side}"), format!("sample_resolution={side}"));
            let own = [keys, &["sample_prompts=a", &pictures, &samples]].concat();
            let (whole, tiled) = (planned(&own), planned(&[&own[..], &["vae_tiling=true"]].concat()));
            write!(table, "| {name}, {side} px |").unwrap();
            let peak = |plan: &Plan, phase| {
                plan.as_configured.phases.iter().find(|own| own.phase == phase).map_or(0, PhasePeak::total)
            };
            for (plan, phase) in [
                (&whole, Phase::Examples),
                (&whole, Phase::Training),
                (&whole, Phase::Samples),
                (&tiled, Phase::Examples),
                (&tiled, Phase::Samples),
            ] {
                write!(table, " {:.2} |", peak(plan, phase) as f64 / GIB as f64).unwrap();
            }
            table.push('\n');
        }
    }
    documented("phases", &table);
}

/// What is often said of memory, and what is predicted for the same change.
#[test]
fn the_documentation_answers_what_is_often_said() {
    let base: &[&str] = &["batch_size=1"];
    let half = "precision=fp16";
    let rows: [(&str, &str, &[&str], &[&str]); 8] = [
        ("fp32 → fp16", "−40%", &["precision=fp32"], &[half]),
        ("rank 8 → 16", "+18%", &["lora_rank=8"], &["lora_rank=16"]),
        ("rank 8 → 128", "", &["lora_rank=8"], &["lora_rank=128"]),
        ("512 → 384 px", "−45%", &["max_resolution=512"], &["max_resolution=384"]),
        ("512 → 448 px", "−30%", &["max_resolution=512"], &["max_resolution=448"]),
        ("fp32, 512 px → fp16, 448 px", "", &["precision=fp32"], &[half, "max_resolution=448"]),
        ("4 micro-batches of 1 accumulated", "nothing", &[], &["gradient_accumulation_steps=4"]),
        ("a batch of 4 instead", "", &[], &["batch_size=4"]),
    ];
    let mut table =
        String::from("| change | is said to change | peak before | after | change |\n|---|---|---|---|---|\n");
    for (name, said, before, after) in rows {
        let peak = |keys: &[&str]| planned(&[base, keys].concat()).as_configured.peak() as f64 / GIB as f64;
        let (before, after) = (peak(before), peak(after));
        let change = format!("{:+.0}%", 100.0 * (after / before - 1.0)).replace('-', "−").replace("+0%", "0%");
        writeln!(table, "| {name} | {said} | {before:.2} | {after:.2} | {change} |").unwrap();
    }
    documented("said", &table);
}

/// What docs/memory.md shows between `<!-- NAME: begin -->` and its end; written there with `UPDATE_DOCS=1`.
fn documented(name: &str, table: &str) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap();
    let (begin, end) = (format!("<!-- {name}: begin -->\n"), format!("<!-- {name}: end -->"));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/memory.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (before, rest) = text.split_once(&begin).unwrap();
    let (shown, after) = rest.split_once(&end).unwrap();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, format!("{before}{begin}{table}{end}{after}")).unwrap();
        return;
    }
    assert_eq!(shown, table, "run the tests with UPDATE_DOCS=1");
}
