//! Records in the spellings of published datasets and of other trainers: what is asked, what stands around it, and what
//! is told where a key has no place. How whole files are read is tested in `texts.rs`.

use std::path::Path;
use std::sync::Arc;

use lora_data::dataset::Strictness;
use lora_data::finding::FindingKind;
use lora_data::source::Source;
use lora_data::texts::{TextOptions, Texts, TokenRow};
use lora_data::tokenizer::Tokenizer;

fn tokenizer(style: &str) -> Arc<Tokenizer> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat").join(style);
    Arc::new(Tokenizer::open(folder).unwrap())
}

fn open(style: &str, name: &str, content: impl AsRef<[u8]>) -> Texts {
    with_template(style, name, content, None)
}

fn with_template(style: &str, name: &str, content: impl AsRef<[u8]>, template: Option<&str>) -> Texts {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    let chat_template = template.map(|source| {
        let path = folder.path().join("template.jinja");
        std::fs::write(&path, source).unwrap();
        path.display().to_string()
    });
    let options = TextOptions { path, chat_template, strictness: Strictness::Inspect, ..TextOptions::default() };
    Texts::open(options, tokenizer(style), None).unwrap()
}

/// The documents of the first row of one record, what is learned in brackets.
fn laid_out(texts: &Texts) -> Vec<String> {
    let TokenRow { ids, trained, documents } = texts.row(0);
    let (mut start, mut out) = (0, Vec::new());
    for length in documents {
        let range = start..start + length;
        start += length;
        let mut text = String::new();
        for run in range.collect::<Vec<_>>().chunk_by(|a, b| trained[*a] == trained[*b]) {
            let part = texts.tokenizer().unwrap().decode(&ids[run[0]..run[0] + run.len()]).unwrap();
            text += &if trained[run[0]] { format!("⟦{part}⟧") } else { part };
        }
        out.push(text);
    }
    out
}

/// A record in ChatML, as turns of role and words; the answers that are learned have a star. Findings in the second
/// place.
fn read(record: &str) -> (Vec<String>, Vec<String>) {
    let texts = open("chatml", "a.jsonl", record);
    let found = texts.findings().iter().map(|own| format!("{}: {}", own.kind.name(), own.detail)).collect();
    if texts.rows() == 0 {
        return (Vec::new(), found);
    }
    let short = |text: &String| {
        let turns =
            text.split("<|im_start|>").filter(|turn| !turn.is_empty() && *turn != "system\nBe of use.<|im_end|>\n");
        let turn = |turn: &str| {
            let (role, words) = turn.split_once('\n').unwrap();
            let star = if words.contains('⟦') { "*" } else { "" };
            let words = words.replace(['⟦', '⟧'], "").replace("<|im_end|>\n", "");
            format!("{}{star}: {words}", &role[..1])
        };
        turns.map(turn).collect::<Vec<_>>().join(" | ")
    };
    (laid_out(&texts).iter().map(short).collect(), found)
}

