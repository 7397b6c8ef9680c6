//! Concept sliders in whole runs: bases of every kind learn them from prompts alone, a run that goes on is the same run, and what
//! cannot be is refused. The formula is held against diffusers and PEFT beside the base of Stable Diffusion.

mod common;
#[path = "common/language.rs"]
mod language;

use std::path::Path;

use common::{distance, tolerance};
use lora_core::{Adapter, DType};
use lora_io::safetensors::SafetensorsFile;
use lora_models::synthetic::{SyntheticModel, SyntheticZImage};
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Preparing, Session};

const SLIDERS: &str = "sliders=[{target = 'a picture', positive = 'a bright picture', negative = 'a dark picture', guidance_scale = 2}, \
                       {target = 'a cat', positive = 'a fat cat', negative = '', weight = 0.5, preserve = ['black', 'white']}]";

fn read(folder: &Path, keys: &[&str]) -> Result<TrainConfig, String> {
    let path = |name: &str| folder.join(name).display().to_string();
    let text = format!(
        "base_model: {}\noutput_dir: {}\nmax_resolution: 64\ndevice: {}\nprecision: fp32\nlora_rank: 4\n\
         target_modules: attention\nlearning_rate: 1e-3\nmax_train_steps: 4\nslider_steps: 4\nseed: 3\n",
        path("base"),
        path("out"),
        common::device()
    );
    TrainConfig::from_text(&text, Format::Yaml, keys).map_err(|error| error.to_string())
}

fn prepare(folder: &Path, keys: &[&str]) -> Session {
    let config = read(folder, &[&[SLIDERS], keys].concat()).unwrap();
    Session::prepare(config, &Plugins::default(), &mut |_| {}).unwrap()
}

fn trained(folder: &Path, keys: &[&str]) -> (Vec<f64>, Adapter) {
    let mut session = prepare(folder, keys);
    let losses = std::iter::from_fn(|| session.step().unwrap()).map(|report| report.loss).collect();
    (losses, common::adapter(&session))
}

fn stable_diffusion(model: &SyntheticModel) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    model.write(folder.path().join("base"), DType::F32).unwrap();
    folder
}

fn z_image() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    SyntheticZImage::tiny().write(&base, DType::F32).unwrap();
    common::flow::add_tokenizer(&base, common::flow::QWEN, "tokenizer");
    folder
}

#[test]
fn bases_of_every_kind_learn_them_and_a_run_goes_on_as_the_same_run() {
    let of_sd2 = ["v_parameterization=true"];
    for (folder, keys) in [
        (stable_diffusion(&SyntheticModel::tiny()), &[][..]),
        (stable_diffusion(&SyntheticModel::tiny_sd2()), &of_sd2),
        (stable_diffusion(&SyntheticModel::tiny_sdxl()), &[]),
        (z_image(), &[]),
    ] {
        let folder = folder.path();
        let mut session = prepare(folder, keys);
        let summary = session.summary().to_string();
        assert!(summary.contains("prompts:   3") && summary.contains("\"black a fat cat\""), "{summary}");
        for _ in 0..2 {
            assert!(session.step().unwrap().unwrap().loss.is_finite());
        }
        session.save_state().unwrap();
        let mut resumed = prepare(folder, &[keys, &["resume=true"]].concat());
        let finish = |session: &mut Session| {
            while session.step().unwrap().is_some() {}
            std::fs::read(session.save("lora").unwrap()).unwrap()
        };
        assert_eq!(finish(&mut session), finish(&mut resumed));
        let file = SafetensorsFile::open(folder.join("out/lora.safetensors")).unwrap();
        assert!(file.metadata()["lora_sliders"].contains("a bright picture"));

        // Of the same draws the loss is lower once something is learned: from noise alone, or what is learned would change what it
        // is learned from.
        let long = ["max_train_steps=24", "slider_steps=1", "learning_rate=5e-3"];
        let still = ["max_train_steps=24", "slider_steps=1", "learning_rate=1e-12"];
        let last = |keys: &[&str]| trained(folder, keys).0[12..].iter().sum::<f64>();
        let (learned, before) = (last(&[keys, &long].concat()), last(&[keys, &still].concat()));
        assert!(learned < 0.98 * before, "{keys:?}: {learned} {before}");
    }
}

#[test]
fn only_what_prompts_need_is_loaded() {
    let folder = stable_diffusion(&SyntheticModel::tiny());
    let mut loaded = Vec::new();
    let config = read(folder.path(), &[SLIDERS]).unwrap();
    Session::prepare(config, &Plugins::default(), &mut |now| {
        if let Preparing::Loading(part) = now {
            loaded.push(part);
        }
    })
    .unwrap();
    assert_eq!(loaded, ["text encoder", "U-Net"]);
}

