//! Bases as people have them on their disks: copies of weights, links, files that other systems left, ties, weights
//! that are stored the other way round or in 8 bits. Every copy of a layer is merged or left out, and nothing that is
//! read is replaced.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lora_core::compose::ExtractOptions;
use lora_core::conformance::distance;
use lora_core::rank::RankPolicy;
use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath, Strength};
use lora_io::merge::{self, MergeOptions, MergeReport, Weighted, merge};
use lora_io::overwrite;
use lora_io::safetensors::{SafetensorsFile, StoredDType, write};
use support::{Raw, file, random, tensor};

fn lora(outputs: usize, inputs: usize, seed: u64) -> AdapterModule {
    AdapterModule::of_factors(random(&[2, inputs], seed), random(&[outputs, 2], seed + 1), false, 2, 1.0)
}

fn of(component: Component, path: &str, module: AdapterModule) -> Adapter {
    Adapter { modules: BTreeMap::from([(ModulePath::new(component, path), module)]), ..Adapter::default() }
}

fn run(base: &Path, adapter: Adapter, out: &Path, dtype: Option<DType>) -> lora_io::Result<MergeReport> {
    let weighted = Weighted { name: "it".into(), adapter, strength: Strength::from(1.0) };
    let options = MergeOptions { dtype, ..MergeOptions::default() };
    merge(base, &[weighted], out, &options, &VariantRegistry::default(), &|_, _| {})
}

/// `weight + 0.5 · up · down`, or with the update turned.
fn expected(weight: &HostTensor, module: &AdapterModule, turned: bool) -> HostTensor {
    let (down, up) = (module.tensors["down"].to_f32(), module.tensors["up"].to_f32());
    let (rows, columns) = (weight.shape()[0], weight.shape()[1]);
    let (outputs, inputs) = if turned { (columns, rows) } else { (rows, columns) };
    let update = |out: usize, into: usize| 0.5 * (up[2 * out] * down[into] + up[2 * out + 1] * down[inputs + into]);
    assert_eq!(up.len(), 2 * outputs);
    let before = weight.to_f32();
    let values = before.iter().enumerate().map(|(place, value)| {
        let (row, column) = (place / columns, place % columns);
        value + if turned { update(column, row) } else { update(row, column) }
    });
    HostTensor::from_f32([rows, columns], values.collect()).unwrap()
}

const QUERY: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";

#[test]
fn every_copy_of_a_layer_is_merged() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    let (weight, module) = (random(&[6, 4], 1), lora(6, 4, 5));
    let name = format!("{QUERY}.weight");
    for path in ["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"] {
        file(&base.join(path), &[(&name, weight.clone())]);
    }
    // The whole model as one file beside its folders, and another network with layers of the same names.
    let single = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight";
    file(
        &base.join("v1-5.safetensors"),
        &[(single, weight.clone()), ("cond_stage_model.transformer.x", random(&[1], 1))],
    );
    file(&base.join("controlnet/diffusion_pytorch_model.safetensors"), &[(&name, weight.clone())]);
    for left in ["unet/diffusion_pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json"] {
        fs::write(base.join(left), "old").unwrap();
    }
    let out = folder.path().join("out");
    let report = run(&base, of(Component::UNET, QUERY, module.clone()), &out, None).unwrap();
    let wanted = expected(&weight, &module, false);
    for (path, name) in [
        ("unet/diffusion_pytorch_model.safetensors", name.as_str()),
        ("unet/diffusion_pytorch_model.fp16.safetensors", &name),
        ("v1-5.safetensors", single),
    ] {
        assert!(distance(&tensor(&out.join(path), name), &wanted) < 1e-6, "{path}");
    }
    assert_eq!(tensor(&out.join("controlnet/diffusion_pytorch_model.safetensors"), &name), weight);
    for left in ["unet/diffusion_pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json"] {
        assert!(!out.join(left).exists() && report.notes.iter().any(|note| note.contains(left)), "{left}");
    }
}

