//! A run that is taken up again is the run that never stopped, bit for bit; anything else is refused by name.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use common::{config, prepare, refusal, workspace};
use lora_io::safetensors::SafetensorsFile;
use lora_torch::tensor::to_bytes;
use lora_train::callback::{Callback, Control};
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, RunResult, Session, StepReport, train};
use serde_json::Value;

/// Everything that a run has learnt, byte by byte.
fn learnt(session: &Session) -> BTreeMap<String, Vec<u8>> {
    let state = session.parameters().state().unwrap();
    state.into_iter().map(|(name, tensor)| (name, to_bytes(&tensor).unwrap())).collect()
}

fn steps(session: &mut Session, count: usize) -> Vec<StepReport> {
    std::iter::from_fn(|| session.step().unwrap()).take(count).collect()
}

/// Six steps in one go, and three with three more after a new beginning.
fn in_one_go_and_in_two(keys: &[&str]) {
    let folder = workspace();
    let keys = [keys, &["max_train_steps=6"]].concat();
    let mut whole = prepare(folder.path(), &keys);
    let reports = steps(&mut whole, 6);
    let whole_file = std::fs::read(whole.save("a").unwrap()).unwrap();

    let mut first = prepare(folder.path(), &keys);
    steps(&mut first, 3);
    first.save_state().unwrap();
    // Steps behind the state are lost with the process and done again.
    steps(&mut first, 1);
    drop(first);
    let mut second = prepare(folder.path(), &[&keys[..], &["resume=true"]].concat());
    assert_eq!((second.steps_done(), second.resumed().unwrap().step), (3, 3));
    let others = steps(&mut second, 6);
    for (a, b) in reports[3..].iter().zip(&others) {
        assert_eq!(
            (a.step, a.epoch, a.loss, a.learning_rate, a.gradient_norm),
            (b.step, b.epoch, b.loss, b.learning_rate, b.gradient_norm),
            "{keys:?}"
        );
    }
    assert_eq!(others.len(), 3);
    assert!(learnt(&whole) == learnt(&second), "{keys:?}");
    assert!(whole_file == std::fs::read(second.save("a").unwrap()).unwrap(), "{keys:?}");
}

#[test]
fn a_run_taken_up_again_is_the_run_that_never_stopped() {
    // Eight pictures in steps of three micro-batches of two: epochs end inside, the last step of each is smaller.
    in_one_go_and_in_two(&[
        "batch_size=2",
        "gradient_accumulation_steps=3",
        "lora_dropout=0.2",
        "rank_dropout=0.1",
        "caption_dropout_rate=0.3",
        "noise_offset=0.05",
        "lr_scheduler=cosine",
        "lr_warmup_steps=2",
        "save_precision=fp32",
    ]);
}

#[test]
fn so_it_is_with_latents_of_each_visit_a_running_average_and_other_variants() {
    in_one_go_and_in_two(&["cache_latents=false", "processors=[\"random_crop\", \"flip\"]", "batch_size=3"]);
    in_one_go_and_in_two(&["variant=pissa", "ema_decay=0.9"]);
    in_one_go_and_in_two(&[
        "precision=bf16",
        "ema_decay=0.9",
        "gradient_accumulation_steps=2",
        "target_modules=all-conv",
    ]);
    in_one_go_and_in_two(&["variant=lokr", "train_text_encoder=false", "gradient_checkpointing=true"]);
}

#[test]
fn so_it_is_with_every_optimiser() {
    for optimizer in ["adamw8bit", "adafactor", "lion", "prodigy", "adamw_schedulefree"] {
        in_one_go_and_in_two(&[&format!("optimizer={optimizer}")]);
    }
}

#[test]
fn so_it_is_with_whole_networks() {
    in_one_go_and_in_two(&["train=full", "batch_size=2", "ema_decay=0.9", "learning_rate=1e-4"]);
}

