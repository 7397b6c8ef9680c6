//! From the body of a server's answer to a caption: where its text stands, and what makes it none.

use serde_json::Value;

use crate::Problem;

/// What a body is.
#[derive(Debug, PartialEq)]
pub(super) enum Body {
    /// A caption, in one line.
    Caption(String),
    /// An answer that is no caption.
    Problem(Problem),
    /// Nothing that this protocol has.
    Foreign(String),
}

/// How answers begin that refuse, in lower case. Captions do not speak of who writes them.
const REFUSALS: &[&str] = &[
    "i'm sorry",
    "i am sorry",
    "sorry, ",
    "i apologize",
    "i apologise",
    "my apologies",
    "i can't ",
    "i cannot ",
    "i can not ",
    "i won't ",
    "i will not ",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "i'm not comfortable",
    "i'm afraid",
    "as an ai",
    "unfortunately, i",
    "i must decline",
    "i don't feel comfortable",
    "i do not feel comfortable",
];

/// Reads the body of an answer that succeeded.
pub(super) fn read(body: &str) -> Body {
    let value: Value = match serde_json::from_str(body) {
        Ok(value) => value,
        Err(_) if looks_like_html(body) => return Body::Foreign("it answers with a web page".into()),
        Err(error) => return Body::Foreign(format!("its answer is no JSON ({error})")),
    };
    if let Some(message) = error_message(&value) {
        return Body::Problem(Problem::Failed(message));
    }
    let Some(choice) = value.get("choices").and_then(|choices| choices.get(0)) else {
        return Body::Foreign("its answer has no `choices`".into());
    };
    let message = choice.get("message").unwrap_or(&Value::Null);
    if let Some(refusal) = message.get("refusal").and_then(Value::as_str).filter(|text| !text.trim().is_empty()) {
        return Body::Problem(Problem::Refused(shortened(refusal)));
    }
    let finish = choice.get("finish_reason").and_then(Value::as_str).unwrap_or_default();
    if finish == "content_filter" {
        return Body::Problem(Problem::Refused("the server's filter stopped the answer".into()));
    }
    let written = text(message.get("content"));
    let thoughts = ["reasoning_content", "reasoning"].iter().any(|key| !text(message.get(key)).trim().is_empty());
    let spoken = without_thoughts(&written);
    let has_thoughts = thoughts || spoken.as_deref() != Some(written.as_str());
    let caption = one_line(spoken.as_deref().unwrap_or_default());
    match (caption.is_empty(), finish) {
        (true, _) if has_thoughts => Body::Problem(Problem::Thinking),
        (_, "length") => Body::Problem(Problem::CutOff),
        (true, _) => Body::Problem(Problem::Empty),
        _ if refuses(&caption) => Body::Problem(Problem::Refused(shortened(&caption))),
        _ => Body::Caption(caption),
    }
}

/// What the server itself says is wrong, in the forms that servers have.
pub(super) fn error_message(value: &Value) -> Option<String> {
    let error = ["error", "detail"].iter().find_map(|key| value.get(*key).filter(|error| !error.is_null()))?;
    let message = error.get("message").unwrap_or(error);
    let message = shortened(&message.as_str().map_or_else(|| message.to_string(), str::to_owned));
    (!message.is_empty()).then_some(message)
}

pub(super) fn looks_like_html(body: &str) -> bool {
    let start: String = body.trim_start().chars().take(15).collect::<String>().to_lowercase();
    start.starts_with("<!doctype")
        || start.starts_with("<html")
        || start.starts_with("<head")
        || start.starts_with("<body")
}

/// Content as text, or the texts of its parts.
fn text(content: Option<&Value>) -> String {
    match content {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect::<Vec<_>>().concat()
        }
        _ => String::new(),
    }
}

/// What stands outside of `<think>…</think>`; `None` where the thoughts have no end. Some servers leave out the beginning.
fn without_thoughts(text: &str) -> Option<String> {
    let mut rest = text;
    let mut spoken = String::new();
    if let Some((_, behind)) = text.split_once("</think>").filter(|(before, _)| !before.contains("<think>")) {
        rest = behind;
    }
    while let Some((before, behind)) = rest.split_once("<think>") {
        spoken.push_str(before);
        rest = behind.split_once("</think>")?.1;
    }
    spoken.push_str(rest);
    Some(spoken)
}

