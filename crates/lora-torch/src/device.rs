//! Which devices there are, and loading libtorch's CUDA half at run time.
//!
//! The binary links only `libtorch_cpu` and `libc10`, so that one binary serves machines with and without a GPU. Where
//! a driver is present, [`cuda`] opens `libtorch_cuda.so` beside the libtorch in use; its registrars then make the
//! device appear.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Variables that libtorch reads its allocator's settings from.
const ALLOCATOR_VARIABLES: [&str; 2] = ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"];

/// Workspace of each of cuBLAS's handles, of which the forward and the backward pass have one each: libtorch's own but on GPUs of
/// data centres, where it takes four times as much.
const CUBLAS_WORKSPACE: &CStr = c":4096:2:16:8";

/// Bytes of that.
pub const CUBLAS_WORKSPACE_BYTES: u64 = 2 * (4096 << 10) + 8 * (16 << 10);

/// Whether CUDA could be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CudaStatus {
    /// Usable, with this many devices.
    Available(usize),
    /// No NVIDIA driver on this machine.
    NoDriver,
    /// A driver, but libtorch's CUDA libraries do not load.
    Unloadable {
        /// What was opened.
        library: PathBuf,
        /// What the loader said; it names the missing library.
        reason: String,
    },
    /// Everything loads, but no device answers.
    NoDevice,
}

impl std::fmt::Display for CudaStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CudaStatus::Available(count) => write!(f, "{count} device(s)"),
            CudaStatus::NoDriver => f.write_str("no NVIDIA driver (libcuda.so.1) on this machine"),
            CudaStatus::Unloadable { library, reason } => write!(
                f,
                "a driver is present, but {} does not load ({reason}); `make setup` on this machine fetches the CUDA libraries, and README.txt of an archive says how they come into its `lib`",
                library.display()
            ),
            CudaStatus::NoDevice => {
                f.write_str("CUDA loads, but reports no device (see nvidia-smi and CUDA_VISIBLE_DEVICES; a program that uses libtorch itself has to call `lora_torch::device::cuda()` first)")
            }
        }
    }
}

/// Loads CUDA if this machine has it; the first call decides for the process. Call it before libtorch is asked for anything that
/// touches on CUDA, be it a seed: it looks once and remembers.
pub fn cuda() -> &'static CudaStatus {
    static STATUS: OnceLock<CudaStatus> = OnceLock::new();
    STATUS.get_or_init(load_cuda)
}

fn load_cuda() -> CudaStatus {
    // SAFETY: loading the driver's library runs its initialisers only; it is the NVIDIA driver's documented entry.
    if unsafe { Library::open(Some("libcuda.so.1"), RTLD_NOW) }.map(std::mem::forget).is_err() {
        return CudaStatus::NoDriver;
    }
    set_allocator();
    if let Err(error) = crate::shim::default_variable(c"CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE) {
        tracing::debug!("cuBLAS takes the workspace that it likes: {error}");
    }
    let library = library_folder().join("libtorch_cuda.so");
    // SAFETY: the library is part of the libtorch this process runs on; global visibility is what its registrars need.
    match unsafe { Library::open(Some(&library), RTLD_NOW | RTLD_GLOBAL) } {
        // Its registrars live as long as the process.
        Ok(handle) => std::mem::forget(handle),
        Err(error) => {
            let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            return CudaStatus::Unloadable { library, reason };
        }
    }
    match tch::Cuda::device_count() {
        count if count > 0 && tch::Cuda::is_available() => {
            crate::cuda::load();
            CudaStatus::Available(count as usize)
        }
        _ => CudaStatus::NoDevice,
    }
}

/// Makes libtorch's allocator grow its segments instead of taking new ones of each size, which leaves holes that no tensor fits.
/// Whoever sets the allocator by libtorch's own variables is left alone.
fn set_allocator() {
    if ALLOCATOR_VARIABLES.iter().any(|name| std::env::var_os(name).is_some()) {
        return;
    }
    if let Err(error) = crate::shim::allocator_settings(c"expandable_segments:True") {
        tracing::warn!("the device's memory may fragment: {error}");
    }
}

