//! CUDA graphs: the kernels that a stretch of code launches, recorded once and launched again as one. A step of training is
//! thousands of small kernels, and a fast device waits for the host to launch them.
//!
//! What holds for code that is recorded: it reads and writes the same memory every time, so that inputs are copied into the
//! tensors that it read, and results are left in tensors from outside; it neither looks at a number nor copies from host memory;
//! it draws nothing at random; and it has run before, in the same shapes, as libraries set themselves up the first time.
//! Gradients that it adds to must be there before.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

use tch::Device;

use crate::cuda::{Calls, calls};
use crate::{Error, Result, shim};

unsafe extern "C" {
    fn lora_stream_new(device: i64, stream: *mut *mut c_void) -> c_int;
    fn lora_stream_drop(stream: *mut c_void);
    fn lora_stream_enter(stream: *const c_void, scope: *mut *mut c_void) -> c_int;
    fn lora_stream_leave(scope: *mut c_void);
}

/// Whether this build and this machine have graphs; why not, where they do not.
///
/// # Errors
/// [`Error::Torch`], which says what is missing.
pub fn available() -> Result<()> {
    calls().map(drop)
}

/// A stream to record on, and memory that its graphs share: one of them runs at a time.
#[derive(Debug)]
pub struct Recorder {
    calls: &'static Calls,
    stream: NonNull<c_void>,
    pool: [u64; 2],
}

// SAFETY: a stream's name and numbers, which nothing changes, without ties to a thread.
unsafe impl Send for Recorder {}
// SAFETY: as above; the allocator and CUDA have locks of their own.
unsafe impl Sync for Recorder {}

impl Recorder {
    /// For a GPU. Fails on other devices, and where the library was built without CUDA's headers.
    ///
    /// # Errors
    /// [`Error::Device`] for another device; [`Error::Torch`] where the library was built without CUDA's headers.
    pub fn new(device: Device) -> Result<Self> {
        let Device::Cuda(index) = device else {
            return Err(Error::Device { requested: format!("{device:?}"), reason: "graphs are for CUDA".into() });
        };
        let (calls, mut pool, mut stream) = (calls()?, [0; 2], std::ptr::null_mut());
        // SAFETY: locals of the size that is written.
        calls.checked(unsafe { (calls.graph_pool)(pool.as_mut_ptr()) })?;
        // SAFETY: a local to write to.
        shim::checked(unsafe { lora_stream_new(index as i64, &mut stream) })?;
        let stream = NonNull::new(stream).ok_or_else(|| Error::Torch("no stream".into()))?;
        Ok(Self { calls, stream, pool })
    }

    /// Makes the recorder's stream this thread's current one while the answer lives. What was given to the one before is done
    /// first, and in the end the other way around.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub fn enter(&self) -> Result<Scope> {
        let mut scope = std::ptr::null_mut();
        // SAFETY: a live stream, which is copied, and a local to write to.
        shim::checked(unsafe { lora_stream_enter(self.stream.as_ptr(), &mut scope) })?;
        let scope = NonNull::new(scope).ok_or_else(|| Error::Torch("no scope".into()))?;
        Ok(Scope { scope, thread: PhantomData })
    }

    /// Records what `body` gives to the recorder's stream, which must be the current one. Nothing of it runs until
    /// [`Graph::replay`]. No autograd graph from before may be alive, as its nodes belong to another stream.
    ///
    /// # Errors
    /// What `body` gives; [`Error::Torch`] where an operation cannot be recorded. The recording has ended then.
    pub fn record<E: From<Error>>(
        &self,
        body: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: two numbers, and a local to write to.
        self.calls.checked(unsafe { (self.calls.graph_begin)(self.pool.as_ptr(), &mut graph) })?;
        let graph = NonNull::new(graph).ok_or_else(|| Error::Torch("no graph".into()))?;
        let graph = Graph { calls: self.calls, graph };
        // A panic ends the recording, too, as a stream that goes on recording takes nothing else. tch panics where an operation
        // that takes a number beside its tensors fails, for instance because it cannot be recorded.
        let done = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
            let words = crate::error::panic_message(&*payload).unwrap_or("a panic");
            Err(Error::Torch(format!("while a step was recorded: {words}")).into())
        });
        // SAFETY: a live graph that is being recorded.
        let ended = self.calls.checked(unsafe { (self.calls.graph_end)(graph.graph.as_ptr()) });
        done.and(ended.map_err(E::from)).map(|()| graph)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // SAFETY: ours alone; scopes have copies.
        unsafe { lora_stream_drop(self.stream.as_ptr()) };
    }
}

