//! Text datasets for language models: JSON, JSON lines, Parquet or plain files, each record a plain text, an instruction
//! with its answer (alpaca; prompt and completion), or a conversation (chat messages; sharegpt). An example is a record as
//! it was read: how a conversation is laid out for a model is its chat template's business, and how many tokens a text has
//! its tokenizer's; neither is here.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use lora_core::random::Stream;
use lora_io::hash::sha256;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cache::DiskCache;
use crate::dataset::Strictness;
use crate::finding::{Finding, FindingKind};
use crate::sampler::Visits;
use crate::source::{Example, Identity, Overview, Shape, Source};
use crate::{Error, Result};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speaker {
    /// What the model is told beforehand.
    System,
    /// The person.
    User,
    /// The model: what is learned.
    Assistant,
    /// The answer of a tool.
    Tool,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Speaker,
    /// What is said.
    pub content: String,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TextSample {
    /// A text, learned in full.
    Plain(String),
    /// A task with its answer; the answer is learned. `input` may be empty.
    Instruction {
        /// The task.
        instruction: String,
        /// What it is about.
        input: String,
        /// The answer.
        output: String,
    },
    /// A conversation; what the assistant says is learned.
    Chat(Vec<Message>),
}

impl TextSample {
    /// The record as a conversation; `None` for a plain text. Task and input are one turn, with an empty line between.
    pub fn messages(&self) -> Option<Vec<Message>> {
        match self {
            TextSample::Plain(_) => None,
            TextSample::Instruction { instruction, input, output } => {
                let task = if input.is_empty() { instruction.clone() } else { format!("{instruction}\n\n{input}") };
                let message = |role, content: &str| Message { role, content: content.to_owned() };
                Some(vec![message(Speaker::User, &task), message(Speaker::Assistant, output)])
            }
            TextSample::Chat(messages) => Some(messages.clone()),
        }
    }
}

/// The form of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TextForm {
    /// `text` (or `content`), or a bare string.
    Plain,
    /// `instruction`, `input`, `output`.
    Alpaca,
    /// `prompt`, `completion` (or `response`).
    Completion,
    /// `messages` of `role` and `content`.
    Messages,
    /// `conversations` of `from` and `value`.
    ShareGpt,
}

/// Which texts, and how they are visited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextOptions {
    /// A file or a folder.
    pub path: PathBuf,
    /// What happens when a record cannot be used.
    pub strictness: Strictness,
    /// Visits of each record per epoch.
    pub repeats: usize,
    /// Records at once.
    pub batch_size: usize,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self { path: PathBuf::new(), strictness: Strictness::Normal, repeats: 1, batch_size: 1 }
    }
}

/// A record and where it is from.
#[derive(Debug, Clone)]
struct Record {
    sample: TextSample,
    form: TextForm,
    /// Its file's place among the files.
    file: usize,
}

/// The records of a file or a folder.
#[derive(Debug, Clone)]
pub struct Texts {
    options: TextOptions,
    files: Vec<PathBuf>,
    records: Vec<Record>,
    findings: Vec<Finding>,
}

impl Texts {
    /// Reads a `.jsonl`, `.json`, `.parquet` or `.txt` file (a text file is one record), or all such files of a folder, sorted
    /// by name. Records that cannot be used are errors where the strictness says so, else they are left out and reported.
    ///
    /// # Errors
    /// Where a file cannot be read, no record is left, or a record of a strict dataset is malformed.
    pub fn open(options: TextOptions) -> Result<Self> {
        let files = files(&options.path)?;
        let mut texts = Self { options, files: Vec::new(), records: Vec::new(), findings: Vec::new() };
        for path in files {
            texts.files.push(path.clone());
            texts.read(&path)?;
        }
        let Self { options: TextOptions { path, strictness, .. }, records, findings, .. } = &texts;
        match records.is_empty() {
            true if *strictness != Strictness::Inspect => {
                let found = match findings.first() {
                    Some(finding) => format!("{} record(s) could not be used, the first: {finding}", findings.len()),
                    None => "there are no records".into(),
                };
                Err(Error::Empty {
                    path: path.to_owned(),
                    looked_for: "texts in jsonl, json, parquet, txt".into(),
                    found,
                })
            }
            _ => Ok(texts),
        }
    }

    /// The records in order.
    pub fn samples(&self) -> impl ExactSizeIterator<Item = &TextSample> {
        self.records.iter().map(|record| &record.sample)
    }

    /// How many records came in which form.
    pub fn forms(&self) -> BTreeMap<TextForm, usize> {
        let mut forms = BTreeMap::new();
        self.records.iter().for_each(|record| *forms.entry(record.form).or_default() += 1);
        forms
    }

