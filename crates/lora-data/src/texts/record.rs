//! One record of a text dataset: a plain text, a conversation in any of the usual spellings, or a pair of answers of
//! which one is better. The names of keys stand in `fields.rs`, the spellings of turns in `turns.rs`.

use serde_json::{Map, Value};

use super::fields::{ANSWER, CONTEXT, Fields, HISTORY, LABEL, PAIR, QUESTION, SYSTEM, TOOLS, TURNS};
use super::turns::{history, message, tools, transcript, turns, written_down};
use crate::template::Conversation;

/// The form of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum TextForm {
    /// `text` (or `content`), or a bare string.
    Plain,
    /// `instruction` (or `question`), `input`, `output`.
    Alpaca,
    /// `prompt`, `completion` (or `response`).
    Completion,
    /// `messages` of `role` and `content`.
    Messages,
    /// `conversations` of `from` and `value`.
    ShareGpt,
    /// `chosen`, `rejected`, with what they answer to.
    Preference,
}

impl TextForm {
    pub(super) const ALL: [TextForm; 6] = [
        TextForm::Plain,
        TextForm::Alpaca,
        TextForm::Completion,
        TextForm::Messages,
        TextForm::ShareGpt,
        TextForm::Preference,
    ];

    /// As people read it.
    pub fn name(self) -> &'static str {
        match self {
            TextForm::Plain => "plain texts",
            TextForm::Alpaca => "instructions",
            TextForm::Completion => "prompts and completions",
            TextForm::Messages => "chat messages",
            TextForm::ShareGpt => "conversations",
            TextForm::Preference => "preference pairs",
        }
    }
}

impl serde::Serialize for TextForm {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// What a record says.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum TextSample {
    /// A text, learned in full.
    Plain(String),
    /// A text that goes on from another. With a chat template it is a conversation of two turns.
    Completion {
        /// What is given.
        prompt: String,
        /// What is learned.
        completion: String,
    },
    /// A conversation; what the assistant says is learned.
    Chat(Conversation),
    /// The same conversation with a better and a worse end.
    Preference {
        /// The one to prefer.
        chosen: Conversation,
        /// The other one.
        rejected: Conversation,
    },
}

impl TextSample {
    /// All texts of the record that somebody wrote, roles and names left out.
    pub fn texts(&self) -> Vec<&str> {
        match self {
            TextSample::Plain(text) => vec![text],
            TextSample::Completion { prompt, completion } => vec![prompt, completion],
            TextSample::Chat(conversation) => contents(conversation),
            TextSample::Preference { chosen, rejected } => {
                contents(chosen).into_iter().chain(contents(rejected)).collect()
            }
        }
    }
}

/// What the messages of a conversation say.
fn contents(conversation: &Conversation) -> Vec<&str> {
    let mut texts = Vec::new();
    for message in &conversation.messages {
        for value in ["content", "reasoning_content"].iter().filter_map(|key| message.get(*key)) {
            match value {
                Value::Array(parts) => texts.extend(parts.iter().filter_map(|part| part["text"].as_str())),
                value => texts.extend(value.as_str()),
            }
        }
    }
    texts
}

/// What a value is, for messages.
pub(super) fn shape(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A record as it is understood.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) form: TextForm,
    pub(super) sample: TextSample,
    /// Keys that mean something, and had no place in the form.
    pub(super) unread: Vec<String>,
}

/// A record by its keys; of several forms the one that says most.
pub(super) fn parse(record: Value) -> Result<Parsed, String> {
    let object = match record {
        Value::String(text) => {
            return Ok(Parsed { form: TextForm::Plain, sample: plain(text)?, unread: Vec::new() });
        }
        Value::Object(object) => object,
        other => return Err(format!("expected an object or text, found {}", shape(&other))),
    };
    let mut fields = Fields::new(object);
    let (form, sample) = of_fields(&mut fields)?;
    let unread = fields.unread(&sample).into_iter().map(str::to_owned).collect();
    Ok(Parsed { form, sample, unread })
}

fn of_fields(fields: &mut Fields) -> Result<(TextForm, TextSample), String> {
    if PAIR.iter().all(|key| fields.get(key).is_some()) {
        return preference(fields).map(|pair| (TextForm::Preference, pair));
    }
    let (question, answer) = (fields.key(QUESTION), fields.key(ANSWER));
    if let Some(key) = fields.key(TURNS) {
        good(fields)?;
        let form = if key == "messages" { TextForm::Messages } else { TextForm::ShareGpt };
        let around = Around::of(fields)?;
        let conversation = around.conversation(turns(fields.take(key), key)?);
        return Ok((form, TextSample::Chat(answered(conversation, key)?)));
    }
    if let (Some(question), Some(answer)) = (question, answer) {
        good(fields)?;
        let form = if question == "prompt" { TextForm::Completion } else { TextForm::Alpaca };
        return completion(fields, question, answer).map(|sample| (form, sample));
    }
    if let Some(key) = fields.key(&["text", "content"]) {
        return plain(fields.text(key)?).map(|sample| (TextForm::Plain, sample));
    }
    Err(format!(
        "no `text`, `instruction` and `output`, `prompt` and `completion`, `messages`, `conversations`, or `chosen` and \
         `rejected`; found {}",
        fields.names()
    ))
}

