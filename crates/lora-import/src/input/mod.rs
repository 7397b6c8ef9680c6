//! From a file or a command line to a tree of values that know their lines. What the keys mean is not known here.

pub(crate) mod command;
pub(crate) mod json;
pub(crate) mod tree;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use tree::Node;

/// The largest configuration that is read, in bytes.
const MOST: u64 = 4 << 20;

/// The form of a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// TOML.
    Toml,
    /// YAML.
    Yaml,
    /// JSON.
    Json,
    /// A command line, or a script that has one.
    Command,
}

/// Where a configuration comes from.
#[derive(Debug, Clone)]
pub struct Source {
    pub(crate) name: String,
    pub(crate) content: Content,
}

#[derive(Debug, Clone)]
pub(crate) enum Content {
    File(PathBuf),
    Text(Format, String),
    Words(Vec<String>),
}

impl Source {
    /// A file. Its content says its form, and its name where the content leaves that open.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self { name: path.display().to_string(), content: Content::File(path) }
    }

    /// A text of a known form; messages call it by the name.
    pub fn text(name: impl Into<String>, format: Format, text: impl Into<String>) -> Self {
        Self { name: name.into(), content: Content::Text(format, text.into()) }
    }

    /// The words of a command line, as a shell has split them.
    pub fn command_line(words: impl IntoIterator<Item = String>) -> Self {
        Self { name: "command line".to_owned(), content: Content::Words(words.into_iter().collect()) }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Problem {
    /// The file, or what else the input is called.
    pub place: String,
    /// Line, from 1, where it is known.
    pub line: Option<usize>,
    /// The key, where there is one.
    pub key: Option<String>,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Problem {
    pub(crate) fn new(place: &str, line: usize, key: &str, message: impl Into<String>) -> Self {
        let key = Some(key.to_owned()).filter(|key| !key.is_empty());
        Self { place: place.to_owned(), line: Some(line).filter(|&line| line > 0), key, message: message.into() }
    }

    /// Of a whole input.
    pub(crate) fn of(place: &str, message: impl Into<String>) -> Self {
        Self::new(place, 0, "", message)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.place)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(key) = &self.key {
            write!(f, ": `{key}`")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// All that is wrong with an input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Problems(pub Vec<Problem>);

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// What was read.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) place: String,
    pub(crate) root: Node,
    /// The script that a command line runs (`sdxl_train_network.py`).
    pub(crate) script: Option<String>,
}

/// Reads a source whose form may be open.
pub(crate) fn read(source: &Source) -> Result<Document, Problem> {
    let place = source.name.clone();
    match &source.content {
        Content::Words(words) => command::of_words(&place, words),
        Content::Text(format, text) => parse(&place, *format, text),
        Content::File(path) => {
            let text = text_of(path)?;
            parse(&place, format_of(path, &text), &text)
        }
    }
}

/// The text of a file.
pub(crate) fn text_of(path: &Path) -> Result<String, Problem> {
    let place = path.display().to_string();
    let refused = |message: String| Problem::of(&place, message);
    let size = std::fs::metadata(path).map_err(|error| refused(format!("cannot read: {error}")))?.len();
    if size > MOST {
        return Err(refused(format!("{size} bytes are too many for a configuration; expected at most {MOST}")));
    }
    let bytes = std::fs::read(path).map_err(|error| refused(format!("cannot read: {error}")))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count() + 1;
        Problem::new(&place, line, "", "not UTF-8; save the file as UTF-8 (not UTF-16 or ANSI)")
    })
}

/// What a text is, by its content first.
pub(crate) fn format_of(path: &Path, text: &str) -> Format {
    let name = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let text = tree::without_mark(text);
    let first = text.trim_start().chars().next();
    match name.as_str() {
        _ if first == Some('{') => Format::Json,
        _ if command::is_in(text) => Format::Command,
        "toml" => Format::Toml,
        "yaml" | "yml" => Format::Yaml,
        "json" => Format::Json,
        "sh" | "bat" | "ps1" | "cmd" => Format::Command,
        _ if tree::of_toml("", text).is_ok() => Format::Toml,
        _ => Format::Yaml,
    }
}

fn parse(place: &str, format: Format, text: &str) -> Result<Document, Problem> {
    let text = tree::without_mark(text);
    let root = match format {
        Format::Toml => tree::of_toml(place, text)?,
        Format::Yaml => tree::of_yaml(place, text)?,
        Format::Json => json::parse(place, text)?,
        Format::Command => return command::of_script(place, text),
    };
    Ok(Document { place: place.to_owned(), root, script: None })
}
