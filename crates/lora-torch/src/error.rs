//! The crate's error type: what libtorch reports, told apart where a caller acts differently.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use lora_core::Error as CoreError;
use lora_core::blocks::BlockKind;
use tch::TchError;

use crate::frozen::Storage;

/// What can go wrong between Rust and libtorch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device (or the host) has no memory left; the operation had no effect.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The device does not answer any more, or a kernel left it in a state that only a new process ends.
    #[error(
        "the GPU cannot be used any more: {0}; `nvidia-smi` and the system's log (Xid) tell whether it fell off the bus, overheated or was reset, and only a new process can use it again"
    )]
    DeviceLost(String),
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
    /// A device that does not compute in a number type.
    #[error(
        "device `{device}` does not compute in {precision} ({reason}); use precision = \"fp32\", or \"fp16\" on a GPU"
    )]
    Precision {
        /// The device.
        device: String,
        /// The number type.
        precision: &'static str,
        /// libtorch's words.
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
    /// A frozen weight cannot be stored in the way asked for.
    #[error("a weight of shape {shape:?} cannot be stored as {storage}: {reason}")]
    Storage {
        /// The weight's shape.
        shape: Vec<i64>,
        /// What it was to be stored as.
        storage: Storage,
        /// Why not.
        reason: &'static str,
    },
    /// A frozen weight cannot stay in the blocks that it has in a file.
    #[error("a weight of shape {shape:?} cannot be used in blocks of {blocks}: {reason}")]
    Blocks {
        /// The weight's shape.
        shape: Vec<i64>,
        /// Its blocks.
        blocks: BlockKind,
        /// Why not.
        reason: &'static str,
    },
    /// An operation that the device of dry runs has no kernel for.
    #[error("the plan does not know {operation}, and cannot tell what it takes")]
    UnknownToPlan {
        /// The operation's name in libtorch.
        operation: String,
    },
    /// Ranks that train together cannot go on together: one did not come, one ended, or they do not agree.
    #[error("{0}")]
    Group(String),
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
        match message {
            _ if reports_out_of_memory(message) => Error::OutOfMemory(first),
            _ if reports_lost_device(&first) => Error::DeviceLost(first),
            _ => match unknown_operation(&first) {
                Some(operation) => Error::UnknownToPlan { operation: operation.to_owned() },
                None => Error::Torch(first),
            },
        }
    }

    /// Whether memory ran out: the caller may free some and try again.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Error::OutOfMemory(_))
    }

    /// Memory ran out, whatever the first line says.
    fn into_memory(self) -> Self {
        match self {
            Error::Torch(text) | Error::DeviceLost(text) => Error::OutOfMemory(text),
            other => other,
        }
    }

    /// Whether the device is gone for this process, with everything that was on it.
    pub fn is_device_lost(&self) -> bool {
        matches!(self, Error::DeviceLost(_))
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
                Err(source) => Error::from_message(&source.to_string()),
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

/// Does some work and turns a panic of libtorch's into an error: tch 0.24 panics instead of returning where an
/// operation that takes a number beside its tensors (`f_mul_scalar`) fails, as the number is freed before the failure
/// is read. Other panics go on.
///
/// # Errors
/// The work's own, and for such a panic what the operation's failure is: [`Error::OutOfMemory`], [`Error::DeviceLost`]
/// or another.
pub fn caught<T, E: From<Error>>(work: impl FnOnce() -> std::result::Result<T, E>) -> std::result::Result<T, E> {
    // What the work leaves half done is the caller's to take back, as after any error.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| match failure_in(&*payload) {
        Some(error) => Err(error.into()),
        None => resume_unwind(payload),
    })
}

/// The failure of libtorch's that a panic tells of.
pub(crate) fn failure_in(payload: &(dyn Any + Send)) -> Option<Error> {
    let message = panic_message(payload)?;
    // `unwrap` shows the failure as Rust writes it.
    let of_torch = message.split_once("Torch(\"").map(|(_, words)| words.trim_end_matches("\")"));
    let line = of_torch.unwrap_or(message).split("\\n").next().unwrap_or_default().replace("\\\"", "\"");
    if reports_out_of_memory(message) {
        return Some(Error::from_message(&line).into_memory());
    }
    of_torch.map(|_| Error::from_message(&line))
}

