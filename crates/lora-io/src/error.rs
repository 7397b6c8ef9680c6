//! The crate's error type: every variant names the file, and the tensor or key where there is one.

use std::path::{Path, PathBuf};

/// What can go wrong with files.
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
    /// A model that is named as on Hugging Face is not on this machine.
    #[error(
        "{name}: no file or folder here, and no model of that name in {cache}; nothing is fetched: `hf download {name}` does, or give the place of its files"
    )]
    NotFetched {
        /// The name.
        name: String,
        /// Where models are that were fetched.
        cache: String,
    },
    /// A file is not what it claims or was taken for.
    #[error("{path}: {reason}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was expected and what found.
        reason: String,
    },
    /// One tensor of a file is wrong.
    #[error("{path}: tensor `{tensor}`: {reason}", path = path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What was expected and what found.
        reason: String,
    },
    /// A file or folder that is no base model, or one whose networks are not opened.
    #[error("{path}: this is {found}", path = path.display())]
    Family {
        /// The file or folder.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// Adapter tensors that fit no layer of the base or lack their other half.
    #[error("{path}: {count} tensor(s) of this adapter do not fit: {list}", path = path.display())]
    Unmatched {
        /// The file.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The first of them, with reasons.
        list: String,
    },
    /// An adapter that cannot be written as asked.
    #[error("adapter module `{module}`: {reason}")]
    Module {
        /// The module.
        module: String,
        /// What is wrong and what helps.
        reason: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Error::Io { path, action, source }
    }

    pub(crate) fn format(path: &Path, reason: impl Into<String>) -> Self {
        Error::Format { path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        Error::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), reason: reason.into() }
    }
}

/// The first of several problems in one line.
pub(crate) fn listed(problems: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut list = problems[..problems.len().min(SHOWN)].join("; ");
    if problems.len() > SHOWN {
        list.push_str("; …");
    }
    list
}
