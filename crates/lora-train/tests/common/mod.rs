//! A tiny base, eight coloured pictures with captions, and configurations of runs on them.

#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod flow;

use std::path::Path;

use lora_core::{Adapter, DType};
use lora_models::synthetic::SyntheticModel;
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Session, StepReport};

/// Where tests train.
pub(crate) fn device() -> String {
    std::env::var("LORA_TEST_DEVICE").unwrap_or_else(|_| "cpu".into())
}

/// Whether the same work gives the same bits: a GPU's kernels add in no order.
pub(crate) fn exact() -> bool {
    device() == "cpu"
}

/// How far apart two ways to the same numbers may be: a bound for the CPU, or a GPU's, whose kernels differ by shape.
pub(crate) fn tolerance(cpu: f64) -> f64 {
    if exact() { cpu } else { cpu.max(2e-3) }
}

/// The base and the pictures.
pub(crate) fn workspace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    SyntheticModel::tiny().write(folder.path().join("base.safetensors"), DType::F16).unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    for index in 0..8u8 {
        let picture = image::RgbImage::from_fn(70, 64, |x, y| image::Rgb([index * 30, x as u8, y as u8]));
        picture.save(data.join(format!("{index}.png"))).unwrap();
        std::fs::write(data.join(format!("{index}.txt")), format!("picture number {index}")).unwrap();
    }
    folder
}

/// A configuration, with further keys as `key=value`; `adapter` is off where whole networks train.
pub(crate) fn config(folder: &Path, keys: &[&str]) -> TrainConfig {
    let path = |name: &str| folder.join(name).display().to_string();
    let adapter = match keys.contains(&"train=full") {
        true => "",
        false => "lora_rank: 4\ntarget_modules: attention\n",
    };
    let text = format!(
        "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\nmax_resolution: 64\ndevice: {}\nprecision: fp32\n\
         {adapter}learning_rate: 1e-3\nmax_train_steps: 2\n",
        path("base.safetensors"),
        path("data"),
        path("out"),
        device()
    );
    TrainConfig::from_text(&text, Format::Yaml, keys).unwrap()
}

/// A prepared run.
pub(crate) fn prepare(folder: &Path, keys: &[&str]) -> Session {
    // What a run warns of, where a test fails.
    let warnings = tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_test_writer();
    let _ = warnings.try_init();
    Session::prepare(config(folder, keys), &Plugins::default(), &mut |_| {}).unwrap()
}

/// What a run that cannot be prepared says.
pub(crate) fn refusal(folder: &Path, keys: &[&str]) -> String {
    match Session::prepare(config(folder, keys), &Plugins::default(), &mut |_| {}) {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.to_string(),
    }
}

/// The adapter of a run.
pub(crate) fn adapter(session: &Session) -> Adapter {
    session.adapter().unwrap().export().unwrap()
}

/// The rest of a run: the adapter, and what each step came to.
pub(crate) fn run(session: &mut Session) -> (Adapter, Vec<StepReport>) {
    let reports = std::iter::from_fn(|| session.step().unwrap()).collect();
    (adapter(session), reports)
}

/// The losses of a whole run.
pub(crate) fn losses(folder: &Path, keys: &[&str]) -> Vec<f64> {
    let mut session = prepare(folder, keys);
    std::iter::from_fn(|| session.step().unwrap()).map(|report| report.loss).collect()
}

/// The rest of a run: the adapter as its file holds it.
pub(crate) fn finish(session: &mut Session) -> Adapter {
    while session.step().unwrap().is_some() {}
    lora_io::adapter::read(session.save("lora").unwrap()).unwrap().adapter
}

/// A whole run.
pub(crate) fn trained(folder: &Path, keys: &[&str]) -> (Adapter, Vec<StepReport>) {
    run(&mut prepare(folder, keys))
}

/// Largest difference between two adapters over the largest value.
pub(crate) fn distance(a: &Adapter, b: &Adapter) -> f32 {
    let (mut worst, mut largest) = (0.0f32, 0.0f32);
    for (path, module) in &a.modules {
        for (name, tensor) in &module.tensors {
            for (x, y) in tensor.to_f32().iter().zip(&*b.modules[path].tensors[name].to_f32()) {
                (worst, largest) = (worst.max((x - y).abs()), largest.max(x.abs()));
            }
        }
    }
    worst / largest
}

/// A run in one go and one that goes on from its state after two steps leave the same bytes. Returns both at their ends; the LoRA is
/// called `lora`.
pub(crate) fn in_one_go_and_resumed(folder: &Path, keys: &[&str]) -> (Session, Session) {
    let mut session = prepare(folder, keys);
    for _ in 0..2 {
        session.step().unwrap();
    }
    session.save_state().unwrap();
    let mut resumed = prepare(folder, &[keys, &["resume=true"]].concat());
    let finish = |session: &mut Session| {
        while session.step().unwrap().is_some() {}
        std::fs::read(session.save("lora").unwrap()).unwrap()
    };
    assert_eq!(finish(&mut session), finish(&mut resumed));
    (session, resumed)
}
