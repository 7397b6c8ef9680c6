//! Finished adapters: merging, combining, resizing, extracting, converting, each beside what it cannot beat (copying a
//! file). A small model by default; `LORA_BENCH_FULL=1` takes Stable Diffusion 1.5's own sizes (2 GB on disk, written once
//! into the target folder).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use criterion::{Criterion, criterion_group, criterion_main};
use lora_core::compose::{ExtractOptions, Method, combine, resize};
use lora_core::random::Stream;
use lora_core::rank::RankPolicy;
use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath, Strength};
use lora_io::adapter::{self, Format};
use lora_io::checkpoint::Checkpoint;
use lora_io::merge::{MergeOptions, Weighted, extract, merge};
use lora_models::synthetic::SyntheticModel;

/// LoRA on every matrix and 1×1 convolution of the transformers: 264 modules in the full-size model.
fn lora(base: &Checkpoint, rank: usize, seed: u64) -> Adapter {
    let mut adapter = Adapter::default();
    for component in [Component::UNET, Component::TEXT_ENCODER] {
        let weights = base.component(component).expect("a Stable Diffusion model has it");
        for name in weights.names() {
            let inside = name.contains(".attentions.") || name.contains(".encoder.layers.");
            let (Some(path), Some(shape)) = (name.strip_suffix(".weight"), weights.shape(name)) else { continue };
            if !inside || shape.len() < 2 {
                continue;
            }
            let stream = Stream::new(seed).at(path);
            let random = |shape: Vec<usize>, side: &str| {
                let mut stream = stream.at(side);
                let values = stream.normals(shape.iter().product()).into_iter().map(|value| 0.01 * value).collect();
                HostTensor::from_f32(shape, values).expect("as many as the shape says").to_dtype(DType::F16)
            };
            let down = [&[rank], &shape[1..]].concat();
            let up = [&[shape[0], rank], &vec![1; shape.len() - 2][..]].concat();
            let tensors =
                BTreeMap::from([("down".to_owned(), random(down, "down")), ("up".to_owned(), random(up, "up"))]);
            let module = AdapterModule { variant: "lora".into(), tensors, rank, alpha: rank as f64 };
            adapter.modules.insert(ModulePath::new(component, path), module);
        }
    }
    adapter
}

/// Copies a file and waits until it is on the disk, as everything here does with what it writes.
fn copy(from: &Path, to: &Path) {
    fs::copy(from, to).and_then(|_| File::open(to)?.sync_all()).expect("the copy is written");
}

fn weighted(adapters: &[Adapter]) -> Vec<Weighted> {
    let own =
        |adapter: &Adapter| Weighted { name: "lora".into(), adapter: adapter.clone(), strength: Strength::from(0.8) };
    adapters.iter().map(own).collect()
}

/// Highest anonymous memory of this process (all but the mapped files) during some work, in MiB: looked at every 5 ms.
fn anonymous_peak(work: impl FnOnce()) -> u64 {
    let anonymous = || {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0)
    };
    let done = std::sync::atomic::AtomicBool::new(false);
    let peak = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut peak = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                peak = anonymous().max(peak);
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            peak
        });
        work();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        watcher.join().expect("the watcher ends")
    });
    peak / 1024
}

fn adapters(criterion: &mut Criterion) {
    let full = std::env::var_os("LORA_BENCH_FULL").is_some();
    let model = if full { SyntheticModel::full() } else { SyntheticModel::tiny() };
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let path = |name: &str| folder.join(format!("{}-{name}.safetensors", if full { "sd15" } else { "tiny" }));
    let base = path("base");
    if !base.exists() {
        model.write(&base, DType::F16).expect("the base is written");
    }
    let checkpoint = Checkpoint::open(&base).expect("the base opens");
    let eight: Vec<Adapter> = (0..3).map(|seed| lora(&checkpoint, 8, seed)).collect();
    println!("base: {} MB, {} modules", fs::metadata(&base).map_or(0, |file| file.len() >> 20), eight[0].modules.len());

    let mut group = criterion.benchmark_group(if full { "sd15" } else { "tiny" });
    group.sample_size(10);
    let (merged, variants) = (path("merged"), VariantRegistry::default());
    let merge_some = |count: usize| {
        let adapters = weighted(&eight[..count]);
        merge(&base, &adapters, &merged, &MergeOptions::default(), &variants, &|_, _| {}).expect("a merge");
    };
    group.bench_function("copy the base", |bencher| bencher.iter(|| copy(&base, &path("copy"))));
    group.bench_function("merge one", |bencher| bencher.iter(|| merge_some(1)));
    group.bench_function("merge three", |bencher| bencher.iter(|| merge_some(3)));
    println!("merge three: {} MiB of anonymous memory at most", anonymous_peak(|| merge_some(3)));
    group.bench_function("combine three of rank 8 into rank 8", |bencher| {
        let strength = Strength::from(0.7);
        let parts: Vec<_> = eight.iter().map(|adapter| (adapter, &strength)).collect();
        bencher.iter(|| combine(&parts, Method::Svd(RankPolicy::Fixed(8))).expect("a combination"));
    });
    group.bench_function("resize rank 8 to 4", |bencher| {
        bencher.iter(|| resize(&eight[0], RankPolicy::Fixed(4)).expect("a smaller one"));
    });
    merge_some(1);
    group.bench_function("extract rank 32", |bencher| {
        let options = ExtractOptions::default();
        let targets = Targets::parse(&["attention-mlp"]).expect("presets");
        bencher.iter(|| extract(&base, &merged, &targets, &options).expect("a LoRA"));
    });
    group.bench_function("extract rank 32 of one layer of 1280×1280", |bencher| {
        // Singular values that fall as those of a real difference do: a sum of ever smaller random parts.
        let random = |seed: u64, count| Stream::new(seed).normals(count);
        let (left, right) = (random(1, 1280 * 64), random(2, 64 * 1280));
        let update = |row: usize, column: usize| {
            (0..64).map(|k| left[row * 64 + k] * right[k * 1280 + column] / (k + 1) as f32).sum::<f32>()
        };
        let base = HostTensor::from_f32([1280, 1280], random(3, 1280 * 1280)).expect("as many as the shape says");
        let places = (0..1280).flat_map(|row| (0..1280).map(move |column| (row, column)));
        let tuned =
            base.to_f32().iter().zip(places).map(|(value, (row, column))| value + update(row, column)).collect();
        let tuned = HostTensor::from_f32([1280, 1280], tuned).expect("as many as the shape says");
        bencher.iter(|| lora_core::compose::extract(&tuned, &base, &ExtractOptions::default()).expect("a LoRA"));
    });
    let (large, converted) = (path("large"), path("converted"));
    adapter::write(&large, &lora(&checkpoint, 128, 9), Format::Kohya, DType::F16).expect("a large one");
    println!("large LoRA: {} MB", fs::metadata(&large).map_or(0, |file| file.len() >> 20));
    group.bench_function("copy a large LoRA", |bencher| bencher.iter(|| copy(&large, &path("copied"))));
    for format in [Format::Diffusers, Format::Kohya] {
        group.bench_function(format!("convert a large LoRA to {format}"), |bencher| {
            bencher.iter(|| {
                let read = adapter::read(&large).expect("it reads");
                adapter::write(&converted, &read.adapter, format, DType::F16).expect("it writes")
            });
        });
    }
    group.finish();
    for name in ["merged", "copy", "large", "copied", "converted"] {
        let _ = fs::remove_file(path(name));
    }
}

criterion_group!(benches, adapters);
criterion_main!(benches);
