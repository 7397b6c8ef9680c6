//! Merging into tiny language models against PEFT (`golden/language`): every kind of adapter that PEFT trains on them, bases in
//! shards, in half precision and in 8 bits. That transformers' logits on the merged folders are PEFT's is looked at by hand, with
//! `tools/compat/check_language_files.py`.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lora_core::conformance::distance;
use lora_core::variant::VariantRegistry;
use lora_core::{DType, HostTensor, Strength};
use lora_io::adapter::{self, Format};
use lora_io::gguf::GgufFile;
use lora_io::gguf::names::Architecture;
use lora_io::merge::{MergeOptions, MergeReport, Weighted, merge};
use lora_io::safetensors::{SafetensorsFile, StoredDType, write};
use support::{Raw, file, tensor};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/language")
}

fn run(base: &Path, adapter: &Path, out: &Path, options: &MergeOptions) -> lora_io::Result<MergeReport> {
    let adapter = adapter::read(adapter)?.adapter;
    let weighted = Weighted { name: "it".into(), adapter, strength: Strength::from(1.0) };
    merge(base, &[weighted], out, options, &VariantRegistry::default(), &|_, _| {})
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Folders in a folder, sorted.
fn folders(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.is_dir());
    paths.sort();
    paths
}

/// All tensors of a folder by the index that it has.
fn tensors(folder: &Path) -> BTreeMap<String, HostTensor> {
    let index = json(&folder.join("model.safetensors.index.json"));
    let map = index["weight_map"].as_object().unwrap();
    map.iter().map(|(name, shard)| (name.clone(), tensor(&folder.join(shard.as_str().unwrap()), name))).collect()
}

/// Tensors with their names and numbers, and what the configuration says of them.
#[test]
fn what_is_written_for_peft_is_what_peft_writes() {
    let at = tempfile::tempdir().unwrap();
    for case in [
        "qwen2/linear",
        "qwen2/tokens",
        "qwen2/norms_saved",
        "qwen2/head_saved",
        "qwen2/biases",
        "qwen3_moe/experts",
        "qwen3_moe/gate_up",
        "qwen3_moe/down",
        "gpt_oss/experts",
        "mixtral/experts",
    ] {
        let (from, to) = (golden().join(case), at.path().join(case.replace('/', "_")));
        adapter::write(&to, &adapter::read(&from).unwrap().adapter, Format::Peft, DType::F32).unwrap();
        let [expected, found] =
            [&from, &to].map(|folder| SafetensorsFile::open(folder.join("adapter_model.safetensors")).unwrap());
        let names = |file: &SafetensorsFile| file.names().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
        assert_eq!(names(&found), names(&expected), "{case}");
        for name in expected.names() {
            let [one, other] = [&expected, &found].map(|file| file.get(name).unwrap().to_host().unwrap());
            assert_eq!((one.shape(), one.to_f32()), (other.shape(), other.to_f32()), "{case}: {name}");
        }
        let [expected, found] = [&from, &to].map(|folder| json(&folder.join("adapter_config.json")));
        let sorted = |value: &serde_json::Value| {
            let mut list: Vec<String> = value.as_array().into_iter().flatten().map(ToString::to_string).collect();
            list.sort();
            list
        };
        assert_eq!(sorted(&found["target_parameters"]), sorted(&expected["target_parameters"]), "{case}");
        let tokens = found["trainable_token_indices"].get("model.embed_tokens").cloned();
        assert_eq!(tokens.unwrap_or_default(), expected["trainable_token_indices"], "{case}");
    }
}

