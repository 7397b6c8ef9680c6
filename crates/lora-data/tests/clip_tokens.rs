//! Token numbers against transformers' two CLIP tokenizers (see `golden/make_clip_tokens.py`): they must be identical.

use lora_data::tokenizer::{ClipTokenizer, TextCleaning};

#[derive(serde::Deserialize)]
struct Row {
    text: String,
    cleaned: Vec<u32>,
    plain: Vec<u32>,
}

#[test]
fn identical_to_both_references() {
    let rows: Vec<Row> = serde_json::from_str(include_str!("golden/clip_tokens.json")).unwrap();
    assert!(rows.len() >= 70);
    let mut wrong = Vec::new();
    for row in &rows {
        for (cleaning, expected) in [(TextCleaning::Ftfy, &row.cleaned), (TextCleaning::None, &row.plain)] {
            let found = ClipTokenizer::new(cleaning).encode(&row.text);
            if found != *expected {
                wrong.push(format!(
                    "{cleaning:?} {:?}\n  expected {expected:?}\n  found    {found:?}",
                    row.text.chars().take(60).collect::<String>()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), 2 * rows.len(), wrong.join("\n"));
}