#[test]
fn computing_again_and_smaller_batches_are_the_same_run() {
    let folder = stable_diffusion(&SyntheticModel::tiny());
    let (whole, adapter) = trained(folder.path(), &["batch_size=2"]);
    for keys in [&["batch_size=2", "gradient_checkpointing=true"][..], &["gradient_accumulation_steps=2"]] {
        let (other, same) = trained(folder.path(), keys);
        let near = whole.iter().zip(&other).all(|(a, b)| (a - b).abs() < tolerance(1e-3) * a);
        assert!(near && distance(&adapter, &same) < 0.05, "{keys:?}: {whole:?} {other:?}");
    }
    // Two sizes: a step is of one.
    let mut session = prepare(folder.path(), &["slider_resolutions=[64, \"128,64\"]", "batch_size=2"]);
    assert_eq!((session.plan().visits_per_epoch, session.plan().steps_per_epoch), (12, 6));
    assert_eq!(session.step().unwrap().unwrap().items, 2);
}

#[test]
fn variants_that_are_not_factors_and_samples_go_both_ways() {
    let folder = stable_diffusion(&SyntheticModel::tiny());
    for variant in ["dora", "lokr", "oft"] {
        let (losses, _) = trained(folder.path(), &[&format!("variant={variant}"), "slider_sample_guidance=1"]);
        assert!(losses.iter().all(|loss| loss.is_finite() && *loss > 0.0), "{variant}: {losses:?}");
    }
    let mut session = prepare(folder.path(), &["sample_resolution=64", "sample_steps=2"]);
    session.step().unwrap();
    assert_eq!(session.sample(&["a cat".to_owned()]).unwrap().len(), 1);
}

#[test]
fn what_cannot_be_is_refused_with_the_key_and_the_cure() {
    let folder = stable_diffusion(&SyntheticModel::tiny());
    let says = |keys: &[&str], words: &[&str]| {
        let error = read(folder.path(), keys).map(drop).unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{keys:?}: {error}");
    };
    says(&["sliders=[{target = 'a', positive = 'b'}]"], &["sliders", "[0]", "missing field `negative`"]);
    says(&["sliders=[{target = 'a', positive = 'b', negative = 'c', strength = 2}]"], &["unknown field `strength`"]);
    says(&["sliders=[{target = 'a', positive = 'b', negative = 'b'}]"], &["[0]: `negative`", "nothing to learn"]);
    says(&["sliders=[]"], &["sliders", "at least one"]);
    says(&["sliders=3"], &["[[sliders]]"]);
    says(&[SLIDERS, "train_data_dir=d"], &["train_data_dir", "prompts alone"]);
    says(&[SLIDERS, "trigger_word=x"], &["trigger_word", "prompts alone"]);
    says(&[SLIDERS, "prior_prompt=a"], &["prior_prompt", "take it out"]);
    says(&[SLIDERS, "train_text_encoder=true"], &["train_text_encoder", "U-Net alone"]);
    says(&[SLIDERS, "train=full", "lora_rank=4"], &["sliders", "train = full"]);
    says(&[SLIDERS, "slider_steps=0"], &["slider_steps"]);
    says(&[], &["train_data_dir"]);
    let error = TrainConfig::datasets_of(None, None, &[SLIDERS]).map(drop).unwrap_err().to_string();
    assert!(error.contains("no pictures to look at") && !error.contains("train_data_dir"), "{error}");

    let refused = |folder: &Path, keys: &[&str]| {
        let config = read(folder, &[&[SLIDERS], keys].concat()).unwrap();
        Session::prepare(config, &Plugins::default(), &mut |_| {}).map(drop).unwrap_err().to_string()
    };
    let mut session = prepare(folder.path(), &[]);
    session.step().unwrap();
    session.save_state().unwrap();
    let error = refused(folder.path(), &["resume=true", "slider_steps=5"]);
    assert!(error.contains("slider_steps was 4, is 5"), "{error}");

    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-models/tests/golden/llm/qwen2/model");
    let text = format!("base_model: {base}\noutput_dir: {}\n", folder.path().join("out").display());
    let config = TrainConfig::from_text(&text, Format::Yaml, &[SLIDERS]).unwrap();
    let error = Session::prepare(config, &Plugins::default(), &mut |_| {}).map(drop).unwrap_err().to_string();
    assert!(error.contains("sliders: a base of the family a language model"), "{error}");
    let z_image = z_image();
    let error = refused(z_image.path(), &["slider_resolutions=[72]"]);
    assert!(error.contains("slider_resolutions") && error.contains("multiples of 16"), "{error}");
}

#[test]
fn a_length_that_is_not_said_is_the_papers() {
    let folder = stable_diffusion(&SyntheticModel::tiny());
    let text = format!("base_model: {}\noutput_dir: o\nmax_resolution: 64\n", folder.path().join("base").display());
    let config = TrainConfig::from_text(&text, Format::Yaml, &[SLIDERS]).unwrap();
    assert_eq!(format!("{:?}", config.length), "Steps(1000)");
}