/// The folder of the libtorch that this process has loaded (falls back to the one it was built with).
pub fn library_folder() -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let loaded = maps.lines().filter_map(|line| line.split_once('/')).map(|(_, path)| format!("/{path}"));
    let folder = loaded
        .filter(|path| path.contains("libtorch_cpu.so"))
        .find_map(|path| Path::new(&path).parent().map(Path::to_path_buf));
    folder.unwrap_or_else(|| PathBuf::from(option_env!("LORA_LIBTORCH_LIB").unwrap_or_default()))
}

/// The device of a configuration value: `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// [`Error::Device`] for another value, and for a GPU that is not there or cannot be used, with the reason.
pub fn resolve(requested: &str) -> Result<Device> {
    let unusable = |reason: String| Error::Device { requested: requested.to_owned(), reason };
    if requested == "cpu" {
        return Ok(Device::Cpu);
    }
    if requested == "auto" {
        return Ok(match cuda() {
            CudaStatus::Available(_) => Device::Cuda(0),
            CudaStatus::NoDriver => Device::Cpu,
            // A GPU that cannot be used must not be passed over in silence.
            problem => {
                tracing::warn!("training on the CPU: {problem}");
                Device::Cpu
            }
        });
    }
    let index = match requested.strip_prefix("cuda") {
        Some("") => 0,
        Some(rest) => rest
            .strip_prefix(':')
            .and_then(|index| index.parse::<usize>().ok())
            .ok_or_else(|| unusable("expected auto, cpu, cuda or cuda:N".into()))?,
        None => return Err(unusable("expected auto, cpu, cuda or cuda:N".into())),
    };
    match cuda() {
        CudaStatus::Available(count) if index < *count => Ok(Device::Cuda(index)),
        CudaStatus::Available(count) => {
            Err(unusable(format!("this machine has {count} CUDA device(s), counted from 0")))
        }
        problem => Err(unusable(problem.to_string())),
    }
}

/// Makes sure that a device computes in a number type: a product and a convolution are tried. A GPU that only imitates
/// bf16 is warned about: computing so costs more than it saves.
///
/// # Errors
/// [`Error::Precision`] where it does not; [`Error::DeviceLost`] and out of memory as they are.
pub fn check_kind(device: Device, kind: Kind) -> Result<()> {
    let tried = || -> Result<()> {
        let square = Tensor::f_ones([16, 16], (kind, device))?;
        let product = square.f_matmul(&square)?;
        let (picture, kernel) = (product.f_view([1i64, 4, 8, 8])?, square.f_view([4i64, 4, 4, 4])?);
        let sum = picture.f_conv2d(&kernel, None::<&Tensor>, 1, 0, 1, 1)?.f_sum(Kind::Float)?;
        // The device answers only when it is waited for.
        f64::try_from(sum)?;
        Ok(())
    };
    match tried() {
        Err(error @ (Error::OutOfMemory(_) | Error::DeviceLost(_))) => return Err(error),
        Err(error) => {
            return Err(Error::Precision {
                device: name(device),
                precision: precision(kind),
                reason: error.to_string(),
            });
        }
        Ok(()) => {}
    }
    if let Device::Cuda(index) = device
        && let Some((major, minor)) = compute_capability(index)
        && let Some(advice) = imitation(kind, major)
    {
        tracing::warn!("{} has compute capability {major}.{minor}: {advice}", name(device));
    }
    Ok(())
}

/// What to do where a GPU of a generation has no units of its own for a number type.
fn imitation(kind: Kind, major: i32) -> Option<&'static str> {
    match kind {
        Kind::BFloat16 if major < 8 => {
            Some("bf16 is imitated there (units for it come with Ampere, 8.0) and is slow; use precision = \"fp16\"")
        }
        Kind::Half if major < 6 => Some("fp16 is slow there; use precision = \"fp32\""),
        _ => None,
    }
}

