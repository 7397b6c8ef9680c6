//! What a configuration gives for a key, as a value of the type that the key has.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::Warmup;
use super::read::{Reader, near};
use crate::optimiser::OptimiserRegistry;

/// What a configuration gives for one key. What is wrong with it becomes a problem at the key's line; the methods then return
/// what they return where nothing is given.
#[derive(Debug)]
pub struct Given<'r> {
    reader: &'r mut Reader,
    key: &'r str,
}

/// The most that a count without a limit of its own may be.
const MOST: u64 = 1_000_000_000;

impl<'r> Given<'r> {
    pub(super) fn new(reader: &'r mut Reader, key: &'r str) -> Self {
        Self { reader, key }
    }

    /// Whether a key is given, this one or another.
    pub fn has(&self, key: &str) -> bool {
        self.reader.has(key)
    }

    /// Notes a problem with the key.
    pub fn problem(&mut self, message: impl Into<String>) {
        self.reader.problem(Some(self.key), message);
    }

    /// The optimisers that a configuration may name.
    pub(super) fn optimisers(&self) -> &OptimiserRegistry {
        &self.reader.optimisers
    }

    fn value(&self) -> Option<Value> {
        self.reader.values.get(self.key).cloned()
    }

    /// Text.
    pub fn text(&mut self) -> Option<String> {
        match self.value()? {
            Value::String(text) => Some(text),
            // An unquoted word of digits is still a name.
            Value::Number(number) => Some(number.to_string()),
            other => self.mismatch("text", &other),
        }
    }

    /// Text, or a switch as the word for it.
    pub fn word(&mut self) -> Option<String> {
        match self.value()? {
            Value::Bool(on) => Some(on.to_string()),
            _ => self.text(),
        }
    }

    /// Text that must be there.
    pub fn required_text(&mut self) -> String {
        match self.text() {
            Some(text) if !text.trim().is_empty() => text,
            _ => {
                if !self.reader.problems.iter().any(|problem| problem.key.as_deref() == Some(self.key)) {
                    self.problem("is missing; it has no default");
                }
                String::new()
            }
        }
    }

    /// True or false.
    pub fn boolean(&mut self, default: bool) -> bool {
        self.optional_boolean().unwrap_or(default)
    }

    /// True or false, where either is given.
    pub fn optional_boolean(&mut self) -> Option<bool> {
        match self.value() {
            None => None,
            Some(Value::Bool(value)) => Some(value),
            Some(other) => self.mismatch("true or false", &other),
        }
    }

    /// A whole number from `least` on, up to 10⁹: beyond it are slips of the finger.
    pub fn count(&mut self, least: u64) -> Option<usize> {
        self.count_to(least, MOST)
    }

    /// A whole number from `least` to `most`: what memory is taken by, or what counts are multiplied with.
    pub fn count_to(&mut self, least: u64, most: u64) -> Option<usize> {
        let value = self.value()?;
        match value.as_u64().filter(|number| (least..=most).contains(number)).map(usize::try_from) {
            Some(Ok(number)) => Some(number),
            _ if most == MOST => self.mismatch(&format!("a whole number from {least} on"), &value),
            _ => self.mismatch(&format!("a whole number from {least} to {most}"), &value),
        }
    }

    /// Any whole number from 0 on, for a seed.
    pub fn seed(&mut self) -> Option<u64> {
        let value = self.value()?;
        value.as_u64().or_else(|| self.mismatch("a whole number from 0 to 18446744073709551615", &value))
    }

    /// A number above 0.
    pub fn positive(&mut self) -> Option<f64> {
        self.number("a number above 0", |number| number > 0.0)
    }

    /// A number from 0 on.
    pub fn not_negative(&mut self) -> Option<f64> {
        self.number("a number from 0 on", |number| number >= 0.0)
    }

    /// A number from 0 to 1.
    pub fn share(&mut self) -> Option<f64> {
        self.number("a number from 0 to 1", |number| (0.0..=1.0).contains(&number))
    }

    /// A number from 0 to below 1.
    pub fn probability(&mut self) -> Option<f64> {
        self.number("a number from 0 to below 1", |number| (0.0..1.0).contains(&number))
    }

    /// A number of steps, or a share of the run below 1.
    pub fn steps_or_share(&mut self) -> Option<Warmup> {
        match self.number("a number of steps, or a share below 1", |value| value >= 0.0)? {
            share if share > 0.0 && share < 1.0 => Some(Warmup::Share(share)),
            steps if steps.fract() != 0.0 => {
                self.problem(format!("{steps} is neither a whole number of steps nor a share below 1"));
                None
            }
            steps => Some(Warmup::Steps(steps as usize)),
        }
    }

