//! CUDA graphs: the kernels that a stretch of code launches, recorded once and launched again as one. A step of
//! training is thousands of small kernels, and a fast device waits for the host to launch them.
//!
//! What holds for code that is recorded: it reads and writes the same memory every time, so that inputs are copied into
//! the tensors that it read, and results are left in tensors from outside; it neither looks at a number nor copies from
//! host memory; it draws nothing at random; and it has run before, in the same shapes, as libraries set themselves up
//! the first time. Gradients that it adds to must be there before.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

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
    pool: LivePool,
}

/// The name, libtorch's, of memory that graphs share.
type Pool = [u64; 2];

/// The pool of the graphs that are alive. Its name is used up with the last of them: libtorch 2.11's host allocator
/// keeps it without users until its own cache is emptied, and takes it for a fault when a recording begins in it
/// (`create_or_incref_pool_under_lock` of `ATen/core/CachingHostAllocator.h`).
#[derive(Debug, Default)]
struct LivePool(Mutex<Weak<Pool>>);

impl LivePool {
    fn get(&self, new: impl FnOnce() -> Result<Pool>) -> Result<Arc<Pool>> {
        let mut alive = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = alive.upgrade() {
            return Ok(pool);
        }
        let pool = Arc::new(new()?);
        *alive = Arc::downgrade(&pool);
        Ok(pool)
    }

    /// The next graph has another one.
    fn leave(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Weak::new();
    }
}

// SAFETY: a stream's name, which nothing changes, without ties to a thread, and numbers behind a lock.
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
        let (calls, mut stream) = (calls()?, std::ptr::null_mut());
        // SAFETY: a local to write to.
        shim::checked(unsafe { lora_stream_new(index as i64, &mut stream) })?;
        let stream = NonNull::new(stream).ok_or_else(|| Error::Torch("no stream".into()))?;
        Ok(Self { calls, stream, pool: LivePool::default() })
    }

    /// Makes the recorder's stream this thread's current one while the answer lives. What was given to the one before
    /// is done first, and in the end the other way around.
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
    /// What `body` gives; [`Error::Torch`] where an operation cannot be recorded. The recording has ended then, and the
    /// memory that it took is given back.
    pub fn record<E: From<Error>>(
        &self,
        body: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        let pool = self.pool.get(|| self.new_pool())?;
        let recorded = self.begin(pool).map_err(E::from).and_then(|graph| self.fill(graph, body));
        if recorded.is_err() {
            self.pool.leave();
        }
        recorded
    }

    fn new_pool(&self) -> Result<Pool> {
        let mut pool = [0; 2];
        // SAFETY: a local of the size that is written.
        self.calls.checked(unsafe { (self.calls.graph_pool)(pool.as_mut_ptr()) })?;
        Ok(pool)
    }

    fn begin(&self, pool: Arc<Pool>) -> Result<Graph> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: two numbers, and a local to write to.
        self.calls.checked(unsafe { (self.calls.graph_begin)(pool.as_ptr(), &mut graph) })?;
        let graph = NonNull::new(graph).ok_or_else(|| Error::Torch("no graph".into()))?;
        Ok(Graph { calls: self.calls, graph, _pool: pool })
    }

    /// Runs `body` while `graph` records, and ends the recording.
    fn fill<E: From<Error>>(
        &self,
        graph: Graph,
        body: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        // A panic ends the recording, too, as a stream that goes on recording takes nothing else. tch panics where an
        // operation that takes a number beside its tensors fails, for instance because it cannot be recorded.
        let done = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
            let other = || {
                let words = crate::error::panic_message(&*payload).unwrap_or("a panic");
                Error::Torch(format!("while a step was recorded: {words}"))
            };
            Err(crate::error::failure_in(&*payload).unwrap_or_else(other).into())
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
    /// Its name is in use as long as the graph is there.
    _pool: Arc<Pool>,
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

    #[test]
    fn graphs_share_a_pool_while_one_of_them_lives_and_its_name_never_comes_again() {
        let (pool, mut names) = (LivePool::default(), 0..);
        let mut next = || pool.get(|| Ok([0, names.next().unwrap()])).unwrap();
        let first = next();
        let second = next();
        assert_eq!(first, second);
        drop(first);
        assert_eq!(second, next(), "one is alive");
        drop(second);
        assert_eq!(*next(), [0, 1], "all were gone");
        let third = next();
        pool.leave();
        assert_ne!(third, next(), "a recording failed");
        assert!(pool.get(|| Err(Error::Torch("no".into()))).is_err());
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
        let reserved = || crate::memory::device_memory(device).unwrap().unwrap().reserved;
        drop(Tensor::zeros([1 << 24], (Kind::Float, device)));
        let before = reserved();
        crate::memory::empty_cache(device).unwrap();
        assert!(reserved() < before, "cached memory is given back, although a recording has failed");
        // With no graph alive any more, too.
        assert!(recorder.record(|| pass().map(drop)).is_ok());
        assert!(recorder.record(|| pass().map(drop)).is_ok());
        drop(scope);
    }
}