    fn read(&mut self, path: &Path) -> Result<()> {
        let wrong = |line: Option<usize>, reason: String| Error::caption(path, line, reason);
        match extension(path).as_str() {
            "jsonl" | "ndjson" => {
                let mut lines = BufReader::new(File::open(path).map_err(Error::io(path, "open"))?);
                let (mut line, mut number) = (Vec::new(), 0);
                // Line by line: a file of gigabytes is never in memory twice.
                while lines.read_until(b'\n', &mut line).map_err(Error::io(path, "read"))? > 0 {
                    number += 1;
                    let bytes = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&line);
                    if !bytes.trim_ascii().is_empty() {
                        let record = serde_json::from_slice(bytes)
                            .map_err(|error| wrong(Some(number), format!("not valid JSON: {error}")));
                        self.record(path, Some(number), record)?;
                    }
                    line.clear();
                }
            }
            "json" => {
                let text = crate::dataset::read_text(path)?;
                let whole: Value = serde_json::from_str(&text)
                    .map_err(|error| wrong(Some(error.line()), format!("not valid JSON: {error}")))?;
                let rows = match whole {
                    Value::Array(rows) => rows,
                    Value::Object(mut object) => match object.remove("data") {
                        Some(Value::Array(rows)) => rows,
                        _ => vec![Value::Object(object)],
                    },
                    other => return Err(wrong(None, format!("expected a list of records, found {}", shape(&other)))),
                };
                for (index, row) in rows.into_iter().enumerate() {
                    self.record(path, Some(index + 1), Ok(row))?;
                }
            }
            #[cfg(feature = "parquet")]
            "parquet" => {
                for (index, row) in crate::dataset::table::json_rows(path)?.enumerate() {
                    self.record(path, Some(index + 1), row)?;
                }
            }
            _ => {
                let text = crate::dataset::read_text(path);
                self.record(path, None, text.map(Value::String))?;
            }
        }
        Ok(())
    }

    /// Takes up a record of the file that was begun last.
    fn record(&mut self, path: &Path, number: Option<usize>, record: Result<Value>) -> Result<()> {
        let sample = record.and_then(|record| sample(&record).map_err(|reason| Error::caption(path, number, reason)));
        match sample {
            Ok((form, sample)) => self.records.push(Record { sample, form, file: self.files.len() - 1 }),
            Err(error) if self.options.strictness == Strictness::Strict => return Err(error),
            Err(error) => self.findings.push(Finding::new(path, FindingKind::CaptionFile, error.reason())),
        }
        Ok(())
    }

    /// Distinguishes records by what they say.
    fn digest(&self, item: usize) -> String {
        sha256(serde_json::json!(self.records[item].sample).to_string().as_bytes())
    }
}

impl Source for Texts {
    fn count(&self) -> usize {
        self.records.len()
    }

    fn visits(&self, _item: usize) -> Visits {
        Visits { count: self.options.repeats, shape: Shape::Unmeasured, batch_size: self.options.batch_size }
    }

    fn path(&self, item: usize) -> &Path {
        &self.files[self.records[item].file]
    }

    fn example(&self, item: usize, _draw: &Stream) -> Result<Example> {
        Ok(Example::Text(self.records[item].sample.clone()))
    }

    fn key_parts(&self, item: usize, _draw: &Stream, _cache: &DiskCache) -> Result<Vec<String>> {
        Ok(vec![self.digest(item)])
    }

    fn identity(&self) -> Identity {
        let count = self.count();
        let all: Vec<String> = (0..count).map(|item| self.digest(item)).collect();
        let visits = count * self.options.repeats;
        Identity {
            options: vec![("batch_size of the dataset".into(), self.options.batch_size.to_string())],
            items: vec![
                ("dataset".into(), format!("{count} texts, {visits} visits an epoch")),
                ("texts".into(), sha256(all.join(" ").as_bytes())[..16].to_owned()),
            ],
        }
    }

    fn findings(&self) -> &[Finding] {
        &self.findings
    }

    fn of_another(&self, path: &Path) -> Result<Box<dyn Source>> {
        let options = TextOptions { path: path.to_owned(), repeats: 1, ..self.options.clone() };
        Self::open(options).map(|texts| Box::new(texts) as Box<dyn Source>)
    }

    fn overview(&self) -> Overview {
        Overview { noun: "texts", items: self.count(), left_out: self.findings.len(), ..Overview::default() }
    }

    fn leave_out(&mut self, unusable: Vec<(usize, Error)>) {
        let mut kept = vec![true; self.records.len()];
        for (item, error) in unusable {
            kept[item] = false;
            self.findings.push(Finding::new(self.path(item), FindingKind::CaptionFile, error.reason()));
        }
        let mut kept = kept.into_iter();
        self.records.retain(|_| kept.next().unwrap_or(true));
    }
}