    /// A finite number in a range, which `expected` names.
    pub fn number(&mut self, expected: &str, fits: impl Fn(f64) -> bool) -> Option<f64> {
        let value = self.value()?;
        match value.as_f64().filter(|&number| number.is_finite() && fits(number)) {
            Some(number) => Some(number),
            None => self.mismatch(expected, &value),
        }
    }

    /// A size of memory, `"8GiB"`.
    pub(super) fn bytes(&mut self) -> Option<u64> {
        let text = self.text()?;
        match crate::bytes::parse(&text) {
            Ok(bytes) => Some(bytes),
            Err(message) => {
                self.problem(message);
                None
            }
        }
    }

    /// A table of numbers by name; switches count as 0 and 1.
    pub fn numbers(&mut self) -> BTreeMap<String, f64> {
        let Some(value) = self.value() else { return BTreeMap::new() };
        let number = |value: &Value| value.as_f64().or_else(|| value.as_bool().map(|on| f64::from(u8::from(on))));
        let table = value.as_object().map(|table| {
            table.iter().map(|(name, value)| Some((name.clone(), number(value)?))).collect::<Option<BTreeMap<_, _>>>()
        });
        match table {
            Some(Some(numbers)) if numbers.values().all(|number| number.is_finite()) => numbers,
            _ => self.mismatch("a table of numbers by name", &value).unwrap_or_default(),
        }
    }

    /// A table of numbers or lists of numbers by name, or a list of texts `name=value`, as sd-scripts has them.
    pub fn number_lists(&mut self) -> BTreeMap<String, Vec<f64>> {
        let Some(value) = self.value() else { return BTreeMap::new() };
        let number = |value: &Value| match value {
            Value::Bool(on) => Some(f64::from(u8::from(*on))),
            value => value.as_f64().filter(|number| number.is_finite()),
        };
        let numbers = |value: &Value| match value {
            Value::Array(items) => items.iter().map(number).collect::<Option<Vec<_>>>(),
            value => Some(vec![number(value)?]),
        };
        let written = |text: &str| {
            let (name, values) = text.split_once('=')?;
            let values = values.trim().trim_matches(['(', ')', '[', ']']).trim_end_matches(',');
            let number = |word: &str| match word.trim() {
                "True" | "true" => Some(1.0),
                "False" | "false" => Some(0.0),
                word => word.parse::<f64>().ok().filter(|number| number.is_finite()),
            };
            Some((name.trim().to_owned(), values.split(',').map(number).collect::<Option<Vec<_>>>()?))
        };
        let table: Option<BTreeMap<_, _>> = match &value {
            Value::Object(table) => table.iter().map(|(name, value)| Some((name.clone(), numbers(value)?))).collect(),
            Value::Array(items) => items.iter().map(|item| written(item.as_str()?)).collect(),
            Value::String(text) => text.split_whitespace().map(written).collect(),
            _ => None,
        };
        let expected = "a table of numbers, or of lists of them, by name, or a list of texts \"name=value\"";
        table.unwrap_or_else(|| self.mismatch(expected, &value).unwrap_or_default())
    }

    /// One text or a list of texts.
    pub fn texts(&mut self) -> Option<Vec<String>> {
        match self.value()? {
            Value::String(text) => Some(vec![text]),
            Value::Array(items) if items.iter().all(Value::is_string) => {
                Some(items.iter().filter_map(|item| item.as_str().map(str::to_owned)).collect())
            }
            other => self.mismatch("text or a list of texts", &other),
        }
    }

    /// A list of whole numbers that passes a test, which `expected` describes.
    pub fn whole_numbers(&mut self, expected: &str, test: impl Fn(&[usize]) -> bool) -> Option<Vec<usize>> {
        let value = self.value()?;
        let number = |item: &Value| item.as_u64().and_then(|number| usize::try_from(number).ok());
        let numbers = value.as_array().and_then(|items| items.iter().map(number).collect::<Option<Vec<_>>>());
        match numbers.filter(|numbers| test(numbers)) {
            Some(numbers) => Some(numbers),
            None => self.mismatch(expected, &value),
        }
    }

    /// Two numbers.
    pub fn pair(&mut self) -> Option<(f64, f64)> {
        let value = self.value()?;
        match value.as_array().map(|items| items.iter().map(Value::as_f64).collect::<Vec<_>>()).as_deref() {
            Some([Some(first), Some(second)]) => Some((*first, *second)),
            _ => self.mismatch("two numbers in brackets", &value),
        }
    }