#[cfg(unix)]
#[test]
fn linked_folders_are_followed_and_stay_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let (base, shared) = (folder.path().join("base"), folder.path().join("shared/unet"));
    let (weight, module, name) = (random(&[6, 4], 1), lora(6, 4, 5), format!("{QUERY}.weight"));
    file(&shared.join("diffusion_pytorch_model.safetensors"), &[(&name, weight.clone())]);
    fs::create_dir_all(&base).unwrap();
    std::os::unix::fs::symlink("../shared/unet", base.join("unet")).unwrap();
    // A link that leads back to where it is does no harm.
    std::os::unix::fs::symlink(".", base.join("loop")).unwrap();
    let out = folder.path().join("out");
    run(&base, of(Component::UNET, QUERY, module.clone()), &out, None).unwrap();
    let merged = out.join("unet/diffusion_pytorch_model.safetensors");
    assert!(distance(&tensor(&merged, &name), &expected(&weight, &module, false)) < 1e-6);
    assert!(!fs::symlink_metadata(out.join("unet")).unwrap().is_symlink());
    assert_eq!(tensor(&shared.join("diffusion_pytorch_model.safetensors"), &name), weight);
}

#[test]
fn hidden_files_and_the_authors_own_are_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    let name = "model.layers.0.self_attn.q_proj";
    let (weight, module) = (random(&[6, 4], 1), lora(6, 4, 5));
    file(&base.join("model.safetensors"), &[(&format!("{name}.weight"), weight.clone())]);
    fs::write(base.join("config.json"), "{}").unwrap();
    for hidden in ["._model.safetensors", "._config.json", ".cache/x.safetensors"] {
        fs::create_dir_all(base.join(hidden).parent().unwrap()).unwrap();
        fs::write(base.join(hidden), b"\0\x05\x16\x07\0\x02\0\0Mac OS X").unwrap();
    }
    // The same weights by their author's names, as Mistral publishes them.
    file(&base.join("consolidated.safetensors"), &[("layers.0.attention.wq.weight", weight.clone())]);
    let out = folder.path().join("out");
    let report = run(&base, of(Component::LANGUAGE_MODEL, name, module.clone()), &out, None).unwrap();
    assert!(report.notes.iter().any(|note| note.contains("consolidated.safetensors")), "{:?}", report.notes);
    let merged = tensor(&out.join("model.safetensors"), &format!("{name}.weight"));
    assert!(distance(&merged, &expected(&weight, &module, false)) < 1e-6);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 2);
}

/// GPT-2's `Conv1D` keeps `[in, out]`; models that have `nn.Linear` under the same names do not.
#[test]
fn weights_that_are_stored_turned_get_the_turned_update() {
    for turned in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base.safetensors");
        let fused = if turned { [6, 18] } else { [18, 6] };
        let (square, wide) = (random(&[6, 6], 1), random(&fused, 2));
        let names = ["h.0.attn.c_proj.weight", "h.0.attn.c_attn.weight"];
        file(
            &base,
            &[(names[0], square.clone()), (names[1], wide.clone()), ("h.0.attn.c_attn.bias", random(&[18], 3))],
        );
        let modules = [("transformer.h.0.attn.c_proj", lora(6, 6, 5)), ("transformer.h.0.attn.c_attn", lora(18, 6, 7))];
        let path = |name: &str| ModulePath::new(Component::LANGUAGE_MODEL, name);
        let adapter = Adapter {
            modules: modules.iter().map(|(name, module)| (path(name), module.clone())).collect(),
            ..Adapter::default()
        };
        let out = folder.path().join("out.safetensors");
        run(&base, adapter.clone(), &out, None).unwrap();
        for ((name, weight), (_, module)) in [(names[0], &square), (names[1], &wide)].into_iter().zip(&modules) {
            let apart = distance(&tensor(&out, name), &expected(weight, module, turned));
            assert!(apart < 1e-6, "{name}, turned {turned}: {apart:e}");
        }
        // What is extracted of the two is the update as an adapter has it.
        let options = ExtractOptions { policy: RankPolicy::Fixed(2), limit: 2, ..ExtractOptions::default() };
        let named = folder.path().join("named.safetensors");
        let named_out = folder.path().join("named_out.safetensors");
        for (from, to) in [(&base, &named), (&out, &named_out)] {
            let all: Vec<_> = names.iter().map(|name| (format!("transformer.{name}"), tensor(from, name))).collect();
            let all: Vec<_> = all.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
            file(to, &all);
        }
        let targets = Targets::parse(&["re:.*c_.*".to_owned()]).unwrap();
        let found = merge::extract(&named, &named_out, &targets, &options).unwrap().adapter;
        for (name, module) in &modules {
            let own = &found.modules[&path(name)];
            let product = |module: &AdapterModule| {
                support::product(&module.tensors["up"], &module.tensors["down"], module.scale())
            };
            assert!(distance(&product(own), &product(module)) < 1e-4, "{name}, turned {turned}");
        }
    }
}

