//! What is held out of the data, and what its loss decides: which step was best, and when to stop. The same for
//! pictures and for texts.

mod common;
#[path = "common/language.rs"]
mod language;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lora_train::StepReport;
use lora_train::callback::{Callback, Control};
use lora_train::config::{Format, Resume, TrainConfig};
use lora_train::plan::{Phase, plan};
use lora_train::{Plugins, RunResult, Session, train};

fn run(config: TrainConfig) -> RunResult {
    train(config, &Plugins::default(), Vec::new(), &Arc::new(AtomicBool::new(false)), &mut |_| {}).unwrap()
}

fn resumed(mut config: TrainConfig) -> TrainConfig {
    config.resume = Resume::Yes;
    config
}

/// The losses that were told, by step.
fn told(folder: &Path) -> Vec<(usize, f64)> {
    let text = fs::read_to_string(folder.join("out/validation.jsonl")).unwrap();
    let line = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        (line["step"].as_u64().unwrap() as usize, line["loss"].as_f64().unwrap())
    };
    text.lines().map(line).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder.join("out")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

/// A run on pictures and one on texts, with the same further keys.
fn both(keys: &[&str]) -> [(tempfile::TempDir, TrainConfig); 2] {
    let (pictures, texts) = (common::workspace(), language::workspace());
    let keys = |split: &'static str| [keys, &[split]].concat();
    let of_pictures = common::config(pictures.path(), &keys("validation_split=0.25"));
    let of_texts = language::try_config(texts.path(), &keys("validation_split=3")).unwrap();
    [(pictures, of_pictures), (texts, of_texts)]
}

#[test]
fn a_part_of_the_data_is_held_out_by_the_seed() {
    let sizes = [(6, 2), (9, 3)];
    for ((folder, config), (trained, held_out)) in both(&["max_train_steps=1"]).into_iter().zip(sizes) {
        let mut session = Session::prepare(config.clone(), &Plugins::default(), &mut |_| {}).unwrap();
        let summary = session.summary();
        assert_eq!(summary.data.items, trained, "{summary}");
        assert!(summary.notes.iter().any(|note| note.contains(&format!("{held_out} of the data"))), "{summary}");
        let loss = |session: &mut Session| {
            let validation = session.load_held_out().unwrap().unwrap();
            assert_eq!(validation.captions().count(), held_out);
            session.validation_loss(&validation).unwrap()
        };
        let first = loss(&mut session);
        drop(session);
        let of_seed = |seed: u64| {
            let mut config = config.clone();
            config.seed = seed;
            loss(&mut Session::prepare(config, &Plugins::default(), &mut |_| {}).unwrap())
        };
        assert_eq!(of_seed(config.seed), first);
        assert!((1..5).map(of_seed).any(|other| other != first));
        drop(folder);
    }
}

#[test]
fn a_run_whose_loss_no_longer_falls_is_stopped() {
    let keys = [
        "max_train_steps=20",
        "learning_rate=1e-12",
        "validate_every_n_steps=2",
        "early_stopping_patience=2",
        "early_stopping_threshold=0.01",
        "save_state=true",
    ];
    for (folder, config) in both(&keys) {
        let result = run(config.clone());
        // The look at step 2 is the first that counts.
        assert_eq!(result.steps, 6);
        assert!(result.stopped.unwrap().contains("2 looks"));
        assert!(result.lora.exists());
        let steps: Vec<usize> = told(folder.path()).into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [0, 2, 4, 6, 6]);
        // Taken up again it has looked in vain as often: one more look is enough.
        assert_eq!(run(resumed(config)).steps, 8);
    }
}

#[test]
fn the_best_is_kept_and_named() {
    let keys = ["max_train_steps=8", "learning_rate=0.02", "validate_every_n_steps=1", "save_best=true"];
    let [(_of_pictures, pictures), (folder, texts)] = both(&keys);
    let best = run(pictures).best.unwrap();
    assert!(best.lora.unwrap().ends_with("lora-best.safetensors"));
    let best = run(texts.clone()).best.unwrap();
    let counted = told(folder.path()).into_iter().filter(|(step, _)| *step > 0);
    let (step, lowest) = counted.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!((best.step, best.loss), (step, lowest));
    let saved = best.lora.unwrap();
    assert!(saved.ends_with("out/lora-best"), "{}", saved.display());
    let mut from = texts;
    from.init_from = Some(saved);
    let mut session = Session::prepare(from, &Plugins::default(), &mut |_| {}).unwrap();
    let validation = session.load_held_out().unwrap().unwrap();
    let again = session.validation_loss(&validation).unwrap();
    assert!((again - lowest).abs() < 1e-5, "{again} against {lowest}");
}

#[test]
fn a_resumed_run_knows_its_best() {
    let keys =
        ["max_train_steps=8", "learning_rate=0.05", "validate_every_n_steps=2", "save_state=true", "save_best=true"];
    let [_, (folder, config)] = both(&keys);
    let whole = run(config.clone()).best.unwrap();
    fs::remove_dir_all(folder.path().join("out")).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    struct StopAt(Arc<AtomicBool>);
    impl Callback for StopAt {
        fn on_step(&mut self, _session: &mut Session, report: &StepReport) -> lora_train::Result<Control> {
            self.0.store(report.step == 5, Ordering::Relaxed);
            Ok(Control::Continue)
        }
    }
    let callbacks: Vec<Box<dyn Callback>> = vec![Box::new(StopAt(Arc::clone(&stop)))];
    let first = train(config.clone(), &Plugins::default(), callbacks, &stop, &mut |_| {}).unwrap();
    assert_eq!(first.steps, 5);
    let second = run(resumed(config));
    assert_eq!((second.steps, second.best.unwrap()), (8, whole));
}

