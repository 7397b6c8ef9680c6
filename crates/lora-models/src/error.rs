//! The crate's error type.

/// What can go wrong when a network is built from weights or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A weight that the architecture needs is not in the base model.
    #[error("{source_name}: weight `{name}` is missing; is the checkpoint complete?")]
    MissingWeight {
        /// The file or folder.
        source_name: String,
        /// The missing weight, in diffusers' naming.
        name: String,
    },
    /// A weight has another shape than its place in the architecture needs.
    #[error("{source_name}: weight `{name}` has shape {found:?}, expected {expected:?}")]
    WeightShape {
        /// The file or folder.
        source_name: String,
        /// The weight, in diffusers' naming.
        name: String,
        /// The shape needed.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A frozen weight cannot be stored in as few bytes as the configuration asks for.
    #[error(
        "{source_name}: weight `{name}`: {source}; hold the base as it is (`base_storage: precision`) or repair the file"
    )]
    Storage {
        /// The file or folder.
        source_name: String,
        /// The weight, in diffusers' naming.
        name: String,
        /// The storage and why it cannot be.
        source: Box<lora_torch::Error>,
    },
    /// The tensors form an architecture that this crate does not build.
    #[error("{source_name}: {reason}")]
    Architecture {
        /// The file or folder.
        source_name: String,
        /// What was expected and what found.
        reason: String,
    },
    /// An input does not fit a network.
    #[error("{what}: expected {expected}, found {found}")]
    Input {
        /// Which input.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Adapters were to come or go while a graph of the network is alive, which needs the layers as they are.
    #[error("a loss of the network is still alive; drop it before adapters are attached or detached")]
    InUse,
    /// A checkpoint could not be read.
    #[error(transparent)]
    Checkpoint(#[from] lora_io::Error),
    /// libtorch or the adapter arithmetic failed.
    #[error(transparent)]
    Torch(#[from] lora_torch::Error),
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether memory ran out: the caller may free some and try again.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Error::Torch(error) if error.is_out_of_memory())
    }

    /// Whether the device is gone for this process, with everything that was on it.
    pub fn is_device_lost(&self) -> bool {
        matches!(self, Error::Torch(error) if error.is_device_lost())
    }
}

impl From<lora_torch::tch::TchError> for Error {
    fn from(error: lora_torch::tch::TchError) -> Self {
        Error::Torch(error.into())
    }
}

impl From<lora_core::Error> for Error {
    fn from(error: lora_core::Error) -> Self {
        Error::Torch(error.into())
    }
}