fn plain(text: String) -> Result<TextSample, String> {
    match text.trim().is_empty() {
        true => Err("the text is empty".into()),
        false => Ok(TextSample::Plain(text)),
    }
}

/// Refuses the wrong answers of a dataset for KTO, which a loss of right answers would teach.
fn good(fields: &Fields) -> Result<(), String> {
    match LABEL.iter().find(|key| fields.get(key) == Some(&Value::Bool(false))) {
        Some(key) => Err(format!("`{key}` is false: the answer is a wrong one, and would be learned as a right one")),
        None => Ok(()),
    }
}

fn filled(fields: &[(&str, &str)]) -> Result<(), String> {
    match fields.iter().find(|(_, text)| text.trim().is_empty()) {
        Some((key, _)) => Err(format!("`{key}` is empty")),
        None => Ok(()),
    }
}

/// What stands beside the turns of a conversation: a system prompt, earlier turns, tools, variables of the template.
struct Around {
    system: String,
    history: Vec<Map<String, Value>>,
    tools: Value,
    variables: Map<String, Value>,
}

impl Around {
    fn of(fields: &mut Fields) -> Result<Self, String> {
        let tools = match fields.key(TOOLS) {
            Some(key) => tools(fields.take(key), key)?,
            None => Value::Null,
        };
        let variables = match fields.take("chat_template_kwargs") {
            Value::Object(variables) => variables,
            Value::Null => Map::new(),
            other => return Err(format!("`chat_template_kwargs`: expected an object, found {}", shape(&other))),
        };
        let history = match fields.key(HISTORY) {
            Some(key) => history(fields.take(key), key)?,
            None => Vec::new(),
        };
        let system = fields.key(SYSTEM).map(|key| fields.text(key)).transpose()?.unwrap_or_default();
        Ok(Self { system, history, tools, variables })
    }

    /// Whether nothing stands there, so that a text may go on from another without turns.
    fn is_empty(&self) -> bool {
        self.system.trim().is_empty() && self.history.is_empty()
    }

    /// Turns with what stands around them. A system turn of their own goes before the record's (as in LLaMA-Factory).
    fn conversation(&self, turns: Vec<Map<String, Value>>) -> Conversation {
        let mut messages = self.history.clone();
        let own = messages.iter().chain(&turns).next().is_some_and(|first| first["role"] == "system");
        if !own && !self.system.trim().is_empty() {
            messages.insert(0, message("system", self.system.clone()));
        }
        messages.extend(turns);
        Conversation { messages, tools: self.tools.clone(), variables: self.variables.clone() }
    }
}

/// What is asked, with what it is about: a text, or a list of messages.
fn asked(fields: &mut Fields, key: &'static str) -> Result<Given, String> {
    if let Some(list) = listed(fields, key) {
        return turns(list, key).map(Given::Turns);
    }
    let question = fields.text(key)?;
    filled(&[(key, &question)])?;
    let texts: Vec<String> = [vec![question], fields.texts(CONTEXT)?].concat();
    Ok(Given::Text(texts.join("\n\n")))
}

/// The list of messages that a key has, or the text of one; it counts as read.
fn listed(fields: &mut Fields, key: &str) -> Option<Value> {
    match fields.get(key)? {
        Value::Array(_) => Some(fields.take(key)),
        Value::String(text) => {
            let list = written_down(text)?;
            fields.take(key);
            Some(list)
        }
        _ => None,
    }
}

/// A part of a record that datasets write as a text or as messages.
enum Given {
    Text(String),
    Turns(Vec<Map<String, Value>>),
}

impl Given {
    fn turns(self, role: &str) -> Vec<Map<String, Value>> {
        match self {
            Given::Text(text) => vec![message(role, text)],
            Given::Turns(turns) => turns,
        }
    }
}

/// What is answered: a text, a message, or a list of messages.
fn answer(fields: &mut Fields, key: &'static str) -> Result<Given, String> {
    if fields.get(key).is_some_and(Value::is_object) {
        return turns(Value::Array(vec![fields.take(key)]), key).map(Given::Turns);
    }
    if let Some(list) = listed(fields, key) {
        return turns(list, key).map(Given::Turns);
    }
    let text = fields.text(key)?;
    filled(&[(key, &text)])?;
    Ok(Given::Text(text))
}

