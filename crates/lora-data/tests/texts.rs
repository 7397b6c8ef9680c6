//! Texts from their files to the rows that training sees, with tiny tokenizers (`tests/golden/chat`).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_core::random::Stream;
use lora_data::cache::DiskCache;
use lora_data::dataset::Strictness;
use lora_data::finding::FindingKind;
use lora_data::report::{html, texts};
use lora_data::source::{Example, Shape, Source};
use lora_data::texts::{HeldOut, LongDocuments, TextForm, TextOptions, Texts, TokenRow};
use lora_data::tokenizer::Tokenizer;
use lora_data::{Error, Result};

fn tokenizer(style: &str) -> Arc<Tokenizer> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat").join(style);
    Arc::new(Tokenizer::open(folder).unwrap())
}

struct Dataset {
    folder: tempfile::TempDir,
}

impl Dataset {
    fn of(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| fs::write(folder.path().join(name), text).unwrap());
        Self { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    fn options(&self) -> TextOptions {
        TextOptions { path: self.path(), strictness: Strictness::Strict, ..TextOptions::default() }
    }

    fn open(&self, style: &str) -> Result<Texts> {
        Texts::open(self.options(), tokenizer(style), None)
    }
}

/// The text of a row, and that of its learned tokens.
fn said(texts: &Texts, row: usize) -> (String, String) {
    let TokenRow { ids, trained, .. } = texts.row(row);
    let tokenizer = texts.tokenizer().unwrap();
    let learned: Vec<u32> = ids.iter().zip(&trained).filter(|(_, own)| **own).map(|(id, _)| *id).collect();
    (tokenizer.decode(&ids).unwrap(), tokenizer.decode(&learned).unwrap())
}

#[test]
fn every_form_is_understood() {
    let lines = r#"{"text": "plain"}
{"instruction": "Translate.", "input": "Haus", "output": "house", "system": "Be brief."}
{"instruction": "Say hi.", "input": "", "output": "hi"}
{"prompt": "2+2=", "completion": "4"}

{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}], "completion": [{"role": "assistant", "content": "a"}]}
{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad", "weight": 0}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "good"}]}
"bare"
"#;
    let texts = Dataset::of(&[("a.jsonl", lines)]).open("chatml").unwrap();
    let forms = texts.summary().forms;
    let expected = [
        (TextForm::Plain, 2),
        (TextForm::Alpaca, 2),
        (TextForm::Completion, 2),
        (TextForm::Messages, 2),
        (TextForm::ShareGpt, 1),
    ];
    assert_eq!(forms, expected.into());
    let begin = "<|im_start|>system\nBe of use.<|im_end|>\n<|im_start|>user\n";
    assert_eq!(said(&texts, 0), ("plain<|im_end|>".into(), said(&texts, 0).1));
    let translated = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTranslate.\n\nHaus<|im_end|>\n<|im_start|>assistant\nhouse<|im_end|>\n";
    assert_eq!(said(&texts, 1), (translated.into(), "house<|im_end|>".into()));
    assert_eq!(said(&texts, 2).0, format!("{begin}Say hi.<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"));
    assert_eq!(said(&texts, 3).1, "4<|im_end|>");
    assert!(said(&texts, 4).0.starts_with("<|im_start|>system\nBe brief."));
    assert_eq!(
        said(&texts, 5),
        (format!("{begin}q<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"), "a<|im_end|>".into())
    );
    assert_eq!(said(&texts, 6).1, "a<|im_end|>", "what the prompt holds is given");
    assert_eq!(said(&texts, 7).1, "good<|im_end|>");
    assert_eq!(said(&texts, 8).0, "bare<|im_end|>");
}

