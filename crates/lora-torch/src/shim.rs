//! The C interface of `cpp/shim.cpp`, and how all C++ of this crate reports failures (`cpp/guard.h`). Private: the modules beside
//! it wrap it safely.

use std::borrow::Borrow;
use std::ffi::{CStr, c_char, c_int};

use tch::Tensor;

use crate::{Error, Result};

/// A `torch::Tensor` as torch-sys passes it.
pub(crate) type RawTensor = torch_sys::C_tensor;

unsafe extern "C" {
    fn lora_shim_last_error() -> *const c_char;
    fn lora_shim_memory_stats(device: i64, out: *mut i64, available: *mut c_int) -> c_int;
    fn lora_shim_memory_info(device: i64, out: *mut i64, available: *mut c_int) -> c_int;
    fn lora_shim_upload(tensor: *const RawTensor, device: i64, out: *mut *mut RawTensor) -> c_int;
    fn lora_shim_empty_cache() -> c_int;
    fn lora_shim_reset_peak(device: i64) -> c_int;
    fn lora_shim_default_variable(name: *const c_char, value: *const c_char) -> c_int;
    fn lora_shim_allocator_settings(settings: *const c_char) -> c_int;
    fn lora_shim_settle(
        gradients: *mut *mut RawTensor,
        count: usize,
        losses: *const RawTensor,
        inverse_scale: f64,
        limit: f64,
        out: *mut f64,
    ) -> c_int;
    fn lora_shim_clear_gradients(parameters: *mut *mut RawTensor, count: usize) -> c_int;
    fn lora_shim_put_gradients(parameters: *mut *mut RawTensor, gradients: *mut *mut RawTensor, count: usize) -> c_int;
    fn lora_shim_collect_gradients(copies: *mut *mut RawTensor, originals: *mut *mut RawTensor, count: usize) -> c_int;
    fn lora_shim_adamw(
        parameters: *mut *mut RawTensor,
        gradients: *mut *mut RawTensor,
        means: *mut *mut RawTensor,
        squares: *mut *mut RawTensor,
        count: usize,
        taken: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        decay: f64,
        epsilon: f64,
    ) -> c_int;
    fn lora_shim_foreach(
        operation: c_int,
        targets: *mut *mut RawTensor,
        others: *mut *mut RawTensor,
        thirds: *mut *mut RawTensor,
        count: usize,
        value: f64,
    ) -> c_int;
    fn lora_shim_foreach_scaled(
        tensors: *mut *mut RawTensor,
        count: usize,
        factor: f64,
        out: *mut *mut RawTensor,
    ) -> c_int;
    fn lora_shim_foreach_norms(
        tensors: *mut *mut RawTensor,
        count: usize,
        order: f64,
        out: *mut *mut RawTensor,
    ) -> c_int;
}

/// Turns a shim's return code into a result: 0 fine, 2 out of memory, anything else another failure.
pub(crate) fn checked(code: c_int) -> Result<()> {
    // SAFETY: the shim keeps its text, NUL-terminated, in a thread-local string until this thread's next shim call.
    result(code, || unsafe { CStr::from_ptr(lora_shim_last_error()) }.to_string_lossy().into_owned())
}

/// The same for a text from elsewhere.
pub(crate) fn result(code: c_int, message: impl FnOnce() -> String) -> Result<()> {
    match code {
        0 => Ok(()),
        2 => Err(Error::OutOfMemory(message())),
        _ => Err(Error::from_message(&message())),
    }
}

