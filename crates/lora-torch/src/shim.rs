//! The C interface of `cpp/shim.cpp`. Private: the modules beside it wrap it safely.

use std::ffi::{CStr, c_char, c_int};

use tch::Tensor;

use crate::{Error, Result};

/// A `torch::Tensor` as torch-sys passes it.
pub(crate) type RawTensor = torch_sys::C_tensor;

unsafe extern "C" {
    fn lora_shim_last_error() -> *const c_char;
    fn lora_shim_memory_stats(device: i64, out: *mut i64, available: *mut c_int) -> c_int;
    fn lora_shim_memory_info(device: i64, out: *mut i64, available: *mut c_int) -> c_int;
    fn lora_shim_empty_cache() -> c_int;
    fn lora_shim_reset_peak(device: i64) -> c_int;
    fn lora_shim_unscale(
        gradients: *mut *mut RawTensor,
        count: usize,
        found_infinite: *mut RawTensor,
        inverse_scale: *mut RawTensor,
    ) -> c_int;
}

/// Turns a shim's return code into a result: 0 fine, 2 out of memory, anything else another failure.
fn checked(code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the shim keeps its text, NUL-terminated, in a thread-local string until this thread's next shim call.
    let message = unsafe { CStr::from_ptr(lora_shim_last_error()) }.to_string_lossy().into_owned();
    Err(if code == 2 { Error::OutOfMemory(message) } else { Error::from_message(&message) })
}

/// `[allocated, allocated peak, reserved, reserved peak]` in bytes, or `None` without an accelerator.
pub(crate) fn memory_stats(device: usize) -> Result<Option<[i64; 4]>> {
    let (mut out, mut available) = ([0; 4], 0);
    // SAFETY: both pointers are to locals of the size the shim writes.
    checked(unsafe { lora_shim_memory_stats(device as i64, out.as_mut_ptr(), &mut available) })?;
    Ok((available != 0).then_some(out))
}

/// `[free, total]` in bytes, or `None` without an accelerator.
pub(crate) fn memory_info(device: usize) -> Result<Option<[i64; 2]>> {
    let (mut out, mut available) = ([0; 2], 0);
    // SAFETY: as above.
    checked(unsafe { lora_shim_memory_info(device as i64, out.as_mut_ptr(), &mut available) })?;
    Ok((available != 0).then_some(out))
}

pub(crate) fn empty_cache() -> Result<()> {
    // SAFETY: takes no pointers.
    checked(unsafe { lora_shim_empty_cache() })
}

pub(crate) fn reset_peak(device: usize) -> Result<()> {
    // SAFETY: takes no pointers.
    checked(unsafe { lora_shim_reset_peak(device as i64) })
}

/// Multiplies gradients in place; sets `found_infinite` to 1 where one element is not finite.
pub(crate) fn unscale(gradients: &mut [Tensor], found_infinite: &mut Tensor, inverse_scale: &Tensor) -> Result<()> {
    let mut pointers: Vec<_> = gradients.iter_mut().map(|tensor| tensor.as_mut_ptr()).collect();
    // SAFETY: the pointers are live `torch::Tensor*` for the length of the call; the shim only reads the last one.
    checked(unsafe {
        lora_shim_unscale(
            pointers.as_mut_ptr(),
            pointers.len(),
            found_infinite.as_mut_ptr(),
            inverse_scale.as_ptr().cast_mut(),
        )
    })
}
