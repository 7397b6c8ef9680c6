//! The key `auto_label` as a user meets it. Needs ONNX Runtime: `make setup-onnx`.

mod common;
#[path = "../../lora-caption/tests/mock/mod.rs"]
mod mock;

use std::path::{Path, PathBuf};

use assert_cmd::prelude::*;
use common::lora;
use lora_core::DType;
use lora_models::synthetic::SyntheticModel;
use mock::{Server, caption};
use predicates::prelude::*;
use predicates::str::contains;

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
fn training_gives_captions_to_pictures_without_one_and_writes_them() {
    let server = Server::start(|request| caption(&format!("Tags: {}", request.prompt())));
    let folder = workspace(4);
    std::fs::write(folder.path().join("data/00.txt"), "by hand").unwrap();
    SyntheticModel::tiny().write(folder.path().join("base.safetensors"), DType::F16).unwrap();
    let config = format!(
        "base_model = \"base.safetensors\"\ntrain_data_dir = \"data\"\noutput_dir = \"out\"\nmax_resolution = 64\ndevice = \"cpu\"\n\
         lora_rank = 2\ntarget_modules = [\"q_proj\", \"v_proj\"]\nmax_train_steps = 1\n\
         auto_label = {{ tagger = \"{}\", threshold = 0.2, server = \"{}\", model = \"m\", prompt = \"[{{tags}}]\", max_tags = 2, prefix = \"sks\" }}\n",
        golden().join("tagger").display(),
        server.url()
    );
    std::fs::write(folder.path().join("config.toml"), config).unwrap();
    let train = |more: &[&str]| lora().current_dir(folder.path()).args(["train", "config.toml"]).args(more).assert();
    // What cannot train is told before anything is captioned.
    train(&["--set", "target_modules=q_proj", "v_parameterization=7"]).code(2);
    train(&["--set", "auto_label={tagger=\"t\", treshold=0.2}"])
        .code(2)
        .stderr(contains("`auto_label`").and(contains("treshold")));
    train(&["--set", "auto_label={server=\"http://h\"}"])
        .code(2)
        .stderr(contains("model: a server has several models"));
    assert_eq!((captions(folder.path()), server.count()), (1, 0));
    let seen = contains("3 of 4 pictures have got a caption").and(contains("4 from .txt"));
    train(&[]).success().stderr(seen);
    let text = std::fs::read_to_string(folder.path().join("data/03.txt")).unwrap();
    assert!(text.starts_with("sks, Tags: [") && text.matches(", ").count() == 2 && server.count() == 3, "{text}");
    assert_eq!(std::fs::read_to_string(folder.path().join("data/00.txt")).unwrap(), "by hand");
    train(&[]).success();
    assert_eq!(server.count(), 3, "the next run has them");
    std::fs::remove_file(folder.path().join("data/03.txt")).unwrap();
    // A picture without a caption is named; it ends a strict run alone.
    let refusing = Server::start(|_| caption("I cannot help with that."));
    let label = format!("auto_label={{server=\"{}\", model=\"m\"}}", refusing.url());
    train(&["--set", &label, "strict=true"])
        .code(1)
        .stderr(contains("1 pictures have got no caption").and(contains("03.png: refused")));
    train(&["--set", &label]).success().stderr(contains("auto_label: data/03.png: refused: I cannot help"));
    let nowhere = "auto_label={server=\"http://127.0.0.1:9\", model=\"m\"}";
    train(&["--set", nowhere])
        .code(1)
        .stderr(contains("auto_label: http://127.0.0.1:9").and(contains("is the server running?")));
}
