//! From text to checked values: both formats become one flat table, and every problem is collected with its line, so
//! that a user sees all of them at once.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::keys::Keys;
use crate::Plugins;
use crate::optimiser::OptimiserRegistry;

/// What is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file, where there is one.
    pub path: Option<PathBuf>,
    /// Everything that is wrong, in the order of the file.
    pub problems: Vec<Problem>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1, where it is known.
    pub line: Option<usize>,
    /// The key, where there is one.
    pub key: Option<String>,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            match &self.path {
                Some(path) => write!(f, "{}", path.display())?,
                None => write!(f, "configuration")?,
            }
            if let Some(line) = problem.line {
                write!(f, ":{line}")?;
            }
            if let Some(key) = &problem.key {
                write!(f, ": `{key}`")?;
            }
            write!(f, ": {}", problem.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// The format of a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// TOML.
    Toml,
    /// YAML (JSON is YAML).
    Yaml,
}

/// The flat table of a configuration, taken apart key by key.
#[derive(Debug)]
pub(super) struct Reader {
    path: Option<PathBuf>,
    text: String,
    values: Map<String, Value>,
    problems: Vec<Problem>,
    keys: Keys,
    optimisers: OptimiserRegistry,
}

impl Reader {
    /// Reads a file, whose name says its format.
    pub(super) fn open(path: &Path, plugins: &Plugins) -> Result<Self, ConfigError> {
        let problem = |message: String| ConfigError {
            path: Some(path.to_owned()),
            problems: vec![Problem { line: None, key: None, message }],
        };
        let format = match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => Format::Toml,
            Some("yaml" | "yml" | "json") => Format::Yaml,
            _ => return Err(problem("expected a name that ends in .toml, .yaml, .yml or .json".into())),
        };
        let bytes = std::fs::read(path).map_err(|error| problem(format!("cannot read: {error}")))?;
        let text = String::from_utf8(bytes).map_err(|error| problem(format!("not UTF-8: {error}")))?;
        Self::parse(Some(path.to_owned()), &text, format, plugins)
    }

    pub(super) fn parse(
        path: Option<PathBuf>,
        text: &str,
        format: Format,
        plugins: &Plugins,
    ) -> Result<Self, ConfigError> {
        let parsed: Result<Value, (Option<usize>, String)> = match format {
            Format::Toml => toml::from_str(text).map_err(|error| {
                let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
                (line, error.message().to_owned())
            }),
            Format::Yaml => serde_saphyr::from_str(text).map_err(|error| {
                let line = error.location().map(|location| location.line() as usize);
                (line, error.to_string().lines().next().unwrap_or_default().to_owned())
            }),
        };
        let problem =
            |line, message| ConfigError { path: path.clone(), problems: vec![Problem { line, key: None, message }] };
        let values = match parsed {
            Ok(Value::Object(values)) => values,
            Ok(Value::Null) => Map::new(),
            Ok(_) => return Err(problem(None, "expected keys and values at the top level".into())),
            Err((line, message)) => return Err(problem(line, message)),
        };
        let (keys, optimisers) = (plugins.keys.clone(), plugins.optimisers.clone());
        Ok(Self { path, text: text.to_owned(), values, problems: Vec::new(), keys, optimisers })
    }

    /// The keys that there may be.
    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// What is given for a key.
    pub(super) fn given<'r>(&'r mut self, key: &'r str) -> Given<'r> {
        Given { reader: self, key }
    }

    /// Puts `key=value` over the file's own; the value is read as TOML, and as plain text where that fails.
    pub(super) fn set(&mut self, assignment: &str) {
        let Some((key, value)) = assignment.split_once('=') else {
            self.problem(None, format!("`--set {assignment}`: expected key=value"));
            return;
        };
        let (key, value) = (key.trim(), value.trim());
        let typed = toml::from_str::<Map<String, Value>>(&format!("value = {value}"))
            .ok()
            .and_then(|mut table| table.remove("value"));
        // The length of a run has two spellings: the one given here takes the place of the file's.
        match key {
            "epochs" => drop(self.values.remove("max_train_steps")),
            "max_train_steps" => drop(self.values.remove("epochs")),
            _ => {}
        }
        self.values.insert(key.to_owned(), typed.unwrap_or_else(|| Value::String(value.to_owned())));
    }

    /// Puts a folder in the place of all datasets that are named.
    pub(super) fn replace_folder(&mut self, folder: &Path) {
        for key in ["datasets", "dataset_config", "reg_data_dir", "metadata_file"] {
            self.values.remove(key);
        }
        self.values.insert("train_data_dir".into(), Value::String(folder.to_string_lossy().into_owned()));
    }

    /// Notes a problem with a key, at its line.
    pub(super) fn problem(&mut self, key: Option<&str>, message: impl Into<String>) {
        let line = key.and_then(|key| self.line_of(key));
        let problem = Problem { line, key: key.map(str::to_owned), message: message.into() };
        // Keys of the run and of its datasets are read twice.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// The values as read, or all problems found on the way.
    pub(super) fn finish<T>(mut self, value: T) -> Result<T, ConfigError> {
        let unknown: Vec<String> = self.values.keys().filter(|key| self.keys.get(key).is_none()).cloned().collect();
        for key in unknown {
            let message = self.keys.advice(&key);
            self.problem(Some(&key), message);
        }
        if self.problems.is_empty() {
            return Ok(value);
        }
        self.problems.sort_by_key(|problem| problem.line);
        Err(ConfigError { path: self.path, problems: self.problems })
    }

    /// A reader of a table within this one: its own keys over this one's.
    pub(super) fn nested(&self, own: &Map<String, Value>) -> Self {
        let mut values = self.values.clone();
        values.remove("train_data_dir");
        values.extend(own.clone());
        let (keys, optimisers) = (self.keys.clone(), self.optimisers.clone());
        Self { path: self.path.clone(), text: String::new(), values, problems: Vec::new(), keys, optimisers }
    }

    /// Takes over the problems of a nested table; those with inherited keys are known already.
    pub(super) fn absorb(&mut self, nested: Self, label: &str, own: &Map<String, Value>) {
        let allowed: Vec<&str> = self.keys.of_datasets().collect();
        for key in own.keys().filter(|key| !allowed.contains(&key.as_str())) {
            let message = match self.keys.get(key) {
                Some(_) => format!("{label}: `{key}` holds for the whole run; it stands outside of the datasets"),
                None => format!("{label}: `{key}`: {}", self.keys.advice(key)),
            };
            self.problem(None, message);
        }
        for problem in nested.problems {
            let key = problem.key.unwrap_or_default();
            if own.contains_key(&key) || key == "train_data_dir" {
                self.problem(None, format!("{label}: `{key}`: {}", problem.message));
            }
        }
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// The line that a key of the flat file stands on.
    fn line_of(&self, key: &str) -> Option<usize> {
        let begins = |line: &str| {
            let rest = line.trim_start().trim_start_matches(['"', '\'']).strip_prefix(key)?;
            rest.trim_start_matches(['"', '\'']).trim_start().starts_with(['=', ':']).then_some(())
        };
        self.text.lines().position(|line| begins(line).is_some()).map(|index| index + 1)
    }
}

/// What a configuration gives for one key. What is wrong with it becomes a problem at the key's line; the methods then return
/// what they return where nothing is given.
#[derive(Debug)]
pub struct Given<'r> {
    reader: &'r mut Reader,
    key: &'r str,
}

