//! Which part of a laid out conversation the model itself says. A template may mark it (`{% generation %}`); for any
//! other it is found by rendering again with an answer's words masked: what differs is the answer, as the template
//! trimmed it.

use std::ops::Range;

use minijinja::Value;
use minijinja::value::Kwargs;

use super::conversation::{MASK, Words};
use super::functions::{tojson, value};
use super::{ChatTemplate, Conversation};
use crate::{Error, Result};

/// The name of the filter that marks what it is given.
pub(super) const FILTER: &str = "lora_mark_answer";

/// Around an answer, while it is looked for: private-use characters of the last plane.
const BEGIN: char = '\u{10fff0}';
const END: char = '\u{10fff1}';

pub(super) fn mark(text: &str) -> String {
    format!("{BEGIN}{text}{END}")
}

/// An answer in a layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its bytes.
    pub span: Range<usize>,
    /// The message that it is of, where the end of the turn is still to be found behind the words; `None` where the
    /// template has said what belongs to the answer.
    pub message: Option<usize>,
}

/// A conversation laid out, with its answers in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layout {
    /// The text.
    pub text: String,
    /// What is learned of it.
    pub answers: Vec<Answer>,
}

impl ChatTemplate {
    /// Lays a conversation out and finds its answers.
    ///
    /// # Errors
    /// With the template's own words, where it refuses the conversation.
    pub fn layout(&self, conversation: &Conversation) -> Result<Layout> {
        let messages: Vec<Value> = conversation.messages.iter().map(value).collect();
        let text = self.render_values(&messages, conversation, false)?;
        let learned = || (0..messages.len()).filter(|message| conversation.is_learned(*message));
        if self.marks_answers(conversation) {
            let (text, spans) = without_marks(&text);
            // A template marks one part for each message of the assistant's; where it does not, none can be excluded.
            let assistant: Vec<usize> = (0..messages.len()).filter(|i| conversation.role(*i) == "assistant").collect();
            let counts = assistant.len() == spans.len();
            let answers = spans
                .into_iter()
                .enumerate()
                .filter(|(index, _)| !counts || conversation.is_learned(assistant[*index]));
            let answers = answers.map(|(_, span)| Answer { span, message: None }).collect();
            return Ok(Layout { text, answers });
        }
        let mut answers = Vec::new();
        for message in learned() {
            let Some(mut words) = self.difference(&text, &messages, conversation, message, Words::All) else {
                continue;
            };
            // Gemma 4 and gpt-oss repeat the name of a called tool in the turn of its answer, which is not the model's.
            if conversation.calls(message)
                && let Some(unnamed) = self.difference(&text, &messages, conversation, message, Words::ButNames)
            {
                words.end = unnamed.end;
            }
            // A template's own beginning of an answer, as `<think>`, is learned where the prompt does not hold it
            // already.
            let before = self.render_values(&messages[..message], conversation, true);
            let begins = before.ok().filter(|before| text.starts_with(before.as_str())).map(|before| before.len());
            let start = begins.filter(|start| *start <= words.end).unwrap_or(words.start);
            answers.push(Answer { span: start..words.end, message: Some(message) });
        }
        Ok(Layout { text, answers })
    }

    /// Where the words of the message behind an answer begin: the answer's end of turn stands before. The end of the
    /// text behind the last message.
    pub(crate) fn turn_end(&self, layout: &Layout, conversation: &Conversation, message: usize) -> usize {
        let messages: Vec<Value> = conversation.messages.iter().map(value).collect();
        let next = (message + 1..messages.len()).find_map(|next| {
            self.difference(&layout.text, &messages, conversation, next, Words::All).map(|words| words.start)
        });
        next.unwrap_or(layout.text.len())
    }