#[test]
fn what_peft_trains_is_merged_as_peft_merges_it() {
    let (mut cases, mut parted) = (0, Vec::new());
    for model in folders(&golden()) {
        let base = model.join("model");
        let before = tensors(&base);
        for case in folders(&model).into_iter().filter(|case| *case != base) {
            let at = tempfile::tempdir().unwrap();
            let out = at.path().join("out");
            run(&base, &case, &out, &MergeOptions::default())
                .unwrap_or_else(|error| panic!("{}: {error}", case.display()));
            let (expected, found) = (SafetensorsFile::open(case.join("merged.safetensors")).unwrap(), tensors(&out));
            for (name, found) in &found {
                let expected = match expected.get(name) {
                    Ok(view) => view.to_host().unwrap(),
                    Err(_) => before[name].clone(),
                };
                let apart = distance(found, &expected);
                assert!(apart < 1e-6, "{}: {name} {apart:e}", case.display());
            }
            let missing: Vec<&str> =
                expected.names().filter(|name| *name != "logits" && !found.contains_key(*name)).collect();
            assert!(missing.is_empty(), "{}: {missing:?}", case.display());
            // The index says how much is there, and the configuration whether the ends are one.
            let index = json(&out.join("model.safetensors.index.json"));
            let bytes: usize = found.values().map(|tensor| tensor.bytes().len()).sum();
            assert_eq!(index["metadata"]["total_size"], bytes, "{}", case.display());
            let tied = |folder: &Path| json(&folder.join("config.json"))["tie_word_embeddings"] == true;
            if tied(&base) != tied(&out) {
                parted.push(case.file_name().unwrap().to_string_lossy().into_owned());
            }
            assert_eq!(tied(&out), !found.contains_key("lm_head.weight"), "{}", case.display());
            assert!(out.join("generation_config.json").exists());
            cases += 1;
        }
    }
    assert_eq!(cases, 23);
    parted.sort();
    assert_eq!(parted, ["both_lora", "embed_lora", "embed_saved", "head_lora", "head_saved", "tokens_and_head"]);
}

#[test]
fn another_type_of_numbers_is_said_wherever_a_folder_says_it() {
    let at = tempfile::tempdir().unwrap();
    let (base, out) = (golden().join("qwen2/model"), at.path().join("out"));
    let case = golden().join("qwen2/linear");
    run(&base, &case, &out, &MergeOptions { dtype: Some(DType::BF16), ..MergeOptions::default() }).unwrap();
    let expected = SafetensorsFile::open(case.join("merged.safetensors")).unwrap();
    let found = tensors(&out);
    for name in expected.names().filter(|name| *name != "logits") {
        let apart = distance(&found[name].to_dtype(DType::F32), &expected.get(name).unwrap().to_host().unwrap());
        assert!(found[name].dtype() == DType::BF16 && apart < 4e-3, "{name}: {apart:e}");
    }
    let bytes: usize = found.values().map(|tensor| tensor.bytes().len()).sum();
    assert_eq!(json(&out.join("model.safetensors.index.json"))["metadata"]["total_size"], bytes);
    assert_eq!(json(&out.join("config.json"))["dtype"], "bfloat16");
    // Trained tokens and saved layers take the place of numbers, which does not come undone.
    for case in ["tokens", "norms_saved", "embed_saved_tied"] {
        let options = MergeOptions { unmerge: true, ..MergeOptions::default() };
        let error = run(&base, &golden().join("qwen2").join(case), &at.path().join("back"), &options).unwrap_err();
        assert!(error.to_string().contains("no way back"), "{error}");
    }
}

#[test]
fn updates_come_out_of_where_they_were_put() {
    for (model, case) in [("qwen3_moe", "experts"), ("mixtral", "experts"), ("qwen2", "embed_lora")] {
        let at = tempfile::tempdir().unwrap();
        let (base, adapter) = (golden().join(model).join("model"), golden().join(model).join(case));
        run(&base, &adapter, &at.path().join("merged"), &MergeOptions::default()).unwrap();
        let options = MergeOptions { unmerge: true, ..MergeOptions::default() };
        run(&at.path().join("merged"), &adapter, &at.path().join("back"), &options).unwrap();
        let (before, after) = (tensors(&base), tensors(&at.path().join("back")));
        for (name, before) in &before {
            assert!(distance(&after[name], before) < 1e-5, "{model}: {name}");
        }
    }
}

