//! A conversation as templates see it: messages with roles, and the tools that may be called.

use serde_json::{Map, Value};

/// Messages, tools and variables of one record.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// Messages in order: objects with `role` and `content`, and whatever else their template knows
    /// (`reasoning_content`, `tool_calls`, `name`).
    pub messages: Vec<Map<String, Value>>,
    /// The tools, in the layout that templates expect; `null` where there are none.
    pub tools: Value,
    /// Variables that belong to this conversation and go before the run's.
    pub variables: Map<String, Value>,
}

impl Conversation {
    /// One message after the other, of roles and contents.
    pub fn of<'t>(turns: impl IntoIterator<Item = (&'t str, &'t str)>) -> Self {
        let message = |(role, content): (&str, &str)| {
            Map::from_iter([("role".to_owned(), role.into()), ("content".to_owned(), content.into())])
        };
        Self { messages: turns.into_iter().map(message).collect(), ..Self::default() }
    }

    /// The role of a message.
    pub fn role(&self, message: usize) -> &str {
        self.messages.get(message).and_then(|message| message.get("role")?.as_str()).unwrap_or_default()
    }

    /// Whether a message is an answer that is learned: the assistant's, and not excluded by `weight: 0` or `train:
    /// false`.
    pub(crate) fn is_learned(&self, message: usize) -> bool {
        let excluded = |own: &Map<String, Value>| {
            own.get("weight").and_then(Value::as_f64) == Some(0.0) || own.get("train") == Some(&Value::Bool(false))
        };
        self.role(message) == "assistant" && self.messages.get(message).is_some_and(|own| !excluded(own))
    }

    /// Whether a message calls a tool.
    pub(super) fn calls(&self, message: usize) -> bool {
        let calls = self.messages.get(message).and_then(|own| own.get("tool_calls")?.as_array());
        calls.is_some_and(|calls| !calls.is_empty())
    }

    /// The same with some of one message's words replaced by characters that no text has, so that what differs in the
    /// layout is what the message says.
    pub(super) fn masked(&self, message: usize, words: Words) -> Map<String, Value> {
        let mut masked = self.messages.get(message).cloned().unwrap_or_default();
        let keys = ["content", "reasoning_content", "thinking", "tool_calls"];
        for key in &keys[if words == Words::Calls { 3..4 } else { 0..4 }] {
            if let Some(value) = masked.get_mut(*key) {
                mask(value, *key == "tool_calls", words != Words::ButNames);
            }
        }
        masked
    }
}

/// Which words of a message are masked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Words {
    /// Its content, thoughts, names and arguments of calls.
    All,
    /// All but the names of tools that it calls, which some templates repeat where the tool answers.
    ButNames,
    /// Its calls alone.
    Calls,
}

/// A private-use character.
pub(super) const MASK: char = '\u{f8f1}';

/// Every text in a value that is words rather than a kind: in `calls` arguments, and `names` where they are asked for.
fn mask(value: &mut Value, calls: bool, names: bool) {
    match value {
        Value::String(text) => *text = MASK.to_string(),
        Value::Array(values) => values.iter_mut().for_each(|value| mask(value, calls, names)),
        Value::Object(object) => {
            for (key, value) in object.iter_mut() {
                match key.as_str() {
                    "type" | "id" => {}
                    "arguments" if value.is_object() => {
                        *value = Value::Object(Map::from_iter([(MASK.to_string(), MASK.to_string().into())]));
                    }
                    "name" if calls && !names => {}
                    "function" | "name" | "arguments" if calls => mask(value, calls, names),
                    "text" | "content" if !calls => mask(value, calls, names),
                    _ => {}
                }
            }
        }
        _ => {}
    }
}
