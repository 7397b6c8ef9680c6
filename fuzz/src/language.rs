//! Readers for language models: tokenizers, chat templates, texts.

use std::fs;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use lora_data::dataset::Strictness;
use lora_data::template::{ChatTemplate, Conversation, TemplateOptions};
use lora_data::texts::{TextOptions, Texts};
use lora_data::tokenizer::Tokenizer;

use crate::{choose, empty_folder, file};

/// A small sound tokenizer with a template.
const SOUND: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/lora-data/tests/golden/chat/chatml");

fn sound() -> &'static Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    TOKENIZER.get_or_init(|| Arc::new(Tokenizer::open(SOUND).expect("a sound tokenizer")))
}

fn use_tokenizer(path: &Path) {
    let Ok(tokenizer) = Tokenizer::open(path) else { return };
    for text in ["Hello, it's 12345\n\n\tw\u{f6}rld \u{1f980} <s>", "", "\u{0}\u{fffd}"] {
        let _ = tokenizer.encode_document(text);
        if let Ok(encoding) = tokenizer.encode(text) {
            let _ = (tokenizer.decode(&encoding.ids), tokenizer.decode_text(&encoding.ids));
        }
    }
    let _ = (tokenizer.vocabulary_size(), tokenizer.ends().count(), tokenizer.special_tokens().clone());
    let _ = ChatTemplate::choose(None, &tokenizer, &TemplateOptions::default());
}

/// Any bytes as one of the files of a tokenizer in Hugging Face's layout.
pub fn tokenizer(bytes: &[u8]) {
    const FILES: [&str; 4] =
        ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"];
    let Some((name, bytes)) = choose(bytes, &FILES) else { return };
    let folder = empty_folder("tokenizer");
    for own in FILES.iter().filter(|own| **own != name) {
        let _ = fs::copy(Path::new(SOUND).join(own), folder.join(own));
    }
    fs::write(folder.join(name), bytes).expect("written");
    use_tokenizer(&folder);
}

/// Any bytes as a GGUF file with a tokenizer.
pub fn tokenizer_gguf(bytes: &[u8]) {
    use_tokenizer(&file("tokenizer.gguf", bytes));
}

/// Any text as a chat template: an error, or a layout with its answers, or its refusal.
pub fn chat_template(bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let templates = [("default".to_owned(), source.to_owned())];
    let Ok(template) = ChatTemplate::new("fuzzed", &templates, sound(), &TemplateOptions::default()) else { return };
    let turns =
        [("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."), ("user", "And?"), ("assistant", "Bye.")];
    let conversation = Conversation::of(turns);
    if let Ok(layout) = template.layout(&conversation) {
        for answer in &layout.answers {
            assert!(layout.text.get(answer.span.clone()).is_some(), "an answer lies in its text");
        }
    }
}

/// Any bytes as a file of texts.
pub fn texts(bytes: &[u8]) {
    let Some((name, bytes)) = choose(bytes, &["a.jsonl", "a.json", "a.txt", "a.parquet"]) else { return };
    let path = file(name, bytes);
    for strictness in [Strictness::Strict, Strictness::Inspect] {
        let options =
            TextOptions { path: path.clone(), strictness, max_seq_length: 64, packing: true, ..TextOptions::default() };
        if let Ok(texts) = Texts::open(options, Arc::clone(sound()), None) {
            (0..texts.rows()).for_each(|row| drop(texts.row(row)));
        }
    }
}
