//! From text to one flat table, whichever format it has. Every problem is collected with its line, so that a user sees all of
//! them at once. What is taken out of the table for a key is in [`super::given`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::given::Given;
use super::keys::Keys;
use super::text;
use crate::Plugins;
use crate::optimiser::OptimiserRegistry;

/// What is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConfigError {
    /// The file, where there is one.
    pub path: Option<PathBuf>,
    /// Everything that is wrong, in the order of the file.
    pub problems: Vec<Problem>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
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
    pub(super) values: Map<String, Value>,
    pub(super) problems: Vec<Problem>,
    keys: Keys,
    pub(super) optimisers: OptimiserRegistry,
    /// Keys that tables within this one give.
    of_tables: BTreeSet<String>,
}

impl Reader {
    /// Reads a file, whose name says its format.
    pub(super) fn open(path: &Path, plugins: &Plugins) -> Result<Self, ConfigError> {
        let problem = |message: String| ConfigError {
            path: Some(path.to_owned()),
            problems: vec![Problem { line: None, key: None, message }],
        };
        let format = match path.extension().and_then(|extension| extension.to_str()) {
            Some(name) if name.eq_ignore_ascii_case("toml") => Format::Toml,
            Some(name) if ["yaml", "yml", "json"].iter().any(|own| name.eq_ignore_ascii_case(own)) => Format::Yaml,
            _ => return Err(problem("expected a name that ends in .toml, .yaml, .yml or .json".into())),
        };
        let bytes = std::fs::read(path).map_err(|error| problem(format!("cannot read: {error}")))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            let line = error.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count() + 1;
            problem(format!("line {line} is not UTF-8; save the file as UTF-8 (not UTF-16 or ANSI)"))
        })?;
        Self::parse(Some(path.to_owned()), &text, format, plugins)
    }

    pub(super) fn parse(
        path: Option<PathBuf>,
        text: &str,
        format: Format,
        plugins: &Plugins,
    ) -> Result<Self, ConfigError> {
        let refused = |problem| ConfigError { path: path.clone(), problems: vec![problem] };
        let (values, problems) = text::parse(text, format).map_err(refused)?;
        let mut values = match values {
            Value::Object(values) => values,
            Value::Null => Map::new(),
            _ => {
                let message = "expected keys and values at the top level".into();
                return Err(refused(Problem { line: None, key: None, message }));
            }
        };
        // What was told is not told again, as of another type than was expected.
        values.retain(|key, _| !problems.iter().any(|problem| begins_with(problem.key.as_deref(), key)));
        let (keys, optimisers) = (plugins.keys.clone(), plugins.optimisers.clone());
        let of_tables = BTreeSet::new();
        Ok(Self { path, text: text.to_owned(), values, problems, keys, optimisers, of_tables })
    }

    /// The keys that there may be.
    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// What is given for a key.
    pub(super) fn given<'r>(&'r mut self, key: &'r str) -> Given<'r> {
        Given::new(self, key)
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
            .and_then(|mut table| table.remove("value"))
            // NaN and infinity, which are no values of JSON's.
            .filter(|value| !value.is_null());
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
        let (text, problems, of_tables) = (String::new(), Vec::new(), BTreeSet::new());
        Self { path: self.path.clone(), text, values, problems, keys, optimisers, of_tables }
    }

    /// Takes over the problems of a nested table; those with inherited keys are known already.
    pub(super) fn absorb(&mut self, nested: Self, label: &str, own: &Map<String, Value>) {
        self.of_tables.extend(own.keys().cloned());
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

    /// Whether a key is given, here or in a table within.
    pub(super) fn gives(&self, key: &str) -> bool {
        self.has(key) || self.of_tables.contains(key)
    }

    /// The lines that keys of the flat file stand on.
    pub(super) fn lines(&self) -> BTreeMap<String, usize> {
        self.values.keys().filter_map(|key| Some((key.clone(), self.line_of(key)?))).collect()
    }

    /// The file.
    pub(super) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
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

/// Whether a problem's path is a key's or one within it.
fn begins_with(path: Option<&str>, key: &str) -> bool {
    path.and_then(|path| path.strip_prefix(key)).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// `; did you mean …?` with the nearest of some names, if one is near.
pub(super) fn near<'n>(word: &str, names: impl Iterator<Item = &'n str>) -> String {
    let scored = names.map(|name| (strsim::jaro_winkler(word, name), name));
    match scored.max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((score, name)) if score > 0.8 => format!("; did you mean `{name}`?"),
        _ => String::new(),
    }
}