    /// The conversation with its calls of tools in the spelling that the template lays out: beside an empty content as
    /// nearly all do, or beside `null` with arguments as text, as those of DeepSeek-R1's distilled models ask for.
    ///
    /// # Errors
    /// Where the template leaves the calls out in every spelling: an answer without words would be learned.
    pub(crate) fn with_calls(&self, conversation: Conversation) -> Result<Conversation> {
        let calling: Vec<usize> = (0..conversation.messages.len()).filter(|own| conversation.calls(*own)).collect();
        let usual = if calling.is_empty() { Ok(true) } else { self.shows(&calling, &conversation) };
        if matches!(usual, Ok(true)) {
            return Ok(conversation);
        }
        for as_text in [false, true] {
            let mut other = conversation.clone();
            for message in &calling {
                if other.messages[*message]["content"] == "" {
                    other.messages[*message].insert("content".to_owned(), serde_json::Value::Null);
                }
                if as_text && let Some(calls) = other.messages[*message].get_mut("tool_calls") {
                    calls.as_array_mut().into_iter().flatten().for_each(with_arguments_as_text);
                }
            }
            if self.shows(&calling, &other).unwrap_or(false) {
                return Ok(other);
            }
        }
        usual?;
        let reason = "it leaves calls of tools out, so that an answer without them would be learned".to_owned();
        Err(Error::Template { origin: self.origin().to_owned(), reason })
    }

    /// Whether the calls of all those messages that are learned stand in the layout.
    fn shows(&self, calling: &[usize], conversation: &Conversation) -> Result<bool> {
        let messages: Vec<Value> = conversation.messages.iter().map(value).collect();
        self.render_values(&messages, conversation, false)?;
        let mut learned = calling.iter().filter(|message| conversation.is_learned(**message));
        Ok(learned.all(|message| {
            let mut masked = messages.clone();
            masked[*message] = value(conversation.masked(*message, Words::Calls));
            // A template that cannot take masked calls has read them.
            self.render_values(&masked, conversation, false).map_or(true, |text| text.contains(MASK))
        }))
    }

    /// The bytes in which a rendering with one message masked differs; `None` where the template leaves the message
    /// out.
    fn difference(
        &self,
        text: &str,
        messages: &[Value],
        conversation: &Conversation,
        message: usize,
        words: Words,
    ) -> Option<Range<usize>> {
        let mut masked = messages.to_vec();
        masked[message] = value(conversation.masked(message, words));
        // A template that cannot take masked words says nothing about where they are.
        let masked = self.render_values(&masked, conversation, false).ok()?;
        if !masked.contains(MASK) {
            return None;
        }
        let start: usize =
            text.chars().zip(masked.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
        let (rest, other) = (&text[start..], &masked[start..]);
        let after = rest.chars().rev().zip(other.chars().rev()).take_while(|(a, b)| a == b);
        let end = text.len() - after.map(|(c, _)| c.len_utf8()).sum::<usize>();
        Some(start..end)
    }
}

/// The arguments of a call as JSON in Python's style, which OpenAI's files have in the place of an object.
fn with_arguments_as_text(call: &mut serde_json::Value) {
    let function = if call.get("function").is_some() { &mut call["function"] } else { call };
    if let Some(arguments @ serde_json::Value::Object(_)) = function.get("arguments")
        && let Ok(text) = tojson(&value(arguments), Kwargs::from_iter(std::iter::empty::<(&str, Value)>()))
    {
        function["arguments"] = text.to_string().into();
    }
}

/// A text without the marks of answers, and the bytes in it that were between them.
pub(super) fn without_marks(text: &str) -> (String, Vec<Range<usize>>) {
    let (mut plain, mut spans, mut start) = (String::with_capacity(text.len()), Vec::new(), None);
    for part in text.split_inclusive([BEGIN, END]) {
        let own = part.trim_end_matches([BEGIN, END]);
        plain.push_str(own);
        match part[own.len()..].chars().next() {
            Some(BEGIN) => start = Some(plain.len()),
            Some(_) => spans.extend(start.take().map(|start| start..plain.len())),
            None => {}
        }
    }
    (plain, spans)
}
