//! Steps of whole runs over the settings that decide memory and speed, one setting changed at a time: seconds a step by
//! criterion, the peak of what libtorch holds, and what `lora plan` predicts of it. Leaves `out/bench/training-DEVICE.json`
//! and a plot beside it.
//!
//! A small model by default; `LORA_BENCH_FULL=1` takes Stable Diffusion 1.5's own sizes with made-up weights (on a CPU that
//! needs 10 GB of memory and, with `-- --quick`, twenty minutes). On CUDA where there is a device.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use lora_core::DType;
use lora_models::synthetic::SyntheticModel;
use lora_torch::tch::Device;
use lora_torch::{device, memory};
use lora_train::config::{Format, TrainConfig};
use lora_train::plan::{Phase, plan};
use lora_train::{Plugins, Session};
use serde::Serialize;

/// What differs from the reference.
const GRID: [(&str, &[&str]); 28] = [
    ("reference", &[]),
    ("fp32", &["precision=fp32"]),
    ("bf16", &["precision=bf16"]),
    ("without CUDA graphs", &["cuda_graphs=false"]),
    ("rank 4", &["lora_rank=4"]),
    ("rank 16", &["lora_rank=16"]),
    ("rank 32", &["lora_rank=32"]),
    ("rank 128", &["lora_rank=128"]),
    ("384 px", &["max_resolution=384"]),
    ("448 px", &["max_resolution=448"]),
    ("768 px", &["max_resolution=768"]),
    ("batch 2", &["batch_size=2"]),
    ("batch 4", &["batch_size=4"]),
    ("1 × 4 accumulated", &["gradient_accumulation_steps=4"]),
    ("2 × 2 accumulated", &["batch_size=2", "gradient_accumulation_steps=2"]),
    ("feed-forward recomputed", &["recompute_feed_forward=true"]),
    ("checkpointing", &["gradient_checkpointing=true"]),
    ("latents not cached", &["cache_latents=false"]),
    ("text encoder frozen", &["train_text_encoder=false"]),
    ("base in fp8", &["base_storage=fp8"]),
    ("base in int8", &["base_storage=int8"]),
    ("base in NF4", &["base_storage=nf4"]),
    (
        "NF4, checkpointing, text encoder frozen",
        &["base_storage=nf4", "gradient_checkpointing=true", "train_text_encoder=false"],
    ),
    ("AdamW in 8 bits", &["optimizer=adamw8bit"]),
    ("Adafactor", &["optimizer=adafactor"]),
    ("Lion", &["optimizer=lion"]),
    ("Prodigy", &["optimizer=prodigy"]),
    ("schedule-free AdamW", &["optimizer=adamw_schedulefree"]),
];

/// One row of the results.
#[derive(Debug, Serialize)]
struct Measured {
    name: &'static str,
    settings: Vec<String>,
    seconds_a_step: f64,
    images_a_second: f64,
    /// The most that libtorch held on the device while training.
    peak_bytes: u64,
    /// What the plan says of it, without what lies beside tensors.
    predicted_bytes: u64,
    /// The most that libtorch took from the device for it, and what the device has less of in all; none on the CPU.
    reserved_bytes: Option<u64>,
    taken_bytes: Option<u64>,
}

/// Whether the CPU has instructions for bf16; those without convert number by number.
fn cpu_computes_in_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

fn reset_peak(device: Device) {
    memory::reset_host_peak();
    memory::reset_peak(device).expect("the device answers");
}

fn peak(device: Device) -> u64 {
    match memory::device_memory(device).expect("the device answers") {
        Some(own) => own.allocated_peak,
        None => memory::host_allocations().map_or(0, |host| host.peak),
    }
}

fn config(folder: &Path, own: &[&str], device: Device) -> TrainConfig {
    let precision = if device == Device::Cpu { "fp32" } else { "fp16" };
    let text = format!(
        "base_model: {0}/base.safetensors\ntrain_data_dir: {0}/pictures\noutput_dir: {0}/out\ncache_dir: {0}/cache\n\
         precision: {precision}\nlora_rank: 8\nmax_resolution: 512\nmax_train_steps: 100000\n",
        folder.display()
    );
    TrainConfig::from_text(&text, Format::Yaml, own).expect("the grid's settings are right")
}

