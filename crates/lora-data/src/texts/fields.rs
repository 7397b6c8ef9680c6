//! The keys of a record: the names under which published datasets keep the same thing, for all forms, and which keys a
//! form has not read. What the values mean is told in `record.rs`, how turns are spelled in `turns.rs`.

use serde_json::{Map, Value};

use super::record::{TextSample, shape};

/// What is asked.
pub(super) const QUESTION: &[&str] = &["instruction", "prompt", "question", "query"];
/// What is asked about, behind the question (`context` of databricks-dolly).
pub(super) const CONTEXT: &[&str] = &["input", "context"];
/// What is answered.
pub(super) const ANSWER: &[&str] = &["output", "completion", "response", "answer"];
/// What the system says (`system_prompt` of OpenOrca).
pub(super) const SYSTEM: &[&str] = &["system", "system_prompt"];
/// Turns before the question, as pairs of question and answer (LLaMA-Factory).
pub(super) const HISTORY: &[&str] = &["history"];
/// The tools that may be called; `functions` is OpenAI's older name.
pub(super) const TOOLS: &[&str] = &["tools", "functions"];
/// A whole conversation.
pub(super) const TURNS: &[&str] = &["messages", "conversations"];
/// The answers of a pair, the better one first.
pub(super) const PAIR: &[&str] = &["chosen", "rejected"];
/// Whether an answer is a good one (TRL's and LLaMA-Factory's datasets for KTO).
pub(super) const LABEL: &[&str] = &["label", "kto_tag"];
/// What no language model here reads.
const MEDIA: &[&str] = &["image", "images", "video", "videos", "audio", "audios"];

/// The values of a record by their keys, those that are `null` left out.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    pub(super) fn new(mut object: Map<String, Value>) -> Self {
        object.retain(|_, value| !value.is_null());
        Self(object)
    }

    /// The key of those that says something, or else is there.
    pub(super) fn key(&self, names: &[&'static str]) -> Option<&'static str> {
        let there = || names.iter().copied().filter(|name| self.0.contains_key(*name));
        there().find(|name| says_something(&self.0[*name])).or_else(|| there().next())
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// The value of a key, which then counts as read.
    pub(super) fn take(&mut self, key: &str) -> Value {
        self.0.remove(key).unwrap_or_default()
    }

    /// The text of a key, empty where there is none. It counts as read once the sample holds it.
    pub(super) fn text(&self, key: &str) -> Result<String, String> {
        match self.0.get(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            None => Ok(String::new()),
            Some(other) => Err(format!("`{key}`: expected text, found {}", shape(other))),
        }
    }

    /// The texts of all keys of those that hold one.
    pub(super) fn texts(&self, names: &[&'static str]) -> Result<Vec<String>, String> {
        let texts = names.iter().map(|name| self.text(name)).collect::<Result<Vec<_>, _>>()?;
        Ok(texts.into_iter().filter(|text| !text.trim().is_empty()).collect())
    }

    /// Keys that mean something to training, say something, and are no part of the sample.
    pub(super) fn unread(&self, sample: &TextSample) -> Vec<&str> {
        let known = [QUESTION, CONTEXT, ANSWER, SYSTEM, HISTORY, TOOLS, TURNS, PAIR, MEDIA].concat();
        let left: Vec<(&String, &Value)> =
            self.0.iter().filter(|(key, value)| known.contains(&key.as_str()) && says_something(value)).collect();
        if left.is_empty() {
            return Vec::new();
        }
        let said = sample.texts();
        let is_said =
            |value: &Value| value.as_str().is_some_and(|own| said.iter().any(|text| text.contains(own.trim())));
        left.into_iter().filter(|(_, value)| !is_said(value)).map(|(key, _)| key.as_str()).collect()
    }

    /// The names of all keys, for messages.
    pub(super) fn names(&self) -> String {
        self.0.keys().cloned().collect::<Vec<_>>().join(", ")
    }
}

fn says_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(values) => !values.is_empty(),
        Value::Object(values) => !values.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}
