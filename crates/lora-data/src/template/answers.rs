//! Which part of a laid out conversation the model itself says. A template may mark it (`{% generation %}`); for any other
//! it is found by rendering again with an answer's words masked: what differs is the answer, as the template trimmed it.

use std::ops::Range;

use minijinja::Value;

use super::conversation::MASK;
use super::functions::value;
use super::{ChatTemplate, Conversation};
use crate::Result;

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
    /// The message that it is of, where the end of the turn is still to be found behind the words; `None` where the template
    /// has said what belongs to the answer.
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
            let Some(words) = self.difference(&text, &messages, conversation, message) else { continue };
            // A template's own beginning of an answer, as `<think>`, is learned where the prompt does not hold it already.
            let before = self.render_values(&messages[..message], conversation, true);
            let begins = before.ok().filter(|before| text.starts_with(before.as_str())).map(|before| before.len());
            let start = begins.filter(|start| *start <= words.end).unwrap_or(words.start);
            answers.push(Answer { span: start..words.end, message: Some(message) });
        }
        Ok(Layout { text, answers })
    }

    /// Where the words of the message behind an answer begin: the answer's end of turn stands before. The end of the text
    /// behind the last message.
    pub(crate) fn turn_end(&self, layout: &Layout, conversation: &Conversation, message: usize) -> usize {
        let messages: Vec<Value> = conversation.messages.iter().map(value).collect();
        let next = (message + 1..messages.len())
            .find_map(|next| self.difference(&layout.text, &messages, conversation, next).map(|words| words.start));
        next.unwrap_or(layout.text.len())
    }

    /// The bytes in which a rendering with one message masked differs; `None` where the template leaves the message out.
    fn difference(
        &self,
        text: &str,
        messages: &[Value],
        conversation: &Conversation,
        message: usize,
    ) -> Option<Range<usize>> {
        let mut masked = messages.to_vec();
        masked[message] = value(conversation.masked(message));
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