/// A language model whose output layer is its embedding.
fn tied(folder: &Path, shards: bool) -> HostTensor {
    let embedding = random(&[10, 4], 1);
    let norm = ("model.norm.weight", random(&[4], 2));
    if shards {
        file(&folder.join("model-1.safetensors"), &[("model.embed_tokens.weight", embedding.clone())]);
        file(&folder.join("model-2.safetensors"), &[norm]);
        let map = r#"{"model.embed_tokens.weight": "model-1.safetensors", "model.norm.weight": "model-2.safetensors"}"#;
        let index = format!(r#"{{"metadata": {{"total_size": 176}}, "weight_map": {map}}}"#);
        fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    } else {
        file(&folder.join("model.safetensors"), &[("model.embed_tokens.weight", embedding.clone()), norm]);
    }
    let config = r#"{"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": true, "vocab_size": 10}"#;
    fs::write(folder.join("config.json"), config).unwrap();
    embedding
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn tied_ends_are_parted_where_an_adapter_changes_one() {
    for shards in [false, true] {
        let first = if shards { "model-1.safetensors" } else { "model.safetensors" };
        let head = lora(10, 4, 5);
        let embedding = AdapterModule::of_factors(random(&[2, 10], 7), random(&[4, 2], 8), true, 2, 1.0);
        // [entries, width]: the transposed product.
        let as_rows = AdapterModule::of_factors(
            embedding.tensors["embedding_down"].clone(),
            embedding.tensors["embedding_up"].clone(),
            false,
            2,
            1.0,
        );
        let both = [("lm_head", &head), ("model.embed_tokens", &embedding)];
        for chosen in [&both[..1], &both[1..], &both[..]] {
            let folder = tempfile::tempdir().unwrap();
            let (base, out) = (folder.path().join("base"), folder.path().join("out"));
            fs::create_dir_all(&base).unwrap();
            let weight = tied(&base, shards);
            let path = |name: &str| ModulePath::new(Component::LANGUAGE_MODEL, name);
            let modules = chosen.iter().map(|(name, module)| (path(name), (*module).clone())).collect();
            let report = run(&base, Adapter { modules, ..Adapter::default() }, &out, None).unwrap();
            assert!(report.notes.iter().any(|note| note.contains("tie_word_embeddings")), "{:?}", report.notes);
            let has = |name: &str| chosen.iter().any(|(own, _)| *own == name);
            let head_wanted = if has("lm_head") { expected(&weight, &head, false) } else { weight.clone() };
            let wanted = if has("model.embed_tokens") { expected(&weight, &as_rows, true) } else { weight.clone() };
            assert!(distance(&tensor(&out.join(first), "lm_head.weight"), &head_wanted) < 1e-6);
            assert!(distance(&tensor(&out.join(first), "model.embed_tokens.weight"), &wanted) < 1e-6);
            assert_eq!(json(&out.join("config.json"))["tie_word_embeddings"], false);
            assert_eq!(json(&out.join("config.json"))["vocab_size"], 10);
            if shards {
                let index = json(&out.join("model.safetensors.index.json"));
                assert_eq!(index["weight_map"]["lm_head.weight"], first);
                assert_eq!(index["metadata"]["total_size"], 176 + 160);
            }
        }
    }
}

#[test]
fn a_tied_base_stays_tied_where_nothing_changes_its_ends() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    fs::create_dir_all(&base).unwrap();
    tied(&base, false);
    file(&base.join("more.safetensors"), &[("model.layers.0.self_attn.q_proj.weight", random(&[6, 4], 3))]);
    run(&base, of(Component::LANGUAGE_MODEL, "model.layers.0.self_attn.q_proj", lora(6, 4, 5)), &out, None).unwrap();
    assert_eq!(json(&out.join("config.json"))["tie_word_embeddings"], true);
    assert!(!SafetensorsFile::open(out.join("model.safetensors")).unwrap().contains("lm_head.weight"));
    // A file alone has no configuration that could say otherwise.
    let alone = base.join("model.safetensors");
    for (name, module) in [("lm_head", lora(10, 4, 5)), ("model.embed_tokens", lora(10, 4, 5))] {
        let error =
            run(&alone, of(Component::LANGUAGE_MODEL, name, module), &folder.path().join("x"), None).unwrap_err();
        assert!(error.to_string().contains("ties its output"), "{error}");
    }
}

#[test]
fn bases_of_eight_bits_are_merged_into_wider_types() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    let name = format!("{QUERY}.weight");
    // 1, -0.5, 0.875, 2.
    let bytes = vec![0x38, 0xB0, 0x36, 0x40];
    write(&base, &Raw::default().with(&name, StoredDType::F8E4M3, &[2, 2], bytes.clone()), &BTreeMap::new()).unwrap();
    let (module, weight) = (lora(2, 2, 5), HostTensor::from_f32([2, 2], vec![1.0, -0.5, 0.875, 2.0]).unwrap());
    let adapter = of(Component::UNET, QUERY, module.clone());
    let error = run(&base, adapter.clone(), &out, None).unwrap_err().to_string();
    assert!(error.contains("--dtype bf16"), "{error}");
    run(&base, adapter.clone(), &out, Some(DType::F32)).unwrap();
    assert!(distance(&tensor(&out, &name), &expected(&weight, &module, false)) < 1e-6);
    // Numbers that a factor beside them belongs to are not what they seem; the factor goes with the type.
    let scaled = Raw::default().with(&name, StoredDType::F8E4M3, &[2, 2], bytes).with(
        &format!("{QUERY}.scale_weight"),
        StoredDType::F32,
        &[],
        0.5f32.to_le_bytes().to_vec(),
    );
    write(&base, &scaled, &BTreeMap::new()).unwrap();
    run(&base, adapter, &out, Some(DType::F32)).unwrap();
    let halved = HostTensor::from_f32([2, 2], vec![0.5, -0.25, 0.4375, 1.0]).unwrap();
    assert!(distance(&tensor(&out, &name), &expected(&halved, &module, false)) < 1e-6);
    assert_eq!(SafetensorsFile::open(&out).unwrap().len(), 1);
}

