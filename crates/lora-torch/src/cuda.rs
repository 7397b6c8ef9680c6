//! The object of this crate that calls CUDA by name (`cpp/cuda`): embedded in the library, opened once libtorch_cuda is there.
//! Private: the modules that use it wrap it safely.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::device::{CudaStatus, cuda};
use crate::{Error, Result};

/// Empty where the build found no headers of CUDA.
static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/lora_cuda.so"));

unsafe extern "C" {
    fn memfd_create(name: *const c_char, flags: c_uint) -> c_int;
    fn lora_kernels(kernels: *const Kernels);
}

/// `lora::Kernels`, which only C++ calls: their arguments are its own affair.
#[repr(C)]
#[derive(Debug)]
struct Kernels {
    nf4: unsafe extern "C" fn(),
    scaled: unsafe extern "C" fn(),
    blocks: unsafe extern "C" fn(),
}

/// The functions of the object, under the names that it gives them.
#[derive(Debug)]
pub(crate) struct Calls {
    last_error: unsafe extern "C" fn() -> *const c_char,
    pub(crate) graph_pool: unsafe extern "C" fn(*mut u64) -> c_int,
    pub(crate) graph_begin: unsafe extern "C" fn(*const u64, *mut *mut c_void) -> c_int,
    pub(crate) graph_end: unsafe extern "C" fn(*mut c_void) -> c_int,
    pub(crate) graph_replay: unsafe extern "C" fn(*mut c_void) -> c_int,
    pub(crate) graph_drop: unsafe extern "C" fn(*mut c_void),
    pub(crate) memory_limit: unsafe extern "C" fn(i64, u64) -> c_int,
    pub(crate) group_nccl: unsafe extern "C" fn(*mut c_void, c_int, c_int, i64) -> c_int,
    kernels: Kernels,
}

impl Calls {
    /// Turns a return code into a result, as [`crate::shim::checked`] does for the library's own C++.
    pub(crate) fn checked(&self, code: c_int) -> Result<()> {
        // SAFETY: the object keeps its text, NUL-terminated, in a thread-local string until this thread's next call.
        crate::shim::result(code, || unsafe { CStr::from_ptr((self.last_error)()) }.to_string_lossy().into_owned())
    }
}

static CALLS: OnceLock<std::result::Result<Calls, String>> = OnceLock::new();

/// Opens the object, once libtorch_cuda is loaded, and gives the library its kernels. Without it training is slower.
pub(crate) fn load() {
    match CALLS.get_or_init(open) {
        // SAFETY: functions of the signatures that the library calls; they and the list stay.
        Ok(calls) => unsafe { lora_kernels(&calls.kernels) },
        Err(reason) => tracing::warn!("without CUDA graphs and kernels of our own: {reason}"),
    }
}

/// The object; why not, where it cannot be opened.
pub(crate) fn calls() -> Result<&'static Calls> {
    let reason = match (cuda(), CALLS.get()) {
        (CudaStatus::Available(_), Some(Ok(calls))) => return Ok(calls),
        (CudaStatus::Available(_), Some(Err(reason))) => reason.clone(),
        (status, _) => status.to_string(),
    };
    Err(Error::Torch(reason))
}

fn open() -> std::result::Result<Calls, String> {
    if OBJECT.is_empty() {
        return Err(
            "built without the headers of CUDA 13; `make setup` fetches them, or install the wheel nvidia-cuda-crt beside torch, and build again"
                .into(),
        );
    }
    // A file that has no place in any folder, as some forbid programs.
    // SAFETY: a text that ends with NUL; the file descriptor is ours alone.
    let mut file = unsafe {
        let descriptor = memfd_create(c"lora_cuda.so".as_ptr(), 0);
        if descriptor < 0 {
            return Err(std::io::Error::last_os_error().to_string());
        }
        File::from_raw_fd(descriptor)
    };
    file.write_all(OBJECT).map_err(|error| error.to_string())?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let words = |error: libloading::Error| {
        std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
    };
    // SAFETY: the object was built beside this library against the libtorch that is loaded; its initialisers are C++'s own.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) }.map_err(words)?;
    // What it gives away stays, so that it does, too.
    let library: &'static Library = Box::leak(Box::new(library));
    macro_rules! symbol {
        ($name:literal) => {{
            let name = CString::new($name).map_err(|error| error.to_string())?;
            // SAFETY: the field's type is the signature in `cpp/cuda`, or a function that Rust does not call.
            *unsafe { library.get(name.as_bytes_with_nul()) }.map_err(words)?
        }};
    }
    Ok(Calls {
        last_error: symbol!("lora_cuda_last_error"),
        graph_pool: symbol!("lora_graph_pool"),
        graph_begin: symbol!("lora_graph_begin"),
        graph_end: symbol!("lora_graph_end"),
        graph_replay: symbol!("lora_graph_replay"),
        graph_drop: symbol!("lora_graph_drop"),
        memory_limit: symbol!("lora_memory_limit"),
        group_nccl: symbol!("lora_group_nccl"),
        kernels: Kernels {
            nf4: symbol!("lora_cuda_nf4"),
            scaled: symbol!("lora_cuda_scaled"),
            blocks: symbol!("lora_cuda_blocks"),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_found_the_headers_and_a_machine_without_a_gpu_is_told() {
        assert!(
            OBJECT.starts_with(b"\x7fELF"),
            "the headers are missing: `make setup`, or nvidia-cuda-crt beside torch"
        );
        match (cuda(), calls()) {
            (CudaStatus::Available(_), opened) => assert!(opened.is_ok(), "{opened:?}"),
            (_, Err(error)) => assert!(!error.to_string().is_empty()),
            (status, Ok(_)) => panic!("opened, with {status}"),
        }
    }
}