/// What a call writes through the pointer that it is given.
pub(crate) fn new_tensor(call: impl FnOnce(*mut *mut RawTensor) -> c_int) -> Result<Tensor> {
    let mut output = std::ptr::null_mut();
    checked(call(&mut output))?;
    // SAFETY: without a failure the shim has written a new tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(output) })
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

/// A host tensor on a GPU, by pinned memory and without waiting.
pub(crate) fn upload(tensor: &Tensor, device: usize) -> Result<Tensor> {
    // SAFETY: a live `torch::Tensor*`, and what a new one is written to.
    new_tensor(|out| unsafe { lora_shim_upload(tensor.as_ptr(), device as i64, out) })
}

pub(crate) fn empty_cache() -> Result<()> {
    // SAFETY: takes no pointers.
    checked(unsafe { lora_shim_empty_cache() })
}

pub(crate) fn reset_peak(device: usize) -> Result<()> {
    // SAFETY: takes no pointers.
    checked(unsafe { lora_shim_reset_peak(device as i64) })
}

/// Settings of the accelerator's allocator, before its first allocation.
pub(crate) fn allocator_settings(settings: &CStr) -> Result<()> {
    // SAFETY: a text that ends with NUL; it is copied.
    checked(unsafe { lora_shim_allocator_settings(settings.as_ptr()) })
}

/// A variable of the environment that libtorch reads, under its own lock; one that is set stays.
pub(crate) fn default_variable(name: &CStr, value: &CStr) -> Result<()> {
    // SAFETY: texts that end with NUL; they are copied.
    checked(unsafe { lora_shim_default_variable(name.as_ptr(), value.as_ptr()) })
}

/// `[sum of the losses, L2 norm, 1 where an element is not finite]` of gradients that are multiplied by `inverse_scale` and
/// limited to a norm in place.
pub(crate) fn settle(gradients: &mut [Tensor], losses: &Tensor, inverse_scale: f64, limit: f64) -> Result<[f64; 3]> {
    let (mut pointers, mut out) = (raw(gradients), [0.0; 3]);
    // SAFETY: live `torch::Tensor*` for the length of the call, and a local of the size the shim writes.
    checked(unsafe {
        lora_shim_settle(pointers.as_mut_ptr(), pointers.len(), losses.as_ptr(), inverse_scale, limit, out.as_mut_ptr())
    })?;
    Ok(out)
}

/// Forgets the gradients of parameters.
pub(crate) fn clear_gradients(parameters: &mut [Tensor]) -> Result<()> {
    let mut pointers = raw(parameters);
    // SAFETY: live `torch::Tensor*` for the length of the call.
    checked(unsafe { lora_shim_clear_gradients(pointers.as_mut_ptr(), pointers.len()) })
}

/// Gives parameters these gradients; lists must be equally long.
pub(crate) fn put_gradients<T: Borrow<Tensor>>(parameters: &[T], gradients: &[T]) -> Result<()> {
    assert_eq!(parameters.len(), gradients.len());
    let (mut parameters, mut gradients) = (pointers(parameters), pointers(gradients));
    // SAFETY: two arrays of live `torch::Tensor*` of one length.
    checked(unsafe { lora_shim_put_gradients(parameters.as_mut_ptr(), gradients.as_mut_ptr(), parameters.len()) })
}

/// Adds the gradients of copies to those of the originals and forgets them; lists must be equally long.
pub(crate) fn collect_gradients<T: Borrow<Tensor>>(copies: &[T], originals: &[T]) -> Result<()> {
    assert_eq!(copies.len(), originals.len());
    let (mut copies, mut originals) = (pointers(copies), pointers(originals));
    // SAFETY: two arrays of live `torch::Tensor*` of one length.
    checked(unsafe { lora_shim_collect_gradients(copies.as_mut_ptr(), originals.as_mut_ptr(), copies.len()) })
}

/// One AdamW step; the four lists must be equally long and not empty.
#[allow(clippy::too_many_arguments, reason = "the formula's own")]
pub(crate) fn adamw<T: Borrow<Tensor>>(
    parameters: &[T],
    gradients: &[T],
    means: &[T],
    squares: &[T],
    taken: u64,
    lr: f64,
    betas: (f64, f64),
    decay: f64,
    epsilon: f64,
) -> Result<()> {
    let count = parameters.len();
    assert!(count > 0 && [gradients.len(), means.len(), squares.len()].iter().all(|&length| length == count));
    let (mut parameters, mut gradients) = (pointers(parameters), pointers(gradients));
    let (mut means, mut squares) = (pointers(means), pointers(squares));
    // SAFETY: four arrays of `count` live `torch::Tensor*`.
    checked(unsafe {
        lora_shim_adamw(
            parameters.as_mut_ptr(),
            gradients.as_mut_ptr(),
            means.as_mut_ptr(),
            squares.as_mut_ptr(),
            count,
            taken as f64,
            lr,
            betas.0,
            betas.1,
            decay,
            epsilon,
        )
    })
}

/// An elementwise operation over lists, in place on the first; lists must be equally long.
pub(crate) fn foreach<A: Borrow<Tensor>, B: Borrow<Tensor>, C: Borrow<Tensor>>(
    operation: c_int,
    targets: &[A],
    others: Option<&[B]>,
    thirds: Option<&[C]>,
    value: f64,
) -> Result<()> {
    let count = targets.len();
    assert!(others.is_none_or(|list| list.len() == count) && thirds.is_none_or(|list| list.len() == count));
    let (mut targets, mut others, mut thirds) = (pointers(targets), others.map(pointers), thirds.map(pointers));
    let list = |list: &mut Option<Vec<*mut RawTensor>>| list.as_mut().map_or(std::ptr::null_mut(), Vec::as_mut_ptr);
    // SAFETY: each array is null or holds `count` live `torch::Tensor*`.
    checked(unsafe {
        lora_shim_foreach(operation, targets.as_mut_ptr(), list(&mut others), list(&mut thirds), count, value)
    })
}

/// New tensors, `factor` times those given.
pub(crate) fn foreach_scaled<T: Borrow<Tensor>>(tensors: &[T], factor: f64) -> Result<Vec<Tensor>> {
    let mut pointers = pointers(tensors);
    let mut out = vec![std::ptr::null_mut(); pointers.len()];
    // SAFETY: both arrays have `count` elements; the shim fills all of the second or fails before the first.
    checked(unsafe { lora_shim_foreach_scaled(pointers.as_mut_ptr(), pointers.len(), factor, out.as_mut_ptr()) })?;
    // SAFETY: each is a new `torch::Tensor*` that is ours alone.
    Ok(out.into_iter().map(|pointer| unsafe { Tensor::from_ptr(pointer) }).collect())
}

/// `[count]`: the norm of each, of an order.
pub(crate) fn foreach_norms<T: Borrow<Tensor>>(tensors: &[T], order: f64) -> Result<Tensor> {
    let mut pointers = pointers(tensors);
    let mut out = std::ptr::null_mut();
    // SAFETY: live `torch::Tensor*` for the length of the call, and a local to write to.
    checked(unsafe { lora_shim_foreach_norms(pointers.as_mut_ptr(), pointers.len(), order, &mut out) })?;
    // SAFETY: a new `torch::Tensor*` that is ours alone.
    Ok(unsafe { Tensor::from_ptr(out) })
}

fn pointers<T: Borrow<Tensor>>(tensors: &[T]) -> Vec<*mut RawTensor> {
    tensors.iter().map(|tensor| tensor.borrow().as_ptr().cast_mut()).collect()
}

fn raw(tensors: &mut [Tensor]) -> Vec<*mut RawTensor> {
    tensors.iter_mut().map(|tensor| tensor.as_mut_ptr()).collect()
}
