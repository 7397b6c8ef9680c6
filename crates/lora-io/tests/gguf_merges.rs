//! Merging into models in GGUF: into GGUF files, quantised again or not, and into folders. What is merged is held by the same
//! merge into the model's weights as a folder of safetensors, which `language_merges` holds against PEFT; the quantisers by
//! the bytes of the `gguf` package (`golden/gguf`).

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lora_core::blocks::BlockKind;
use lora_core::conformance::distance;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath, Strength};
use lora_io::gguf::{self, GgufFile, LanguageModel, TensorType, Value};
use lora_io::merge::{MergeOptions, MergeReport, Weighted, merge};
use lora_io::safetensors::SafetensorsFile;
use support::{random, tensor};
use tempfile::tempdir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf").join(name)
}

fn run(base: &Path, adapter: &Adapter, out: &Path, options: &MergeOptions) -> lora_io::Result<MergeReport> {
    let weighted = Weighted { name: "it".into(), adapter: adapter.clone(), strength: Strength::from(1.0) };
    merge(base, &[weighted], out, options, &VariantRegistry::default(), &|_, _| {})
}

fn lora(outputs: usize, inputs: usize, seed: u64) -> AdapterModule {
    AdapterModule::of_factors(random(&[2, inputs], seed), random(&[outputs, 2], seed + 1), false, 2, 1.0)
}

fn adapter(modules: Vec<(&str, AdapterModule)>) -> Adapter {
    let path = |path: &str| ModulePath::new(Component::LANGUAGE_MODEL, path);
    Adapter { modules: modules.into_iter().map(|(name, own)| (path(name), own)).collect(), ..Adapter::default() }
}

/// An adapter of layers in Q5_0, Q8_0, F16 and BF16, with rows in llama.cpp's order among them.
fn of_llama() -> Adapter {
    adapter(vec![
        ("model.layers.0.self_attn.q_proj", lora(32, 32, 1)),
        ("model.layers.0.self_attn.k_proj", lora(16, 32, 3)),
        ("model.layers.0.self_attn.v_proj", lora(16, 32, 5)),
        ("model.layers.1.mlp.down_proj", lora(32, 64, 7)),
        ("lm_head", lora(40, 32, 9)),
    ])
}