impl Given<'_> {
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
        match self.value() {
            None => default,
            Some(Value::Bool(value)) => value,
            Some(other) => self.mismatch("true or false", &other).unwrap_or(default),
        }
    }

    /// A whole number from `least` on.
    pub fn count(&mut self, least: u64) -> Option<usize> {
        let value = self.value()?;
        match value.as_u64().filter(|&number| number >= least).and_then(|number| usize::try_from(number).ok()) {
            Some(number) => Some(number),
            None => self.mismatch(&format!("a whole number from {least} on"), &value),
        }
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
        match crate::plan::bytes::parse(&text) {
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
        let sides: Option<Vec<usize>> = match &value {
            Value::Number(_) => value.as_u64().map(|side| vec![side as usize]),
            Value::String(text) => text.split([',', 'x']).map(|side| side.trim().parse().ok()).collect(),
            Value::Array(items) => items.iter().map(|item| item.as_u64().map(|side| side as usize)).collect(),
            _ => None,
        };
        let size = match sides.as_deref() {
            Some([side]) => (*side, *side),
            Some([width, height]) => (*width, *height),
            _ => return self.mismatch("\"width,height\" or one number", &value),
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

    /// A list of tables.
    pub(super) fn tables(&mut self) -> Vec<Map<String, Value>> {
        let Some(value) = self.value() else { return Vec::new() };
        let tables = value.as_array().map(|list| list.iter().map(|table| table.as_object().cloned()).collect());
        match tables {
            Some(Some(tables)) => tables,
            _ => self.mismatch("a list of tables, [[datasets]] in TOML", &value).unwrap_or_default(),
        }
    }

    fn mismatch<T>(&mut self, expected: &str, found: &Value) -> Option<T> {
        self.problem(format!("expected {expected}, found {found}"));
        None
    }
}

/// `; did you mean …?` with the nearest of some names, if one is near.
pub(super) fn near<'n>(word: &str, names: impl Iterator<Item = &'n str>) -> String {
    let scored = names.map(|name| (strsim::jaro_winkler(word, name), name));
    match scored.max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((score, name)) if score > 0.8 => format!("; did you mean `{name}`?"),
        _ => String::new(),
    }
}