/// A caption's words in one line, without quotation marks around all of it. Of caption files with several lines trainers read
/// one.
fn one_line(text: &str) -> String {
    let visible = |character: char| if character.is_control() { ' ' } else { character };
    let line = text.chars().map(visible).collect::<String>().split_whitespace().collect::<Vec<_>>().join(" ");
    let inner = [('"', '"'), ('“', '”'), ('`', '`')].into_iter().find_map(|(open, close)| {
        let inner = line.strip_prefix(open)?.strip_suffix(close)?;
        (!inner.contains([open, close])).then(|| inner.trim().to_owned())
    });
    inner.unwrap_or(line)
}

fn refuses(caption: &str) -> bool {
    let start: String = caption.chars().take(40).collect::<String>().to_lowercase().replace('’', "'");
    REFUSALS.iter().any(|refusal| start.starts_with(refusal))
}

/// The beginning of a text that somebody else wrote, in one line.
pub(super) fn shortened(text: &str) -> String {
    let line = one_line(text);
    match line.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer(message: Value, finish: &str) -> Body {
        read(&json!({ "choices": [{ "message": message, "finish_reason": finish }] }).to_string())
    }

    fn said(content: &str) -> Body {
        answer(json!({ "role": "assistant", "content": content }), "stop")
    }

    #[test]
    fn a_caption_is_one_line_without_thoughts_and_quotation_marks() {
        let caption = |text: &str| Body::Caption(text.to_owned());
        assert_eq!(said("  A red\n\n apple.\u{0} "), caption("A red apple."));
        assert_eq!(said("<think>an apple?\nred</think>\n\"A red apple.\""), caption("A red apple."));
        assert_eq!(said("so, an apple</think> An apple."), caption("An apple."));
        assert_eq!(said("\"Stop\" and \"Go\""), caption("\"Stop\" and \"Go\""));
        let parts = json!({ "content": [{ "type": "text", "text": "An " }, { "type": "text", "text": "apple." }] });
        assert_eq!(answer(parts, "stop"), caption("An apple."));
        assert_eq!(said("Sorry-looking dog in the rain"), caption("Sorry-looking dog in the rain"));
    }

    #[test]
    fn what_is_no_caption_says_why() {
        let problem = Body::Problem;
        assert_eq!(said("  "), problem(Problem::Empty));
        assert_eq!(answer(json!({ "content": null }), "stop"), problem(Problem::Empty));
        assert_eq!(answer(json!({ "content": "A red" }), "length"), problem(Problem::CutOff));
        assert_eq!(said("<think>hm"), problem(Problem::Thinking));
        assert_eq!(said("<think>hm</think>"), problem(Problem::Thinking));
        assert_eq!(answer(json!({ "content": "", "reasoning_content": "hm" }), "length"), problem(Problem::Thinking));
        for refusal in ["I’m sorry, but I can't help with that.", "I cannot describe this.", "As an AI, I …"] {
            assert!(matches!(said(refusal), Body::Problem(Problem::Refused(_))), "{refusal}");
        }
        let refusal = answer(json!({ "content": null, "refusal": "No." }), "stop");
        assert_eq!(refusal, problem(Problem::Refused("No.".into())));
        assert!(matches!(answer(json!({ "content": "A" }), "content_filter"), Body::Problem(Problem::Refused(_))));
        let error = read(r#"{"error":{"message":"model crashed","code":500}}"#);
        assert_eq!(error, problem(Problem::Failed("model crashed".into())));
    }

    #[test]
    fn another_protocol_is_told() {
        for (body, said) in [
            ("<!DOCTYPE html><p>hello", "web page"),
            ("hello", "no JSON"),
            (r#"{"response":"A red apple"}"#, "no `choices`"),
            (r#"{"choices":[]}"#, "no `choices`"),
            ("[]", "no `choices`"),
        ] {
            let Body::Foreign(reason) = read(body) else { panic!("{body}") };
            assert!(reason.contains(said), "{reason}");
        }
    }
}