#[test]
fn what_would_be_another_run_is_refused_by_name() {
    let folder = workspace();
    let mut first = prepare(folder.path(), &[]);
    steps(&mut first, 1);
    first.save_state().unwrap();
    for (key, was, is) in [
        ("lora_rank=8", "lora_rank was 4", "is 8"),
        ("target_modules=attention-mlp", "target_modules was [\"attention\"]", "is [\"attention-mlp\"]"),
        ("seed=7", "seed was 42", "is 7"),
        ("batch_size=2", "batch_size was 1", "is 2"),
        ("gradient_accumulation_steps=4", "gradient_accumulation_steps was 1", "is 4"),
        ("max_resolution=128", "max_resolution was 64×64", "is 128×128"),
        ("precision=bf16", "precision was fp32", "is bf16"),
        ("variant=dora", "variant was lora", "is dora"),
        ("cache_latents=false", "cache_latents was true", "is false"),
        ("caption_prefix=x", "captions was …", "prefix: \"x\""),
    ] {
        let error = refusal(folder.path(), &["resume=true", key]);
        let named = error.contains(was) && error.contains(is) && error.contains("lora-state.safetensors");
        assert!(named && error.contains("init_from"), "{key}: {error}");
    }
    // Length, names, samples and saves may change; the learning rate too, and is noted.
    let keys =
        ["resume=true", "max_train_steps=9", "learning_rate=5e-4", "sample_prompts=[\"a\"]", "save_every_n_steps=2"];
    let session = prepare(folder.path(), &keys);
    let notes = session.summary().notes.join("\n");
    assert!(notes.contains("step 1 of 9") && notes.contains("learning_rate was 0.001, is 0.0005"), "{notes}");

    // Another caption, another picture, another base.
    std::fs::write(folder.path().join("data/3.txt"), "another").unwrap();
    assert!(refusal(folder.path(), &["resume=true"]).contains("pictures and their captions was"));
    std::fs::remove_file(folder.path().join("data/3.png")).unwrap();
    let error = refusal(folder.path(), &["resume=true"]);
    assert!(error.contains("dataset was 8 pictures, 8 visits an epoch, is 7 pictures, 7 visits"), "{error}");
    let other = workspace();
    lora_models::synthetic::SyntheticModel::tiny()
        .write(other.path().join("base.safetensors"), lora_core::DType::BF16)
        .unwrap();
    let state = format!("resume={}", folder.path().join("out/lora-state.safetensors").display());
    assert!(refusal(other.path(), &[&state]).contains("base_model was"));
}

#[test]
fn where_there_is_no_whole_state_the_remedy_is_named() {
    let folder = workspace();
    assert_eq!(prepare(folder.path(), &["resume=auto"]).steps_done(), 0);
    let error = refusal(folder.path(), &["resume=true"]);
    assert!(error.contains("lora-state.safetensors") && error.contains("resume = \"auto\""), "{error}");
    let mut session = prepare(folder.path(), &[]);
    steps(&mut session, 1);
    let path = session.save_state().unwrap();
    assert_eq!(prepare(folder.path(), &["resume=auto"]).steps_done(), 1);
    // From another folder, by the file or the folder.
    for from in [path.as_path(), path.parent().unwrap()] {
        let resume = format!("resume={}", from.display());
        let elsewhere = format!("output_dir={}", folder.path().join("elsewhere").display());
        assert_eq!(prepare(folder.path(), &[&resume, &elsewhere]).steps_done(), 1);
    }
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let error = refusal(folder.path(), &["resume=auto"]);
    assert!(
        error.contains("lora-state.safetensors") && error.contains("truncated") && error.contains("resume = false"),
        "{error}"
    );
    // A state that cannot be written leaves the one before.
    std::fs::write(&path, &bytes).unwrap();
    steps(&mut session, 1);
    let mut trained = session.parameters().state().unwrap();
    let _ = trained.values_mut().next_back().unwrap().f_fill_(f64::NAN).unwrap();
    assert!(session.save_state().unwrap_err().to_string().contains("not finite"));
    assert!(std::fs::read(&path).unwrap() == bytes);
}

