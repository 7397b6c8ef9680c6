//! Files that lie, are cut short or are something else: each must end in an error that names the file, never in a panic,
//! and what the reference implementation writes and refuses, ours reads and refuses.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use lora_core::HostTensor;
use lora_io::safetensors::{SafetensorsFile, write};
use proptest::prelude::*;

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend(std::iter::repeat_n(0u8, data));
    bytes
}

fn open(bytes: &[u8]) -> Result<SafetensorsFile, String> {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("evil.safetensors");
    std::fs::write(&path, bytes).unwrap();
    SafetensorsFile::open(&path).map_err(|error| error.to_string())
}

#[test]
fn every_lie_is_an_error_that_names_file_and_cause() {
    let f32 = |shape: &str, begin: usize, end: usize| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let one = |name: &str, body: &str| format!(r#"{{"{name}":{body}}}"#);
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", vec![], &["no safetensors file"]),
        ("short", vec![1, 2, 3], &["no safetensors file"]),
        ("header beyond the file", file("{}", 0)[..9].to_vec(), &["truncated"]),
        ("absurd header", [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat(), &["header claims"]),
        ("not JSON", file("{\"a\":", 0), &["header"]),
        ("not UTF-8", [4u64.to_le_bytes().as_slice(), b"{\"\xff\"", b""].concat(), &["UTF-8"]),
        ("trailing JSON", file("{} {}", 0), &["header"]),
        ("unknown dtype", file(&one("a", r#"{"dtype":"F7","shape":[1],"data_offsets":[0,4]}"#), 4), &["`a`", "F7"]),
        ("shape and bytes", file(&one("a", &f32("[3]", 0, 8)), 8), &["`a`", "12 bytes", "8"]),
        ("overflow", file(&one("a", &f32("[4611686018427387904,4611686018427387904]", 0, 8)), 8), &["`a`"]),
        ("backwards", file(&one("a", &f32("[0]", 8, 4)), 8), &["`a`", "before they begin"]),
        ("beyond the data", file(&one("a", &f32("[2]", 0, 8)), 4), &["`a`", "truncated"]),
        ("trailing bytes", file(&one("a", &f32("[1]", 0, 4)), 8), &["4 bytes follow"]),
        (
            "overlap",
            file(&format!(r#"{{"a":{},"b":{}}}"#, f32("[2]", 0, 8), f32("[2]", 4, 12)), 12),
            &["`b`", "overlaps"],
        ),
        ("hole", file(&format!(r#"{{"a":{},"b":{}}}"#, f32("[1]", 0, 4), f32("[1]", 8, 12)), 12), &["`b`", "hole"]),
        ("twice", file(&format!(r#"{{"a":{0},"a":{0}}}"#, f32("[1]", 0, 4)), 4), &["`a`", "twice"]),
        ("metadata twice", file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), &["twice"]),
        ("metadata key twice", file(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0), &["`k`", "twice"]),
        ("metadata number", file(r#"{"__metadata__":{"k":1}}"#, 0), &["header"]),
        ("pickle", b"PK\x03\x04aaaa archive/data.pkl".to_vec(), &["pickle", "convert"]),
        ("old pickle", b"\x80\x02}q\x00.aaaaaaa".to_vec(), &["pickle"]),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid".to_vec(), &["git-lfs"]),
        ("web page", b"<!DOCTYPE html><html>".to_vec(), &["web page"]),
        ("gguf", b"GGUF\x03\x00\x00\x00aaaaaaaa".to_vec(), &["GGUF"]),
    ];
    for (what, bytes, fragments) in cases {
        let error = open(&bytes).expect_err(what);
        assert!(error.contains("evil.safetensors"), "{what}: {error}");
        for fragment in fragments {
            assert!(error.contains(fragment), "{what}: `{error}` lacks `{fragment}`");
        }
    }
}

#[test]
fn every_truncation_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let tensors =
        BTreeMap::from([("a".to_owned(), HostTensor::zeros([3, 5])), ("b".to_owned(), HostTensor::zeros([]))]);
    write(&path, &tensors, &BTreeMap::from([("k".into(), "v".into())])).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for length in 0..whole.len() {
        assert!(open(&whole[..length]).is_err(), "{length} of {}", whole.len());
    }
    assert!(open(&whole).is_ok());
}

#[test]
fn the_reference_implementation_and_ours_read_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let values: Vec<f32> = (0..6).map(|value| value as f32).collect();
    let tensors = BTreeMap::from([
        ("z".to_owned(), HostTensor::from_f32([2, 3], values.clone()).unwrap()),
        ("half".to_owned(), HostTensor::from_f32([3], vec![0.5; 3]).unwrap().to_dtype(lora_core::DType::F16)),
    ]);
    write(&path, &tensors, &BTreeMap::new()).unwrap();
    let ours = std::fs::read(&path).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&ours).unwrap();
    assert_eq!(parsed.tensor("z").unwrap().shape(), [2, 3]);

    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let half = tensors["half"].bytes();
    let views = [
        ("z", safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 3], &bytes).unwrap()),
        ("half", safetensors::tensor::TensorView::new(safetensors::Dtype::F16, vec![3], half).unwrap()),
    ];
    let theirs = safetensors::serialize(views, None::<HashMap<String, String>>).unwrap();
    assert_eq!(theirs, ours, "without metadata the bytes are the same");
    assert_eq!(open(&theirs).unwrap().get("z").unwrap().to_host().unwrap(), tensors["z"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_never_panic(position in 0usize..400, value: u8, cut in 0usize..400) {
        let header = r#"{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"F16","shape":[],"data_offsets":[24,26]}}"#;
        let mut bytes = file(header, 26);
        let length = bytes.len();
        bytes[position % length] = value;
        bytes.truncate(length - cut % 3);
        if let Ok(file) = open(&bytes) {
            for name in file.names() {
                let _ = file.get(name).unwrap().to_host();
                file.release(name);
            }
        }
    }

    #[test]
    fn what_is_written_is_read(names in proptest::collection::btree_set("\\PC{0,12}", 0..6), key in "\\PC{0,8}") {
        let tensors: BTreeMap<String, HostTensor> = names
            .into_iter()
            .filter(|name| name != "__metadata__")
            .enumerate()
            .map(|(index, name)| (name, HostTensor::from_f32([index, 2], vec![index as f32; 2 * index]).unwrap()))
            .collect();
        let metadata = BTreeMap::from([(key, "\u{0}\"é".to_owned())]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        write(&path, &tensors, &metadata).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        prop_assert_eq!(file.metadata(), &metadata);
        prop_assert_eq!(file.names().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
        for (name, tensor) in &tensors {
            prop_assert_eq!(&file.get(name).unwrap().to_host().unwrap(), tensor);
        }
    }
}
