//! GGUF: element types against gguf's own dequantisation (bit for bit), a model against what transformers loads, adapters
//! there and back, and files that lie.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_core::conformance::distance;
use lora_core::random::Stream;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath};
use lora_io::adapter::{self, Format};
use lora_io::gguf::names::Architecture;
use lora_io::gguf::{self, GgufFile, LanguageModel, Value};
use lora_io::safetensors::SafetensorsFile;
use proptest::prelude::*;
use support::product;
use tempfile::tempdir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf").join(name)
}

#[test]
fn every_type_has_the_references_values_bit_for_bit() {
    let (file, expected) =
        (GgufFile::open(golden("types.gguf")).unwrap(), SafetensorsFile::open(golden("types.safetensors")).unwrap());
    assert_eq!(expected.len(), 11);
    for name in expected.names() {
        let (found, expected) = (file.tensor(name).unwrap(), expected.get(name).unwrap().to_host().unwrap());
        assert_eq!(found.shape(), expected.shape(), "{name}");
        let bits = |tensor: &HostTensor| tensor.to_f32().iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert!(bits(&found) == bits(&expected), "{name}: {found:?} is not {expected:?}");
    }
    assert_eq!(file.text("general.name"), Some("types"));
    assert_eq!(file.texts("some.texts").unwrap(), ["a", "ü", ""]);
}

#[test]
fn a_model_is_what_transformers_loads() {
    let expected = SafetensorsFile::open(golden("llama.safetensors")).unwrap();
    let model = LanguageModel::open(golden("llama.gguf")).unwrap();
    assert_eq!(*model.architecture(), Architecture { name: "llama".into(), heads: 4, kv_heads: 2 });
    assert!(model.names().eq(expected.names()));
    let folder = tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    gguf::dequantise(golden("llama.gguf"), &path, DType::F32, &|_| ()).unwrap();
    let written = SafetensorsFile::open(&path).unwrap();
    assert_eq!(written.metadata()["lora_dequantised_from"], "Q5_0");
    for name in expected.names() {
        let expected = expected.get(name).unwrap().to_host().unwrap();
        assert_eq!(model.tensor(name).unwrap().to_dtype(DType::F32), expected, "{name}");
        assert_eq!(written.get(name).unwrap().to_host().unwrap(), expected, "{name}");
    }
    // Where safetensors is expected, the message tells the way.
    assert!(SafetensorsFile::open(golden("llama.gguf")).unwrap_err().to_string().contains("lora dequantise"));
}

/// Plain LoRA on query, key, output and embedding of the golden model.
fn language_adapter() -> Adapter {
    let mut adapter = Adapter::default();
    for (index, (path, rows, columns)) in [
        ("model.layers.0.self_attn.q_proj", 32, 32),
        ("model.layers.1.self_attn.k_proj", 16, 32),
        ("model.layers.1.mlp.down_proj", 32, 64),
        ("model.embed_tokens", 32, 40),
    ]
    .into_iter()
    .enumerate()
    {
        let names = if path.ends_with("tokens") { ["embedding_down", "embedding_up"] } else { ["down", "up"] };
        let random = |shape: [usize; 2], seed| {
            HostTensor::from_f32(shape, Stream::new(seed).normals(shape[0] * shape[1])).unwrap()
        };
        let tensors = BTreeMap::from([
            (names[0].to_owned(), random([4, columns], index as u64)),
            (names[1].to_owned(), random([rows, 4], 100 + index as u64)),
        ]);
        let module = AdapterModule { variant: "lora".into(), tensors, rank: 4, alpha: 8.0 };
        adapter.modules.insert(ModulePath::new(Component::LANGUAGE_MODEL, path), module);
    }
    adapter
}