/// A stream is current while this lives; to be dropped on its thread.
#[derive(Debug)]
pub struct Scope {
    scope: NonNull<c_void>,
    thread: PhantomData<*const ()>,
}

impl Drop for Scope {
    fn drop(&mut self) {
        // SAFETY: ours alone, and on the thread that made it, as it cannot be sent.
        unsafe { lora_stream_leave(self.scope.as_ptr()) };
    }
}

/// What was recorded.
#[derive(Debug)]
pub struct Graph {
    calls: &'static Calls,
    graph: NonNull<c_void>,
}

// SAFETY: a handle without ties to a thread, used through one reference at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Gives all of it to the current stream; the host goes on.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]. What a kernel of it does wrong is seen at the next wait for the device.
    pub fn replay(&mut self) -> Result<()> {
        // SAFETY: a live graph whose recording has ended.
        self.calls.checked(unsafe { (self.calls.graph_replay)(self.graph.as_ptr()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: ours alone.
        unsafe { (self.calls.graph_drop)(self.graph.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;
    use crate::device::{CudaStatus, cuda};

    #[test]
    fn only_a_gpu_records() {
        assert!(Recorder::new(Device::Cpu).unwrap_err().to_string().contains("CUDA"));
    }

    /// Forward and backward of a product, on a machine with a GPU.
    #[test]
    fn a_recorded_pass_computes_with_new_inputs_and_adds_to_its_gradient() {
        if !matches!(cuda(), CudaStatus::Available(_)) {
            println!("not run: {}", cuda());
            return;
        }
        let device = Device::Cuda(0);
        let recorder = Recorder::new(device).unwrap();
        let scope = recorder.enter().unwrap();
        let weight = Tensor::ones([8, 8], (Kind::Float, device)).set_requires_grad(true);
        let input = Tensor::ones([4, 8], (Kind::Float, device));
        let loss = Tensor::zeros([0i64; 0], (Kind::Float, device));
        let pass = || -> Result<Tensor> {
            let own = input.f_matmul(&weight)?.f_square()?.f_sum(Kind::Float)?;
            own.f_backward()?;
            Ok(own.detach())
        };
        drop(pass().unwrap());
        let mut gradient = weight.grad();
        let recorded = || -> Result<()> {
            loss.shallow_clone().f_copy_(&pass()?)?;
            Ok(())
        };
        let mut graph = recorder.record(recorded).unwrap();
        for value in [1.0, 2.0, -3.0] {
            let (_, _) = (input.shallow_clone().fill_(value), gradient.zero_());
            graph.replay().unwrap();
            // 32 answers of 8v, and 2 · 8v · v for each of four rows.
            assert_eq!(loss.double_value(&[]), 32.0 * 64.0 * value * value);
            assert_eq!(gradient.double_value(&[3, 5]), 4.0 * 16.0 * value * value);
            graph.replay().unwrap();
            assert_eq!(gradient.double_value(&[3, 5]), 8.0 * 16.0 * value * value, "it adds");
        }
        // What reads a number cannot be recorded, and the recorder goes on.
        assert!(recorder.record(|| pass().map(|loss| assert!(loss.double_value(&[]) > 0.0))).is_err());
        drop(graph);
        assert!(recorder.record(|| pass().map(drop)).is_ok());
        drop(scope);
    }
}
