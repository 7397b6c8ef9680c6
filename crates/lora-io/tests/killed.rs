//! A program that is killed in the middle of writing leaves what was there before.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use lora_io::atomic;

/// Tells the process that is to be killed what it writes.
const FILE: &str = "LORA_TEST_KILLED_FILE";

#[test]
#[ignore = "a process of its own, started by the next test"]
fn the_program_that_is_killed() {
    let Some(path) = std::env::var_os(FILE) else { return };
    let _ = atomic::write(path, |file| {
        file.write_all(b"new, but")?;
        file.flush()?;
        std::thread::sleep(Duration::from_secs(600));
        Ok(())
    });
}

#[test]
fn a_kill_in_the_middle_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    atomic::write(&path, |file| file.write_all(b"old")).unwrap();
    let mut process = Running(
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_program_that_is_killed", "--ignored"])
            .env(FILE, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let start = Instant::now();
    let half = loop {
        if let Some((half, _)) = contents(folder.path()).into_iter().find(|(_, bytes)| bytes == b"new, but") {
            break half;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "nothing is written");
        std::thread::sleep(Duration::from_millis(1));
    };
    // As if it had been at it for long: while the process lives the file is its own.
    let file = File::options().write(true).open(&half).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
    atomic::clear_partial(folder.path());
    assert!(half.exists());
    process.0.kill().unwrap();
    process.0.wait().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    atomic::clear_partial(folder.path());
    assert_eq!(contents(folder.path()), [(path, b"old".to_vec())]);
}

/// A process that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.map(|path| (path.clone(), std::fs::read(path).unwrap_or_default())).collect()
}