#[test]
fn only_the_last_saves_are_kept() {
    let keys = ["max_train_steps=6", "save_every_n_steps=1", "save_total_limit=2"];
    for ((folder, config), extension) in both(&keys).into_iter().zip([".safetensors", ""]) {
        // Of another run, and a folder with something of the user's.
        fs::create_dir_all(folder.path().join("out/other-step000001")).unwrap();
        run(config);
        let names = names(folder.path());
        let saves: Vec<&String> = names.iter().filter(|name| name.contains("-step")).collect();
        let expected = ["lora-step000004", "lora-step000005"].map(|name| format!("{name}{extension}"));
        assert_eq!(saves, [&expected[0], &expected[1], &"other-step000001".to_owned()]);
        assert!(names.contains(&format!("lora{extension}")));
    }
}

/// A plan looks at what is held out as at items of another place.
#[test]
fn what_is_held_out_is_planned() {
    let folder = language::workspace();
    let peaks = |key: &str| {
        let config = language::try_config(folder.path(), &[key, "vram_budget=100GiB"]).unwrap();
        let plan = plan(&config, &Plugins::default()).unwrap();
        plan.as_configured.phases.iter().map(|phase| (phase.phase, phase.parts.total())).collect::<Vec<_>>()
    };
    let split = peaks("validation_split=0.25");
    assert!(split.iter().any(|(phase, _)| *phase == Phase::Validation), "{split:?}");
    assert_eq!(split, peaks("validation_data_dir=elsewhere"));
}

#[test]
fn what_cannot_be_decided_is_refused() {
    let folder = common::workspace();
    let refused = |keys: &[&str]| {
        let path = folder.path().display();
        let text =
            format!("base_model: {path}/base.safetensors\ntrain_data_dir: {path}/data\noutput_dir: {path}/out\n");
        TrainConfig::from_text(&text, Format::Yaml, keys).unwrap_err().to_string()
    };
    for (keys, said) in [
        (&["save_best=true"][..], "validate_every_n_steps"),
        (&["early_stopping_patience=2", "validation_split=0.1"], "validate_every_n_steps"),
        (&["early_stopping_threshold=0.1"], "early_stopping_patience"),
        (&["validation_split=0.1", "validation_data_dir=x"], "validation_data_dir"),
        (&["validation_split=1.5"], "share"),
        (&["early_stopping=3"], "early_stopping_patience"),
    ] {
        let error = refused(keys);
        assert!(error.contains(said), "{keys:?}: {error}");
    }
    let all = common::refusal(folder.path(), &["validation_split=8"]);
    assert!(all.contains("validation_split") && all.contains('8'), "{all}");
}

#[test]
fn masks_weigh_what_is_held_out_as_they_weigh_what_is_trained_on() {
    let folder = common::workspace();
    // The left half counts.
    for index in 0..8 {
        let mask = image::GrayImage::from_fn(70, 64, |x, _| image::Luma([if x < 35 { 255 } else { 0 }]));
        mask.save(folder.path().join(format!("data/{index}-mask.png"))).unwrap();
    }
    let loss = |keys: &[&str]| {
        let config = common::config(folder.path(), &[keys, &["validation_split=0.25"]].concat());
        let mut session = Session::prepare(config, &Plugins::default(), &mut |_| {}).unwrap();
        let validation = session.load_held_out().unwrap().unwrap();
        session.validation_loss(&validation).unwrap()
    };
    let (plain, half) = (loss(&[]), loss(&["masked_loss=true"]));
    let inverted = loss(&["masked_loss=true", "invert_mask=true"]);
    assert!((half + inverted - plain).abs() < 1e-3 * plain, "{half} + {inverted} ≠ {plain}");
    assert!(half > 0.2 * plain && half < 0.8 * plain, "{half} of {plain}");
    // What is kept of the base's answers is no part of a judgement.
    let kept = loss(&["masked_loss=true", "prior_mask_weight=1.0"]);
    // Nor do processors draw anything.
    let drawn = loss(&[r#"processors=["center_crop","color_jitter","flip"]"#]);
    assert!((kept - half).abs() < 1e-6 * half && (drawn - plain).abs() < 1e-6 * plain, "{kept}, {drawn}");
}

#[test]
fn a_held_out_picture_that_cannot_be_read_is_left_out_unless_the_run_is_strict() {
    let folder = common::workspace();
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    for name in ["a.png", "b.png"] {
        image::RgbImage::from_pixel(64, 64, image::Rgb([90; 3])).save(other.join(name)).unwrap();
    }
    let key = format!("validation_data_dir={:?}", other.display().to_string());
    let load = |strict: &str| {
        let config = common::config(folder.path(), &[&key, strict]);
        let mut session = Session::prepare(config, &Plugins::default(), &mut |_| {}).unwrap();
        // Its header can be read.
        let bytes = fs::read(other.join("b.png")).unwrap();
        fs::write(other.join("b.png"), &bytes[..bytes.len() - 20]).unwrap();
        let loaded = session.load_held_out().map(|own| own.unwrap().captions().count());
        fs::write(other.join("b.png"), &bytes).unwrap();
        loaded.map_err(|error| error.to_string())
    };
    assert_eq!(load("strict=false"), Ok(1));
    assert!(load("strict=true").unwrap_err().contains("b.png"));
}