#[test]
fn adapters_go_to_llama_cpp_and_come_back() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let mut adapter = language_adapter();
    adapter.metadata.insert("note".into(), "kept".into());
    let error = adapter::write(&path, &adapter, Format::Gguf, DType::F32).unwrap_err().to_string();
    assert!(error.contains("--base"), "{error}");
    let architecture = Architecture::of_base(golden("llama.gguf")).unwrap();
    adapter::gguf::set_architecture(&mut adapter, &architecture);
    assert!(adapter::write(&path, &adapter, Format::Gguf, DType::F32).unwrap().is_empty());
    let read = adapter::read(&path).unwrap();
    assert_eq!((read.format, &read.adapter), (Format::Gguf, &adapter));
    // Embeddings are looked up in rows of `lora_a`.
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.shape("token_embd.weight.lora_a").unwrap(), [40, 4]);
    assert_eq!(file.shape("token_embd.weight.lora_b").unwrap(), [32, 4]);
    assert_eq!(file.float("adapter.lora.alpha"), Some(8.0));

    // What llama.cpp adds to its rows is what Hugging Face's model adds to its own: the model whose rows are the update's
    // reads as the update.
    for (module, name, heads) in [
        ("model.layers.0.self_attn.q_proj", "blk.0.attn_q.weight", 4),
        ("model.layers.1.self_attn.k_proj", "blk.1.attn_k.weight", 2),
    ] {
        let stored = product(
            &file.tensor(&format!("{name}.lora_b")).unwrap(),
            &file.tensor(&format!("{name}.lora_a")).unwrap(),
            1.0,
        );
        let mut values: BTreeMap<String, Value> = BTreeMap::from([
            ("general.architecture".into(), Value::Text("llama".into())),
            ("llama.attention.head_count".into(), Value::Unsigned(4)),
        ]);
        values.insert("llama.attention.head_count_kv".into(), Value::Unsigned(2));
        let base = folder.path().join(format!("{heads}.gguf"));
        gguf::write(&base, &values, &BTreeMap::from([(name.to_owned(), stored)])).unwrap();
        let own = &adapter.modules[&ModulePath::new(Component::LANGUAGE_MODEL, module)];
        let expected = product(&own.tensors["up"], &own.tensors["down"], 1.0);
        let found = LanguageModel::open(&base).unwrap().tensor(&format!("{module}.weight")).unwrap();
        assert!(distance(&found, &expected) < 1e-6, "{module}");
    }

    // Alphas that differ are folded in.
    let first = adapter.modules.values_mut().next().unwrap();
    first.alpha = 2.0;
    let notes = adapter::write(&path, &adapter, Format::Gguf, DType::F32).unwrap();
    assert!(notes[0].contains("folded"));
    for (path, module) in &adapter::read(&path).unwrap().adapter.modules {
        let name = if module.tensors.contains_key("up") { ("up", "down") } else { ("embedding_up", "embedding_down") };
        let own = &adapter.modules[path];
        let update = |module: &AdapterModule| product(&module.tensors[name.0], &module.tensors[name.1], module.scale());
        assert!(distance(&update(module), &update(own)) < 1e-6, "{path}");
    }
}

/// `rope_freqs` is no weight of Hugging Face's model: a configuration says it, or nothing does.
#[test]
fn factors_on_rotary_frequencies_are_a_scaling_of_the_configuration() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let scaling = |factors: Option<Vec<f32>>| {
        let mut values = BTreeMap::from([
            ("general.architecture".to_owned(), Value::Text("llama".into())),
            ("llama.attention.head_count".to_owned(), Value::Unsigned(4)),
            ("llama.rope.freq_base".to_owned(), Value::Float(500_000.0)),
        ]);
        values.insert("general.type".into(), Value::Text("model".into()));
        let mut tensors = BTreeMap::from([("token_embd.weight".to_owned(), HostTensor::zeros([4, 64]))]);
        if let Some(factors) = factors {
            tensors.insert("rope_freqs.weight".into(), HostTensor::from_f32([factors.len()], factors).unwrap());
        }
        gguf::write(&path, &values, &tensors).unwrap();
        LanguageModel::open(&path).unwrap().rope_scaling()
    };
    assert_eq!(scaling(None).unwrap(), None);
    // See `gguf/rope.rs` for where these are from.
    let found = scaling(Some(vec![1.0, 2.442_259_6, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0])).unwrap().unwrap();
    assert_eq!(found["rope_type"], "llama3");
    assert_eq!((found["factor"].as_f64(), found["original_max_position_embeddings"].as_u64()), (Some(8.0), Some(64)));
    let error = scaling(Some(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])).unwrap_err().to_string();
    assert!(error.contains("rope_freqs.weight") && error.contains("rope_scaling"), "{error}");
}