/// What is in the way of the state stands for a disk that does not take it.
#[test]
fn a_state_that_cannot_be_written_costs_nothing_else() {
    let folder = workspace();
    let out = folder.path().join("out");
    std::fs::create_dir_all(out.join("lora-state.safetensors/occupied")).unwrap();
    let run = |keys: &[&str]| {
        let stop = Arc::new(AtomicBool::new(false));
        train(config(folder.path(), keys), &Plugins::default(), Vec::new(), &stop, &mut |_| {})
    };
    assert_eq!(run(&["save_state_every_n_steps=1", "save_state=false"]).unwrap().steps, 2);
    std::fs::remove_file(out.join("lora.safetensors")).unwrap();
    // The one at the end is told as an error, after everything else is saved.
    let error = run(&["save_state=true"]).unwrap_err().to_string();
    for part in ["state of step 2", "MB)", "lora-state.safetensors", "Make room", "output_dir"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    for name in ["lora.safetensors", "metrics.jsonl", "loss.png"] {
        assert!(out.join(name).exists(), "{name}");
    }
}

struct StopAfter(usize);

impl Callback for StopAfter {
    fn on_step(&mut self, _session: &mut Session, report: &StepReport) -> lora_train::Result<Control> {
        match report.step == self.0 {
            true => Err(lora_train::Error::Callback { name: "stop".into(), reason: "on purpose".into() }),
            false => Ok(Control::Continue),
        }
    }
}

#[test]
fn metrics_and_curve_cover_the_whole_run() {
    let folder = workspace();
    let run = |keys: &[&str], more: Vec<Box<dyn Callback>>| {
        let stop = Arc::new(AtomicBool::new(false));
        train(config(folder.path(), keys), &Plugins::default(), more, &stop, &mut |_| {})
    };
    let out = folder.path().join("out");
    let validation = format!("validation_data_dir={}", folder.path().join("data").display());
    let looks = [validation.as_str(), "validate_every_n_steps=1", "train_text_encoder=false"];
    let keys = ["max_train_steps=5", "save_state_every_n_steps=2", "save_state=false", "output_name=a", "log_with=all"];
    let keys = [&keys[..], &looks].concat();
    run(&keys, vec![Box::new(StopAfter(3))]).unwrap_err();
    // As after a kill: the state is that of step 2, the metrics end in the middle of a line.
    let metrics = out.join("metrics.jsonl");
    let mut text = std::fs::read_to_string(&metrics).unwrap();
    assert_eq!(text.lines().count(), 3);
    text.push_str("{\"step\":4,\"lo");
    std::fs::write(&metrics, text).unwrap();
    let csv = std::fs::read_to_string(out.join("metrics.csv")).unwrap();
    std::fs::write(out.join("metrics.csv"), csv + "4,1,0.5,0.5").unwrap();
    let result = run(&[&keys[..], &["resume=auto"]].concat(), Vec::new()).unwrap();
    assert_eq!((result.steps, result.stopped), (5, None));
    let numbers = || -> Vec<(u64, f64)> {
        let text = std::fs::read_to_string(&metrics).unwrap();
        let parse = |line: &str| {
            let json: serde_json::Value = serde_json::from_str(line).unwrap();
            (json["step"].as_u64().unwrap(), json["loss"].as_f64().unwrap())
        };
        text.lines().map(parse).collect()
    };
    let resumed = numbers();
    assert_eq!(resumed.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    // All columns but the clock's and the memory's.
    let table = || -> Vec<Vec<String>> {
        let text = std::fs::read_to_string(out.join("metrics.csv")).unwrap();
        let row = |line: &str| {
            line.split(',').enumerate().filter(|(at, _)| *at < 8).map(|(_, cell)| cell.to_owned()).collect()
        };
        text.lines().map(row).collect()
    };
    let rows = table();
    assert_eq!(rows.iter().map(|row| row[0].as_str()).collect::<Vec<_>>(), ["step", "1", "2", "3", "4", "5"]);
    assert_eq!(std::fs::read_dir(out.join("logs/a")).unwrap().count(), 2, "a file for each part");
    let lora = std::fs::read(out.join("a.safetensors")).unwrap();
    let validation = std::fs::read_to_string(out.join("validation.jsonl")).unwrap();
    assert_eq!(validation.lines().count(), 6, "{validation}");
    let curve = std::fs::read(out.join("loss.png")).unwrap();
    run(&keys, Vec::new()).unwrap();
    assert_eq!(numbers(), resumed);
    assert_eq!(table(), rows);
    assert_eq!(std::fs::read_to_string(out.join("validation.jsonl")).unwrap(), validation);
    assert!(lora == std::fs::read(out.join("a.safetensors")).unwrap());
    assert!(curve == std::fs::read(out.join("loss.png")).unwrap(), "the curve shows the whole run");
    // One state, and nothing half-written.
    let names: Vec<String> = std::fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(names.iter().filter(|name| name.contains("state")).count(), 1, "{names:?}");
    assert!(!names.iter().any(|name| name.starts_with('.')), "{names:?}");

    // A run that was complete is made longer from the state of its end.
    let keys = ["output_name=b", "save_state=true", "max_train_steps=3", "train_text_encoder=false"];
    run(&keys, Vec::new()).unwrap();
    let keys = ["output_name=b", "resume=true", "max_train_steps=5", "train_text_encoder=false"];
    let longer = run(&keys, Vec::new()).unwrap();
    assert_eq!(longer.steps, 5);
    assert_eq!(numbers(), resumed);
}

/// Tells the process that is to be killed where its run is.
const KILLED_RUN: &str = "LORA_TEST_KILLED_RUN";

fn run_with_states(folder: &Path) -> RunResult {
    let keys = ["max_train_steps=24", "save_state_every_n_steps=1", "resume=auto", "train_text_encoder=false"];
    let stop = Arc::new(AtomicBool::new(false));
    train(config(folder, &keys), &Plugins::default(), Vec::new(), &stop, &mut |_| {}).unwrap()
}

#[test]
#[ignore = "a process of its own, started by the next test"]
fn the_run_that_is_killed() {
    if let Some(folder) = std::env::var_os(KILLED_RUN) {
        run_with_states(&PathBuf::from(folder));
    }
}

/// SIGKILL, which no program can answer, at whatever moment, that of writing included: the state is whole each time,
/// and the run arrives where one arrives that nobody killed.
#[test]
fn a_killed_run_arrives_where_it_would_have() {
    let undisturbed = workspace();
    let expected = run_with_states(undisturbed.path());
    let folder = workspace();
    let (out, mut steps) = (folder.path().join("out"), Vec::new());
    let state = out.join("lora-state.safetensors");
    for patience in [0, 3, 10, 30, 100].map(Duration::from_millis) {
        let (before, left) = (written(&state), partial(&out));
        let mut process = Running(
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "the_run_that_is_killed", "--ignored"])
                .env(KILLED_RUN, folder.path())
                .stdout(Stdio::null())
                .spawn()
                .unwrap(),
        );
        // Once the first state of this process is in place: in the middle of writing another file, where that can be
        // met.
        wait_for(&mut process, || written(&state) != before);
        let start = Instant::now();
        wait_for(&mut process, || partial(&out) != left || start.elapsed() >= patience);
        process.0.kill().unwrap();
        assert!(!process.0.wait().unwrap().success(), "it was killed before its end");
        steps.push(recorded(&state)["step"].as_u64().unwrap());
    }
    assert!(steps.is_sorted() && steps[0] >= 1 && steps[4] < 24, "{steps:?}");
    let result = run_with_states(folder.path());
    assert_eq!((result.steps, expected.steps), (24, 24));
    for name in ["lora.safetensors", "lora-state.safetensors", "loss.png"] {
        let read = |folder: &Path| std::fs::read(folder.join("out").join(name)).unwrap();
        assert!(read(folder.path()) == read(undisturbed.path()), "{name}, killed after steps {steps:?}");
    }
}

