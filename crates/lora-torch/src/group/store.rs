//! The C interface of `cpp/group/group.cpp`: the store, and sums that are under way. Private: what is said under which key, and
//! what a failure means, is in the modules beside.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tch::Tensor;

use crate::shim::{RawTensor, checked};
use crate::{Result, cuda};

/// `lora::group::Group`, which only C++ looks into.
type RawGroup = c_void;
type RawWork = c_void;

unsafe extern "C" {
    fn lora_group_open(
        host: *const c_char,
        port: u16,
        listener: c_int,
        milliseconds: i64,
        prefix: *const c_char,
        group: *mut *mut RawGroup,
    ) -> c_int;
    fn lora_group_set(group: *mut RawGroup, key: *const c_char, bytes: *const u8, count: usize) -> c_int;
    fn lora_group_append(group: *mut RawGroup, key: *const c_char, bytes: *const u8, count: usize) -> c_int;
    fn lora_group_add(group: *mut RawGroup, key: *const c_char, by: i64, sum: *mut i64) -> c_int;
    fn lora_group_delete(group: *mut RawGroup, key: *const c_char) -> c_int;
    fn lora_group_get(group: *mut RawGroup, key: *const c_char, bytes: *mut *const u8, count: *mut usize) -> c_int;
    fn lora_group_connect(
        group: *mut RawGroup,
        host: *const c_char,
        rank: c_int,
        ranks: c_int,
        milliseconds: i64,
    ) -> c_int;
    fn lora_group_sum(
        group: *mut RawGroup,
        tensor: *const RawTensor,
        milliseconds: i64,
        work: *mut *mut RawWork,
    ) -> c_int;
    fn lora_group_is_done(work: *mut RawWork, done: *mut c_int) -> c_int;
    fn lora_group_finish(work: *mut RawWork) -> c_int;
    fn lora_group_drop_work(work: *mut RawWork);
    fn lora_group_abort(group: *mut RawGroup) -> c_int;
    fn lora_group_drop(group: *mut RawGroup, abandon: c_int);
}

/// Who waits for a sum notices what happens to it, and says so. c10d's own watchdog would end the process instead.
const NCCL_SETTINGS: [(&CStr, &CStr); 2] =
    [(c"TORCH_NCCL_ASYNC_ERROR_HANDLING", c"0"), (c"TORCH_NCCL_RETHROW_CUDA_ERRORS", c"0")];

/// A client of the store that all ranks read and write, and what sums are made with once it is connected.
#[derive(Debug)]
pub(super) struct Store {
    raw: *mut RawGroup,
    /// Something is under way that cannot be ended.
    abandoned: AtomicBool,
}

