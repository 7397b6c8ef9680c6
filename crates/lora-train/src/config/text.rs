//! From the text of a file to values, whichever format it has. What the libraries that read TOML, YAML and JSON have against a
//! text is told in the words of this program, with the line and the key that they leave out.

use serde_json::Value;

use super::read::{Format, Problem};

/// The values of a text, and numbers in it that are none: NaN and infinity, which no key takes.
pub(super) fn parse(text: &str, format: Format) -> Result<(Value, Vec<Problem>), Problem> {
    let text = without_mark(text);
    let refused = |line: Option<usize>, name: &str, reason: &str| {
        let key = line.and_then(|line| key_on(text.lines().nth(line - 1)?));
        Problem { line, key, message: in_words(name, reason) }
    };
    match format {
        Format::Toml => {
            let values: Value = toml::from_str(text).map_err(|error| {
                let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
                refused(line, "TOML", error.message())
            })?;
            let problems = not_numbers(&values, text);
            Ok((values, problems))
        }
        Format::Yaml => {
            let values = serde_saphyr::from_str(text).map_err(|error| {
                let line = error.location().map(|location| location.line() as usize);
                refused(line, "YAML", error.to_string().lines().next().unwrap_or_default())
            })?;
            Ok((values, Vec::new()))
        }
    }
}

/// Without the byte order mark that editors put first.
fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// What a library says, without the place that stands before it already, and where it means its own settings, in words that
/// mean something here.
fn in_words(name: &str, reason: &str) -> String {
    let reason = reason.strip_prefix("error: ").unwrap_or(reason);
    let reason = match reason.strip_prefix("line ").and_then(|rest| rest.split_once(": ")) {
        Some((place, reason)) if place.contains(" column ") => reason,
        _ => reason,
    };
    if let Some(number) = reason.strip_prefix("non-finite float ").and_then(|rest| rest.split('`').nth(1)) {
        return format!("expected a finite number, found {number}");
    }
    if reason.starts_with("duplicate") {
        return "duplicate: it is given twice; keep one of them".into();
    }
    let advice = match reason {
        "string values must be quoted, expected literal string" => "; put text in quotes",
        _ if reason.contains("escape") => "; write \\ in paths as / or \\\\, or put the text in single quotes",
        _ if reason.contains("found a tab") || reason.contains("tabs") => "; indent with blanks",
        _ if reason.contains("mapping values are not allowed") => "; put text with a colon in quotes",
        _ if reason.contains("alias") => "; put text that begins with * or & in quotes",
        _ => "",
    };
    format!("not valid {name}: {reason}{advice}")
}

/// The key that a line gives.
fn key_on(line: &str) -> Option<String> {
    let (key, _) = line.trim_start_matches(['-', ' ', '\t', '{', ',']).split_once(['=', ':'])?;
    let key = key.trim().trim_matches(['"', '\'']);
    let is_key = !key.is_empty() && key.chars().all(|letter| letter.is_ascii_alphanumeric() || "_-.".contains(letter));
    is_key.then(|| key.to_owned())
}

/// TOML's `nan` and `inf`, which are null among the values, where nothing else is.
fn not_numbers(values: &Value, text: &str) -> Vec<Problem> {
    let mut found = Vec::new();
    collect_nulls(values, "", &mut found);
    let problem = |path: String| {
        let last =
            path.rsplit('.').next().unwrap_or_default().trim_end_matches(|letter| "[]0123456789".contains(letter));
        let line = text.lines().position(|line| {
            key_on(line).is_some_and(|key| key == last || path.starts_with(&key) && line.contains(last))
        });
        let message = "expected a finite number, found nan or inf".into();
        Problem { line: line.map(|index| index + 1), key: Some(path), message }
    };
    found.into_iter().map(problem).collect()
}

fn collect_nulls(value: &Value, path: &str, found: &mut Vec<String>) {
    match value {
        Value::Null => found.push(path.to_owned()),
        Value::Object(table) => {
            for (key, value) in table {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                collect_nulls(value, &path, found);
            }
        }
        Value::Array(list) => {
            for (index, value) in list.iter().enumerate() {
                collect_nulls(value, &format!("{path}[{index}]"), found);
            }
        }
        _ => {}
    }
}
