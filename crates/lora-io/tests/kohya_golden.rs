//! A LoRA file whose hashes were computed independently (`tools/golden/make_kohya.py`).

use std::collections::BTreeMap;

use lora_io::safetensors::{SafetensorsFile, write};
use lora_io::{AdapterInfo, hash};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/kohya_small.safetensors");

#[test]
fn hashes_and_summary_are_the_expected_ones() {
    let expected: serde_json::Value = serde_json::from_str(include_str!("golden/kohya_small.json")).unwrap();
    let text = |key: &str| expected[key].as_str().unwrap();
    assert_eq!(hash::file_sha256(FILE).unwrap(), text("sha256"));
    assert_eq!(hash::auto_v1(FILE).unwrap(), text("auto_v1"));
    let info = AdapterInfo::read(FILE).unwrap();
    assert_eq!(info.model_hash, text("sshs_model_hash"));
    assert_eq!(&info.model_hash[..12], text("auto_v3"));
    assert_eq!(info.modules.values().sum::<usize>(), expected["modules"].as_u64().unwrap() as usize);
    assert_eq!(info.ranks.iter().collect::<Vec<_>>(), [&32]);
    assert_eq!(info.alphas, [16.0]);
    let metadata: BTreeMap<String, String> = serde_json::from_value(expected["metadata"].clone()).unwrap();
    assert_eq!(info.metadata, metadata);
    assert!(info.not_finite.is_empty());
}

#[test]
fn written_again_it_is_the_same_file() {
    let file = SafetensorsFile::open(FILE).unwrap();
    let tensors: BTreeMap<_, _> =
        file.names().map(|name| (name.to_owned(), file.get(name).unwrap().to_host().unwrap())).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("again.safetensors");
    write(&path, &tensors, file.metadata()).unwrap();
    assert_eq!(hash::sha256(SafetensorsFile::open(&path).unwrap().data()), file.metadata()["sshs_model_hash"]);
    // With its `ss_*` keys alone it has the legacy hash that its own metadata names.
    let ours: BTreeMap<_, _> = file.metadata().clone().into_iter().filter(|(key, _)| key.starts_with("ss_")).collect();
    write(&path, &tensors, &ours).unwrap();
    assert_eq!(hash::auto_v1(&path).unwrap(), file.metadata()["sshs_legacy_hash"]);
}