#[test]
fn an_adapter_for_another_model_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    let single = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight";
    file(&base, &[(single, random(&[6, 4], 1)), ("cond_stage_model.transformer.x", random(&[1], 1))]);
    let with = |module: AdapterModule, version: &str| {
        let mut adapter = of(Component::UNET, QUERY, module);
        adapter.metadata.insert("ss_base_model_version".into(), version.into());
        adapter
    };
    let notes = run(&base, with(lora(6, 4, 5), "sdxl_base_v1-0"), &out, None).unwrap().notes.join("; ");
    assert!(notes.contains("Stable Diffusion XL") && notes.contains("Stable Diffusion 1.x"), "{notes}");
    let notes = run(&base, with(lora(6, 4, 5), "wan2.1"), &out, None).unwrap().notes.join("; ");
    assert!(notes.contains("wan2.1"), "{notes}");
    assert!(run(&base, with(lora(6, 4, 5), "sd_v1"), &out, None).unwrap().notes.is_empty());
    assert!(run(&base, of(Component::UNET, QUERY, lora(6, 4, 5)), &out, None).unwrap().notes.is_empty());
    // Shapes are held against the base's before anything is written; both models are named there too.
    let error = merge::matches(&base, with(lora(320, 320, 5), "sdxl_base_v1-0")).unwrap_err().to_string();
    assert!(error.contains("[320, 2]") && error.contains("[6, 4]") && error.contains("XL"), "{error}");
    let loha = ["w1_a", "w1_b", "w2_a", "w2_b"].map(|name| {
        let shape = if name.ends_with('a') { [320, 2] } else { [2, 320] };
        (name.to_owned(), random(&shape, 9))
    });
    let loha = AdapterModule { variant: "loha".into(), tensors: BTreeMap::from(loha), rank: 2, alpha: 2.0 };
    assert!(merge::matches(&base, of(Component::UNET, QUERY, loha)).unwrap_err().to_string().contains("[320, 2]"));
}