#[test]
fn a_file_that_does_not_tell_the_heads_is_read_with_the_base() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let mut adapter = language_adapter();
    let architecture = Architecture::of_base(golden("llama.gguf")).unwrap();
    adapter::gguf::set_architecture(&mut adapter, &architecture);
    adapter::write(&path, &adapter, Format::Gguf, DType::F16).unwrap();
    let file = GgufFile::open(&path).unwrap();
    let tensors = file.names().map(|name| (name.to_owned(), file.tensor(name).unwrap())).collect();
    let foreign: BTreeMap<String, Value> = file
        .values()
        .filter(|(key, _)| !key.contains("head_count"))
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .collect();
    gguf::write(&path, &foreign, &tensors).unwrap();
    assert!(adapter::read(&path).unwrap_err().to_string().contains("--base"));
    let read = adapter::gguf::read_for(&path, &architecture).unwrap();
    assert_eq!(read.dtype(), DType::F16);
    for (path, module) in &read.adapter.modules {
        for (name, tensor) in &module.tensors {
            assert_eq!(*tensor, adapter.modules[path].tensors[name].to_dtype(DType::F16), "{path} {name}");
        }
    }
    let other = Architecture { name: "qwen2".into(), ..architecture };
    assert!(adapter::gguf::read_for(&path, &other).unwrap_err().to_string().contains("qwen2"));
}