/// Each record has one question, context, system prompt or history under a name of its own.
#[test]
fn question_context_system_and_history_are_read_under_all_their_names_in_all_forms() {
    let cases = [
        // Intel/orca_dpo_pairs.
        (
            r#"{"system": "S", "question": "Q", "chosen": "C", "rejected": "R"}"#,
            &["s: S | u: Q | a*: C", "s: S | u: Q | a*: R"] as &[&str],
        ),
        (
            r#"{"instruction": "Q", "input": "X", "chosen": "C", "rejected": "R"}"#,
            &["u: Q\n\nX | a*: C", "u: Q\n\nX | a*: R"],
        ),
        (
            r#"{"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "C"}, "rejected": {"from": "gpt", "value": "R"}}"#,
            &["u: Q | a*: C", "u: Q | a*: R"],
        ),
        (
            r#"{"messages": [{"role": "user", "content": "Q"}], "chosen": "C", "rejected": "R"}"#,
            &["u: Q | a*: C", "u: Q | a*: R"],
        ),
        // databricks-dolly.
        (r#"{"instruction": "Q", "context": "X", "response": "A"}"#, &["u: Q\n\nX | a*: A"]),
        (r#"{"instruction": "Q", "input": "", "context": "X", "output": "A"}"#, &["u: Q\n\nX | a*: A"]),
        (r#"{"prompt": "Q", "input": "X", "response": "A"}"#, &["u: Q\n\nX | a*: A"]),
        (r#"{"question": "Q", "answer": "A"}"#, &["u: Q | a*: A"]),
        (r#"{"system": "S", "prompt": "Q", "response": "A"}"#, &["s: S | u: Q | a*: A"]),
        (r#"{"system_prompt": "S", "question": "Q", "response": "A"}"#, &["s: S | u: Q | a*: A"]),
        (r#"{"system_prompt": "S", "instruction": "Q", "output": "A"}"#, &["s: S | u: Q | a*: A"]),
        (
            r#"{"system_prompt": "S", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}"#,
            &["s: S | u: Q | a*: A"],
        ),
        (
            r#"{"instruction": "Q", "input": "", "output": "A", "history": [["P", "B"]]}"#,
            &["u: P | a*: B | u: Q | a*: A"],
        ),
        // Lists that were written down as text.
        (
            r#"{"messages": "[{\"role\": \"user\", \"content\": \"Q\"}, {\"role\": \"assistant\", \"content\": \"A\"}]"}"#,
            &["u: Q | a*: A"],
        ),
        (
            r#"{"conversations": "[{\"from\": \"human\", \"value\": \"Q\"}]", "chosen": "C", "rejected": "R"}"#,
            &["u: Q | a*: C", "u: Q | a*: R"],
        ),
        (
            r#"{"prompt": "[{\"role\": \"user\", \"content\": \"Q\"}]", "completion": "[{\"role\": \"assistant\", \"content\": \"A\"}]"}"#,
            &["u: Q | a*: A"],
        ),
        (
            r#"{"prompt": "Q", "chosen": "[{\"role\": \"assistant\", \"content\": \"C\"}]", "rejected": "[{\"role\": \"assistant\", \"content\": \"R\"}]"}"#,
            &["u: Q | a*: C", "u: Q | a*: R"],
        ),
        (r#"{"instruction": "Q", "output": "A", "history": "[[\"P\", \"B\"]]"}"#, &["u: P | a*: B | u: Q | a*: A"]),
        // Texts that only look like lists.
        (r#"{"instruction": "[1, 2]", "output": "[{\"a\": 3}]"}"#, &["u: [1, 2] | a*: [{\"a\": 3}]"]),
        // ultrachat_200k: the prompt once more.
        (
            r#"{"prompt": "Q", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}"#,
            &["u: Q | a*: A"],
        ),
    ];
    for (record, expected) in cases {
        let (found, findings) = read(record);
        assert_eq!((found.as_slice(), findings.len()), (expected.map_owned().as_slice(), 0), "{record} {findings:?}");
    }
}

trait MapOwned {
    fn map_owned(&self) -> Vec<String>;
}

impl MapOwned for &[&str] {
    fn map_owned(&self) -> Vec<String> {
        self.iter().map(|own| (*own).to_owned()).collect()
    }
}

/// The rule of `maybe_extract_prompt` in TRL 1.16, as its source says it.
#[test]
fn a_pair_whose_answers_hold_the_prompt_has_it_once() {
    let ends = r#""chosen": [{"role": "user", "content": "Q "}, {"role": "assistant", "content": "C"}],
        "rejected": [{"role": "user", "content": "Q "}, {"role": "assistant", "content": "R"}]"#
        .replace('\n', " ");
    let messages = r#""messages": [{"role": "user", "content": "Q "}, {"role": "assistant", "content": "C"}]"#;
    let human = r#"{"chosen": "\n\nHuman: Q\n\nAssistant: B\n\nHuman: P\n\nAssistant: C", "rejected": "\n\nHuman: Q\n\nAssistant: B\n\nHuman: P\n\nAssistant: R"}"#;
    let once = ["u: Q  | a*: C", "u: Q  | a*: R"];
    assert_eq!(read(&format!("{{\"prompt\": \"Q\", {ends}}}")), (once.as_slice().map_owned(), vec![]));
    assert_eq!(read(&format!("{{\"prompt\": \"Q\", {messages}, {ends}}}")), (once.as_slice().map_owned(), vec![]));
    let turns = ["u: Q | a: B | u: P | a*: C", "u: Q | a: B | u: P | a*: R"];
    assert_eq!(read(human), (turns.as_slice().map_owned(), vec![]));
    let (rows, found) = read(r#"{"chosen": "C", "rejected": "R"}"#);
    assert!(rows.is_empty() && found[0].contains("answer to nothing"), "{found:?}");
}

#[test]
fn a_key_that_has_no_place_is_named_and_counted() {
    let turns = r#"[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]"#;
    let cases = [
        (format!(r#"{{"messages": {turns}, "context": "X", "input": ""}}"#), "line 1: not read: context"),
        (format!(r#"{{"messages": {turns}, "images": ["a.png"]}}"#), "line 1: not read: images"),
        (r#"{"text": "T", "question": "Q"}"#.to_owned(), "line 1: not read: question"),
        (r#"{"instruction": "Q", "question": "other", "output": "A"}"#.to_owned(), "line 1: not read: question"),
        (
            r#"{"system": "S", "messages": [{"role": "system", "content": "T"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}"#
                .to_owned(),
            "line 1: not read: system",
        ),
    ];
    for (record, expected) in cases {
        let texts = open("chatml", "a.jsonl", &record);
        assert_eq!(texts.counts().get(&FindingKind::UnreadKey), Some(&1), "{record}");
        assert_eq!(texts.findings()[0].detail, expected);
        assert!(texts.summary().to_string().contains("unread-key: 1"), "{record}");
    }
}

#[test]
fn an_answer_that_is_labelled_as_wrong_is_not_learned() {
    for record in [
        r#"{"prompt": "Q", "completion": "A", "label": false}"#,
        r#"{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "kto_tag": false}"#,
    ] {
        let (rows, found) = read(record);
        assert!(rows.is_empty() && found[0].contains("is false"), "{found:?}");
    }
    assert_eq!(read(r#"{"prompt": "Q", "completion": "A", "label": true}"#).0, ["u: Q | a*: A"]);
}

#[test]
fn tools_in_older_and_shorter_spellings_are_those_of_the_usual_one() {
    let tool = r#"{"name": "tide", "description": "d", "parameters": {}}"#;
    let wrapped = format!(r#"{{"type": "function", "function": {tool}}}"#);
    let call = r#"{"name": "tide", "arguments": "{\"hours\": 3}"}"#;
    let record = |tools: String, call: String| {
        format!(
            r#"{{{tools}, "messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": null, {call}}},
            {{"role": "function", "name": "tide", "content": "1.5"}}, {{"role": "assistant", "content": "a"}}]}}"#
        )
        .replace('\n', " ")
    };
    let usual = record(
        format!("\"tools\": [{wrapped}]"),
        format!(r#""tool_calls": [{{"type": "function", "function": {call}}}]"#),
    );
    let older = record(format!("\"functions\": [{tool}]"), format!("\"function_call\": {call}"));
    let shorter = record(
        format!("\"tools\": [{tool}]"),
        format!(r#""tool_calls": [{{"type": "function", "function": {call}}}]"#),
    );
    let expected = laid_out(&open("qwen3", "a.jsonl", &usual));
    assert!(expected[0].contains("{\"type\": \"function\", \"function\": {\"name\": \"tide\""), "{expected:?}");
    assert_eq!(laid_out(&open("qwen3", "a.jsonl", &older)), expected);
    assert_eq!(laid_out(&open("qwen3", "a.jsonl", &shorter)), expected);
}

/// A conversation in which a tool is called, and answers.
const CALL: &str = concat!(
    r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "#,
    r#""function": {"name": "tide", "arguments": {"hours": 3}}}]}, {"role": "tool", "content": "1.5"}, "#,
    r#"{"role": "assistant", "content": "a"}]}"#
);

/// As Gemma 4 and gpt-oss lay out what a tool answers: under the name that the model called.
#[test]
fn what_a_tool_answers_is_given_where_its_turn_repeats_the_name_of_the_call() {
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role }}\
        {% if m.role == 'tool' %}{{ ' ' + loop.previtem.tool_calls[0].function.name }}{% endif %}{{ '\\n' }}\
        {% for call in m.tool_calls or [] %}{{ call.function.name ~ ' ' ~ (call.function.arguments | tojson) }}{% endfor %}\
        {{ m.content + '<|im_end|>\\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    let texts = with_template("chatml", "a.jsonl", CALL, Some(template));
    let expected = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦tide {\"hours\": 3}<|im_end|>⟧\n\
                    <|im_start|>tool tide\n1.5<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n";
    assert_eq!(laid_out(&texts), [expected], "{:?}", texts.findings());
}

/// Templates of DeepSeek-R1's distilled models ask whether the content is none, and add arguments to a text.
#[test]
fn a_call_is_brought_into_the_spelling_that_its_template_lays_out_or_refused() {
    let template = "{% for m in messages %}{{ m.role + '\\n' }}{% if m.content is none %}\
        {% for call in m.tool_calls %}{{ call.function.name + ' ' + call.function.arguments }}{% endfor %}\
        {% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}\
        {% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}";
    let texts = with_template("chatml", "a.jsonl", CALL, Some(template));
    let said = laid_out(&texts).concat();
    assert!(said.contains("⟦tide {\"hours\": 3}<|im_end|>⟧tool\n1.5"), "{said}");
    let texts = open("chatml", "a.jsonl", CALL);
    assert_eq!((texts.rows(), texts.findings()[0].kind), (0, FindingKind::TemplateRefused));
    assert!(texts.findings()[0].detail.contains("calls of tools"), "{}", texts.findings()[0]);
}

#[test]
fn a_text_that_has_its_begin_and_end_written_out_has_them_once() {
    let texts = open("llama3", "a.jsonl", r#"{"text": "<|begin_of_text|>a tide<|eot_id|>"}"#);
    assert_eq!(laid_out(&texts), ["<|begin_of_text|>⟦a tide<|eot_id|>⟧"]);
}

#[test]
fn a_json_file_may_hold_json_lines() {
    let texts = open("chatml", "a.json", "{\"text\": \"one\"}\n\n{\"text\": \"two\"}\n{\"text\":\n");
    assert_eq!((texts.rows(), texts.findings().len()), (2, 1));
    assert!(texts.findings()[0].detail.starts_with("line 4"), "{}", texts.findings()[0]);
    assert_eq!(open("chatml", "a.json", "{\n\"text\":\n\"one\"}\n").rows(), 1);
    assert_eq!(open("chatml", "a.json", "[{\"text\": \"one\"},\n{\"text\": \"two\"}]").rows(), 2);
}
