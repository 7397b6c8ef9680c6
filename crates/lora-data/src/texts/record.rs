//! One record of a text dataset: a plain text, a conversation in any of the usual spellings, or a pair of answers of which
//! one is better.

use serde_json::{Map, Value};

use crate::template::Conversation;

/// The form of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
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
    /// `prompt`, `chosen`, `rejected`.
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

/// A record by its keys; of several forms the one that says most.
pub(super) fn parse(record: Value) -> Result<(TextForm, TextSample), String> {
    let mut object = match record {
        Value::String(text) => return plain(text),
        Value::Object(object) => object,
        other => return Err(format!("expected an object or text, found {}", shape(&other))),
    };
    object.retain(|_, value| !value.is_null());
    let has = |key: &str| object.contains_key(key);
    if has("chosen") && has("rejected") {
        return preference(object).map(|pair| (TextForm::Preference, pair));
    }
    for (key, form) in [("messages", TextForm::Messages), ("conversations", TextForm::ShareGpt)] {
        if has(key) {
            let mut conversation = surroundings(&mut object)?;
            conversation.messages.extend(turns(object.remove(key).unwrap_or_default(), key)?);
            return Ok((form, TextSample::Chat(answered(conversation, key)?)));
        }
    }
    if has("instruction") {
        let answer = if has("output") { "output" } else { "response" };
        let mut conversation = surroundings(&mut object)?;
        let (task, input) = (text(&mut object, "instruction")?, text(&mut object, "input")?);
        let output = text(&mut object, answer)?;
        filled(&[("instruction", &task), (answer, &output)])?;
        let task = if input.is_empty() { task } else { format!("{task}\n\n{input}") };
        conversation.messages.extend([message("user", task), message("assistant", output)]);
        return Ok((TextForm::Alpaca, TextSample::Chat(conversation)));
    }
    let answer = ["completion", "response"].into_iter().find(|key| has(key));
    if let Some(answer) = answer.filter(|_| has("prompt")) {
        return completion(object, answer).map(|sample| (TextForm::Completion, sample));
    }
    if let Some(key) = ["text", "content"].into_iter().find(|key| has(key)) {
        return plain(text(&mut object, key)?);
    }
    let keys = object.keys().cloned().collect::<Vec<_>>().join(", ");
    Err(format!(
        "no `text`, `instruction` and `output`, `prompt` and `completion`, `messages`, `conversations`, or `chosen` and \
         `rejected`; found {keys}"
    ))
}

fn plain(text: String) -> Result<(TextForm, TextSample), String> {
    match text.trim().is_empty() {
        true => Err("the text is empty".into()),
        false => Ok((TextForm::Plain, TextSample::Plain(text))),
    }
}

fn filled(fields: &[(&str, &str)]) -> Result<(), String> {
    match fields.iter().find(|(_, text)| text.trim().is_empty()) {
        Some((key, _)) => Err(format!("`{key}` is empty")),
        None => Ok(()),
    }
}

/// A text of a record, empty where there is none.
fn text(object: &mut Map<String, Value>, key: &str) -> Result<String, String> {
    match object.remove(key) {
        Some(Value::String(text)) => Ok(text),
        None => Ok(String::new()),
        Some(other) => Err(format!("`{key}`: expected text, found {}", shape(&other))),
    }
}

fn message(role: &str, content: String) -> Map<String, Value> {
    Map::from_iter([("role".to_owned(), role.into()), ("content".to_owned(), content.into())])
}

/// What stands beside the turns of a conversation: tools, variables of the template, a system prompt.
fn surroundings(object: &mut Map<String, Value>) -> Result<Conversation, String> {
    let tools = match object.remove("tools") {
        // Some exporters write the list as text.
        Some(Value::String(text)) if text.trim().is_empty() => Value::Null,
        Some(Value::String(text)) => {
            serde_json::from_str(&text).map_err(|error| format!("`tools`: not valid JSON: {error}"))?
        }
        Some(tools) => tools,
        None => Value::Null,
    };
    let tools = match tools {
        Value::Array(tools) if tools.is_empty() => Value::Null,
        tools @ (Value::Array(_) | Value::Null) => tools,
        other => return Err(format!("`tools`: expected a list, found {}", shape(&other))),
    };
    let variables = match object.remove("chat_template_kwargs") {
        Some(Value::Object(variables)) => variables,
        None => Map::new(),
        Some(other) => return Err(format!("`chat_template_kwargs`: expected an object, found {}", shape(&other))),
    };
    let system = text(object, "system")?;
    let messages = if system.trim().is_empty() { Vec::new() } else { vec![message("system", system)] };
    Ok(Conversation { messages, tools, variables })
}

/// Prompt and completion: both texts, or both lists of messages.
fn completion(mut object: Map<String, Value>, answer: &str) -> Result<TextSample, String> {
    if object["prompt"].is_array() || object[answer].is_array() {
        let mut conversation = surroundings(&mut object)?;
        let mut given = turns(object.remove("prompt").unwrap_or_default(), "prompt")?;
        // What stands in the prompt is given, whoever says it.
        for own in &mut given {
            own.insert("train".to_owned(), false.into());
        }
        conversation.messages.extend(given);
        conversation.messages.extend(turns(object.remove(answer).unwrap_or_default(), answer)?);
        return Ok(TextSample::Chat(answered(conversation, answer)?));
    }
    let (prompt, completion) = (text(&mut object, "prompt")?, text(&mut object, answer)?);
    filled(&[("prompt", &prompt), (answer, &completion)])?;
    Ok(TextSample::Completion { prompt, completion })
}

