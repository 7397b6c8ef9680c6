//! Values as other trainers write them: numbers and switches may be text, whole numbers may have a point.

use serde_json::{Number, Value};

/// A number.
pub(crate) fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
    .filter(|number| number.is_finite())
}

/// A whole number from 0 on.
pub(crate) fn count(value: &Value) -> Option<u64> {
    if let Value::Number(number) = value
        && let Some(number) = number.as_u64()
    {
        return Some(number);
    }
    number(value).filter(|number| number.fract() == 0.0 && (0.0..1e15).contains(number)).map(|number| number as u64)
}

/// True or false.
pub(crate) fn switch(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(on) => Some(*on),
        Value::String(text) if text.eq_ignore_ascii_case("true") => Some(true),
        Value::String(text) if text.eq_ignore_ascii_case("false") => Some(false),
        Value::Number(number) if number.as_u64() == Some(0) => Some(false),
        Value::Number(number) if number.as_u64() == Some(1) => Some(true),
        _ => None,
    }
}

/// Text; a number is text too, as in names of digits.
pub(crate) fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// One text or several.
pub(crate) fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Array(items) => items.iter().map(text).collect(),
        value => text(value).map(|text| vec![text]),
    }
}

/// A number as a value: whole ones without a point.
pub(crate) fn of_number(number: f64) -> Value {
    match number.fract() == 0.0 && number.abs() < 1e15 {
        true => Value::from(number as i64),
        false => Number::from_f64(number).map_or(Value::Null, Value::Number),
    }
}

/// Whether a text names something on a hub (`owner/name`) rather than a file.
pub(crate) fn is_hub_name(text: &str) -> bool {
    let letters = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let is_file = [".safetensors", ".ckpt", ".gguf", ".json", ".jsonl", ".parquet", ".txt", ".pt"]
        .iter()
        .any(|ending| text.ends_with(ending));
    match text.split_once('/') {
        Some((owner, name)) => !is_file && letters(owner) && letters(name),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_switches_may_be_text() {
        assert_eq!((number(&"1e-4".into()), number(&"".into()), number(&true.into())), (Some(1e-4), None, None));
        assert_eq!(
            (count(&"75".into()), count(&2.0.into()), count(&2.5.into()), count(&(-1).into())),
            (Some(75), Some(2), None, None)
        );
        assert_eq!((switch(&"True".into()), switch(&0.into()), switch(&2.into())), (Some(true), Some(false), None));
        assert_eq!((of_number(8.0), of_number(0.5)), (8.into(), 0.5.into()));
    }

    #[test]
    fn names_of_a_hub_are_told_from_files() {
        assert!(is_hub_name("runwayml/stable-diffusion-v1-5") && is_hub_name("Qwen/Qwen3-4B-Instruct-2507"));
        for file in ["models/base.safetensors", "./models/base", "/models/base", "base", "a/b/c", "data\\x"] {
            assert!(!is_hub_name(file), "{file}");
        }
    }
}