fn extension(path: &Path) -> String {
    path.extension().map(|extension| extension.to_string_lossy().to_lowercase()).unwrap_or_default()
}

fn files(path: &Path) -> Result<Vec<PathBuf>> {
    const KNOWN: &[&str] = &[
        "jsonl",
        "ndjson",
        "json",
        "txt",
        #[cfg(feature = "parquet")]
        "parquet",
    ];
    let known = |path: &Path| KNOWN.contains(&extension(path).as_str());
    if path.is_file() {
        return match known(path) {
            true => Ok(vec![path.to_owned()]),
            false => Err(Error::Option {
                key: "train_data_dir",
                value: path.display().to_string(),
                reason: format!("expected a folder or a file that ends in {}", KNOWN.join(", ")),
            }),
        };
    }
    let entries = fs::read_dir(path).map_err(Error::io(path, "read the folder"))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| known(path)).collect();
    files.sort();
    Ok(files)
}

fn shape(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A record by its keys; of several forms the one that says most.
fn sample(record: &Value) -> Result<(TextForm, TextSample), String> {
    if let Value::String(text) = record {
        return plain(text);
    }
    let object = record.as_object().ok_or_else(|| format!("expected an object or text, found {}", shape(record)))?;
    let has = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
    let text = |key: &str| match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Null) | None => Ok(String::new()),
        Some(other) => Err(format!("`{key}`: expected text, found {}", shape(other))),
    };
    if has("messages") {
        return Ok((TextForm::Messages, TextSample::Chat(turns(&object["messages"], "messages")?)));
    }
    if has("conversations") {
        return Ok((TextForm::ShareGpt, TextSample::Chat(turns(&object["conversations"], "conversations")?)));
    }
    let (form, task, input, answer) = if has("instruction") {
        (TextForm::Alpaca, "instruction", "input", if has("output") { "output" } else { "response" })
    } else if has("prompt") && (has("completion") || has("response")) {
        (TextForm::Completion, "prompt", "", if has("completion") { "completion" } else { "response" })
    } else if let Some(key) = ["text", "content"].into_iter().find(|key| has(key)) {
        return plain(&text(key)?);
    } else {
        let keys = object.keys().cloned().collect::<Vec<_>>().join(", ");
        return Err(format!(
            "no `text`, `instruction` and `output`, `prompt` and `completion`, `messages` or `conversations`; found {keys}"
        ));
    };
    let (instruction, input, output) = (text(task)?, text(input)?, text(answer)?);
    if instruction.trim().is_empty() || output.trim().is_empty() {
        return Err(format!("`{task}` or `{answer}` is empty"));
    }
    Ok((form, TextSample::Instruction { instruction, input, output }))
}

fn plain(text: &str) -> Result<(TextForm, TextSample), String> {
    match text.trim().is_empty() {
        true => Err("the text is empty".into()),
        false => Ok((TextForm::Plain, TextSample::Plain(text.to_owned()))),
    }
}

