//! The crate's error type: what ends a run. What keeps one picture from its caption is a [`crate::Problem`] and ends nothing.

use std::path::PathBuf;

/// What can end a run of captions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// ONNX Runtime cannot be opened.
    #[error(
        "ONNX Runtime is needed by a tagger and cannot be opened: {reason}; `make setup-onnx` fetches it, or set ORT_DYLIB_PATH to its libonnxruntime"
    )]
    Runtime {
        /// The system's answer.
        reason: String,
    },
    /// A tagger that cannot be used.
    #[error("{path}: not a usable tagger: {reason}", path = path.display())]
    Tagger {
        /// The model, or the folder where it was looked for.
        path: PathBuf,
        /// What is wrong, and what would work.
        reason: String,
    },
    /// The list of a tagger's tags cannot be used.
    #[error("{path}: not a usable list of tags: {reason}; a tagger's `selected_tags.csv` lies beside its model", path = path.display())]
    TagList {
        /// The list.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A server that cannot be used at all.
    #[error("{address}: {reason}")]
    Server {
        /// Where requests went.
        address: String,
        /// What is wrong, and what would work.
        reason: String,
    },
    /// Nothing but failures.
    #[error("none of the first {count} pictures got a caption; the last: {last}")]
    NothingWorks {
        /// How many were tried.
        count: usize,
        /// What happened to the last.
        last: String,
    },
    /// An option that cannot work.
    #[error("{key}: {reason}")]
    Option {
        /// The option, as it is called in a configuration.
        key: &'static str,
        /// What is wrong, and what would work.
        reason: String,
    },
    /// A list of captions that is there already cannot be read, and is therefore not written.
    #[error("{path}, line {line}: {reason}; it is left as it is: correct or move it", path = path.display())]
    List {
        /// The list.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A folder of pictures that cannot be used.
    #[error(transparent)]
    Data(#[from] lora_data::Error),
    /// A file that cannot be written.
    #[error(transparent)]
    File(#[from] lora_io::Error),
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the options are to blame, rather than the work.
    pub fn is_usage(&self) -> bool {
        matches!(self, Error::Option { .. })
    }

    pub(crate) fn option(key: &'static str, reason: impl Into<String>) -> Self {
        Error::Option { key, reason: reason.into() }
    }
}
