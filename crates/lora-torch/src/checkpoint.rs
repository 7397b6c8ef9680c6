//! Gradient checkpointing (Chen et al., 2016): parts of a network whose activations are not kept for the backward pass but
//! computed again in it. A third more computing for a fraction of the memory.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tch::Tensor;

use crate::Result;
use crate::error::panic_message;
use crate::shim::{RawTensor, new_tensor};

/// A part of a network that graphs may hold on to, and that libtorch's threads may compute again.
#[derive(Debug)]
pub struct Shared<T>(Arc<T>);

// SAFETY: what is shared are layers: frozen tensors and adapters. They are only read while shared (`get_mut` sees to it),
// libtorch's reference counts are atomic and its tensors may be read by several threads. tch leaves `Sync` out because of
// its in-place functions, which nothing here calls on weights.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T: Send> Shared<T> {
    /// Shares a part, which must not change itself when it is computed (no cells).
    pub fn new(part: T) -> Self {
        Self(Arc::new(part))
    }

    /// The part, to be changed; `None` while a graph that was made with it is alive.
    pub fn get_mut(&mut self) -> Option<&mut T> {
        Arc::get_mut(&mut self.0)
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

type Run = dyn Fn(&[Tensor]) -> Result<Tensor> + Send;

unsafe extern "C" {
    fn lora_checkpoint(
        part: *mut c_void,
        run: unsafe extern "C" fn(*mut c_void, *mut *mut RawTensor, usize, *mut *const c_char) -> *mut RawTensor,
        drop: unsafe extern "C" fn(*mut c_void),
        inputs: *mut *mut RawTensor,
        count: usize,
        host_from: i64,
        output: *mut *mut RawTensor,
    ) -> c_int;
}

/// Inputs of fewer bytes stay on the device: what many blocks share (text states, the timestep) is small, and is there anyway.
pub const LARGE: usize = 1 << 20;

/// Where the inputs of a part wait for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inputs {
    /// Where they are.
    Kept,
    /// Those of [`LARGE`] bytes and more in host memory (pinned, for a device).
    InHost,
}

/// The output of `run` on `inputs`, of which only the inputs are kept: in the backward pass `run` is called again, on a
/// thread of libtorch's choice, and must compute the same. Gradients reach the inputs and whatever `run` reads. Without
/// gradients it is called once and nothing is kept.
///
/// # Errors
/// What `run` gives. An error of its second call is one of the backward pass.
pub fn checkpoint(
    inputs: &[&Tensor],
    wait: Inputs,
    run: impl Fn(&[Tensor]) -> Result<Tensor> + Send + 'static,
) -> Result<Tensor> {
    let host_from = match wait {
        Inputs::Kept => i64::MAX,
        Inputs::InHost => LARGE as i64,
    };
    let mut inputs: Vec<Tensor> = inputs.iter().map(|input| input.shallow_clone()).collect();
    let mut pointers: Vec<*mut RawTensor> = inputs.iter_mut().map(Tensor::as_mut_ptr).collect();
    let part: Box<Box<Run>> = Box::new(Box::new(run));
    new_tensor(|output| {
        // SAFETY: the box is given to C++, which gives it back to `release` exactly once, after its last `compute`; the
        // pointers are live `torch::Tensor*` for the length of the call.
        unsafe {
            let part = Box::into_raw(part).cast();
            lora_checkpoint(part, compute, release, pointers.as_mut_ptr(), pointers.len(), host_from, output)
        }
    })
}

thread_local! {
    /// Text of this thread's last failed part, for as long as C++ needs to copy it.
    static FAILURE: RefCell<CString> = RefCell::default();
}

/// Computes a part for C++.
///
/// # Safety
/// `part` came from `checkpoint` and was not released; `inputs` are `count` live `torch::Tensor*`; `error` may be written.
unsafe extern "C" fn compute(
    part: *mut c_void,
    inputs: *mut *mut RawTensor,
    count: usize,
    error: *mut *const c_char,
) -> *mut RawTensor {
    let result = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: as the function's own contract says.
        let (run, pointers) = unsafe { (&*part.cast::<Box<Run>>(), std::slice::from_raw_parts(inputs, count)) };
        // SAFETY: `clone_from_ptr` makes a reference of its own to a live tensor.
        let inputs: Vec<Tensor> = pointers.iter().map(|&pointer| unsafe { Tensor::clone_from_ptr(pointer) }).collect();
        run(&inputs)
    }));
    let message = match result {
        Ok(Ok(output)) => return into_raw(output),
        Ok(Err(error)) => error.to_string(),
        // Among them what `caught` tells of: the words say whether memory ran out.
        Err(payload) => format!(
            "a part of the network panicked: {}",
            panic_message(&*payload).and_then(|words| words.lines().next()).unwrap_or_default()
        ),
    };
    FAILURE.with_borrow_mut(|text| {
        *text = CString::new(message.replace('\0', " ")).unwrap_or_default();
        // SAFETY: as the function's own contract says; the text lives until this thread's next failure.
        unsafe { *error = text.as_ptr() };
    });
    std::ptr::null_mut()
}

/// A tensor given away.
fn into_raw(tensor: Tensor) -> *mut RawTensor {
    let mut tensor = std::mem::ManuallyDrop::new(tensor);
    tensor.as_mut_ptr()
}

