//! How `lora` finds and becomes the program that trains, with a script in that program's place.
#![cfg(unix)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use assert_cmd::prelude::*;
use predicates::prelude::*;
use predicates::str::contains;

/// These tests write programs and start them. A file that is open for writing in any process cannot be started, and a process that
/// another test starts at that moment has it open.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A copy of `lora` in a folder of its own, where nothing lies beside it.
fn alone(folder: &Path) -> PathBuf {
    let lora = folder.join("lora");
    std::fs::copy(env!("CARGO_BIN_EXE_lora"), &lora).unwrap();
    lora
}

fn script(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn lora(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_remove("LORA_TRAINER").env("OMP_WAIT_POLICY", "ACTIVE");
    command
}

#[test]
fn arguments_input_output_and_exit_status_are_the_second_programs() {
    let _alone = one_at_a_time();
    let folder = tempfile::tempdir().unwrap();
    let program = alone(folder.path());
    script(
        &folder.path().join("lora-trainer"),
        "for argument in \"$@\"; do echo \"[$argument]\"; done; cat; echo told >&2; exit $STATUS",
    );
    for (status, arguments) in [
        ("0", &["train", "a b.toml", "--set", "x=1", "--", "--help"][..]),
        ("1", &["plan", "--help"]),
        ("2", &["sample", "--prompt", ""]),
        ("77", &["keys"]),
    ] {
        let expected: String = arguments.iter().map(|argument| format!("[{argument}]\n")).collect();
        let mut command = assert_cmd::Command::from_std(lora(&program));
        let run = command.args(arguments).env("STATUS", status).write_stdin("from outside\n").assert();
        run.code(status.parse::<i32>().unwrap()).stdout(expected + "from outside\n").stderr("told\n");
    }
    let mut help = lora(&program);
    help.args(["help", "train"]).env("STATUS", "0").stdin(Stdio::null()).assert().stdout("[train]\n[--help]\n");
}

#[test]
fn the_program_is_looked_for_by_a_variable_then_beside_lora_then_in_the_path() {
    let _alone = one_at_a_time();
    let folder = tempfile::tempdir().unwrap();
    let (own, path) = (folder.path().join("own"), folder.path().join("path"));
    std::fs::create_dir_all(&own).unwrap();
    std::fs::create_dir_all(&path).unwrap();
    let program = alone(&own);
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&program, &link).unwrap();
    let keys = |program: &Path| {
        let mut command = lora(program);
        command.arg("keys").env("PATH", format!("{}:/bin:/usr/bin", path.display()));
        command
    };
    let cure = contains("lora keys").and(contains("neither beside `lora`")).and(contains("make build"));
    keys(&program).assert().code(1).stderr(cure.and(contains(own.to_str().unwrap())));
    script(&path.join("lora-trainer"), "echo in the path");
    keys(&program).assert().success().stdout("in the path\n");
    script(&own.join("lora-trainer"), "echo beside");
    keys(&program).assert().success().stdout("beside\n");
    keys(&link).assert().success().stdout("beside\n");
    script(&folder.path().join("other"), "echo named");
    keys(&program).env("LORA_TRAINER", folder.path().join("other")).assert().success().stdout("named\n");
    let named = contains("cannot start").and(contains("/nowhere/trainer"));
    keys(&program).env("LORA_TRAINER", "/nowhere/trainer").assert().code(1).stderr(named);
}

#[test]
fn all_commands_are_in_one_list_and_mistakes_end_with_2() {
    let _alone = one_at_a_time();
    let folder = tempfile::tempdir().unwrap();
    let program = alone(folder.path());
    let list = String::from_utf8(lora(&program).arg("--help").assert().success().get_output().stdout.clone()).unwrap();
    for command in ["train", "plan", "keys", "dataset", "sample", "generate", "evaluate", "doctor", "import", "merge"] {
        assert!(list.lines().any(|line| line.trim_start().starts_with(&format!("{command} "))), "{command}: {list}");
    }
    lora(&program).assert().code(2);
    lora(&program).arg("trian").assert().code(2).stderr(contains("train"));
    lora(&program).arg("info").assert().code(2);
}

