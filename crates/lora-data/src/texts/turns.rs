//! Turns and tools as datasets spell them, brought into the spelling of chat templates: roles, calls of tools,
//! transcripts.

use serde_json::{Map, Value, json};

use super::record::shape;

pub(super) fn message(role: &str, content: String) -> Map<String, Value> {
    Map::from_iter([("role".to_owned(), role.into()), ("content".to_owned(), content.into())])
}

/// The tools of a record: a list, or (as some exporters write it) its text. Templates expect each as `{"type":
/// "function", "function": …}`; OpenAI's older `functions` and LLaMA-Factory's files have what is inside.
pub(super) fn tools(tools: Value, key: &str) -> Result<Value, String> {
    let tools = match tools {
        Value::String(text) if text.trim().is_empty() => Value::Null,
        Value::String(text) => {
            serde_json::from_str(&text).map_err(|error| format!("`{key}`: not valid JSON: {error}"))?
        }
        tools => tools,
    };
    match tools {
        Value::Array(tools) if tools.is_empty() => Ok(Value::Null),
        Value::Array(tools) => Ok(tools.into_iter().map(wrapped).collect()),
        Value::Null => Ok(Value::Null),
        other => Err(format!("`{key}`: expected a list, found {}", shape(&other))),
    }
}

fn wrapped(tool: Value) -> Value {
    let is_bare = tool["type"] != "function" && tool["name"].is_string();
    if is_bare { json!({"type": "function", "function": tool}) } else { tool }
}

/// The list of messages that a text is, as some exporters write it. Other texts stay what they are.
pub(super) fn written_down(text: &str) -> Option<Value> {
    if !text.trim_start().starts_with('[') {
        return None;
    }
    let is_turn = |own: &Value| ["role", "from"].iter().any(|key| own.get(*key).is_some_and(Value::is_string));
    let list: Vec<Value> = serde_json::from_str(text).ok()?;
    (!list.is_empty() && list.iter().all(is_turn)).then_some(Value::Array(list))
}

/// A list, or (as some exporters write it) its text.
fn list(value: Value, key: &str) -> Result<Vec<Value>, String> {
    let value = match value {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| format!("`{key}`: expected a list, found text that is no JSON: {error}"))?,
        value => value,
    };
    let Value::Array(list) = value else { return Err(format!("`{key}`: expected a list, found {}", shape(&value))) };
    Ok(list)
}

/// Earlier turns: pairs of question and answer, or messages; or the text of such a list.
pub(super) fn history(value: Value, key: &str) -> Result<Vec<Map<String, Value>>, String> {
    let mut messages = Vec::new();
    for (index, own) in list(value, key)?.into_iter().enumerate() {
        let place = format!("`{key}`, turn {}", index + 1);
        match own.as_array().map(Vec::as_slice) {
            Some([Value::String(question), Value::String(answer)]) => {
                messages.extend([message("user", question.clone()), message("assistant", answer.clone())]);
            }
            Some(_) => return Err(format!("{place}: expected a question and its answer")),
            None => messages.push(turn(own, &place)?),
        }
    }
    Ok(messages)
}

/// The turns of a transcript as hh-rlhf has them, `\n\nHuman: …\n\nAssistant: …`; `None` where it is none, or ends
/// without an answer.
pub(super) fn transcript(text: &str) -> Option<Vec<Map<String, Value>>> {
    const MARKS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];
    let text = format!("\n\n{}", text.trim());
    let (mut rest, mut turns) = (text.strip_prefix(MARKS[0].0)?, Vec::new());
    let mut role = MARKS[0].1;
    loop {
        let next = MARKS.iter().filter_map(|(mark, next)| Some((rest.find(mark)?, mark.len(), *next))).min();
        let end = next.map_or(rest.len(), |(end, ..)| end);
        turns.push(message(role, rest[..end].trim().to_owned()));
        let Some((_, mark, next)) = next else { break };
        (rest, role) = (&rest[end + mark..], next);
    }
    let last = turns.last()?;
    (last["role"] == "assistant" && last["content"] != "").then_some(turns)
}

/// The turns of a conversation, in either spelling; or, as some exporters write them, the text of such a list.
pub(super) fn turns(value: Value, key: &str) -> Result<Vec<Map<String, Value>>, String> {
    list(value, key)?
        .into_iter()
        .enumerate()
        .map(|(index, own)| turn(own, &format!("`{key}`, turn {}", index + 1)))
        .collect()
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
    own.retain(|_, value| !value.is_null());
    // OpenAI's older spelling has one call.
    if let Some(function) = own.remove("function_call") {
        own.insert("tool_calls".to_owned(), json!([{"type": "function", "function": function}]));
    }
    let content = ["content", "value"].into_iter().find_map(|name| own.remove(name)).unwrap_or_default();
    let mut turn = Map::from_iter([("role".to_owned(), role.into())]);
    match content {
        // A call that was written down as JSON.
        Value::String(text) if name == "function_call" => {
            let call: Value =
                serde_json::from_str(&text).map_err(|error| format!("{place}: the call is not valid JSON: {error}"))?;
            let calls = if let Value::Array(calls) = call { calls } else { vec![call] };
            let call = |function: Value| json!({"type": "function", "function": function});
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