/// The compute capability of a device, as the driver tells it; `None` where it does not.
fn compute_capability(index: usize) -> Option<(i32, i32)> {
    type Get = unsafe extern "C" fn(*mut i32, i32, i32) -> i32;
    // Numbers of CUdevice_attribute in the driver's interface.
    const MAJOR: i32 = 75;
    const MINOR: i32 = 76;
    // SAFETY: the driver is loaded already (`load_cuda`) and stays so; this only counts a reference.
    let driver = unsafe { Library::open(Some("libcuda.so.1"), RTLD_NOW) }.ok()?;
    // SAFETY: the signature is that of cuDeviceGetAttribute(int *, CUdevice_attribute, CUdevice), where an attribute and a
    // device are C ints; a device's handle is its number.
    let get = unsafe { driver.get::<Get>(b"cuDeviceGetAttribute\0") }.ok()?;
    let attribute = |number: i32| {
        let mut value = 0;
        // SAFETY: a local to write to; libtorch has initialised the driver.
        (unsafe { get(&mut value, number, i32::try_from(index).ok()?) } == 0).then_some(value)
    };
    Some((attribute(MAJOR)?, attribute(MINOR)?))
}

/// What a GPU is known by on any machine, as the driver tells it; `None` where it does not.
pub(crate) fn uuid(index: usize) -> Option<String> {
    type Get = unsafe extern "C" fn(*mut [u8; 16], i32) -> i32;
    // SAFETY: the driver is loaded already (`load_cuda`) and stays so; this only counts a reference.
    let driver = unsafe { Library::open(Some("libcuda.so.1"), RTLD_NOW) }.ok()?;
    // SAFETY: the signature is that of cuDeviceGetUuid_v2(CUuuid *, CUdevice), where a CUuuid is 16 bytes and a device's handle
    // its number.
    let get = unsafe { driver.get::<Get>(b"cuDeviceGetUuid_v2\0") }.ok()?;
    let mut bytes = [0; 16];
    // SAFETY: a local to write to; libtorch has initialised the driver.
    let code = unsafe { get(&mut bytes, i32::try_from(index).ok()?) };
    (code == 0).then(|| bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".into(),
    }
}

fn precision(kind: Kind) -> &'static str {
    match kind {
        Kind::Half => "fp16",
        Kind::BFloat16 => "bf16",
        _ => "fp32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_parse_and_absent_ones_are_explained() {
        assert_eq!(resolve("cpu").unwrap(), Device::Cpu);
        resolve("auto").unwrap();
        for bad in ["gpu", "cuda:x", "cuda1", ""] {
            assert!(resolve(bad).unwrap_err().to_string().contains("expected auto"), "{bad}");
        }
        assert!(resolve("cuda:99").is_err());
    }

    #[test]
    fn what_a_device_lacks_is_said() {
        check_kind(Device::Cpu, Kind::Float).unwrap();
        check_kind(Device::Cpu, Kind::BFloat16).unwrap();
        // No device convolves booleans: what a missing number type looks like.
        let error = check_kind(Device::Cpu, Kind::Bool).unwrap_err();
        assert!(
            matches!(error, Error::Precision { .. }) && error.to_string().contains("precision = \"fp32\""),
            "{error}"
        );
        assert!(imitation(Kind::BFloat16, 7).unwrap().contains("fp16"));
        assert_eq!(
            (imitation(Kind::BFloat16, 8), imitation(Kind::Half, 7), imitation(Kind::Float, 3)),
            (None, None, None)
        );
        let fault = crate::fault::Fault::of_allocation(0);
        assert!(check_kind(Device::Cpu, Kind::Float).unwrap_err().is_out_of_memory());
        drop(fault);
    }

    #[test]
    fn libtorch_takes_the_allocator_settings() {
        crate::shim::allocator_settings(c"expandable_segments:True").unwrap();
        assert!(crate::shim::allocator_settings(c"expandable_segments:perhaps").is_err());
        crate::shim::allocator_settings(c"expandable_segments:False").unwrap();
    }

    #[test]
    fn the_loaded_libtorch_is_found() {
        assert!(tch::Tensor::zeros([1], tch::kind::FLOAT_CPU).defined());
        assert!(library_folder().join("libtorch_cpu.so").exists());
    }
}
