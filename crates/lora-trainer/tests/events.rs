//! `lora train --events` as another program meets it: the lines it writes, the commands it takes.

mod common;

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use common::{lora, workspace};
use serde_json::Value;

/// A run that another process drives.
struct Driven {
    run: Child,
    commands: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Driven {
    fn begin(folder: &std::path::Path, arguments: &[&str]) -> Self {
        let mut run = lora()
            .current_dir(folder)
            .args(["train", "config.toml", "--events"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (commands, events) = (run.stdin.take().unwrap(), run.stdout.take().unwrap());
        Self { run, commands, lines: BufReader::new(events).lines() }
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
    }

    fn next(&mut self) -> Option<Value> {
        self.lines.next().map(|line| serde_json::from_str(&line.unwrap()).unwrap())
    }

    /// The next event of a name; those before it are passed over.
    fn until(&mut self, name: &str) -> Value {
        loop {
            let event = self.next().unwrap_or_else(|| panic!("the run ended before `{name}`"));
            if event["event"] == name {
                return event;
            }
        }
    }

    /// Processor time of the run so far.
    #[cfg(target_os = "linux")]
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.run.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
}

#[test]
fn a_run_is_watched_and_steered_from_another_process() {
    let folder = workspace();
    let mut driven = Driven::begin(
        folder.path(),
        &["--set", "max_train_steps=100000", "sample_prompts=[\"a\"]", "sample_steps=1", "save_state=true"],
    );
    let first = driven.next().unwrap();
    assert_eq!((&first["event"], &first["version"]), (&"stream".into(), &1.into()));
    assert_eq!(driven.next().unwrap()["event"], "preparing");
    let started = driven.until("started");
    assert_eq!(
        (&started["steps"], &started["name"], &started["config"]["lora_rank"]),
        (&100_000.into(), &"lora".into(), &"2".into())
    );
    assert_eq!(driven.until("samples")["file"], "out/samples.png");
    let step = driven.until("step");
    assert_eq!((&step["step"], &step["steps"], &step["unit"]), (&1.into(), &100_000.into(), &"img".into()));
    for field in ["loss", "learning_rate", "gradient_norm", "rate", "seconds_left", "memory"] {
        assert!(step[field].as_f64().is_some_and(|value| value > 0.0), "{field}: {step}");
    }
    assert!(step["learning_rates"]["unet"].is_number(), "{step}");

    driven.tell("pause");
    assert_eq!(driven.until("command")["done"], true);
    let held = driven.until("paused")["step"].as_u64().unwrap();
    #[cfg(target_os = "linux")]
    {
        // Threads of libtorch's may spin for a moment after the last step.
        std::thread::sleep(Duration::from_millis(500));
        let before = driven.ticks();
        std::thread::sleep(Duration::from_secs(2));
        let burnt = driven.ticks() - before;
        assert!(burnt <= 10, "{burnt} hundredths of a second while it was held");
    }
    driven.tell("pause");
    assert_eq!(driven.until("command")["done"], false);
    driven.tell("save");
    let saved = driven.next().unwrap();
    let path = folder.path().join(format!("out/lora-step{held:06}.safetensors"));
    assert_eq!((&saved["event"], &saved["step"], &saved["holds"]), (&"saved".into(), &held.into(), &"weights".into()));
    assert_eq!(saved["sha256"].as_str(), Some(lora_io::hash::file_sha256(&path).unwrap().as_str()));
    assert_eq!(driven.next().unwrap()["holds"], "state");
    let answer = driven.next().unwrap();
    assert!(answer["done"] == true && answer["message"].as_str().unwrap().contains("-state."), "{answer}");
    driven.tell("make coffee");
    let answer = driven.next().unwrap();
    assert_eq!((&answer["command"], &answer["done"]), (&"make coffee".into(), &false.into()));
    assert!(answer["message"].as_str().unwrap().contains("pause, resume, sample, save, stop"), "{answer}");
    driven.tell("sample");
    assert_eq!(driven.next().unwrap()["label"], format!("step {held}"));
    assert_eq!(driven.next().unwrap()["done"], true);
    driven.tell("resume");
    assert_eq!(driven.until("resumed")["step"], held);
    assert_eq!(driven.until("step")["step"], held + 1, "no step was made while it was held");

    driven.tell("stop");
    assert_eq!(driven.until("command")["command"], "stop");
    let finished = driven.until("finished");
    assert_eq!(
        (&finished["path"], &finished["stopped"]),
        (&"out/lora.safetensors".into(), &"stopped by a command".into())
    );
    assert_eq!(driven.next(), None, "nothing comes after the end");
    assert!(driven.run.wait().unwrap().success());
}

#[test]
fn what_fails_is_the_last_event() {
    let folder = workspace();
    for (set, code, usage) in [("lora_rnk=2", 2, true), ("base_model=none.safetensors", 1, false)] {
        let mut driven = Driven::begin(folder.path(), &["--set", set]);
        let failed = driven.until("failed");
        assert_eq!(failed["usage"], usage, "{failed}");
        assert!(failed["message"].as_str().unwrap().contains(set.split('=').next_back().unwrap()) || usage, "{failed}");
        assert_eq!((driven.next(), driven.run.wait().unwrap().code()), (None, Some(code)));
    }
}

#[test]
fn events_go_to_a_file_and_standard_input_may_be_closed() {
    let folder = workspace();
    let output = lora()
        .current_dir(folder.path())
        .args(["train", "--events=events.jsonl", "config.toml", "--json"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["steps"] == 2);
    let text = std::fs::read_to_string(folder.path().join("events.jsonl")).unwrap();
    let names: Vec<Value> =
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["event"].take()).collect();
    assert_eq!((names.first(), names.last()), (Some(&"stream".into()), Some(&"finished".into())));
    assert_eq!(names.iter().filter(|name| *name == "step").count(), 2);

    let both = lora().args(["train", "--events", "--json", "x.toml"]).output().unwrap();
    assert!(both.status.code() == Some(2) && String::from_utf8_lossy(&both.stderr).contains("--events=FILE"));
}

#[test]
fn a_reader_that_goes_away_does_not_end_the_run() {
    let folder = workspace();
    let mut driven = Driven::begin(folder.path(), &["--set", "max_train_steps=6"]);
    driven.until("started");
    let Driven { mut run, commands, lines } = driven;
    drop((commands, lines));
    let start = Instant::now();
    assert!(run.wait().unwrap().success() && start.elapsed() < Duration::from_secs(120));
    assert!(folder.path().join("out/lora.safetensors").exists());
}