/// The model's weights with the adapter in them, by the way over a folder.
fn expected(base: &Path, own: &Adapter) -> BTreeMap<String, HostTensor> {
    let at = tempdir().unwrap();
    let folder = at.path().join("base");
    fs::create_dir_all(&folder).unwrap();
    gguf::dequantise(base, folder.join("model.safetensors"), DType::F32, &|_| ()).unwrap();
    let config = LanguageModel::open(base).unwrap().config().unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    run(&folder, own, &at.path().join("merged"), &MergeOptions::default()).unwrap();
    let path = at.path().join("merged/model.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    file.names().map(|name| (name.to_owned(), tensor(&path, name))).collect()
}

#[test]
fn blocks_of_32_have_the_references_bytes() {
    let file = SafetensorsFile::open(golden("quantised.safetensors")).unwrap();
    let values = file.get("values").unwrap().to_host().unwrap();
    for kind in [
        TensorType::Blocks(BlockKind::Q4_0),
        TensorType::Blocks(BlockKind::Q4_1),
        TensorType::Blocks(BlockKind::Q5_0),
        TensorType::Blocks(BlockKind::Q5_1),
        TensorType::Blocks(BlockKind::Q8_0),
    ] {
        let expected = file.get(&kind.to_string()).unwrap();
        let found = gguf::quantise(kind, &values.to_f32());
        let wrong = found.iter().zip(expected.bytes()).position(|(found, expected)| found != expected);
        assert_eq!((found.len(), wrong), (expected.bytes().len(), None), "{kind}");
    }
}

/// `n` numbers of a bell around `middle`, with blocks of zeros and of one number.
fn numbers(seed: u64, middle: f32) -> Vec<f32> {
    let mut values: Vec<f32> = random(&[32, 256], seed).to_f32().iter().map(|value| 0.3 * value + middle).collect();
    values[..256].fill(0.0);
    values[256..512].fill(0.25);
    values
}

/// What scales from the extremes and rounding to nearest give, in exact scales: more bits than a block has.
fn rounded(values: &[f32], sub: usize, levels: f32, signed: bool) -> Vec<f32> {
    let round = |own: &[f32]| -> Vec<f32> {
        let (low, top) = own.iter().fold((0.0f32, 0.0f32), |(low, top), v| (low.min(*v), top.max(*v)));
        let (scale, minimum) =
            if signed { (top.max(-low) / (levels / 2.0), 0.0) } else { ((top - low) / (levels - 1.0), low) };
        let q = |v: &f32| if scale == 0.0 { minimum } else { ((v - minimum) / scale).round() * scale + minimum };
        own.iter().map(q).collect()
    };
    values.chunks(sub).flat_map(round).collect()
}

#[test]
fn blocks_of_256_lose_no_more_than_rounding_to_nearest() {
    let error = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    for (kind, sub, levels, signed) in [
        (TensorType::Blocks(BlockKind::Q4_K), 32, 16.0, false),
        (TensorType::Blocks(BlockKind::Q5_K), 32, 32.0, false),
        (TensorType::Blocks(BlockKind::Q6_K), 16, 64.0, true),
    ] {
        for (seed, middle) in [(1, 0.0), (2, 0.2), (3, -2.0)] {
            let values = numbers(seed, middle);
            let found = gguf::values(kind, &gguf::quantise(kind, &values)).unwrap();
            let (ours, plain) = (error(&found, &values), error(&rounded(&values, sub, levels, signed), &values));
            // The scales themselves have 6 or 8 bits here, and none in what it is held against.
            assert!(ours < 1.06 * plain, "{kind} around {middle}: {ours:e}, plain {plain:e}");
            assert!(found[..256].iter().all(|value| *value == 0.0), "{kind}");
            // Numbers that a block holds are not moved by quantising them again.
            let again = gguf::values(kind, &gguf::quantise(kind, &found)).unwrap();
            assert!(error(&again, &found) < 0.2 * plain, "{kind}: {:e} of {plain:e}", error(&again, &found));
        }
    }
}

#[test]
fn a_quantised_model_is_merged_into_only_where_that_is_asked_for() {
    let at = tempdir().unwrap();
    let (base, own) = (golden("llama.gguf"), of_llama());
    let out = at.path().join("out.gguf");
    let error = run(&base, &own, &out, &MergeOptions::default()).unwrap_err().to_string();
    for part in ["--requantise", "--dtype fp16", "a folder"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(!out.exists());
    let report = run(&base, &own, &out, &MergeOptions { requantise: true, ..MergeOptions::default() }).unwrap();
    assert_eq!((report.changed, report.copied), (5, 16));
    assert!(report.notes[0].contains("quantised again"), "{:?}", report.notes);
    let (before, after) = (GgufFile::open(&base).unwrap(), GgufFile::open(&out).unwrap());
    assert!(before.values().eq(after.values()) && before.names().eq(after.names()));
    let expected = expected(&base, &own);
    let model = LanguageModel::open(&out).unwrap();
    for name in model.names() {
        let stored = model.stored_name(name).unwrap();
        assert_eq!(before.tensor_type(stored), after.tensor_type(stored), "{name}");
        let changed = own.modules.keys().any(|path| name == format!("{}.weight", path.path));
        if !changed {
            assert_eq!(before.blocks(stored).unwrap(), after.blocks(stored).unwrap(), "{name}");
        }
        let apart = distance(&model.tensor(name).unwrap().to_dtype(DType::F32), &expected[name]);
        assert!(apart < if changed { 0.06 } else { 1e-9 }, "{name}: {apart:e}");
    }
    // An adapter of layers that are not quantised needs no leave.
    let plain = adapter(vec![("model.layers.0.self_attn.v_proj", lora(16, 32, 5))]);
    let own_type = before.tensor_type("blk.0.attn_v.weight").unwrap();
    assert_eq!(own_type.block().0, 1);
    run(&base, &plain, &at.path().join("plain.gguf"), &MergeOptions::default()).unwrap();
    let error = run(&out, &plain, &out, &MergeOptions::default()).unwrap_err();
    assert!(error.to_string().contains("would replace"), "{error}");
}

#[test]
fn plain_numbers_and_folders_hold_the_merge_as_it_is() {
    let at = tempdir().unwrap();
    let (base, own) = (golden("llama.gguf"), of_llama());
    let expected = expected(&base, &own);
    let file = at.path().join("f32.gguf");
    run(&base, &own, &file, &MergeOptions { dtype: Some(DType::F32), ..MergeOptions::default() }).unwrap();
    let model = LanguageModel::open(&file).unwrap();
    let folder = at.path().join("folder");
    let report =
        run(&base, &own, &folder, &MergeOptions { dtype: Some(DType::F32), ..MergeOptions::default() }).unwrap();
    assert_eq!((report.changed, report.copied, report.files.len()), (5, 16, 2));
    for (name, expected) in &expected {
        assert_eq!(model.file().tensor_type(model.stored_name(name).unwrap()), Some(TensorType::F32));
        assert!(distance(&model.tensor(name).unwrap(), expected) < 1e-6, "{name}");
        assert!(distance(&tensor(&folder.join("model.safetensors"), name), expected) < 1e-6, "{name}");
    }
    let config: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    assert_eq!((&config["torch_dtype"], &config["hidden_size"]), (&"float32".into(), &32.into()));
    assert_eq!(config["architectures"], serde_json::json!(["LlamaForCausalLM"]));
    // The model alone, as a folder.
    let alone = at.path().join("alone");
    gguf::dequantise_to_folder(&base, &alone, DType::F32, &|_| ()).unwrap();
    let same: serde_json::Value = serde_json::from_slice(&fs::read(alone.join("config.json")).unwrap()).unwrap();
    assert_eq!(same, config);
    let model = LanguageModel::open(&base).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    assert_eq!(tensor(&alone.join("model.safetensors"), name), model.tensor(name).unwrap().to_dtype(DType::F32));
    assert!(gguf::dequantise_to_folder(&base, &alone, DType::F32, &|_| ()).is_err());
    assert!(run(&base, &own, &folder, &MergeOptions::default()).unwrap_err().to_string().contains("exists already"));
    let unmerge = MergeOptions { unmerge: true, ..MergeOptions::default() };
    assert!(run(&base, &own, &at.path().join("x.gguf"), &unmerge).is_err());
    let strange = adapter(vec![("model.layers.7.self_attn.q_proj", lora(32, 32, 1)), ("lm_head", lora(41, 32, 1))]);
    let error = run(&base, &strange, &at.path().join("x.gguf"), &MergeOptions::default()).unwrap_err().to_string();
    assert!(error.contains("no such layer") && error.contains("[41, 2]") | error.contains("[40, 32]"), "{error}");
}

/// A model without an output layer of its own gets one where one end is changed; other types of tensors keep their bytes.
#[test]
fn tied_ends_are_parted_and_the_header_is_copied() {
    let at = tempdir().unwrap();
    let base = at.path().join("base.gguf");
    let text = |text: &str| Value::Text(text.into());
    let mut values = BTreeMap::from([
        ("general.architecture".to_owned(), text("llama")),
        ("general.file_type".to_owned(), Value::Unsigned(0)),
        ("llama.attention.head_count".to_owned(), Value::Unsigned(2)),
    ]);
    for key in ["embedding_length", "block_count", "feed_forward_length"] {
        values.insert(format!("llama.{key}"), Value::Unsigned(4));
    }
    let weight = random(&[10, 4], 1);
    let tensors = BTreeMap::from([
        ("token_embd.weight".to_owned(), weight.clone()),
        ("output_norm.weight".to_owned(), random(&[4], 2)),
    ]);
    gguf::write(&base, &values, &tensors).unwrap();
    let module = lora(10, 4, 5);
    let out = at.path().join("out.gguf");
    let report = run(&base, &adapter(vec![("lm_head", module.clone())]), &out, &MergeOptions::default()).unwrap();
    assert!(report.notes[0].contains("output.weight"), "{:?}", report.notes);
    let file = GgufFile::open(&out).unwrap();
    assert_eq!(file.tensor("token_embd.weight").unwrap(), weight);
    let update = support::product(&module.tensors["up"], &module.tensors["down"], 0.5);
    let sum = weight.to_f32().iter().zip(update.to_f32().iter()).map(|(a, b)| a + b).collect();
    let sum = HostTensor::from_f32([10, 4], sum).unwrap();
    assert!(distance(&file.tensor("output.weight").unwrap(), &sum) < 1e-6);
    assert_eq!(LanguageModel::open(&out).unwrap().config().unwrap()["tie_word_embeddings"], false);
    // Of the embedding alone: the head keeps what the embedding was.
    let own = AdapterModule::of_factors(random(&[2, 10], 7), random(&[4, 2], 8), true, 2, 1.0);
    let half = MergeOptions { dtype: Some(DType::F16), ..MergeOptions::default() };
    run(&base, &adapter(vec![("model.embed_tokens", own)]), &out, &half).unwrap();
    let file = GgufFile::open(&out).unwrap();
    assert_eq!(file.tensor("output.weight").unwrap(), weight.to_dtype(DType::F16));
    assert!(distance(&file.tensor("token_embd.weight").unwrap().to_dtype(DType::F32), &weight) > 1e-2);
    assert_eq!(
        (file.number("general.file_type"), file.tensor_type("output_norm.weight")),
        (Some(1), Some(TensorType::F32))
    );
}
