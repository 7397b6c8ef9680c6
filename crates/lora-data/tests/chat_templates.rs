//! Renderings, tokens and answers of conversations against transformers', in seven styles of templates and tokenizers
//! (see `tools/golden/make_chat.py`).

use std::path::PathBuf;
use std::sync::Arc;

use lora_data::dataset::Strictness;
use lora_data::template::{ChatTemplate, Conversation, TemplateOptions};
use lora_data::texts::{TextOptions, Texts, TokenRow};
use lora_data::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

const STYLES: [&str; 7] = ["chatml", "gemma", "llama3", "mistral", "phi", "qwen3", "smollm3"];

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    messages: Vec<Map<String, Value>>,
    kwargs: Map<String, Value>,
}

#[derive(serde::Deserialize)]
struct Expected {
    name: String,
    error: Option<String>,
    #[serde(default)]
    text: String,
    #[serde(default)]
    prompt: String,
    #[serde(default)]
    ids: Vec<u32>,
    #[serde(default)]
    spans: Vec<(usize, usize)>,
    #[serde(default)]
    answers: String,
}

impl Expected {
    /// Which tokens transformers calls answers; the first of a document is never learned.
    fn learned(&self) -> Vec<bool> {
        self.answers.bytes().enumerate().map(|(place, own)| place > 0 && own == b'1').collect()
    }
}

fn folder(style: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat").join(style)
}

fn cases(style: &str) -> Vec<(Case, Expected)> {
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
    let given: Value = serde_json::from_str(&read(folder("").join("cases.json"))).unwrap();
    let cases: Vec<Case> = serde_json::from_value(given["cases"].clone()).unwrap();
    let expected: Vec<Expected> = serde_json::from_str(&read(folder(style).join("expected.json"))).unwrap();
    assert_eq!(cases.len(), expected.len());
    cases.into_iter().zip(expected).inspect(|(case, expected)| assert_eq!(case.name, expected.name)).collect()
}

fn options() -> TemplateOptions {
    TemplateOptions { date: "2025-05-05".into(), ..TemplateOptions::default() }
}

fn conversation(case: &Case) -> Conversation {
    let mut variables = case.kwargs.clone();
    let tools = variables.remove("tools").unwrap_or_default();
    Conversation { messages: case.messages.clone(), tools, variables }
}

#[test]
fn conversations_are_laid_out_as_by_transformers_and_refused_where_it_refuses() {
    let mut compared = 0;
    for style in STYLES {
        let tokenizer = Tokenizer::open(folder(style)).unwrap();
        let tagged = folder(style).join("tagged.jinja").display().to_string();
        for template in [None, Some(tagged.as_str())] {
            let template = ChatTemplate::choose(template, &tokenizer, &options()).unwrap().unwrap();
            for (case, expected) in cases(style) {
                let conversation = conversation(&case);
                let found = template.render(&conversation, false);
                match expected.error {
                    Some(error) => {
                        let found = found.unwrap_err().to_string();
                        // What the template raises is what the user reads; other errors are worded by either side.
                        assert!(!found.is_empty() && (!error.contains("must") || found.contains(&error)), "{found}");
                    }
                    None => {
                        assert_eq!(found.unwrap(), expected.text, "{style}, {}", case.name);
                        let prompt = template.render(&conversation, true).unwrap();
                        assert_eq!(prompt, expected.prompt, "{style}, {}", case.name);
                        compared += 1;
                    }
                }
            }
        }
    }
    assert!(compared > 300, "{compared}");
}

#[test]
fn tokens_and_their_places_are_those_of_transformers() {
    for style in STYLES {
        let tokenizer = Tokenizer::open(folder(style)).unwrap();
        for (case, expected) in cases(style).into_iter().filter(|(_, expected)| expected.error.is_none()) {
            let found = tokenizer.encode(&expected.text).unwrap();
            assert_eq!(found.ids, expected.ids, "{style}, {}", case.name);
            let spans: Vec<(usize, usize)> = found.spans.iter().map(|span| (span.start, span.end)).collect();
            assert_eq!(spans, expected.spans, "{style}, {}", case.name);
        }
    }
}

/// The row of one conversation, read from a file; `None` where the file's record cannot be used.
fn row(tokenizer: &Arc<Tokenizer>, case: &Case, chat_template: Option<String>) -> Option<TokenRow> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    let mut variables = case.kwargs.clone();
    let tools = variables.remove("tools");
    let record = json!({"messages": case.messages, "tools": tools, "chat_template_kwargs": variables});
    std::fs::write(&path, record.to_string()).unwrap();
    let options = TextOptions {
        path,
        chat_template,
        template: options(),
        strictness: Strictness::Inspect,
        ..TextOptions::default()
    };
    let texts = Texts::open(options, Arc::clone(tokenizer), None).unwrap();
    (texts.rows() > 0).then(|| texts.row(0))
}

/// Whether transformers lays the conversation out without the calls of tools in it, which is refused here.
fn leaves_calls_out(case: &Case, expected: &Expected) -> bool {
    let calls = case.messages.iter().filter_map(|own| own.get("tool_calls")?.as_array()).flatten();
    let mut names = calls.filter_map(|call| call["function"]["name"].as_str());
    names.any(|name| !expected.text.contains(name))
}

