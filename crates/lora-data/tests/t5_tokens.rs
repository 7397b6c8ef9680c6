//! Tokens of T5's kind of tokenizer are transformers' (see `tools/golden/make_t5_tokens.py`).

use std::path::PathBuf;

use lora_data::tokenizer::Tokenizer;
use serde_json::Value;

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/t5")
}

fn compare(tokenizer: &Tokenizer, which: &str) {
    let rows: Value = serde_json::from_str(&std::fs::read_to_string(golden().join("tokens.json")).unwrap()).unwrap();
    let rows = rows[which].as_array().unwrap();
    assert_eq!(rows.len(), 15);
    for row in rows {
        let text = row["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode_document(text).unwrap(), expected, "{which}, {text:?}");
    }
}

/// Characters are normalised, runs of spaces collapse, and an end is appended.
#[test]
fn tokens_are_those_of_transformers() {
    let tokenizer = Tokenizer::open(golden()).unwrap();
    compare(&tokenizer, "tiny");
    let special = tokenizer.special_tokens();
    let id = |token: &Option<lora_data::tokenizer::SpecialToken>| token.as_ref().map(|token| token.id);
    assert_eq!((id(&special.pad), id(&special.eos)), (Some(0), Some(1)));
}

/// The published vocabulary is too large to lie here: `T5_TOKENIZER` names its folder.
#[test]
fn tokens_of_the_published_vocabulary_are_those_of_transformers() {
    let Some(folder) = std::env::var_os("T5_TOKENIZER") else { return };
    compare(&Tokenizer::open(folder).unwrap(), "published");
}
