//! A configuration of sd-scripts, taken as it is, has the loss curve that sd-scripts' formulas give on the same draws
//! (`tools/golden/make_sd_scripts_run.py`, where diffusers, transformers, PEFT and PyTorch compute them).

use std::path::Path;

use lora_core::DType;
use lora_import::{Format as Theirs, Options, Source, import};
use lora_models::synthetic::SyntheticModel;
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Session};
use serde_json::Value;

const SIDE: u32 = 128;

/// The base and the pictures of the script.
fn workspace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    SyntheticModel::tiny().write(folder.path().join("base.safetensors"), DType::F32).unwrap();
    let pictures = folder.path().join("pictures/1_ink");
    std::fs::create_dir_all(&pictures).unwrap();
    for index in 0..4u32 {
        let color = |x: u32, y: u32| image::Rgb([60 * index, 2 * x, x * y / 64].map(|value| value as u8));
        image::RgbImage::from_fn(SIDE, SIDE, color).save(pictures.join(format!("{index}.png"))).unwrap();
        std::fs::write(pictures.join(format!("{index}.txt")), format!("picture number {index}")).unwrap();
    }
    folder
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[test]
fn a_run_of_sd_scripts_has_the_loss_curve_of_its_formulas() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sd_scripts_run.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
    let folder = workspace();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let places = [("BASE", at("base.safetensors")), ("PICTURES", at("pictures")), ("OUT", at("out"))];
    let text = places.iter().fold(golden["config"].as_str().unwrap().to_owned(), |text, (name, place)| {
        text.replace(&format!("\"{name}\""), &format!("\"{place}\""))
    });
    let imported = import(&Source::text("run.toml", Theirs::Toml, &text), &Options::default()).unwrap();
    let config = TrainConfig::from_text(&imported.config(), Format::Toml, &["device=cpu"]).unwrap();
    let mut session = Session::prepare(config, &Plugins::default(), &mut |_| {}).unwrap();

    let reports: Vec<_> = std::iter::from_fn(|| session.step().unwrap()).collect();
    let (losses, rates) = (numbers(&golden["losses"]), golden["learning_rates"].as_array().unwrap());
    assert_eq!(reports.len(), losses.len());
    for ((report, loss), rates) in reports.iter().zip(losses).zip(rates) {
        assert!((report.learning_rate - numbers(rates)[0]).abs() < 1e-12, "step {}", report.step);
        // Rounding alone: the tiny model's trajectories move by 4e-7 between threads and number types.
        let error = (report.loss / loss - 1.0).abs();
        assert!(error < 2e-5, "step {}: {} {loss}, {error:e} apart", report.step, report.loss);
    }
    let norm = |text: bool| {
        let own = session.parameters().iter().filter(|own| own.name.starts_with("text_encoder") == text);
        own.map(|own| own.norm().unwrap().powi(2)).sum::<f64>().sqrt()
    };
    for (found, expected) in [norm(false), norm(true)].into_iter().zip(numbers(&golden["final_norms"])) {
        assert!((found / expected - 1.0).abs() < 1e-5, "final norm {found}, expected {expected}");
    }
}