/// llama.cpp has gate and up apart, and every expert's factors behind each other: what they make up is what is merged.
#[test]
fn adapters_of_experts_are_written_for_llama_cpp() {
    for (model, in_turn) in [("qwen3_moe", false), ("gpt_oss", true)] {
        let at = tempfile::tempdir().unwrap();
        let case = golden().join(model).join("experts");
        let mut adapter = adapter::read(&case).unwrap().adapter;
        // llama.cpp takes no biases.
        adapter.modules.retain(|_, module| module.variant == "lora" && !module.tensors.contains_key("bias_value"));
        let architecture = Architecture::of_base(golden().join(model).join("model")).unwrap();
        adapter::gguf::set_architecture(&mut adapter, &architecture);
        let path = at.path().join("a.gguf");
        adapter::write(&path, &adapter, Format::Gguf, DType::F32).unwrap();
        let file = GgufFile::open(&path).unwrap();
        let merged = SafetensorsFile::open(case.join("merged.safetensors")).unwrap();
        let before = tensors(&golden().join(model).join("model"));
        for (name, part, second) in
            [("ffn_gate_exps", "gate", 0), ("ffn_up_exps", "up", 1), ("ffn_down_exps", "down", 0)]
        {
            let factor = |side: &str| file.tensor(&format!("blk.0.{name}.weight.{side}")).unwrap();
            let (a, b) = (factor("lora_a"), factor("lora_b"));
            let (&[experts, rank, inputs], &[3, outputs, 2]) = (a.shape(), b.shape()) else { panic!("{b:?}") };
            assert_eq!((experts, rank), (3, 2));
            for expert in 0..experts {
                let a = HostTensor::from_f32(
                    [rank, inputs],
                    a.to_f32()[expert * rank * inputs..][..rank * inputs].to_vec(),
                );
                let b = HostTensor::from_f32(
                    [outputs, rank],
                    b.to_f32()[expert * outputs * rank..][..outputs * rank].to_vec(),
                );
                let update = support::product(&b.unwrap(), &a.unwrap(), 1.5);
                let at = |tensor: &HostTensor, output: usize, input: usize| {
                    let &[.., rows, columns] = tensor.shape() else { panic!() };
                    let output = if in_turn && part != "down" { 2 * output + second } else { output };
                    // gpt-oss stores inputs first.
                    let place = if in_turn {
                        expert * rows * columns + input * columns + output
                    } else {
                        output * columns + input
                    };
                    tensor.to_f32()[place]
                };
                let stored = match in_turn {
                    true => format!(
                        "model.layers.0.mlp.experts.{}",
                        if part == "down" { "down_proj" } else { "gate_up_proj" }
                    ),
                    false => format!("model.layers.0.mlp.experts.{expert}.{part}_proj.weight"),
                };
                let (after, before) = (merged.get(&stored).unwrap().to_host().unwrap(), &before[&stored]);
                for output in 0..outputs {
                    for input in 0..inputs {
                        let change = at(&after, output, input) - at(before, output, input);
                        let apart = (update.to_f32()[output * inputs + input] - change).abs();
                        assert!(apart < 1e-5, "{model}, {name}, {expert}: {apart:e}");
                    }
                }
            }
        }
    }
}