/// Frees a part for C++.
///
/// # Safety
/// `part` came from `checkpoint` and is not used again.
unsafe extern "C" fn release(part: *mut c_void) {
    // SAFETY: as the contract says.
    let part = unsafe { Box::from_raw(part.cast::<Box<Run>>()) };
    // A destructor that panics must not unwind into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(part)));
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tch::{Device, Kind};

    use super::*;
    use crate::Error;

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    #[test]
    fn gradients_are_those_of_the_plain_part() {
        let weight = leaf(&[0.5, -1.5]);
        let run = |weight: &Tensor, input: &Tensor| (input * weight).tanh() * 3.0;
        let (a, b) = (leaf(&[1.0, 2.0]), leaf(&[1.0, 2.0]));
        run(&weight, &run(&weight, &a)).sum(Kind::Float).backward();
        let plain = (Vec::<f32>::try_from(a.grad()).unwrap(), Vec::<f32>::try_from(weight.grad()).unwrap());

        let other = leaf(&[0.5, -1.5]);
        let calls = Arc::new(AtomicUsize::new(0));
        let part = |input: &Tensor| {
            let (own, calls) = (Shared::new(other.shallow_clone()), Arc::clone(&calls));
            checkpoint(&[input], Inputs::Kept, move |inputs| {
                calls.fetch_add(1, Ordering::SeqCst);
                Ok(run(&own, &inputs[0]))
            })
            .unwrap()
        };
        let output = part(&part(&b));
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        output.sum(Kind::Float).backward();
        assert_eq!(calls.load(Ordering::SeqCst), 4, "each once more");
        let own = (Vec::<f32>::try_from(b.grad()).unwrap(), Vec::<f32>::try_from(other.grad()).unwrap());
        assert_eq!(own, plain);
    }

    #[test]
    fn a_part_whose_inputs_are_not_trained_still_gets_its_gradients() {
        let weight = leaf(&[2.0]);
        let own = Shared::new(weight.shallow_clone());
        let input = Tensor::from_slice(&[3.0f32]);
        let output = checkpoint(&[&input], Inputs::Kept, move |inputs| Ok(&inputs[0] * &*own)).unwrap();
        assert!(output.requires_grad());
        output.sum(Kind::Float).backward();
        assert_eq!(weight.grad().double_value(&[0]), 3.0);
        // And one that is not trained at all is no harm.
        let twice = checkpoint(&[&input], Inputs::Kept, |inputs| Ok(&inputs[0] * 2.0)).unwrap();
        (twice * &weight).sum(Kind::Float).backward();
        assert_eq!(weight.grad().double_value(&[0]), 9.0);
    }

    #[test]
    fn large_inputs_may_wait_in_host_memory() {
        crate::seed(1);
        // 2 MiB, and one that is too small to be worth it.
        let (large, small) = (Tensor::randn([1 << 19], (Kind::Float, Device::Cpu)), leaf(&[3.0]));
        let gradients = |wait: Inputs| {
            let large = large.copy().set_requires_grad(true);
            let output = checkpoint(&[&large, &small], wait, |inputs| Ok((&inputs[0] * &inputs[1]).square())).unwrap();
            output.sum(Kind::Float).backward();
            (large.grad(), small.grad().double_value(&[0]))
        };
        let kept = gradients(Inputs::Kept);
        let _ = small.grad().zero_();
        assert_eq!(gradients(Inputs::InHost), kept);
        // One that is not trained stays so.
        let frozen = checkpoint(&[&large], Inputs::InHost, |inputs| Ok(inputs[0].sin())).unwrap();
        (frozen * &small).sum(Kind::Float).backward();
        assert!(!large.grad().defined() && small.grad().defined());
    }

    #[test]
    fn parts_are_freed_with_their_graph() {
        let mut part = Shared::new(leaf(&[1.0]));
        let own = part.clone();
        let output =
            checkpoint(&[&Tensor::from_slice(&[1.0f32])], Inputs::Kept, move |inputs| Ok(&inputs[0] * &*own)).unwrap();
        assert!(part.get_mut().is_none(), "the graph holds it");
        drop(output);
        assert!(part.get_mut().is_some());
        tch::no_grad(|| {
            let own = part.clone();
            drop(
                checkpoint(&[&Tensor::from_slice(&[1.0f32])], Inputs::Kept, move |inputs| Ok(&inputs[0] * &*own))
                    .unwrap(),
            );
        });
        assert!(part.get_mut().is_some());
    }

    #[test]
    fn failures_of_either_pass_are_errors() {
        let failing = |when: usize| {
            let calls = AtomicUsize::new(0);
            checkpoint(&[&leaf(&[1.0])], Inputs::Kept, move |inputs| {
                match calls.fetch_add(1, Ordering::SeqCst) == when {
                    true => Err(Error::OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB".into())),
                    false => Ok(&inputs[0] * 2.0),
                }
            })
        };
        assert!(failing(0).unwrap_err().is_out_of_memory());
        let late = failing(1).unwrap().f_sum(Kind::Float).unwrap().f_backward();
        assert!(Error::from(late.unwrap_err()).is_out_of_memory());
        let panicking = checkpoint(&[&leaf(&[1.0])], Inputs::Kept, |_| panic!("oops"));
        assert!(panicking.unwrap_err().to_string().contains("panicked"));
        let wrong = checkpoint(&[&leaf(&[1.0, 2.0])], Inputs::Kept, |inputs| {
            Ok(inputs[0].f_matmul(&Tensor::zeros([3, 3], (Kind::Float, Device::Cpu)))?)
        });
        assert!(wrong.is_err());
    }
}