/// What a panic said.
pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> Option<&str> {
    payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied())
}

/// Only the caching allocator throws a class of its own; the driver, cuBLAS, cuDNN and the host allocator say it in
/// words.
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

/// The operation that libtorch says has no kernel for tensors without elements.
fn unknown_operation(message: &str) -> Option<&str> {
    let without = ["attempted to run this operator with Meta tensors", "with arguments from the 'Meta' backend"];
    without.iter().any(|words| message.contains(words)).then_some(())?;
    let name = &message[message.find("aten::")?..];
    name.split(|letter: char| !(letter.is_alphanumeric() || [':', '_', '.'].contains(&letter)))
        .next()
        .map(|name| name.trim_end_matches([':', '.']))
}

/// Errors of the CUDA runtime after which every further call fails too, by the texts of `cudaGetErrorString`. An error
/// of one call only ("invalid configuration argument") is not among them.
fn reports_lost_device(message: &str) -> bool {
    let sticky = [
        "unspecified launch failure",
        "illegal memory access",
        "misaligned address",
        "an illegal instruction",
        "device-side assert",
        "launch timed out",
        "uncorrectable",
        "hardware stack error",
        "device is lost",
        "GPU is lost",
        "no CUDA-capable device",
        "device(s) is/are busy or unavailable",
        "driver shutting down",
        "unknown error",
    ];
    message.contains("CUDA") && sticky.iter().any(|text| message.contains(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_device_is_told_from_a_failed_call() {
        for text in [
            "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported",
            "CUDA error: an illegal memory access was encountered",
            "CUDA error: uncorrectable ECC error encountered",
            "No CUDA GPUs are available: CUDA error: no CUDA-capable device is detected",
            "CUDA error: all CUDA-capable devices are busy: CUDA-capable device(s) is/are busy or unavailable",
        ] {
            let error = Error::from(TchError::Torch(text.into()));
            assert!(error.is_device_lost() && !error.is_out_of_memory(), "{text}");
            assert!(error.to_string().contains("nvidia-smi") && error.to_string().contains("CUDA error"), "{error}");
        }
        for text in ["CUDA error: invalid configuration argument", "CUDA error: out of memory", "unknown error"] {
            assert!(!Error::from(TchError::Torch(text.into())).is_device_lost(), "{text}");
        }
    }

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
    fn a_panic_of_libtorch_is_the_error_that_it_tells_of_and_other_panics_go_on() {
        let failing = |text: &str| -> std::result::Result<(), TchError> { Err(TchError::Torch(text.into())) };
        let panicking = |text: &str| -> Result<()> {
            caught(|| {
                failing(text).unwrap();
                Ok(())
            })
        };
        let lost =
            panicking("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be").unwrap_err();
        assert!(lost.is_device_lost() && lost.to_string().contains("Xid"), "{lost}");
        assert!(panicking("CUDA error: out of memory").unwrap_err().is_out_of_memory());
        assert_eq!(panicking("a \"b\"").unwrap_err().to_string(), "libtorch: a \"b\"");
        // A real one, of an operation that takes a number.
        let mut whole = tch::Tensor::from_slice(&[1i64, 2]);
        let real = caught(|| -> Result<tch::Tensor> { Ok(whole.f_mul_scalar_(0.5)?) });
        assert!(matches!(&real, Err(Error::Torch(words)) if words.contains("Long")), "{real:?}");
        let other = catch_unwind(|| caught(|| -> Result<()> { panic!("a fault of our own") }));
        assert!(other.is_err());
    }

    #[test]
    fn errors_pass_through_adapter_formulas_unchanged() {
        let there = CoreError::from(Error::OutOfMemory("x".into()));
        assert!(Error::from(there).is_out_of_memory());
        // An outsider's backend that hands on libtorch's own words.
        let words = TchError::Torch("CUDA out of memory. Tried to allocate 2 GiB".into());
        assert!(Error::from(CoreError::Backend(Box::new(words))).is_out_of_memory());
    }
}
