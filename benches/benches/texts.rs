//! Texts and language models: tokens a second from records to rows, and in steps of whole runs.
//!
//! A tiny model of random weights by default; `LORA_BENCH_BASE` names another, as `assets/smollm2.gguf` that
//! `tools/fetch-smollm2.sh` fetches, and `LORA_BENCH_TOKENIZER` a folder with the tokenizer of yet another. Peaks of
//! memory beside PEFT's are measured by `tools/bench/text_side_by_side.py`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lora_data::cache::DiskCache;
use lora_data::source::Source;
use lora_data::texts::{TextOptions, Texts};
use lora_data::tokenizer::Tokenizer;
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Session};

/// The base, in a folder or a file.
fn base(folder: &Path) -> PathBuf {
    if let Some(base) = std::env::var_os("LORA_BENCH_BASE") {
        return base.into();
    }
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
    for from in ["lora-models/tests/golden/llm/qwen2/model", "lora-train/tests/golden/language"] {
        let files = std::fs::read_dir(crates.join(from)).expect("golden files are there").flatten();
        for file in files.map(|entry| entry.path()).filter(|path| path.is_file()) {
            std::fs::copy(&file, folder.join(file.file_name().unwrap_or_default())).expect("the disk takes it");
        }
    }
    folder.to_owned()
}

/// Conversations of a few sentences each.
fn conversations(path: &Path, count: usize) {
    let line = |number: usize| {
        let text = "The keeper counted the ships twice before supper, and wrote both numbers into the book. ";
        let (question, answer) = (format!("What happened on day {number}?"), text.repeat(1 + number % 7));
        let messages = serde_json::json!({ "messages": [
            { "role": "user", "content": question }, { "role": "assistant", "content": answer }
        ] });
        format!("{messages}\n")
    };
    std::fs::write(path, (0..count).map(line).collect::<String>()).expect("the disk takes it");
}

/// The pages of this repository, a paragraph a record, each so many times with a number of its own.
fn pages(path: &Path, times: usize) {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(docs).expect("the pages are there").flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "md"));
    files.sort();
    let mut records = String::new();
    for (number, file) in (0..times).flat_map(|number| files.iter().map(move |file| (number, file))) {
        let text = std::fs::read_to_string(file).expect("pages are texts");
        for paragraph in text.split("\n\n").filter(|paragraph| paragraph.len() > 40) {
            records += &format!("{}\n", serde_json::json!({ "text": format!("{number}. {paragraph}") }));
        }
    }
    std::fs::write(path, records).expect("the disk takes it");
}

fn tokenise(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder for what is made");
    let named = std::env::var_os("LORA_BENCH_TOKENIZER").map(PathBuf::from);
    let tokenizer = Tokenizer::open(named.unwrap_or_else(|| base(folder.path())));
    let tokenizer = Arc::new(tokenizer.expect("the base has a tokenizer"));
    let mut group = criterion.benchmark_group("tokenise");
    group.sample_size(10);
    for name in ["conversations", "pages"] {
        let (data, cache) = (folder.path().join(format!("{name}.jsonl")), folder.path().join(name));
        match name {
            "pages" => pages(&data, 20),
            _ => conversations(&data, 4000),
        }
        let options = TextOptions { path: data, ..TextOptions::default() };
        let open = |cache: Option<&DiskCache>| {
            Texts::open(options.clone(), Arc::clone(&tokenizer), cache).expect("good records")
        };
        group.throughput(Throughput::Elements(open(None).summary().tokens as u64));
        group.bench_function(name, |bencher| bencher.iter(|| open(None).count()));
        let cache = DiskCache::open(cache).expect("the disk takes it");
        open(Some(&cache));
        group.bench_function(format!("{name}, warm cache"), |bencher| bencher.iter(|| open(Some(&cache)).count()));
    }
    group.finish();
}

/// Steps on full rows, every token of them learned.
fn steps(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder for what is made");
    let data = folder.path().join("long.txt");
    std::fs::write(&data, "The lamp was lit before the evening came. ".repeat(2000)).expect("the disk takes it");
    let text = format!(
        "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\nmax_seq_length: 256\nlora_rank: 8\n\
         target_modules: all-linear\nmax_train_steps: 1000000\nprecision: fp32\n",
        base(folder.path()).display(),
        data.display(),
        folder.path().join("out").display(),
    );
    let mut group = criterion.benchmark_group("language steps");
    group.sample_size(10);
    for (name, keys) in [
        ("reference", &[][..]),
        ("checkpointing", &["gradient_checkpointing=true"]),
        ("base in NF4", &["base_storage=nf4"]),
        ("packing", &["packing=true"]),
    ] {
        let config = TrainConfig::from_text(&text, Format::Yaml, keys).expect("the settings are right");
        let mut session = Session::prepare(config, &Plugins::default(), &mut |_| {}).expect("the run is a good one");
        group.throughput(Throughput::Elements(256));
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter(|| session.step().expect("steps succeed").expect("the run is long").loss);
        });
    }
    group.finish();
}

criterion_group!(benches, tokenise, steps);
criterion_main!(benches);