    /// Width and height: `"512,768"`, `512` or `[512, 768]`, in multiples of 8.
    pub fn size(&mut self) -> Option<(usize, usize)> {
        let value = self.value()?;
        self.size_of(&value)
    }

    /// One such size, or a list of them.
    pub fn sizes(&mut self) -> Option<Vec<(usize, usize)>> {
        match self.value()? {
            Value::Array(items) if items.is_empty() => self.mismatch("at least one size", &Value::Array(items)),
            Value::Array(items) => items.iter().map(|item| self.size_of(item)).collect(),
            one => self.size_of(&one).map(|size| vec![size]),
        }
    }

    fn size_of(&mut self, value: &Value) -> Option<(usize, usize)> {
        let sides: Option<Vec<usize>> = match value {
            Value::Number(_) => value.as_u64().map(|side| vec![side as usize]),
            Value::String(text) => text.split([',', 'x']).map(|side| side.trim().parse().ok()).collect(),
            Value::Array(items) => items.iter().map(|item| item.as_u64().map(|side| side as usize)).collect(),
            _ => None,
        };
        let size = match sides.as_deref() {
            Some([side]) => (*side, *side),
            Some([width, height]) => (*width, *height),
            _ => return self.mismatch("\"width,height\" or one number", value),
        };
        for side in [size.0, size.1] {
            if !(64..=4096).contains(&side) || side % 8 != 0 {
                let near = (side.clamp(64, 4096) / 8 * 8, side.clamp(64, 4096).next_multiple_of(8));
                let message = format!(
                    "{side} pixels: expected a multiple of 8 from 64 to 4096; nearest are {} and {}",
                    near.0, near.1
                );
                self.problem(message);
                return None;
            }
        }
        Some(size)
    }

    /// One of a few words.
    pub fn choice<T: Copy>(&mut self, choices: &[(&str, T)]) -> Option<T> {
        let word = self.text()?;
        match choices.iter().find(|(name, _)| name.eq_ignore_ascii_case(&word)) {
            Some((_, value)) => Some(*value),
            None => {
                let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
                let message =
                    format!("`{word}` is not among {}{}", names.join(", "), near(&word, names.iter().copied()));
                self.problem(message);
                None
            }
        }
    }

    /// A table with entries of its own. One that is wrong is named.
    pub(super) fn table<T: DeserializeOwned>(&mut self) -> Option<T> {
        let value = self.value()?;
        let Value::Object(table) = &value else { return self.mismatch("a table", &value) };
        let read = |table: Map<String, Value>| serde_json::from_value::<T>(Value::Object(table));
        let wrong: Vec<String> = table
            .iter()
            .filter_map(|(name, value)| {
                let error = read(Map::from_iter([(name.clone(), value.clone())])).err()?.to_string();
                Some(if error.contains(name.as_str()) { error } else { format!("`{name}`: {error}") })
            })
            .collect();
        if wrong.is_empty() {
            return read(table.clone()).map_err(|error| self.problem(error.to_string())).ok();
        }
        wrong.into_iter().for_each(|error| self.problem(error));
        None
    }

    /// A list of tables.
    pub(super) fn tables(&mut self) -> Vec<Map<String, Value>> {
        let Some(value) = self.value() else { return Vec::new() };
        let tables = value.as_array().map(|list| list.iter().map(|table| table.as_object().cloned()).collect());
        match tables {
            Some(Some(tables)) => tables,
            _ => {
                let expected = format!("a list of tables, [[{}]] in TOML", self.key);
                self.mismatch(&expected, &value).unwrap_or_default()
            }
        }
    }

    /// A list of tables with entries of their own, at least one. One that is wrong is named.
    pub(super) fn entries<T: DeserializeOwned>(&mut self) -> Vec<T> {
        if self.value().is_some_and(|value| value.as_array().is_some_and(Vec::is_empty)) {
            self.problem("is empty; expected at least one");
        }
        let mut all = Vec::new();
        for (index, table) in self.tables().into_iter().enumerate() {
            match serde_json::from_value(Value::Object(table)) {
                Ok(entry) => all.push(entry),
                Err(error) => self.problem(format!("[{index}]: {error}")),
            }
        }
        all
    }

    fn mismatch<T>(&mut self, expected: &str, found: &Value) -> Option<T> {
        match found {
            // What stands there in YAML may be a comment, or nothing.
            Value::Null => {
                self.problem(format!("expected {expected}, found nothing; # begins a comment, outside of quotes"))
            }
            found => self.problem(format!("expected {expected}, found {found}")),
        }
        None
    }
}
