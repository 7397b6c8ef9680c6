//! Tokenizers inside GGUF files give the numbers that transformers gives with the same tokenizers as folders (see
//! `tools/golden/make_gguf_tokenizers.py` and `make_chat.py`).

use std::path::PathBuf;

use lora_data::tokenizer::{SpecialTokens, Tokenizer};
use lora_io::gguf::GgufFile;
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

#[test]
fn numbers_are_those_of_the_same_tokenizer_as_a_folder() {
    for style in ["llama3", "qwen3", "chatml", "mistral"] {
        let inside = Tokenizer::open(golden(&format!("gguf/{style}.gguf"))).unwrap();
        let folder = Tokenizer::open(golden(&format!("chat/{style}"))).unwrap();
        let rows = std::fs::read_to_string(golden(&format!("chat/{style}/expected.json"))).unwrap();
        let rows: Vec<Value> = serde_json::from_str(&rows).unwrap();
        for row in rows.iter().filter(|row| row.get("error").is_none()) {
            let found = inside.encode(row["text"].as_str().unwrap()).unwrap();
            let expected: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
            assert_eq!(found.ids, expected, "{style}, {}", row["name"]);
            assert_eq!(inside.decode(&found.ids).unwrap(), folder.decode(&expected).unwrap());
        }
        for text in ["½ ² ③ 12345", "  two\n\n\tspaces ", "don't DON'T", "e\u{301}", "▁", "🦀 東京"] {
            let found = inside.encode_document(text).unwrap();
            assert_eq!(found, folder.encode_document(text).unwrap(), "{style}, {text:?}");
        }
        let named = |tokenizer: &Tokenizer| {
            let SpecialTokens { bos, eos, pad, .. } = tokenizer.special_tokens().clone();
            (bos, eos, pad)
        };
        assert_eq!(named(&inside), named(&folder), "{style}");
        assert_eq!(inside.vocabulary_size(), folder.vocabulary_size(), "{style}");
        assert_eq!(inside.templates(), folder.templates(), "{style}");
        assert!(Tokenizer::is_at(golden(&format!("gguf/{style}.gguf"))));
    }
}

#[test]
fn a_tokenizer_that_breaks_off_is_an_error_wherever_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(golden("chat/chatml/tokenizer.json")).unwrap();
    for length in (0..whole.len() - 1).step_by(61) {
        std::fs::write(folder.path().join("tokenizer.json"), &whole[..length]).unwrap();
        let error = Tokenizer::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && error.contains("download"), "{length}: {error}");
    }
    std::fs::write(folder.path().join("tokenizer.json"), [b"\xef\xbb\xbf", &whole[..]].concat()).unwrap();
    assert!(Tokenizer::open(folder.path()).is_ok());
}

#[test]
fn saved_beside_a_model_they_are_the_same() {
    for style in ["llama3", "qwen3", "chatml", "mistral"] {
        let inside = Tokenizer::open(golden(&format!("gguf/{style}.gguf"))).unwrap();
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(inside.save(folder.path()).unwrap().len(), 3);
        let saved = Tokenizer::open(folder.path()).unwrap();
        for text in
            ["½ ² ③ 12345", "  two\n\n\tspaces ", "<|im_start|>user\nx<|im_end|>", "<s>[INST] x [/INST]", "🦀 東京"]
        {
            assert_eq!(
                saved.encode_document(text).unwrap(),
                inside.encode_document(text).unwrap(),
                "{style}, {text:?}"
            );
        }
        assert_eq!(saved.templates(), inside.templates(), "{style}");
        assert_eq!(saved.special_tokens(), inside.special_tokens(), "{style}");
        assert!(saved.ends().eq(inside.ends()), "{style}");
    }
}

#[test]
fn a_rule_of_splitting_that_is_not_known_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.gguf");
    let mut bytes = std::fs::read(golden("gguf/chatml.gguf")).unwrap();
    let at = bytes.windows(6).position(|own| own == b"smollm").unwrap();
    bytes[at..at + 6].copy_from_slice(b"newest");
    std::fs::write(&path, &bytes).unwrap();
    let error = Tokenizer::open(&path).unwrap_err().to_string();
    assert!(error.contains("newest") && error.contains("qwen2") && error.contains("tokenizer.json"), "{error}");
    let at = bytes.windows(4).position(|own| own == b"gpt2").unwrap();
    bytes[at..at + 4].copy_from_slice(b"bert");
    std::fs::write(&path, &bytes).unwrap();
    assert!(Tokenizer::open(&path).unwrap_err().to_string().contains("`bert`"));
    assert_eq!(GgufFile::open(&path).unwrap().elements("tokenizer.ggml.model"), None);
}