#[test]
fn calls_of_tools_are_laid_out_in_either_spelling() {
    let tools = r#"[{"type": "function", "function": {"name": "tide"}}]"#;
    let openai = format!(
        r#"{{"tools": {tools}, "messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": null,
        "tool_calls": [{{"type": "function", "function": {{"name": "tide", "arguments": "{{\"hours\": 3}}"}}}}]}},
        {{"role": "tool", "content": "1.5"}}, {{"role": "assistant", "content": "a"}}]}}"#
    )
    .replace('\n', " ");
    let sharegpt = format!(
        r#"{{"tools": {}, "conversations": [{{"from": "human", "value": "q"}}, {{"from": "function_call", "value": "{{\"name\": \"tide\", \"arguments\": {{\"hours\": 3}}}}"}}, {{"from": "observation", "value": "1.5"}}, {{"from": "gpt", "value": "a"}}]}}"#,
        serde_json::Value::from(tools)
    );
    let texts = Dataset::of(&[("a.jsonl", &format!("{openai}\n{sharegpt}\n"))]).open("qwen3").unwrap();
    let (text, learned) = said(&texts, 0);
    assert!(text.contains("<tools>\n{\"type\": \"function\""), "{text}");
    let call = "<tool_call>\n{\"name\": \"tide\", \"arguments\": {\"hours\": 3}}\n</tool_call><|im_end|>";
    assert!(learned.starts_with(call), "{learned}");
    assert_eq!(said(&texts, 1), (text, learned));
}