/// `names.json` is from the tables of the gguf package.
#[test]
fn adapters_of_every_architecture_have_llama_cpps_names() {
    let expected: serde_json::Value = serde_json::from_slice(&std::fs::read(golden("names.json")).unwrap()).unwrap();
    let folder = tempdir().unwrap();
    for (kind, own) in expected.as_object().unwrap() {
        let config = format!(r#"{{"model_type": "{kind}", "num_attention_heads": 2, "num_key_value_heads": 1}}"#);
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let architecture = Architecture::of_base(folder.path()).unwrap();
        assert_eq!(own["architecture"], architecture.name, "{kind}");
        let names = own["names"].as_object().unwrap();
        let mut adapter = Adapter::default();
        for (module, name) in names {
            assert_eq!(name, &serde_json::json!(architecture.stored(module)), "{kind}, {module}");
            assert_eq!(architecture.module(name.as_str().unwrap()).as_ref(), Some(module), "{kind}");
            let random = |shape: [usize; 2], seed: &str| {
                HostTensor::from_f32(shape, Stream::new(1).at(seed).normals(shape[0] * shape[1])).unwrap()
            };
            let embedding = module.ends_with("embed_tokens");
            let own = AdapterModule::of_factors(
                random([2, 8], module),
                random([8, 2], name.as_str().unwrap()),
                embedding,
                2,
                4.0,
            );
            adapter.modules.insert(ModulePath::new(Component::LANGUAGE_MODEL, module), own);
        }
        adapter::gguf::set_architecture(&mut adapter, &architecture);
        let path = folder.path().join("a.gguf");
        adapter::write(&path, &adapter, Format::Gguf, DType::F32).unwrap();
        assert_eq!(adapter::read(&path).unwrap().adapter, adapter, "{kind}");
        // Pairs side by side in these, as llama.cpp turns them; halves in the others.
        let stored = GgufFile::open(&path).unwrap().tensor("blk.11.attn_q.weight.lora_b").ok();
        let own = adapter.modules.get(&ModulePath::new(Component::LANGUAGE_MODEL, "model.layers.11.self_attn.q_proj"));
        if let (Some(stored), Some(own)) = (stored, own) {
            let rows = |tensor: &HostTensor| tensor.to_f32().chunks(2).map(<[f32]>::to_vec).collect::<Vec<_>>();
            let (stored, own) = (rows(&stored), rows(&own.tensors["up"]));
            let sides = [0, 2, 1, 3, 4, 6, 5, 7].map(|row| own[row].clone());
            let reordered = ["llama", "mistral3", "smollm3", "granite"].contains(&&*architecture.name);
            assert_eq!(stored, if reordered { sides.to_vec() } else { own }, "{kind}");
        }
    }
}

#[test]
fn what_does_not_belong_is_named() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let text = |text: &str| Value::Text(text.into());
    let mut values = BTreeMap::from([
        ("general.architecture".to_owned(), text("qwen2")),
        ("general.type".to_owned(), text("adapter")),
        ("adapter.type".to_owned(), text("lora")),
        ("adapter.lora.alpha".to_owned(), Value::Float(8.0)),
    ]);
    let tensor = HostTensor::zeros([4, 8]);
    let names = ["blk.0.attn_q.weight.lora_a", "blk.0.strange.weight.lora_a", "blk.0.strange.weight.lora_b", "other"];
    let tensors = names.map(|name| (name.to_owned(), tensor.clone())).into();
    gguf::write(&path, &values, &tensors).unwrap();
    let error = adapter::read(&path).unwrap_err().to_string();
    for part in ["4 tensor(s)", "`blk.0.attn_q.weight.lora_b` is missing", "no layer", "`other` (no half"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    values.insert("adapter.type".into(), text("control_vector"));
    gguf::write(&path, &values, &tensors).unwrap();
    assert!(adapter::read(&path).unwrap_err().to_string().contains("no LoRA adapter"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any header of a real file with some bytes changed or cut: an error or a file whose tensors can be read, never a panic.
    #[test]
    fn damaged_files_are_survived(cut in 0usize..4000, changes in proptest::collection::vec((0usize..1200, any::<u8>()), 0..6)) {
        let mut bytes = std::fs::read(golden("types.gguf")).unwrap();
        bytes.truncate(bytes.len().saturating_sub(cut));
        for (place, byte) in changes {
            if let Some(own) = bytes.get_mut(place) {
                *own = byte;
            }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        if let Ok(file) = GgufFile::open(file.path()) {
            for name in file.names() {
                let _ = file.tensor(name);
            }
            let _ = file.texts("some.texts");
        }
        let _ = adapter::read(file.path());
    }
}

#[test]
fn lies_about_sizes_reserve_nothing() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let start = |tensors: u64, values: u64| {
        [b"GGUF", &3u32.to_le_bytes()[..], &tensors.to_le_bytes(), &values.to_le_bytes()].concat()
    };
    let key = |kind: u32, rest: &[u8]| [&1u64.to_le_bytes()[..], b"k", &kind.to_le_bytes(), rest].concat();
    let huge = u64::MAX.to_le_bytes();
    for (bytes, expected) in [
        (start(u64::MAX, 0), "tensors"),
        (start(0, u64::MAX), "values"),
        ([start(0, 1), huge.to_vec(), vec![0; 16]].concat(), "bytes of a text"),
        ([start(0, 1), key(9, &[&8u32.to_le_bytes()[..], &huge].concat())].concat(), "elements"),
        ([start(0, 1), key(9, &[&9u32.to_le_bytes()[..], &huge].concat())].concat(), "type 9"),
        ([start(0, 1), key(77, &[])].concat(), "type 77"),
        ([start(0, 1), key(7, &[2])].concat(), "truth"),
        (b"GGUF\x01\0\0\0".to_vec(), "version 1"),
        (b"GGUF\0\0\0\x03".to_vec(), "big-endian"),
        (b"GGU".to_vec(), "ends"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = GgufFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