/// A process that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

fn wait_for(process: &mut Running, there: impl Fn() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(process.0.try_wait().unwrap().is_none(), "the run ended before it was killed");
        assert!(start.elapsed() < Duration::from_secs(300), "the run gets nowhere");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The numbers of a state, as its header has them.
fn recorded(state: &Path) -> Value {
    serde_json::from_str(&SafetensorsFile::open(state).unwrap().metadata()["lora_state"]).unwrap()
}

/// When a file got its content.
fn written(path: &Path) -> Option<std::time::SystemTime> {
    std::fs::metadata(path).and_then(|data| data.modified()).ok()
}

/// Files that are being written in a folder, or that a kill left there.
fn partial(folder: &Path) -> BTreeSet<String> {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(".lora-partial-")).collect()
}

/// What the program of commit 0bb5f91 recorded of these runs (`lora train` with `save_state`, the header of the state
/// but for the base's hash): states of that time must go on.
#[test]
fn what_a_state_records_of_its_run_stays_what_it_was() {
    for name in ["plain", "full"] {
        let folder = workspace();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/settings").join(name);
        let read = |extension: &str| std::fs::read_to_string(golden.with_extension(extension)).unwrap();
        let text = read("yaml").replace('@', &folder.path().display().to_string());
        let config = TrainConfig::from_text::<&str>(&text, Format::Yaml, &[]).unwrap();
        let mut session = Session::prepare(config, &Plugins::default(), &mut |_| {}).unwrap();
        let mut settings = recorded(&session.save_state().unwrap())["settings"].take();
        // How long the files are is their encoder's business.
        for key in ["base_model", lora_data::Pictures::LENGTHS] {
            settings["fixed"].as_object_mut().unwrap().remove(key).unwrap();
        }
        let expected: Value = serde_json::from_str(&read("json")).unwrap();
        assert_eq!((&settings["fixed"], &settings["free"]), (&expected["fixed"], &expected["free"]), "{name}");
    }
}