#[test]
fn a_template_that_marks_answers_is_believed_to_the_token() {
    for style in STYLES {
        let tokenizer = Arc::new(Tokenizer::open(folder(style)).unwrap());
        let tagged = folder(style).join("tagged.jinja").display().to_string();
        for (case, expected) in cases(style) {
            let found = row(&tokenizer, &case, Some(tagged.clone()));
            match found {
                Some(found) => {
                    assert_eq!(found.ids, expected.ids, "{style}, {}", case.name);
                    assert_eq!(found.trained, expected.learned(), "{style}, {}", case.name);
                    assert_eq!(found.documents, [expected.ids.len()]);
                }
                None => assert!(
                    !expected.learned().contains(&true) || leaves_calls_out(&case, &expected),
                    "{style}, {}",
                    case.name
                ),
            }
        }
    }
}

/// Without marks an answer begins where the prompt of its turn ends. Two things are then not learned that transformers'
/// marks take in: thoughts that the prompt holds already, and a blank before the first word.
const WITHOUT_ITS_BEGIN: [(&str, &str); 10] = [
    ("mistral", "system and two turns"),
    ("mistral", "no thinking"),
    ("mistral", "flag in the system text"),
    ("mistral", "three turns (2)"),
    ("mistral", "flag in the system text (2)"),
    ("mistral", "shouted (2)"),
    ("qwen3", "no thinking"),
    ("qwen3", "no thinking (2)"),
    ("smollm3", "flag in the system text"),
    ("smollm3", "flag in the system text (2)"),
];

#[test]
fn answers_are_found_without_marks() {
    let (mut same, mut others) = (0, Vec::new());
    for style in STYLES {
        let tokenizer = Arc::new(Tokenizer::open(folder(style)).unwrap());
        for (case, expected) in cases(style) {
            let learned = expected.learned();
            let Some(found) = row(&tokenizer, &case, None) else {
                assert!(!learned.contains(&true) || leaves_calls_out(&case, &expected), "{style}, {}", case.name);
                continue;
            };
            assert_eq!(found.ids, expected.ids, "{style}, {}", case.name);
            if found.trained == learned {
                same += 1;
                continue;
            }
            others.push((style, case.name.clone()));
            let more: Vec<u32> =
                (0..learned.len()).filter(|i| found.trained[*i] && !learned[*i]).map(|i| found.ids[i]).collect();
            let less: Vec<u32> =
                (0..learned.len()).filter(|i| !found.trained[*i] && learned[*i]).map(|i| found.ids[i]).collect();
            assert!(more.is_empty(), "{style}, {}", case.name);
            let less = tokenizer.decode(&less).unwrap();
            let trimmed = less.replace("<think>", "").replace("</think>", "");
            assert_eq!(trimmed.trim(), "", "{style}, {}", case.name);
        }
    }
    let known: Vec<(&str, String)> = WITHOUT_ITS_BEGIN.map(|(style, name)| (style, name.to_owned())).into();
    assert_eq!((same, others), (165, known));
}

/// Templates come with models: one that doubles a text until memory is full, or counts for ever, is refused.
#[test]
fn templates_that_would_take_all_memory_or_time_are_refused() {
    let tokenizer = Tokenizer::open(folder("chatml")).unwrap();
    let sources = [
        "{% set all = namespace(x='abcd') %}{% for i in range(40) %}{% set all.x = all.x ~ all.x %}{% endfor %}{{ all.x }}",
        "{{ '%2000000000d' | format(1) }}",
        "{{ 'a\\nb' | indent(2000000000) }}",
        "{% for i in range(10000) %}{% for j in range(10000) %}{% for k in range(10000) %}{% endfor %}{% endfor %}{% endfor %}",
    ];
    for source in sources {
        let template =
            ChatTemplate::new("a model's", &[("default".into(), source.into())], &tokenizer, &options()).unwrap();
        let error = template.render(&Conversation::of([("user", "Hi")]), false).unwrap_err().to_string();
        assert!(error.contains("a model's") && error.contains("fuel"), "{source}: {error}");
    }
}

/// What Jinja 3.1 in transformers 5.17's sandbox writes, under Python 3.11.
#[test]
fn tests_and_methods_of_texts_are_those_of_jinja_and_python() {
    let cases = [
        (
            "{{ none is iterable }} {{ x is iterable }} {{ 'a' is iterable }} {{ 1 is iterable }}",
            "False True True False",
        ),
        (
            "{{ none is sequence }} {{ x is sequence }} {{ 'a' is sequence }} {{ {} is sequence }}",
            "False True True True",
        ),
        ("{% if tools is iterable and tools | length > 0 %}T{% endif %}", ""),
        ("{% for i in [1, 2] %}{{ loop.previtem }}<{{ loop.nextitem }};{% endfor %}", "<2;1<;"),
        ("{{ 'a b-c' | wordcount }}", "3"),
        ("{{ 'a,b,c'.rsplit(',', 1) | join('|') }} {{ 'a,b,c'.rsplit(',') | join('|') }}", "a,b|c a|b|c"),
        ("{{ 'aBß'.swapcase() }} {{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('x') }}", "AbSS bc abc"),
    ];
    let tokenizer = Tokenizer::open(folder("chatml")).unwrap();
    for (source, expected) in cases {
        let template = ChatTemplate::new("a", &[("default".into(), source.into())], &tokenizer, &options()).unwrap();
        let found = template.render(&Conversation::of([("user", "Hi")]), false).unwrap();
        assert_eq!(found, expected, "{source}");
    }
}