/// A look at pictures needs the second program for the keys of a configuration alone.
#[test]
fn a_dataset_is_looked_at_without_the_second_program() {
    let _alone = one_at_a_time();
    let folder = tempfile::tempdir().unwrap();
    let program = alone(folder.path());
    let pictures = folder.path().join("pictures");
    std::fs::create_dir(&pictures).unwrap();
    image::RgbImage::new(64, 64).save(pictures.join("a.png")).unwrap();
    std::fs::write(pictures.join("a.txt"), "a square").unwrap();
    lora(&program).arg("dataset").arg(&pictures).assert().success().stdout(contains("pictures:  1, 1 visits an epoch"));
    let set = ["--set", "enable_bucket=true"];
    lora(&program).arg("dataset").arg(&pictures).args(set).assert().code(1).stderr(contains("lora dataset"));
    script(&folder.path().join("lora-trainer"), "echo \"passed on: $@\"");
    lora(&program).arg("dataset").arg(&pictures).args(set).assert().success().stdout(contains("enable_bucket=true"));
}

/// The second program is the process that was started, so that a signal to it, or to the whole terminal, comes once.
#[test]
fn a_signal_reaches_the_second_program_once() {
    let _alone = one_at_a_time();
    let folder = tempfile::tempdir().unwrap();
    let program = alone(folder.path());
    let told = folder.path().join("told");
    script(
        &folder.path().join("lora-trainer"),
        "trap 'echo $$ >> told; sleep 1; exit 3' TERM\necho > ready; while :; do sleep 0.02; done",
    );
    let mut child = lora(&program).arg("train").current_dir(folder.path()).spawn().unwrap();
    let start = Instant::now();
    while !folder.path().join("ready").exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "it was not started");
        std::thread::sleep(Duration::from_millis(10));
    }
    // Not SIGINT: a shell whose parent ignores that one, as behind nohup, cannot trap it.
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > Duration::from_secs(120) {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(3));
    assert_eq!(std::fs::read_to_string(told).unwrap(), format!("{}\n", child.id()));
}

#[test]
fn the_doctor_says_so_where_the_second_program_cannot_be_loaded() {
    let _alone = one_at_a_time();
    let folder = tempfile::tempdir().unwrap();
    let program = alone(folder.path());
    script(&folder.path().join("lora-trainer"), "echo 'libtorch_cpu.so: cannot open' >&2; exit 127");
    let told = contains("libtorch_cpu.so: cannot open").and(contains("was not loaded")).and(contains("make setup"));
    lora(&program).arg("doctor").assert().code(1).stderr(told);
    script(&folder.path().join("lora-trainer"), "exit 2");
    lora(&program).args(["doctor", "--nothing"]).assert().code(2);
}

/// What an OpenMP library reads before `main`; a variable of the user's own stays.
#[cfg(target_os = "linux")]
#[test]
fn beside_a_busy_program_threads_of_what_computes_are_to_yield() {
    let _alone = one_at_a_time();
    let folder = tempfile::tempdir().unwrap();
    let program = alone(folder.path());
    script(&folder.path().join("lora-trainer"), "echo \"$OMP_WAIT_POLICY $GOMP_SPINCOUNT\"");
    let mut busy = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
    let told = |arguments: &[&str], own: Option<(&str, &str)>| {
        let mut command = lora(&program);
        for name in ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"] {
            command.env_remove(name);
        }
        String::from_utf8(command.args(arguments).envs(own).output().unwrap().stdout).unwrap()
    };
    let (untold, set) = (told(&["train"], None), told(&["train"], Some(("GOMP_SPINCOUNT", "20"))));
    let others = told(&["keys"], None);
    busy.kill().unwrap();
    busy.wait().unwrap();
    assert_eq!((untold.as_str(), set.as_str(), others.as_str()), ("PASSIVE \n", " 20\n", " \n"));
}
