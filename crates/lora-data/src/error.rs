//! The crate's error type: every variant names the file, and the line or key where there is one.

use std::path::{Path, PathBuf};

/// What can go wrong with a dataset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A picture cannot be decoded.
    #[error("{path}: not a readable picture: {reason}", path = path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        reason: String,
    },
    /// A caption or metadata file is malformed.
    #[error("{path}{place}: {reason}", path = path.display(), place = line.map_or_else(String::new, |line| format!(", line {line}")))]
    Caption {
        /// The file.
        path: PathBuf,
        /// The line, from 1, where there is one.
        line: Option<usize>,
        /// What was expected and what found.
        reason: String,
    },
    /// A tokenizer that cannot be read or used.
    #[error("{path}: not a usable tokenizer: {reason}", path = path.display())]
    Tokenizer {
        /// The file or folder.
        path: PathBuf,
        /// What is the matter, and what would work.
        reason: String,
    },
    /// A chat template that cannot be read, or that refuses a conversation.
    #[error("chat template of {origin}: {reason}")]
    Template {
        /// Where the template is from: a file, or its name in one.
        origin: String,
        /// What the template itself says, or what is wrong with it.
        reason: String,
    },
    /// Several caption or metadata files are malformed.
    #[error("{} captions or lists of them cannot be used:{}", problems.len(), listed(problems))]
    Captions {
        /// What is wrong with each.
        problems: Vec<Error>,
    },
    /// A folder or a file without pictures or texts that can be used.
    #[error("{path}: nothing found to train on (looked for {looked_for}); {found}", path = path.display())]
    Empty {
        /// The folder.
        path: PathBuf,
        /// The extensions that count.
        looked_for: String,
        /// What is there instead.
        found: String,
    },
    /// A file that `lora-io` reads or writes.
    #[error(transparent)]
    File(lora_io::Error),
    /// An option that cannot work.
    #[error("{key} = {value} is impossible: {reason}")]
    Option {
        /// The option.
        key: &'static str,
        /// The value given.
        value: String,
        /// Why, and what would work.
        reason: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<lora_io::Error> for Error {
    fn from(error: lora_io::Error) -> Self {
        match error {
            lora_io::Error::Io { path, action, source } => Error::Io { path, action, source },
            other => Error::File(other),
        }
    }
}

/// The most problems of one kind that a message lists.
const LISTED: usize = 20;

fn listed(problems: &[Error]) -> String {
    let mut text: String = problems.iter().take(LISTED).map(|problem| format!("\n  {problem}")).collect();
    if problems.len() > LISTED {
        text.push_str(&format!("\n  and {} more, which `lora dataset --json` lists", problems.len() - LISTED));
    }
    text
}

impl Error {
    /// One error of all that are wrong with captions.
    pub(crate) fn captions(mut problems: Vec<Self>) -> Self {
        match problems.len() {
            1 => problems.remove(0),
            _ => Error::Captions { problems },
        }
    }

    /// What is wrong with captions; any other error is passed on.
    pub(crate) fn into_captions(self) -> Result<Vec<Self>> {
        match self {
            Error::Captions { problems } => Ok(problems),
            Error::Caption { .. } => Ok(vec![self]),
            other => Err(other),
        }
    }

    /// The file or folder that it is about.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Error::Io { path, .. }
            | Error::Picture { path, .. }
            | Error::Caption { path, .. }
            | Error::Tokenizer { path, .. }
            | Error::Empty { path, .. } => Some(path),
            _ => None,
        }
    }

    /// What is the matter, without the file.
    pub fn reason(&self) -> String {
        match self {
            Error::Io { action, source, .. } => format!("cannot {action}: {source}"),
            Error::Picture { reason, .. } | Error::Tokenizer { reason, .. } => reason.clone(),
            Error::Caption { line: Some(line), reason, .. } => format!("line {line}: {reason}"),
            Error::Caption { reason, .. } => reason.clone(),
            other => other.to_string(),
        }
    }

    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Error::Io { path, action, source }
    }

    pub(crate) fn picture(path: &Path, reason: impl Into<String>) -> Self {
        Error::Picture { path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn tokenizer(path: &Path, reason: impl Into<String>) -> Self {
        Error::Tokenizer { path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn caption(path: &Path, line: Option<usize>, reason: impl Into<String>) -> Self {
        Error::Caption { path: path.to_owned(), line, reason: reason.into() }
    }
}
