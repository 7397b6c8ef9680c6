//! What became of each key: the four lists, for people and for programs.

use std::fmt;

use serde::Serialize;
use serde::ser::SerializeStruct;
use serde_json::{Map, Value};

use crate::Tool;
use crate::config::{Draft, inline};
use crate::tools;

/// Which list a key ends in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It means the same here.
    Taken,
    /// It means something else here; how that is accounted for.
    Translated(String),
    /// The result does not depend on it, for this reason.
    WithoutEffect(String),
    /// There is nothing like it here; what is lost by that.
    NoCounterpart(String),
}

impl Verdict {
    fn said(&self) -> &str {
        match self {
            Self::Taken => "",
            Self::Translated(text) | Self::WithoutEffect(text) | Self::NoCounterpart(text) => text,
        }
    }
}

/// A key of the input, and what became of it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Accounted {
    /// The key, with the tables that it stands in.
    pub key: String,
    /// Its line, where it has one.
    pub line: Option<usize>,
    /// Keys of ours with the values that it gave them.
    pub wrote: Map<String, Value>,
    /// Its list.
    pub verdict: Verdict,
}

impl Serialize for Accounted {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut table = serializer.serialize_struct("Accounted", 4)?;
        table.serialize_field("key", &self.key)?;
        table.serialize_field("line", &self.line)?;
        table.serialize_field("wrote", &self.wrote)?;
        table.serialize_field("said", self.verdict.said())?;
        table.end()
    }
}

impl fmt::Display for Accounted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.key)?;
        for (index, (key, value)) in self.wrote.iter().enumerate() {
            write!(f, "{}{key} = {}", if index == 0 { " → " } else { ", " }, inline(value))?;
        }
        match self.verdict.said() {
            "" => Ok(()),
            said => write!(f, ": {said}"),
        }
    }
}

/// A translated configuration. Its display is the lists.
#[derive(Debug)]
pub struct Import {
    place: String,
    tool: Tool,
    keys: Vec<Accounted>,
    defaults: Vec<Accounted>,
    draft: Draft,
}

impl Import {
    pub(crate) fn new(place: String, tool: Tool, keys: Vec<Accounted>, defaults: Vec<Accounted>, draft: Draft) -> Self {
        Self { place, tool, keys, defaults, draft }
    }

    /// The trainer.
    pub fn tool(&self) -> Tool {
        self.tool
    }

    /// Every key of the input with its list, in the order of their lines.
    pub fn keys(&self) -> &[Accounted] {
        &self.keys
    }

    /// What the trainer does where keys are not given, where that is not what this program does.
    pub fn defaults(&self) -> &[Accounted] {
        &self.defaults
    }

    /// Keys that a configuration must have and the input does not give.
    pub fn missing(&self) -> Vec<&'static str> {
        let has = |key| self.draft.has(key);
        let mut missing: Vec<_> = ["base_model"].into_iter().filter(|key| !has(key)).collect();
        if !has("train_data_dir") && !has("dataset_config") {
            missing.push("train_data_dir");
        }
        missing.extend(["output_dir"].into_iter().filter(|key| !has(key)));
        missing
    }

    /// The configuration as TOML, with a comment at each line that was translated.
    pub fn config(&self) -> String {
        let heading = [format!("From {} ({}).", self.place, tools::table(self.tool).title)];
        let lost = self.list(|verdict| matches!(verdict, Verdict::NoCounterpart(_)));
        let mut footer: Vec<String> = Vec::new();
        if !lost.is_empty() {
            footer.push("No counterpart here:".to_owned());
            footer.extend(
                lost.iter().map(|key| format!("  {}: {}", key.key, key.verdict.said()).replace(['\n', '\r'], " ")),
            );
        }
        self.draft.file(&heading, &self.missing(), &footer)
    }

    fn list(&self, of: fn(&Verdict) -> bool) -> Vec<&Accounted> {
        self.keys.iter().filter(|key| of(&key.verdict)).collect()
    }

    /// The four lists with their names.
    fn lists(&self) -> [(&'static str, Vec<&Accounted>); 4] {
        [
            ("taken", self.list(|verdict| matches!(verdict, Verdict::Taken))),
            ("translated", self.list(|verdict| matches!(verdict, Verdict::Translated(_)))),
            ("without effect on the result", self.list(|verdict| matches!(verdict, Verdict::WithoutEffect(_)))),
            ("no counterpart", self.list(|verdict| matches!(verdict, Verdict::NoCounterpart(_)))),
        ]
    }
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}, {} keys", self.place, tools::table(self.tool).title, self.keys.len())?;
        for (name, keys) in self.lists() {
            if keys.is_empty() {
                continue;
            }
            writeln!(f, "{name} ({}):", keys.len())?;
            for key in keys {
                let line = key.line.map_or_else(String::new, |line| format!("line {line}: "));
                writeln!(f, "  {line}{key}")?;
            }
        }
        if !self.defaults.is_empty() {
            writeln!(f, "not given, and other there than here ({}):", self.defaults.len())?;
            for key in &self.defaults {
                writeln!(f, "  {key}")?;
            }
        }
        for key in self.missing() {
            writeln!(f, "missing: {key} is not in the input; fill it in")?;
        }
        Ok(())
    }
}

impl Serialize for Import {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let [taken, translated, without_effect, no_counterpart] = self.lists().map(|(_, keys)| keys);
        let mut table = serializer.serialize_struct("Import", 9)?;
        table.serialize_field("file", &self.place)?;
        table.serialize_field("trainer", tools::table(self.tool).name)?;
        table.serialize_field("taken", &taken)?;
        table.serialize_field("translated", &translated)?;
        table.serialize_field("without_effect", &without_effect)?;
        table.serialize_field("no_counterpart", &no_counterpart)?;
        table.serialize_field("not_given", &self.defaults)?;
        table.serialize_field("missing", &self.missing())?;
        table.serialize_field("config", &self.config())?;
        table.end()
    }
}
