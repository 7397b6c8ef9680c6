//! What a command does where its output is not read to the end, or cannot be written.
#![cfg(unix)]

use std::process::{Command, Stdio};

/// A command whose standard output is a pipe that nobody reads; its exit status and what it said on standard error.
fn unread(arguments: &[&str]) -> (Option<i32>, String) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_lora"));
    let run = command.args(arguments).stdin(Stdio::null()).stdout(writer).output().unwrap();
    (run.status.code(), String::from_utf8_lossy(&run.stderr).into_owned())
}

#[test]
fn a_closed_pipe_is_no_failure_and_changes_no_exit_status() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    image::RgbImage::new(64, 64).save(folder.path().join("a.png")).unwrap();
    assert_eq!(unread(&["dataset", path, "--json"]), (Some(0), String::new()));
    std::fs::write(folder.path().join("b.png"), "no picture").unwrap();
    let (status, told) = unread(&["dataset", path, "--strict"]);
    assert_eq!(status, Some(1), "{told}");
    assert!(told.contains("error: 1 file") && !told.contains("panicked"), "{told}");
}

#[test]
#[cfg(target_os = "linux")]
fn an_output_that_cannot_be_written_is_an_error_in_words() {
    let folder = tempfile::tempdir().unwrap();
    image::RgbImage::new(64, 64).save(folder.path().join("a.png")).unwrap();
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lora"));
    let run = command.arg("dataset").arg(folder.path()).stdout(full).output().unwrap();
    let told = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{told}");
    assert!(told.starts_with("error: standard output cannot be written"), "{told}");
}