/// The turns of a conversation, in either spelling.
fn turns(value: &Value, key: &str) -> Result<Vec<Message>, String> {
    let turns = value.as_array().ok_or_else(|| format!("`{key}`: expected a list, found {}", shape(value)))?;
    let turn = |(index, turn): (usize, &Value)| {
        let place = format!("`{key}`, turn {}", index + 1);
        let field = |names: [&str; 2]| {
            let found = names.iter().find_map(|name| turn.get(name)).filter(|value| !value.is_null());
            let found = found.ok_or_else(|| format!("{place}: no `{}` or `{}`", names[0], names[1]))?;
            found.as_str().ok_or_else(|| format!("{place}: expected text, found {}", shape(found)))
        };
        let role = match field(["role", "from"])? {
            "system" => Speaker::System,
            "user" | "human" => Speaker::User,
            "assistant" | "gpt" | "model" | "chatgpt" => Speaker::Assistant,
            "tool" | "function" | "observation" | "ipython" => Speaker::Tool,
            other => return Err(format!("{place}: `{other}` is none of system, user, assistant, tool (human, gpt)")),
        };
        Ok(Message { role, content: field(["content", "value"])?.to_owned() })
    };
    let turns = turns.iter().enumerate().map(turn).collect::<Result<Vec<_>, _>>()?;
    match turns.iter().any(|turn| turn.role == Speaker::Assistant) {
        true => Ok(turns),
        false => Err(format!("`{key}`: nobody answers, so there is nothing to learn")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: impl Into<PathBuf>, strictness: Strictness) -> Result<Texts> {
        Texts::open(TextOptions { path: path.into(), strictness, ..TextOptions::default() })
    }

    fn read(name: &str, text: &str, strictness: Strictness) -> Result<Texts> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(name), text).unwrap();
        open(folder.path().join(name), strictness)
    }

    fn message(role: Speaker, content: &str) -> Message {
        Message { role, content: content.into() }
    }

    #[test]
    fn every_form_is_understood() {
        let lines = r#"{"text": "plain"}
{"instruction": "Translate.", "input": "Haus", "output": "house"}
{"instruction": "Say hi.", "input": "", "output": "hi"}
{"prompt": "2+2=", "completion": "4"}

{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
"bare"
"#;
        let dataset = read("a.jsonl", lines, Strictness::Strict).unwrap();
        assert_eq!(dataset.forms().into_values().collect::<Vec<_>>(), [2, 2, 1, 1, 1]);
        let samples: Vec<&TextSample> = dataset.samples().collect();
        assert_eq!(*samples[0], TextSample::Plain("plain".into()));
        let translated = samples[1].messages().unwrap();
        assert_eq!(translated[0], message(Speaker::User, "Translate.\n\nHaus"));
        assert_eq!(samples[2].messages().unwrap()[0].content, "Say hi.");
        assert_eq!(samples[3].messages().unwrap()[1], message(Speaker::Assistant, "4"));
        let turns = [message(Speaker::User, "q"), message(Speaker::Assistant, "a")];
        assert_eq!(samples[4].messages().unwrap()[1..], turns);
        assert_eq!(*samples[5], TextSample::Chat(turns.into()));
        assert_eq!(samples[0].messages(), None);
    }

    #[test]
    fn lists_and_plain_files_and_folders() {
        let list = read("a.json", r#"[{"text": "one"}, {"text": "two"}]"#, Strictness::Strict).unwrap();
        assert_eq!(list.samples().len(), 2);
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("b.txt"), "\u{feff}a whole\nfile").unwrap();
        fs::write(folder.path().join("a.jsonl"), "{\"text\": \"first\"}").unwrap();
        fs::write(folder.path().join("notes.md"), "not read").unwrap();
        let dataset = open(folder.path(), Strictness::Strict).unwrap();
        let samples: Vec<TextSample> = dataset.samples().cloned().collect();
        assert_eq!(samples, ["first", "a whole\nfile"].map(|text| TextSample::Plain(text.into())));
    }

    #[test]
    fn texts_are_visited_as_often_as_asked_and_share_batches_whatever_their_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        fs::write(&path, "{\"text\": \"one\"}\n{\"text\": \"one and a half\"}\n{\"text\": \"two\"}").unwrap();
        let options = TextOptions { path: path.clone(), repeats: 2, batch_size: 4, ..TextOptions::default() };
        let mut texts = Texts::open(options).unwrap();
        let mut order = texts.sampler(1);
        assert_eq!((order.epoch_length(), order.next_batch().len(), order.next_batch().len()), (6, 4, 2));
        let text = |texts: &Texts, item: usize| texts.example(item, &Stream::new(0)).unwrap();
        assert_eq!(text(&texts, 1), Example::Text(TextSample::Plain("one and a half".into())));

        let before = texts.identity();
        assert_eq!(before.items[0], ("dataset".into(), "3 texts, 6 visits an epoch".into()));
        texts.leave_out(vec![(1, Error::caption(&path, Some(2), "too long"))]);
        assert_eq!(text(&texts, 1), Example::Text(TextSample::Plain("two".into())));
        assert_eq!((texts.count(), texts.findings()[0].path.as_path()), (2, path.as_path()));
        assert_eq!(texts.identity().options, before.options);
        assert!(texts.identity().items.iter().zip(&before.items).all(|(now, was)| now != was));
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
            ("{\"instruction\": \"x\", \"output\": \"\"}", &["`output`", "empty"]),
            ("17", &["expected an object"]),
        ];
        for (text, fragments) in cases {
            let error = read("bad.jsonl", text, Strictness::Strict).unwrap_err().to_string();
            for fragment in fragments.iter().chain(&["bad.jsonl"]) {
                assert!(error.contains(fragment), "`{error}` lacks `{fragment}`");
            }
        }
        let mixed = read("a.jsonl", "{\"text\": \"good\"}\n{}\n\u{1}", Strictness::Normal).unwrap();
        assert_eq!((mixed.count(), mixed.findings().len()), (1, 2));
        assert!(read("a.jsonl", "{}", Strictness::Normal).unwrap_err().to_string().contains("1 record"));
        assert!(read("a.xml", "<a/>", Strictness::Normal).unwrap_err().to_string().contains("jsonl"));
    }
}