#[test]
fn a_lora_in_place_of_the_base_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.safetensors");
    let name = "lora_unet_mid_block_attentions_0_proj_in";
    let (down, up) = (format!("{name}.lora_down.weight"), format!("{name}.lora_up.weight"));
    file(&base, &[(&down, random(&[2, 4], 1)), (&up, random(&[4, 2], 2))]);
    let error = run(&base, of(Component::UNET, QUERY, lora(6, 4, 5)), &folder.path().join("out"), None).unwrap_err();
    assert!(error.to_string().contains("this is a LoRA, not a base model"), "{error}");
}

#[test]
fn nothing_that_is_read_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    file(&at("a.safetensors"), &[("x", random(&[1], 1))]);
    file(&at("adapter/adapter_model.safetensors"), &[("x", random(&[1], 1))]);
    fs::write(at("adapter/adapter_config.json"), "{}").unwrap();
    fs::create_dir_all(at("empty")).unwrap();
    let refused = |input: &str, output: &str| overwrite::refuse([at(input).as_path()], &at(output)).is_err();
    assert!(refused("a.safetensors", "a.safetensors"));
    assert!(refused("a.safetensors", "empty/../a.safetensors"));
    assert!(refused("adapter", "adapter") && refused("adapter", "adapter/adapter_model.safetensors"));
    assert!(refused("adapter/adapter_model.safetensors", "adapter"));
    assert!(refused("adapter/adapter_model.safetensors", "adapter/adapter_config.json"));
    assert!(!refused("a.safetensors", "b.safetensors") && !refused("adapter", "adapter/new.safetensors"));
    assert!(!refused("a.safetensors", "adapter") && !refused("a.safetensors", "empty"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(at("a.safetensors"), at("link.safetensors")).unwrap();
        fs::hard_link(at("a.safetensors"), at("hard.safetensors")).unwrap();
        std::os::unix::fs::symlink(at("adapter"), at("linked")).unwrap();
        assert!(refused("a.safetensors", "link.safetensors") && refused("link.safetensors", "a.safetensors"));
        assert!(refused("a.safetensors", "hard.safetensors") && refused("linked", "adapter"));
    }
    // A merged folder never lies in the base's own.
    let base = at("base");
    file(&base.join("model.safetensors"), &[("model.layers.0.self_attn.q_proj.weight", random(&[6, 4], 3))]);
    let adapter = of(Component::LANGUAGE_MODEL, "model.layers.0.self_attn.q_proj", lora(6, 4, 5));
    assert!(run(&base, adapter.clone(), &base.join("merged"), None).is_err());
    assert!(run(&base, adapter, &base, None).is_err());
}