/// Weights of 8 bits with a scale for all, for each row, for each block, also in another shard than the weight's.
#[test]
fn weights_of_eight_bits_are_merged_by_their_scales() {
    let at = tempfile::tempdir().unwrap();
    let layer = "model.layers.0.self_attn.q_proj";
    let (weight, factors) =
        (format!("{layer}.weight"), ["lora_A", "lora_B"].map(|side| format!("base_model.model.{layer}.{side}.weight")));
    // 1, -0.5, 0.875, 2, 1, 1, -1, 4 as F8_E4M3.
    let bytes = vec![0x38, 0xB0, 0x36, 0x40, 0x38, 0x38, 0xB8, 0x48];
    let numbers = [1.0, -0.5, 0.875, 2.0, 1.0, 1.0, -1.0, 4.0];
    let adapter = at.path().join("adapter");
    let [down, up] = [vec![1.0, 2.0], vec![0.5, 0.0, -0.25, 1.0]].map(|values| values);
    file(
        &adapter.join("adapter_model.safetensors"),
        &[
            (&factors[0], HostTensor::from_f32([1, 2], down).unwrap()),
            (&factors[1], HostTensor::from_f32([4, 1], up).unwrap()),
        ],
    );
    fs::write(adapter.join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 2}"#).unwrap();
    let update: Vec<f32> = [0.5, 0.0, -0.25, 1.0].iter().flat_map(|up| [2.0 * up, 4.0 * up]).collect();
    for (name, shape, scales, each) in [
        ("weight_scale", vec![], vec![0.5], vec![0.5; 8]),
        ("weight_scale", vec![4, 1], vec![1.0, 2.0, 0.5, 0.25], vec![1.0, 1.0, 2.0, 2.0, 0.5, 0.5, 0.25, 0.25]),
        ("weight_scale_inv", vec![2, 1], vec![2.0, 0.5], vec![2.0, 2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.5]),
        ("weight_scale_inv", vec![2, 2], vec![2.0, 0.5, 1.0, 4.0], vec![2.0, 0.5, 2.0, 0.5, 1.0, 4.0, 1.0, 4.0]),
    ] {
        let base = tempfile::tempdir().unwrap();
        let config = r#"{"model_type": "qwen3", "torch_dtype": "bfloat16",
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 1]}}"#;
        fs::write(base.path().join("config.json"), config).unwrap();
        let raw = Raw::default().with(&weight, StoredDType::F8E4M3, &[4, 2], bytes.clone());
        write(base.path().join("model-1.safetensors"), &raw, &BTreeMap::new()).unwrap();
        let scale = HostTensor::from_f32(shape, scales).unwrap();
        file(&base.path().join("model-2.safetensors"), &[(&format!("{layer}.{name}"), scale)]);
        let map = serde_json::json!({ "metadata": { "total_size": 24 },
            "weight_map": { weight.clone(): "model-1.safetensors", format!("{layer}.{name}"): "model-2.safetensors" } });
        fs::write(base.path().join("model.safetensors.index.json"), map.to_string()).unwrap();
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("out");
        let error = run(base.path(), &adapter, &out, &MergeOptions::default()).unwrap_err().to_string();
        assert!(error.contains("--dtype bf16"), "{error}");
        run(base.path(), &adapter, &out, &MergeOptions { dtype: Some(DType::F32), ..MergeOptions::default() }).unwrap();
        let expected: Vec<f32> = (0..8).map(|at| numbers[at] * each[at] + update[at]).collect();
        let found = tensor(&out.join("model-1.safetensors"), &weight);
        assert_eq!(*found.to_f32(), expected[..], "{name}");
        // Nothing is left that the numbers are no longer to be multiplied by.
        assert_eq!(SafetensorsFile::open(out.join("model-2.safetensors")).unwrap().len(), 0);
        let index = json(&out.join("model.safetensors.index.json"));
        assert_eq!((index["weight_map"].as_object().unwrap().len(), &index["metadata"]["total_size"]), (1, &32.into()));
        let config = json(&out.join("config.json"));
        assert_eq!((config.get("quantization_config"), &config["torch_dtype"]), (None, &"float32".into()));
    }
}

#[test]
fn tokens_and_experts_that_do_not_fit_are_named() {
    let at = tempfile::tempdir().unwrap();
    let adapter = |case: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let folder = at.path().join("adapter");
        fs::create_dir_all(&folder).unwrap();
        fs::copy(golden().join(case).join("adapter_model.safetensors"), folder.join("adapter_model.safetensors"))
            .unwrap();
        let mut config = json(&golden().join(case).join("adapter_config.json"));
        change(&mut config);
        fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
        let base = golden().join(case).parent().unwrap().join("model");
        run(&base, &folder, &at.path().join("out"), &MergeOptions::default()).unwrap_err().to_string()
    };
    let tokens =
        |list: serde_json::Value| adapter("qwen2/tokens", &|config| config["trainable_token_indices"] = list.clone());
    for (list, said) in [
        (serde_json::json!([1, 2]), "3 rows are there for the 2 tokens"),
        (serde_json::json!([1, 2, 32]), "token 32 is trained, and this base has 32 rows"),
        (serde_json::json!([1, 2, -1]), "-1 is no token"),
        (serde_json::json!("all"), "no list"),
        (serde_json::json!({ "lm_head": [1, 2, 3] }), "does not say which tokens"),
    ] {
        let error = tokens(list);
        assert!(error.contains(said), "{error}");
    }
    let error = adapter("qwen3_moe/experts", &|config| config["r"] = 4.into());
    assert!(error.contains("no experts of rank 4"), "{error}");
    let error = adapter("qwen3_moe/experts", &|config| config["r"] = 3.into());
    assert!(error.contains("no layer of 2 experts"), "{error}");
}