/// Question and answer: texts, or lists of messages.
fn completion(fields: &mut Fields, question: &'static str, key: &'static str) -> Result<TextSample, String> {
    let around = Around::of(fields)?;
    match (asked(fields, question)?, answer(fields, key)?) {
        // Only a `prompt` may be a text to go on from; other questions want a template.
        (Given::Text(prompt), Given::Text(completion)) if question == "prompt" && around.is_empty() => {
            Ok(TextSample::Completion { prompt, completion })
        }
        (asked, answer) => {
            let mut given = asked.turns("user");
            // What stands in the prompt is given, whoever says it.
            given.iter_mut().for_each(not_learned);
            let answer = answer.turns("assistant");
            let end = if begins_with(&answer, &given) { answer[given.len()..].to_vec() } else { answer };
            let conversation = around.conversation([given, end].concat());
            Ok(TextSample::Chat(answered(conversation, key)?))
        }
    }
}

/// Prompt, better and worse answer: texts, or messages. Where both answers begin with turns of their own, they hold the
/// whole conversation, and a prompt beside them says the same again (ultrafeedback_binarized; TRL's
/// `maybe_extract_prompt` takes it from them too).
fn preference(fields: &mut Fields) -> Result<TextSample, String> {
    let around = Around::of(fields)?;
    let mut given = match (fields.key(TURNS), fields.key(QUESTION)) {
        (Some(key), _) => Some(Given::Turns(turns(fields.take(key), key)?)),
        (None, Some(key)) if fields.get(key).is_some_and(|prompt| prompt != "") => Some(asked(fields, key)?),
        (None, _) => None,
    };
    let ends = match (answer(fields, "chosen")?, answer(fields, "rejected")?) {
        (Given::Text(chosen), Given::Text(rejected)) if given.is_none() && around.history.is_empty() => {
            fields.take("chosen");
            fields.take("rejected");
            transcript(&chosen).zip(transcript(&rejected)).ok_or(
                "`chosen` and `rejected` answer to nothing: no `prompt`, `question`, `instruction` or `messages`, and they \
                 are no transcripts that begin with `Human:`",
            )?
        }
        (chosen, rejected) => (chosen.turns("assistant"), rejected.turns("assistant")),
    };
    let shared = shared(&ends.0, &ends.1);
    let is_text = matches!(given, Some(Given::Text(_)));
    let begin = given.take().map(|given| given.turns("user")).unwrap_or_default();
    let asks = shared.iter().any(|turn| turn["role"] == "user");
    let held = begins_with(shared, &begin) || (asks && (is_text || begins_with(&begin, shared)));
    let pair = |end: &[Map<String, Value>], key| {
        let turns = if held { end.to_vec() } else { [&begin, end].concat() };
        let mut conversation = around.conversation(turns);
        // Of a whole conversation the last answer is what differs.
        let last = conversation.messages.len().saturating_sub(1);
        conversation.messages.iter_mut().take(last).for_each(not_learned);
        answered(conversation, key)
    };
    Ok(TextSample::Preference { chosen: pair(&ends.0, "chosen")?, rejected: pair(&ends.1, "rejected")? })
}

fn not_learned(turn: &mut Map<String, Value>) {
    turn.insert("train".to_owned(), false.into());
}

fn is_same(a: &Map<String, Value>, b: &Map<String, Value>) -> bool {
    let said = |turn: &Map<String, Value>| match turn.get("content") {
        Some(Value::String(text)) => Value::from(text.trim()),
        other => other.cloned().unwrap_or_default(),
    };
    a["role"] == b["role"] && said(a) == said(b) && a.get("tool_calls") == b.get("tool_calls")
}

fn begins_with(turns: &[Map<String, Value>], begin: &[Map<String, Value>]) -> bool {
    turns.len() >= begin.len() && turns.iter().zip(begin).all(|(a, b)| is_same(a, b))
}

/// The turns that two conversations begin with alike.
fn shared<'t>(one: &'t [Map<String, Value>], other: &[Map<String, Value>]) -> &'t [Map<String, Value>] {
    &one[..one.iter().zip(other).take_while(|(a, b)| is_same(a, b)).count()]
}

fn answered(conversation: Conversation, key: &str) -> Result<Conversation, String> {
    let answers = (0..conversation.messages.len()).any(|message| conversation.role(message) == "assistant");
    match answers {
        true => Ok(conversation),
        false => Err(format!("`{key}`: nobody answers, so there is nothing to learn")),
    }
}
