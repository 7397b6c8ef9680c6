//! The crate's error type: what libtorch reports, told apart where a caller acts differently.

use lora_core::Error as CoreError;
use tch::TchError;

/// What can go wrong between Rust and libtorch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device (or the host) has no memory left; the operation had no effect.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// Any other failure inside libtorch.
    #[error("libtorch: {0}")]
    Torch(String),
    /// A device was asked for that this machine or this libtorch does not offer.
    #[error("device `{requested}` cannot be used: {reason}")]
    Device {
        /// The device as written.
        requested: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// Bytes that do not fill the shape they claim.
    #[error("{what}: {expected} bytes expected for its shape, {found} found")]
    Size {
        /// Which tensor.
        what: String,
        /// Bytes by shape and dtype.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// Adapter arithmetic refused.
    #[error(transparent)]
    Adapter(CoreError),
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn from_message(message: &str) -> Self {
        // libtorch appends its C++ stack to the first line.
        let first = message.lines().next().unwrap_or_default().trim().to_owned();
        if reports_out_of_memory(message) { Error::OutOfMemory(first) } else { Error::Torch(first) }
    }

    /// Whether memory ran out: the caller may free some and try again.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Error::OutOfMemory(_))
    }
}

impl From<TchError> for Error {
    fn from(error: TchError) -> Self {
        match error {
            TchError::Torch(message) => Error::from_message(&message),
            other => Error::Torch(other.to_string()),
        }
    }
}

impl From<CoreError> for Error {
    fn from(error: CoreError) -> Self {
        match error {
            // Our own backend failed inside a formula: give its error back as it was.
            CoreError::Backend(source) => match source.downcast::<Error>() {
                Ok(own) => *own,
                Err(source) => Error::Torch(source.to_string()),
            },
            other => Error::Adapter(other),
        }
    }
}

impl From<Error> for CoreError {
    fn from(error: Error) -> Self {
        CoreError::Backend(Box::new(error))
    }
}

/// Only the caching allocator throws a class of its own; the driver, cuBLAS, cuDNN and the host allocator say it in words.
fn reports_out_of_memory(message: &str) -> bool {
    [
        "out of memory",
        "can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "nable to find an engine to execute this computation",
    ]
    .iter()
    .any(|text| message.contains(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_errors_are_told_apart_by_every_wording() {
        for text in [
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nstack",
            "CUDA error: out of memory",
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
            "GET was unable to find an engine to execute this computation",
        ] {
            assert!(Error::from(TchError::Torch(text.into())).is_out_of_memory(), "{text}");
        }
        let other = Error::from(TchError::Torch("mat1 and mat2 shapes cannot be multiplied\n#1 frame".into()));
        assert_eq!(other.to_string(), "libtorch: mat1 and mat2 shapes cannot be multiplied");
    }

    #[test]
    fn a_real_allocation_failure_is_out_of_memory() {
        let error =
            tch::Tensor::f_zeros([1 << 60], (tch::Kind::Float, tch::Device::Cpu)).map_err(Error::from).unwrap_err();
        assert!(error.is_out_of_memory(), "{error}");
    }

    #[test]
    fn errors_pass_through_adapter_formulas_unchanged() {
        let there = CoreError::from(Error::OutOfMemory("x".into()));
        assert!(Error::from(there).is_out_of_memory());
    }
}