// SAFETY: c10d's store takes a lock for each call, and so does a backend that work is given to; both are made to be called by
// several threads.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Opens the store that is served at an address: by this process where it brings a bound socket, which it does not close.
    pub(super) fn open(
        host: IpAddr,
        port: u16,
        listener: Option<c_int>,
        limit: Duration,
        prefix: &str,
    ) -> Result<Self> {
        let (host, prefix, mut raw) = (text(&host.to_string()), text(prefix), std::ptr::null_mut());
        // SAFETY: texts that end with NUL and are copied, and a local to write to.
        checked(unsafe {
            lora_group_open(host.as_ptr(), port, listener.unwrap_or(-1), milliseconds(limit), prefix.as_ptr(), &mut raw)
        })?;
        Ok(Self { raw, abandoned: false.into() })
    }

    pub(super) fn set(&self, key: &str, bytes: &[u8]) -> Result<()> {
        // SAFETY: a live group, and a text and bytes that are copied.
        checked(unsafe { lora_group_set(self.raw, text(key).as_ptr(), bytes.as_ptr(), bytes.len()) })
    }

    pub(super) fn append(&self, key: &str, bytes: &[u8]) -> Result<()> {
        // SAFETY: as above.
        checked(unsafe { lora_group_append(self.raw, text(key).as_ptr(), bytes.as_ptr(), bytes.len()) })
    }

    /// A counter, by so much more.
    pub(super) fn add(&self, key: &str, by: i64) -> Result<i64> {
        let mut sum = 0;
        // SAFETY: as above, and a local to write to.
        checked(unsafe { lora_group_add(self.raw, text(key).as_ptr(), by, &mut sum) })?;
        Ok(sum)
    }

    pub(super) fn delete(&self, key: &str) -> Result<()> {
        // SAFETY: a live group, and a text that is copied.
        checked(unsafe { lora_group_delete(self.raw, text(key).as_ptr()) })
    }

    /// What is under a key now.
    pub(super) fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let (mut bytes, mut count) = (std::ptr::null(), 0);
        // SAFETY: a live group, a text that is copied, and two locals to write to.
        checked(unsafe { lora_group_get(self.raw, text(key).as_ptr(), &mut bytes, &mut count) })?;
        // SAFETY: so many bytes that stay until this thread's next call.
        Ok((!bytes.is_null()).then(|| unsafe { std::slice::from_raw_parts(bytes, count) }.to_vec()))
    }

    /// Connects all ranks in host memory; this one listens on an address, or on that which variables of Gloo's own choose.
    pub(super) fn connect(&self, host: Option<IpAddr>, rank: usize, ranks: usize, limit: Duration) -> Result<()> {
        let host = host.map(|host| text(&host.to_string()));
        let pointer = host.as_ref().map_or(std::ptr::null(), |host| host.as_ptr());
        // SAFETY: a live group, and a text, if any, that is copied.
        checked(unsafe { lora_group_connect(self.raw, pointer, rank as c_int, ranks as c_int, milliseconds(limit)) })
    }

    /// Makes NCCL ready for tensors of a GPU.
    pub(super) fn connect_gpus(&self, device: usize, rank: usize, ranks: usize) -> Result<()> {
        let calls = cuda::calls()?;
        for (name, value) in NCCL_SETTINGS {
            crate::shim::default_variable(name, value)?;
        }
        // SAFETY: a live group, as the object beside this library, of the same build, knows it too.
        calls.checked(unsafe { (calls.group_nccl)(self.raw, rank as c_int, ranks as c_int, device as i64) })
    }

    /// Gives up what is under way: a GPU goes on at once, and nothing waits for host memory.
    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
        // SAFETY: a live group.
        if let Err(error) = checked(unsafe { lora_group_abort(self.raw) }) {
            tracing::debug!("a sum on the GPU could not be ended: {error}");
        }
    }

    /// Begins to sum a tensor over all ranks, in place.
    pub(super) fn sum(&self, tensor: &Tensor, limit: Duration) -> Result<Work> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: a live group, a live `torch::Tensor*` which the work refers to by itself, and a local to write to.
        checked(unsafe { lora_group_sum(self.raw, tensor.as_ptr(), milliseconds(limit), &mut raw) })?;
        Ok(Work(raw))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more; what is under way refers to what it needs by itself.
        unsafe { lora_group_drop(self.raw, (*self.abandoned.get_mut()).into()) }
    }
}

/// A sum that is under way.
#[derive(Debug)]
pub(super) struct Work(*mut RawWork);

impl Work {
    pub(super) fn is_done(&self) -> Result<bool> {
        let mut done = 0;
        // SAFETY: live work, and a local to write to.
        checked(unsafe { lora_group_is_done(self.0, &mut done) })?;
        Ok(done != 0)
    }

    /// Of what is done: its failure, if it failed. The current stream of a GPU goes on after it.
    pub(super) fn finish(self) -> Result<()> {
        // SAFETY: live work.
        checked(unsafe { lora_group_finish(self.0) })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: ours alone.
        unsafe { lora_group_drop_work(self.0) }
    }
}

/// As C++ reads it. NUL, which no key here has, would end it.
fn text(words: &str) -> CString {
    CString::new(words.replace('\0', "")).unwrap_or_default()
}

/// At most a year, so that C++ can add it to a time of day.
fn milliseconds(limit: Duration) -> i64 {
    limit.min(Duration::from_secs(365 * 24 * 3600)).as_millis() as i64
}
