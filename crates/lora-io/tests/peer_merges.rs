//! Adapters of PEFT's that are merged and not trained here, against what PEFT's own merge makes of them.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, HostTensor, Strength};
use lora_io::adapter;
use lora_io::merge::{MergeOptions, Weighted, merge};
use lora_io::safetensors::write;
use support::{Golden, file, tensor};

fn distance(found: &HostTensor, expected: &HostTensor) -> f64 {
    lora_core::conformance::distance(found, expected)
}

/// Merges an adapter into `layer` of a file, and takes it out again where that is asked for.
fn merged(folder: &Path, base: &[(&str, HostTensor)], adapter: Adapter, unmerge: bool) -> lora_io::Result<()> {
    let (from, to) = if unmerge { ("merged", "back") } else { ("base", "merged") };
    if !unmerge {
        file(&folder.join(from), base);
    }
    let weighted = Weighted { name: "it".into(), adapter, strength: Strength::from(1.0) };
    let options = MergeOptions { unmerge, ..MergeOptions::default() };
    merge(folder.join(from), &[weighted], folder.join(to), &options, &VariantRegistry::default(), &|_, _| {}).map(drop)
}

#[test]
fn adapters_are_merged_as_peft_merges_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/merged");
    let mut checked = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let golden = Golden::open(&path);
        let scratch = tempfile::tempdir().unwrap();
        let of_file = golden
            .tensors
            .iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix("file.")?.to_owned(), tensor.clone())));
        let of_file: BTreeMap<String, HostTensor> = of_file.collect();
        write(scratch.path().join("adapter_model.safetensors"), &of_file, &BTreeMap::new()).unwrap();
        std::fs::write(scratch.path().join("adapter_config.json"), &golden.metadata["options"]).unwrap();
        let adapter = adapter::read(scratch.path()).unwrap_or_else(|error| panic!("{}: {error}", golden.name)).adapter;
        let layer = ["weight", "bias"].map(|name| golden.tensors[name].clone());
        let base = [("layer.weight", layer[0].clone()), ("layer.bias", layer[1].clone())];
        merged(scratch.path(), &base, adapter.clone(), false).unwrap();
        for (name, expected) in [("layer.weight", "effective"), ("layer.bias", "effective_bias")] {
            let apart = distance(&tensor(&scratch.path().join("merged"), name), &golden.tensors[expected]);
            assert!(apart < 1e-6, "{}: {name} {apart:e}", golden.name);
        }
        // Taken out again, or refused where the base's bias is gone.
        match merged(scratch.path(), &base, adapter, true) {
            Ok(()) => {
                assert!(distance(&tensor(&scratch.path().join("back"), "layer.weight"), &layer[0]) < 1e-5);
                assert!(distance(&tensor(&scratch.path().join("back"), "layer.bias"), &layer[1]) < 1e-5);
            }
            Err(error) => assert!(golden.name.contains("bias-lora-only"), "{}: {error}", golden.name),
        }
        checked += 1;
    }
    assert_eq!(checked, 7);
}

/// PiSSA and OLoRA as they were trained: on the original base what PEFT took out of it is taken out here, on the changed
/// base they are plain LoRAs.
#[test]
fn first_values_that_the_file_lacks_follow_from_the_base() {
    for golden in Golden::all("init-") {
        let scratch = tempfile::tempdir().unwrap();
        let key = |side: &str| format!("base_model.model.layer.lora_{side}.weight");
        let trained = ["A", "B"].map(|side| (key(side), golden.tensors[&format!("trained.lora_{side}")].clone()));
        write(scratch.path().join("adapter_model.safetensors"), &BTreeMap::from(trained), &BTreeMap::new()).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&golden.metadata["options"]).unwrap();
        config["peft_type"] = "LORA".into();
        std::fs::write(scratch.path().join("adapter_config.json"), config.to_string()).unwrap();
        let read = adapter::read(scratch.path()).unwrap();
        assert!(read.notes.iter().any(|note| note.contains("--residual")), "{:?}", read.notes);

        let original = [("layer.weight", golden.tensors["weight"].clone())];
        merged(scratch.path(), &original, read.adapter.clone(), false).unwrap();
        let apart = distance(&tensor(&scratch.path().join("merged"), "layer.weight"), &golden.tensors["effective"]);
        assert!(apart < 1e-5, "{} on the original: {apart:e}", golden.name);
        assert!(merged(scratch.path(), &original, read.adapter.clone(), true).is_err(), "not told by a merged weight");

        let mut plain = read.adapter;
        adapter::on_residual(&mut plain);
        merged(scratch.path(), &[("layer.weight", golden.tensors["residual"].clone())], plain, false).unwrap();
        let apart = distance(&tensor(&scratch.path().join("merged"), "layer.weight"), &golden.tensors["effective"]);
        assert!(apart < 1e-6, "{} on the residual: {apart:e}", golden.name);
    }
}