/// Prompt, better and worse answer: texts, or lists of messages; without a prompt the answers hold the whole conversation.
fn preference(mut object: Map<String, Value>) -> Result<TextSample, String> {
    let around = surroundings(&mut object)?;
    let given = match object.remove("prompt") {
        Some(Value::String(prompt)) => vec![message("user", prompt)],
        Some(list) => turns(list, "prompt")?,
        None => Vec::new(),
    };
    let mut end = |key: &str| {
        let mut conversation = around.clone();
        conversation.messages.extend(given.iter().cloned().map(|mut own| {
            own.insert("train".to_owned(), false.into());
            own
        }));
        match object.remove(key) {
            Some(Value::String(answer)) => {
                filled(&[(key, &answer)])?;
                conversation.messages.push(message("assistant", answer));
            }
            Some(list) => conversation.messages.extend(turns(list, key)?),
            None => {}
        }
        // Of a whole conversation the last answer is what differs.
        let last = conversation.messages.len().saturating_sub(1);
        for own in conversation.messages.iter_mut().take(last) {
            own.insert("train".to_owned(), false.into());
        }
        answered(conversation, key)
    };
    Ok(TextSample::Preference { chosen: end("chosen")?, rejected: end("rejected")? })
}

fn answered(conversation: Conversation, key: &str) -> Result<Conversation, String> {
    let answers = (0..conversation.messages.len()).any(|message| conversation.role(message) == "assistant");
    match answers {
        true => Ok(conversation),
        false => Err(format!("`{key}`: nobody answers, so there is nothing to learn")),
    }
}

/// The turns of a conversation, in either spelling.
fn turns(value: Value, key: &str) -> Result<Vec<Map<String, Value>>, String> {
    let Value::Array(turns) = value else { return Err(format!("`{key}`: expected a list, found {}", shape(&value))) };
    turns.into_iter().enumerate().map(|(index, own)| turn(own, &format!("`{key}`, turn {}", index + 1))).collect()
}

fn turn(value: Value, place: &str) -> Result<Map<String, Value>, String> {
    let Value::Object(mut own) = value else {
        return Err(format!("{place}: expected an object, found {}", shape(&value)));
    };
    let spoken = ["role", "from"].into_iter().find_map(|name| own.remove(name)).filter(|value| !value.is_null());
    let spoken = spoken.ok_or_else(|| format!("{place}: no `role` or `from`"))?;
    let name = spoken.as_str().ok_or_else(|| format!("{place}: expected text, found {}", shape(&spoken)))?;
    let role = match name {
        "system" | "developer" => "system",
        "user" | "human" => "user",
        "assistant" | "gpt" | "model" | "chatgpt" | "function_call" => "assistant",
        "tool" | "function" | "observation" | "ipython" => "tool",
        other => return Err(format!("{place}: `{other}` is none of system, user, assistant, tool (human, gpt)")),
    };
    let content = ["content", "value"].into_iter().find_map(|name| own.remove(name)).unwrap_or_default();
    let mut turn = Map::from_iter([("role".to_owned(), role.into())]);
    match content {
        // A call that was written down as JSON.
        Value::String(text) if name == "function_call" => {
            let call: Value =
                serde_json::from_str(&text).map_err(|error| format!("{place}: the call is not valid JSON: {error}"))?;
            let calls = if let Value::Array(calls) = call { calls } else { vec![call] };
            let call = |function: Value| serde_json::json!({"type": "function", "function": function});
            own.insert("tool_calls".to_owned(), calls.into_iter().map(call).collect());
            turn.insert("content".to_owned(), "".into());
        }
        content @ (Value::String(_) | Value::Array(_)) => {
            turn.insert("content".to_owned(), content);
        }
        // Tools may answer with anything, and calls have no words.
        content if role == "tool" && !content.is_null() => {
            turn.insert("content".to_owned(), content);
        }
        Value::Null if own.contains_key("tool_calls") || own.contains_key("reasoning_content") => {
            turn.insert("content".to_owned(), "".into());
        }
        Value::Null => return Err(format!("{place}: no `content` or `value`")),
        other => return Err(format!("{place}: expected text, found {}", shape(&other))),
    }
    own.retain(|_, value| !value.is_null());
    if let Some(calls) = own.get_mut("tool_calls").and_then(Value::as_array_mut) {
        calls.iter_mut().for_each(with_arguments_as_object);
    }
    turn.extend(own);
    Ok(turn)
}

/// Arguments of a call are an object for templates and a text in files of OpenAI's layout.
fn with_arguments_as_object(call: &mut Value) {
    let function = if call.get("function").is_some() { &mut call["function"] } else { call };
    if let Some(Value::String(text)) = function.get("arguments")
        && let Ok(arguments @ Value::Object(_)) = serde_json::from_str(text)
    {
        function["arguments"] = arguments;
    }
}
