//! `lora caption` as a user meets it. Needs ONNX Runtime: `make setup-onnx`.

#[path = "../../lora-caption/tests/mock/mod.rs"]
mod mock;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::prelude::*;
use mock::{Server, caption, plain};
use predicates::prelude::*;
use predicates::str::contains;

fn lora() -> Command {
    let mut command = Command::cargo_bin("lora").unwrap();
    command.env_remove("LORA_API_KEY");
    command
}

/// A small tagger and photographs.
fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lora-caption/tests/golden")
}

/// A folder `data` with pictures of one colour each, and its parent.
fn workspace(count: u8) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("data")).unwrap();
    for index in 0..count {
        let picture = image::RgbImage::from_pixel(64, 64, image::Rgb([index, 90, 120]));
        picture.save(folder.path().join(format!("data/{index:02}.png"))).unwrap();
    }
    folder
}

fn captions(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder.join("data")).unwrap();
    entries.filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|own| own == "txt")).count()
}

#[test]
fn tags_are_written_counted_and_shown_on_a_page() {
    let folder = workspace(0);
    for name in ["collins.png", "chelsea.png"] {
        std::fs::copy(golden().join(name), folder.path().join("data").join(name)).unwrap();
    }
    let run = |more: &[&str]| {
        let mut command = lora();
        command.current_dir(folder.path()).args(["caption", "data", "--tagger"]).arg(golden().join("tagger"));
        command.args(["--prefix", "sks", "--exclude", "cat", "--replace", "1girl=woman"]).args(more).assert()
    };
    let told = contains("data/collins.png: sks, woman, long hair, ^_^").and(contains("2 long hair"));
    run(&["--dry-run", "--frequencies"]).success().stdout(told.and(contains("nothing was written")));
    assert_eq!(captions(folder.path()), 0);
    let output = run(&["--json", "--html", "page.html"])
        .success()
        .stderr(contains("12 tags, on the"))
        .get_output()
        .stdout
        .clone();
    let json: serde_json::Value = serde_json::from_slice(&output).unwrap();
    assert_eq!(
        (json["pictures"].as_u64(), json["captioned"][1]["caption"].as_str()),
        (Some(2), Some("sks, woman, long hair, ^_^"))
    );
    assert_eq!(std::fs::read_to_string(folder.path().join("data/chelsea.txt")).unwrap(), "sks, woman, long hair\n");
    let page = std::fs::read_to_string(folder.path().join("page.html")).unwrap();
    assert!(page.contains("sks, woman, long hair, ^_^") && page.contains("2 got a caption"));
    run(&[]).success().stdout(contains("0 got a caption, 2 had one, 0 got none"));
}

#[test]
fn mistakes_end_with_2_and_what_cannot_be_used_with_1() {
    let folder = workspace(2);
    let run = |arguments: &[&str]| {
        let mut command = lora();
        command.current_dir(folder.path()).args(["caption", "data"]).args(arguments);
        command
    };
    let tagger = golden().join("tagger");
    let tagger = tagger.to_str().unwrap();
    run(&[]).assert().code(2).stderr(contains("--tagger"));
    run(&["--server", "http://localhost"]).assert().code(2).stderr(contains("--model"));
    run(&["--tagger", tagger, "--threshold", "35"])
        .assert()
        .code(2)
        .stderr(contains("probability from 0 to 1, found 35"));
    run(&["--tagger", tagger, "--replace", "cat"]).assert().code(2).stderr(contains("TAG=NAME"));
    let server = ["--server", "http://127.0.0.1:9", "--model", "m"];
    run(&[&server[..], &["--prompt", "{tags}"]].concat()).assert().code(2).stderr(contains("no tagger"));
    run(&[&server[..], &["--api-key-env", "NOT_THERE"]].concat())
        .assert()
        .code(2)
        .stderr(contains("NOT_THERE is not set"));
    run(&server).assert().code(1).stderr(contains("127.0.0.1:9").and(contains("is the server running?")));
    run(&["--tagger", "data"]).assert().code(1).stderr(contains("no .onnx file"));
    for library in ["/nowhere/libonnxruntime.so", "data"] {
        let runtime = contains("make setup-onnx").and(contains("ORT_DYLIB_PATH"));
        run(&["--tagger", tagger]).env("ORT_DYLIB_PATH", library).assert().code(1).stderr(runtime);
    }
    std::fs::write(folder.path().join("data/02.png"), "text").unwrap();
    let one = contains("1 of 3 pictures have got no caption: 1 not readable");
    run(&["--tagger", tagger]).assert().code(1).stderr(one).stdout(contains("data/02.png: "));
    assert_eq!(captions(folder.path()), 2);
}

#[test]
fn a_key_is_sent_and_never_shown() {
    let server = Server::start(|request| match request.header("authorization") {
        Some("Bearer sk-right") => caption("A plain wall."),
        other => plain(401, &format!("{{\"error\":{{\"message\":\"bad key {}\"}}}}", other.unwrap_or_default())),
    });
    let folder = workspace(1);
    let run = |name: &str, key: &str, more: &[&str]| {
        let mut command = lora();
        command
            .current_dir(folder.path())
            .args(["caption", "data", "--model", "m", "--server", &server.url()])
            .args(more);
        command.env(name, key).env("LORA_LOG", "trace").assert()
    };
    // As text, and as dumps of bytes have it.
    let shown = || contains("sk-wrong").not().and(contains("Bearer.").not());
    let refused = run("LORA_API_KEY", "sk-wrong", &[]).code(1).stdout(shown());
    refused.stderr(contains("refuses access (401 Unauthorized): bad key Bearer …").and(shown()));
    let done = run("MY_KEY", "sk-right", &["--api-key-env", "MY_KEY", "--json"]).success();
    let hidden = || contains("sk-right").not().and(contains("Bearer.").not());
    done.stdout(hidden()).stderr(hidden());
}

#[cfg(unix)]
#[test]
fn an_interrupted_or_killed_run_goes_on_where_it_stopped() {
    let server = Server::start(|_| {
        std::thread::sleep(Duration::from_millis(100));
        caption("A plain wall.")
    });
    let folder = workspace(60);
    let arguments = ["caption", "data", "--model", "m", "--requests", "2", "--server", &server.url()];
    let mut before = 0;
    for signal in ["-INT", "-KILL"] {
        let mut child = lora()
            .current_dir(folder.path())
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while captions(folder.path()) < before + 6 {
            assert!(start.elapsed() < Duration::from_secs(60), "no captions came");
            std::thread::sleep(Duration::from_millis(10));
        }
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        let status = child.wait().unwrap();
        let output = std::io::read_to_string(child.stdout.take().unwrap()).unwrap();
        if signal == "-INT" {
            assert!(status.success() && output.contains("stopped early"), "{output}");
        }
        before = captions(folder.path());
        assert!(before < 60);
    }
    lora().current_dir(folder.path()).args(arguments).assert().success().stdout(contains(format!("{before} had one")));
    assert_eq!(captions(folder.path()), 60);
    // Requests that were under way at the kill are sent again: two that were waited for, and those ahead of them.
    assert!(server.count() <= 60 + 2 + 8, "{}", server.count());
}