fn steps(criterion: &mut Criterion) {
    let device = device::resolve("auto").expect("auto always resolves");
    let full = std::env::var_os("LORA_BENCH_FULL").is_some();
    if device == Device::Cpu {
        memory::count_host_allocations().expect("libtorch's allocator can be counted");
    }
    let folder = tempfile::tempdir().expect("a folder for what is made");
    let model = if full { SyntheticModel::full() } else { SyntheticModel::tiny() };
    model.write(folder.path().join("base.safetensors"), DType::F16).expect("the base is written");
    let pictures = folder.path().join("pictures");
    std::fs::create_dir(&pictures).expect("a folder for pictures");
    for index in 0..4u8 {
        let picture = image::RgbImage::from_fn(768, 768, |x, y| image::Rgb([(x / 3) as u8, (y / 3) as u8, index * 60]));
        picture.save(pictures.join(format!("{index}.png"))).expect("a picture is written");
    }

    // Only `cargo bench` passes `--bench`. As a test one row is run, the others are only read.
    let has = |flag: &str| std::env::args().any(|argument| argument == flag);
    let tried = has("--test") || !has("--bench");
    let results = RefCell::new(Vec::new());
    let mut group = criterion.benchmark_group(format!("{} on {device:?}", if full { "sd15" } else { "tiny" }));
    group.sample_size(10);
    for (name, own) in GRID {
        let worth_it = |key: &str| match key {
            "precision=bf16" => device != Device::Cpu || cpu_computes_in_bf16(),
            "base_storage=fp8" | "cuda_graphs=false" => device != Device::Cpu,
            _ => true,
        };
        if !own.iter().all(|key| worth_it(key)) {
            continue;
        }
        let config = config(folder.path(), own, device);
        if tried && name != "reference" {
            continue;
        }
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            let predicted = plan(&config, &Plugins::default()).expect("the configuration can be planned").as_configured;
            let training = predicted.phases.iter().find(|phase| phase.phase == Phase::Training);
            // Of the row before.
            memory::empty_cache(device).expect("the device answers");
            let batch = config.batch_size * config.gradient_accumulation_steps;
            let mut session = Session::prepare(config.clone(), &Plugins::default(), &mut |_| {})
                .expect("the configuration can be trained");
            // The first step counts: a recorded one takes its memory while it is recorded.
            reset_peak(device);
            for _ in 0..2 {
                session.step().expect("a step runs");
            }
            let (mut taken, mut count) = (Duration::ZERO, 0);
            bencher.iter_custom(|iterations| {
                let start = Instant::now();
                for _ in 0..iterations {
                    session.step().expect("a step runs");
                }
                let own = start.elapsed();
                taken += own;
                count += iterations;
                own
            });
            if count > 0 && !tried {
                let seconds = taken.as_secs_f64() / count as f64;
                // Criterion may come back to a row.
                let mut results = results.borrow_mut();
                results.retain(|row: &Measured| row.name != name);
                results.push(Measured {
                    name,
                    settings: own.iter().map(|&key| key.to_owned()).collect(),
                    seconds_a_step: seconds,
                    images_a_second: batch as f64 / seconds,
                    peak_bytes: peak(device),
                    predicted_bytes: training.map_or(0, |phase| phase.parts.total()),
                    reserved_bytes: session.device_memory().expect("the device answers").map(|own| own.reserved_peak),
                    taken_bytes: session.device_memory().expect("the device answers").map(|own| own.total - own.free),
                });
                // After each row: the whole takes long, and what is there is there.
                write(&results, device, full).expect("results are written");
            }
        });
    }
    group.finish();
}

fn write(results: &[Measured], device: Device, full: bool) -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../out/bench");
    std::fs::create_dir_all(&folder)?;
    let kind = if device == Device::Cpu { "cpu" } else { "cuda" };
    let stem = folder.join(format!("training-{}-{kind}", if full { "sd15" } else { "tiny" }));
    std::fs::write(stem.with_extension("json"), serde_json::to_string_pretty(results)?)?;
    std::fs::write(stem.with_extension("svg"), plot(results))?;
    Ok(())
}

/// Bars of memory, with a mark where the plan expects it, and of speed.
fn plot(results: &[Measured]) -> String {
    const ROW: usize = 20;
    const LABEL: f64 = 270.0;
    const BAR: f64 = 260.0;
    let height = ROW * results.len() + 30;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"960\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\
         <text x=\"{LABEL}\" y=\"15\">peak, MiB (line: planned)</text>\
         <text x=\"{}\" y=\"15\">pictures a second</text>\n",
        LABEL + BAR + 80.0
    );
    let most = |of: fn(&Measured) -> f64| results.iter().map(of).fold(f64::MIN_POSITIVE, f64::max);
    let (memory, speed) = (most(|row| row.peak_bytes.max(row.predicted_bytes) as f64), most(|row| row.images_a_second));
    for (index, row) in results.iter().enumerate() {
        let top = 24 + index * ROW;
        let bars = [
            (LABEL, row.peak_bytes as f64 / memory, format!("{}", row.peak_bytes >> 20), "#3b6fb6"),
            (LABEL + BAR + 80.0, row.images_a_second / speed, format!("{:.2}", row.images_a_second), "#c98a2e"),
        ];
        let _ = writeln!(svg, "<text x=\"8\" y=\"{}\">{}</text>", top + 13, row.name);
        for (left, share, value, colour) in bars {
            let width = share * BAR;
            let _ = writeln!(
                svg,
                "<rect x=\"{left}\" y=\"{top}\" width=\"{width:.1}\" height=\"15\" fill=\"{colour}\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{value}</text>",
                left + width + 6.0,
                top + 12
            );
        }
        let planned = LABEL + row.predicted_bytes as f64 / memory * BAR;
        let _ = writeln!(
            svg,
            "<line x1=\"{planned:.1}\" x2=\"{planned:.1}\" y1=\"{top}\" y2=\"{}\" stroke=\"black\" stroke-width=\"2\"/>",
            top + 15
        );
    }
    svg.push_str("</svg>\n");
    svg
}

criterion_group!(benches, steps);
criterion_main!(benches);
