//! The crate's error type.

use std::path::PathBuf;

/// What can end a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration cannot work.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// The dataset cannot be used.
    #[error(transparent)]
    Data(#[from] lora_data::Error),
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] lora_io::Error),
    /// A network could not be built or run.
    #[error(transparent)]
    Model(lora_models::Error),
    /// A registered name is unknown or taken, or targets match nothing.
    #[error(transparent)]
    Adapter(lora_core::Error),
    /// A plugin name from the configuration is not registered.
    #[error("callbacks: no callback is called `{name}`; registered are {known}")]
    UnknownCallback {
        /// The name in the configuration.
        name: String,
        /// The registered names.
        known: String,
    },
    /// The adapter to go on from does not fit the configuration.
    #[error("{path}: cannot go on from this LoRA: {reason}", path = path.display())]
    InitFrom {
        /// The adapter file.
        path: PathBuf,
        /// What differs, and the remedy.
        reason: String,
    },
    /// NaN or infinity, by the stage that made it first.
    #[error("NaN or infinity in {stage}{place}; {remedy}")]
    NotFinite {
        /// VAE, text encoder, U-Net or LoRA.
        stage: &'static str,
        /// The step or picture.
        place: String,
        /// What helps.
        remedy: &'static str,
    },
    /// A callback of the user's gave up.
    #[error("callback `{name}`: {reason}")]
    Callback {
        /// The callback.
        name: String,
        /// Its own words.
        reason: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the configuration or the arguments are to blame, rather than the work.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Error::Config(_) | Error::UnknownCallback { .. } | Error::Adapter(lora_core::Error::NoMatch { .. })
        )
    }

    /// Whether memory ran out.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Error::Model(error) if error.is_out_of_memory())
    }
}

impl From<lora_models::Error> for Error {
    fn from(error: lora_models::Error) -> Self {
        match error {
            lora_models::Error::Checkpoint(error) => Error::File(error),
            other => Error::Model(other),
        }
    }
}

impl From<lora_torch::Error> for Error {
    fn from(error: lora_torch::Error) -> Self {
        match error {
            lora_torch::Error::Adapter(error) => Error::Adapter(error),
            other => Error::Model(other.into()),
        }
    }
}

impl From<lora_torch::tch::TchError> for Error {
    fn from(error: lora_torch::tch::TchError) -> Self {
        lora_torch::Error::from(error).into()
    }
}

impl From<lora_core::Error> for Error {
    fn from(error: lora_core::Error) -> Self {
        lora_torch::Error::from(error).into()
    }
}