#[test]
fn lists_and_plain_files_and_folders() {
    let list = Dataset::of(&[("a.json", r#"[{"text": "one"}, {"text": "two"}]"#)]).open("chatml").unwrap();
    assert_eq!((list.rows(), said(&list, 1).0), (2, "two<|im_end|>".into()));
    let files = [("b.txt", "\u{feff}a whole\nfile"), ("a.jsonl", "{\"text\": \"first\"}"), ("notes.md", "not read")];
    let folder = Dataset::of(&files).open("chatml").unwrap();
    let all: Vec<String> = (0..folder.rows()).map(|row| said(&folder, row).0).collect();
    assert_eq!(all, ["first<|im_end|>", "a whole\nfile<|im_end|>"]);
}

#[test]
fn a_plain_text_begins_by_the_tokenizers_rule_and_ends_and_its_first_token_is_not_learned() {
    let texts = Dataset::of(&[("a.txt", "a tide")]).open("llama3").unwrap();
    assert_eq!(said(&texts, 0), ("<|begin_of_text|>a tide<|eot_id|>".into(), "a tide<|eot_id|>".into()));
    let TokenRow { ids, trained, documents } = texts.row(0);
    assert_eq!((trained[0], trained[1..].iter().all(|own| *own), documents), (false, true, vec![ids.len()]));
    assert_eq!(texts.measure(0), (ids.len() - 1) as f64);
}

#[test]
fn without_a_template_prompts_are_gone_on_from_and_conversations_are_refused() {
    let lines = "{\"prompt\": \"The tide \", \"completion\": \"is in\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, \
                 {\"role\": \"assistant\", \"content\": \"a\"}]}";
    let dataset = Dataset::of(&[("a.jsonl", lines)]);
    let bare = tempfile::tempdir().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat/llama3");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(folder.join(name), bare.path().join(name)).unwrap();
    }
    let bare = Arc::new(Tokenizer::open(bare.path()).unwrap());
    let options = TextOptions { strictness: Strictness::Normal, ..dataset.options() };
    let texts = Texts::open(options.clone(), Arc::clone(&bare), None).unwrap();
    assert_eq!(said(&texts, 0), ("<|begin_of_text|>The tide is in<|eot_id|>".into(), " is in<|eot_id|>".into()));
    assert_eq!((texts.rows(), texts.findings()[0].kind), (1, FindingKind::TemplateRefused));
    assert!(texts.findings()[0].detail.contains("line 2") && texts.findings()[0].detail.contains("chat_template"));

    let alpaca = TextOptions { chat_template: Some("alpaca".into()), ..options.clone() };
    let texts = Texts::open(alpaca, Arc::clone(&bare), None).unwrap();
    let expected = "<|begin_of_text|>### Instruction:\nq\n\n### Response:\na<|eot_id|>";
    assert_eq!(said(&texts, 1), (expected.into(), "a<|eot_id|>".into()));
    let llama = TextOptions { chat_template: Some("llama3".into()), ..options.clone() };
    let texts = Texts::open(llama, Arc::clone(&bare), None).unwrap();
    assert_eq!(said(&texts, 1).1, "a<|eot_id|>");
    for (name, fragments) in [("chatml", ["<|im_end|>", "no token"]), ("other", ["alpaca", "no such file"])] {
        let options = TextOptions { chat_template: Some(name.into()), ..options.clone() };
        let error = Texts::open(options, Arc::clone(&bare), None).unwrap_err().to_string();
        assert!(fragments.iter().all(|own| error.contains(own)) && error.contains("chat_template"), "{error}");
    }
}

#[test]
fn system_prompt_and_inputs_are_learned_or_given_as_asked() {
    let lines = r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
{"conversations": [{"from": "system", "value": "own"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}"#;
    let dataset = Dataset::of(&[("a.jsonl", lines)]);
    let options = TextOptions { system_prompt: Some("Speak.".into()), train_on_inputs: true, ..dataset.options() };
    let texts = Texts::open(options, tokenizer("chatml"), None).unwrap();
    assert!(said(&texts, 0).0.starts_with("<|im_start|>system\nSpeak.<|im_end|>"));
    assert!(said(&texts, 1).0.starts_with("<|im_start|>system\nown<|im_end|>"));
    assert_eq!(texts.measure(0), (texts.row(0).ids.len() - 1) as f64);
}

#[test]
fn rows_of_near_lengths_share_shapes_and_packed_rows_have_one() {
    let lines: String = (1..40).map(|n| format!("{{\"text\": \"{}\"}}\n", "tide ".repeat(n))).collect();
    let dataset = Dataset::of(&[("a.jsonl", &lines)]);
    let options = TextOptions { max_seq_length: 100, length_step: 16, batch_size: 3, repeats: 2, ..dataset.options() };
    let texts = Texts::open(options.clone(), tokenizer("chatml"), None).unwrap();
    for row in 0..texts.rows() {
        let length = texts.row(row).ids.len();
        let Shape::Tokens(shape) = texts.visits(row).shape else { panic!("a shape of tokens") };
        assert!(length <= shape && shape < length + 16 && (shape % 16 == 0 || shape == 100), "{length} {shape}");
    }
    let mut order = texts.sampler(1);
    assert_eq!(order.epoch_length(), 2 * texts.rows());
    for _ in 0..order.batches_per_epoch() {
        let shapes: BTreeSet<Shape> = order.next_batch().iter().map(|visit| texts.visits(visit.index).shape).collect();
        assert_eq!(shapes.len(), 1);
    }

    let packed = Texts::open(TextOptions { packing: true, ..options }, tokenizer("chatml"), None).unwrap();
    assert!(packed.rows() < texts.rows());
    let mut documents = Vec::new();
    for row in 0..packed.rows() {
        let TokenRow { ids, trained, documents: lengths } = packed.row(row);
        assert_eq!(packed.visits(row).shape, Shape::Tokens(100));
        assert!(ids.len() <= 100 && ids.len() == trained.len() && ids.len() == lengths.iter().sum::<usize>());
        let mut start = 0;
        for length in lengths {
            assert!(!trained[start], "the first token of a document follows nothing");
            documents.push(ids[start..start + length].to_vec());
            start += length;
        }
    }
    let mut alone: Vec<Vec<u32>> = (0..texts.rows()).map(|row| texts.row(row).ids).collect();
    alone.sort();
    documents.sort();
    assert_eq!(documents, alone);
    let learned = |texts: &Texts| (0..texts.rows()).map(|row| texts.measure(row)).sum::<f64>();
    assert_eq!(learned(&packed), learned(&texts));
    let (one, other) = (texts.summary(), packed.summary());
    assert_eq!((one.tokens, one.trained, one.longest), (other.tokens, other.trained, other.longest));
}

#[test]
fn what_is_too_long_is_treated_as_asked_and_named() {
    let dataset =
        Dataset::of(&[("a.jsonl", &format!("{{\"text\": \"{}\"}}\n\n{{\"text\": \"short\"}}", "x ".repeat(100)))]);
    let open = |long_documents, overlap| {
        let options = TextOptions { max_seq_length: 64, long_documents, overlap, ..dataset.options() };
        Texts::open(options, tokenizer("chatml"), None)
    };
    let whole = dataset.open("chatml").unwrap();
    let length = whole.row(0).ids.len();
    let split = open(LongDocuments::Split, 10).unwrap();
    assert_eq!(split.summary().split, (1, split.rows() - 1));
    let learned: f64 = (0..split.rows() - 1).map(|row| split.measure(row)).sum();
    assert_eq!(learned, (length - 1) as f64, "each is learned once");
    assert_eq!(split.row(1).ids[..10], split.row(0).ids[54..]);
    assert!(split.row(1).trained[..10].iter().all(|own| !own) && split.row(1).trained[10]);
    let cut = open(LongDocuments::Truncate, 0).unwrap();
    assert_eq!((cut.rows(), cut.row(0).ids.len(), cut.summary().cut), (2, 64, (1, length - 64)));
    assert_eq!(cut.findings()[0].kind, FindingKind::TextCut);
    assert!(cut.findings()[0].detail.contains("line 1: the last"), "{}", cut.findings()[0]);
    let skipped = open(LongDocuments::Skip, 0).unwrap();
    assert_eq!(
        (skipped.rows(), skipped.summary().skipped, skipped.findings()[0].kind),
        (1, 1, FindingKind::TextSkipped)
    );
    assert!(skipped.summary().to_string().starts_with("rows:      1 (1 skipped)"), "{}", skipped.summary());
    let error = open(LongDocuments::Error, 0).unwrap_err().to_string();
    assert!(
        ["a.jsonl, line 1", &length.to_string(), "max_seq_length"].iter().all(|own| error.contains(own)),
        "{error}"
    );
    assert!(open(LongDocuments::Split, 64).unwrap_err().to_string().contains("overlap"));
}

#[test]
fn what_cannot_be_used_is_named_by_line() {
    let cases = [
        ("{\"txt\": \"x\"}", &["line 1", "found txt"] as &[&str]),
        ("{\"text\": \"x\"}\n{\"text\":", &["line 2", "JSON"]),
        ("{\"text\": \"  \"}", &["empty"]),
        ("{\"text\": 3}", &["`text`", "a number"]),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}]}", &["nobody answers"]),
        ("{\"messages\": [{\"role\": \"bot\", \"content\": \"q\"}]}", &["turn 1", "`bot`"]),
        ("{\"messages\": [{\"role\": \"user\"}]}", &["turn 1", "`content`"]),
        ("{\"conversations\": {}}", &["expected a list"]),
        ("{\"messages\": \"[{'role': 'user'}]\"}", &["`messages`: expected a list", "no JSON"]),
        ("{\"instruction\": \"x\", \"output\": \"\"}", &["`output`", "empty"]),
        ("{\"tools\": \"[\", \"messages\": []}", &["`tools`", "JSON"]),
        ("17", &["expected an object"]),
    ];
    for (text, fragments) in cases {
        let error = Dataset::of(&[("bad.jsonl", text)]).open("chatml").unwrap_err().to_string();
        for fragment in fragments.iter().chain(&["bad.jsonl"]) {
            assert!(error.contains(fragment), "`{error}` lacks `{fragment}`");
        }
    }
    let dataset = Dataset::of(&[("a.xml", "<a/>")]);
    let options = TextOptions { path: dataset.path().join("a.xml"), ..dataset.options() };
    assert!(Texts::open(options, tokenizer("chatml"), None).unwrap_err().to_string().contains("jsonl"));
    fs::write(dataset.path().join("a.jsonl"), b"{\"text\": \"good\"}\n{\"text\": \"\xff\"}\n{}").unwrap();
    let options = TextOptions { strictness: Strictness::Normal, ..dataset.options() };
    let texts = Texts::open(options.clone(), tokenizer("chatml"), None).unwrap();
    assert_eq!((texts.rows(), texts.findings().len()), (1, 2));
    assert!(texts.findings()[0].detail.contains("line 2: not UTF-8 at byte 10"), "{}", texts.findings()[0]);
    fs::write(dataset.path().join("a.jsonl"), "{}").unwrap();
    assert!(Texts::open(options, tokenizer("chatml"), None).unwrap_err().to_string().contains("1 record"));
}

#[test]
fn what_a_template_refuses_and_what_is_worth_a_look_is_counted_and_named() {
    let turn = |role: &str, text: &str| format!("{{\"role\": \"{role}\", \"content\": \"{text}\"}}");
    let record = |turns: &[String]| format!("{{\"messages\": [{}]}}\n", turns.join(", "));
    let lines = [
        record(&[turn("user", "q"), turn("assistant", "a")]),
        record(&[turn("user", "q"), turn("user", "q"), turn("assistant", "a")]),
        record(&[turn("user", "what is </s>?"), turn("assistant", "a")]),
    ]
    .concat();
    let dataset = Dataset::of(&[("a.jsonl", &lines)]);
    let options = TextOptions { strictness: Strictness::Normal, ..dataset.options() };
    let texts = Texts::open(options, tokenizer("mistral"), None).unwrap();
    let kinds = [(FindingKind::TemplateRefused, 1), (FindingKind::SpecialToken, 1)];
    assert_eq!((texts.rows(), texts.counts()), (2, &kinds.into()));
    let said = |kind| texts.findings().iter().find(|own| own.kind == kind).unwrap().detail.clone();
    let refused = said(FindingKind::TemplateRefused);
    assert!(refused.starts_with("line 2: ") && refused.contains("must alternate"), "{refused}");
    assert_eq!(said(FindingKind::SpecialToken), "line 3: the text holds \"</s>\", which is a special token");
    let strict = dataset.open("mistral").unwrap_err().to_string();
    assert!(strict.contains("a.jsonl, line 2") && strict.contains("must alternate"), "{strict}");

    let endless = dataset.path().join("endless.jinja");
    fs::write(&endless, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").unwrap();
    let options = TextOptions { chat_template: Some(endless.display().to_string()), ..dataset.options() };
    let texts = Texts::open(options, tokenizer("chatml"), None).unwrap();
    assert_eq!(texts.counts().get(&FindingKind::EndlessAnswer), Some(&3));
}

#[test]
fn a_table_tells_what_will_be_learned() {
    let lines = r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
{"text": "more"}"#;
    let texts = Dataset::of(&[("a.jsonl", lines)]).open("chatml").unwrap();
    let table = texts.summary().to_string();
    for fragment in ["1 plain texts, 1 conversations", "0 cut", "\n           ⟦a<|im_end|>⟧"] {
        assert!(table.contains(fragment), "{table}");
    }
}

#[test]
fn pairs_stay_together() {
    let lines = r#"{"prompt": "q", "chosen": "good", "rejected": "bad"}
{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "good"}],
 "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "bad"}]}"#
        .replace(",\n ", ", ");
    let dataset = Dataset::of(&[("a.jsonl", &lines)]);
    let texts = dataset.open("chatml").unwrap();
    assert!(texts.are_pairs());
    for row in 0..2 {
        let TokenRow { ids, documents, .. } = texts.row(row);
        assert_eq!((documents.len(), documents.iter().sum::<usize>()), (2, ids.len()));
        assert_eq!(said(&texts, row).1, "good<|im_end|>bad<|im_end|>");
    }
    let wanted =
        |pairs: bool| Texts::open(TextOptions { pairs: Some(pairs), ..dataset.options() }, tokenizer("chatml"), None);
    let pairs = wanted(true).unwrap();
    assert_eq!((pairs.measure(0), pairs.amount(0) > 1.0), (1.0, true));
    assert!(wanted(false).unwrap_err().to_string().contains("objective"));
    let one = Texts::stand_in(TextOptions { pairs: Some(true), ..dataset.options() }, 3);
    assert_eq!((one.rows(), one.row(2).documents.len(), one.measure(2)), (3, 2, 1.0));
    fs::write(dataset.path().join("b.jsonl"), "{\"text\": \"plain\"}").unwrap();
    let error = dataset.open("chatml").unwrap_err().to_string();
    assert!(error.contains("b.jsonl") && error.contains("pairs"), "{error}");
}

#[test]
fn some_records_are_held_out_by_the_seed() {
    let lines: String = (0..20).map(|n| format!("{{\"text\": \"number {n}\"}}\n")).collect();
    let dataset = Dataset::of(&[("a.jsonl", &lines)]);
    let all = |texts: &Texts| (0..texts.rows()).map(|row| said(texts, row).0).collect::<BTreeSet<_>>();
    let options = TextOptions { repeats: 3, ..dataset.options() };
    let texts = Texts::open(options, tokenizer("chatml"), None).unwrap();
    let (own, other) = texts.clone().held_out(HeldOut::Share(0.25), 7).unwrap();
    assert_eq!((own.rows(), other.rows(), own.visits(0).count, other.visits(0).count), (15, 5, 3, 1));
    assert_eq!(all(&own).union(&all(&other)).count(), 20);
    let (_, again) = texts.clone().held_out(HeldOut::Records(5), 7).unwrap();
    assert_eq!(all(&again), all(&other));
    let (_, another) = texts.clone().held_out(HeldOut::Records(5), 8).unwrap();
    assert_ne!(all(&another), all(&other));
    for wrong in [HeldOut::Records(0), HeldOut::Records(20), HeldOut::Share(1.0)] {
        let error = texts.clone().held_out(wrong, 7).unwrap_err().to_string();
        assert!(error.contains("validation_split") && error.contains("20 records"), "{error}");
    }
}

#[test]
fn a_file_is_tokenised_once_and_again_when_it_or_its_treatment_changes() {
    let lines = r#"{"conversations": [{"from": "human", "value": "q <|im_end|>"}, {"from": "gpt", "value": "a"}]}
{}
{"text": "more and more and more"}"#;
    let dataset = Dataset::of(&[("a.jsonl", lines)]);
    let cache = tempfile::tempdir().unwrap();
    let entries = || {
        let folders = fs::read_dir(cache.path()).unwrap().flatten().filter(|entry| entry.path().is_dir());
        folders.map(|entry| fs::read_dir(entry.path()).unwrap().count()).sum::<usize>()
    };
    let rows = |options: &TextOptions, style: &str| {
        let cache = DiskCache::open(cache.path()).unwrap();
        let texts = Texts::open(options.clone(), tokenizer(style), Some(&cache)).unwrap();
        let rows: Vec<TokenRow> = (0..texts.rows()).map(|row| texts.row(row)).collect();
        (rows, texts.findings().to_vec(), texts.counts().clone(), texts.summary())
    };
    let options = TextOptions { strictness: Strictness::Normal, ..dataset.options() };
    let first = rows(&options, "chatml");
    assert_eq!((entries(), first.1.len()), (1, 2));
    assert_eq!(rows(&options, "chatml"), first);
    // How rows are made is no business of the cache.
    let packed = TextOptions { packing: true, max_seq_length: 64, ..options.clone() };
    assert_eq!((rows(&packed, "chatml").0.len(), entries()), (1, 1));
    rows(&TextOptions { train_on_inputs: true, ..options.clone() }, "chatml");
    rows(&options, "qwen3");
    rows(&TextOptions { system_prompt: Some("x".into()), ..options.clone() }, "chatml");
    assert_eq!(entries(), 4);
    fs::write(dataset.path().join("a.jsonl"), "{\"text\": \"other\"}").unwrap();
    assert_eq!((rows(&options, "chatml").0.len(), entries()), (1, 5));
}

#[test]
fn a_source_of_texts_is_known_by_what_it_says_and_leaves_out_what_it_is_told_to() {
    let dataset = Dataset::of(&[("a.jsonl", "{\"text\": \"one\"}\n{\"text\": \"two\"}\n{\"text\": \"three\"}")]);
    let mut texts = dataset.open("chatml").unwrap();
    let before = texts.identity();
    assert_eq!(before.items[0], ("dataset".into(), "3 rows of texts, 3 visits an epoch".into()));
    assert_eq!(dataset.open("chatml").unwrap().identity(), before);
    let Example::Tokens(row) = texts.example(1, &Stream::new(0)).unwrap() else { panic!("tokens") };
    assert_eq!(row, texts.row(1));
    let path = texts.path(1).to_owned();
    let wrong = Error::Picture { path: path.clone(), reason: "unusable".into() };
    texts.leave_out(vec![(1, wrong)]);
    assert_eq!((texts.count(), said(&texts, 1).0), (2, "three<|im_end|>".into()));
    assert_eq!(texts.findings()[0].path, path);
    assert_eq!(texts.identity().options, before.options);
    assert!(texts.identity().items.iter().zip(&before.items).all(|(now, was)| now != was));
    let another = Dataset::of(&[("b.txt", "other")]);
    assert_eq!(said(&texts.of_another(another.path(), None).unwrap(), 0).0, "other<|im_end|>");
}

#[test]
fn stand_ins_have_the_longest_shape() {
    let options = TextOptions { max_seq_length: 100, batch_size: 2, ..TextOptions::default() };
    let texts = Texts::stand_in(options, 3);
    assert_eq!((texts.count(), texts.visits(2).shape, texts.measure(0)), (3, Shape::Tokens(100), 99.0));
    let row = texts.row(1);
    assert_eq!((row.ids.len(), row.documents, row.trained[0], row.trained[99]), (100, vec![100], false, true));
    assert_eq!(texts.of_another("elsewhere", None).unwrap().count(), 1);
}

#[test]
fn a_report_tells_lengths_scripts_and_what_is_the_matter() {
    let lines = r#"{"text": "the tide is in"}
{"text": "Прилив и отлив"}
{"text": "the tide is in"}
{"messages": [{"role": "user", "content": "<b>q</b>"}, {"role": "assistant", "content": ""}]}
{"messages": [{"role": "user", "content": "nobody answers"}]}
"#;
    let dataset = Dataset::of(&[("a.jsonl", lines)]);
    let options = TextOptions { strictness: Strictness::Inspect, ..dataset.options() };
    let texts = Texts::open(options, tokenizer("chatml"), None).unwrap();
    let report = texts::inspect(&texts, 10);
    assert_eq!(report.scripts, [("Latin".to_owned(), 3), ("Cyrillic".to_owned(), 1)]);
    assert_eq!(report.lengths.iter().map(|(_, count)| count).sum::<usize>(), 4);
    let found: Vec<_> = report.findings.iter().map(|own| (own.kind, own.detail.as_str())).collect();
    assert!(found[0].0 == FindingKind::TextRecord && found[0].1.starts_with("line 5: "), "{found:?}");
    assert!(found.contains(&(FindingKind::EmptyAnswer, "line 4: an answer has no words")), "{found:?}");
    assert!(found.contains(&(FindingKind::DuplicateText, "line 3: the same as a.jsonl, line 1")), "{found:?}");
    assert_eq!(report.shown.len(), 4);
    let page = html::page_of_texts("texts & more", &report);
    for fragment in ["texts &amp; more", "&lt;b&gt;q&lt;/b&gt;", "<mark>&lt;|im_end|&gt;</mark>", "duplicate-text"] {
        assert!(page.contains(fragment), "{fragment}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(
        (&json["summary"]["forms"]["plain texts"], &json["summary"]["findings"]["text-record"]),
        (&3.into(), &1.into())
    );
}

/// Files that the fuzz targets found: one at which parquet's reader panics, and one whose rows are errors without end.
#[test]
fn damaged_tables_end_and_are_named() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/damaged");
    for name in ["reader-panics.parquet", "errors-without-end.parquet"] {
        for strictness in [Strictness::Strict, Strictness::Normal] {
            let options = TextOptions { path: folder.join(name), strictness, ..TextOptions::default() };
            let error = Texts::open(options, tokenizer("chatml"), None).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
