//! How many operations libtorch is asked for, and after how many of them the host waits for the device: at small batches a
//! fast GPU is kept busy only by a host that launches early and never waits. Times and memory are not measured here.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int};
use std::sync::{Mutex, PoisonError};

use crate::Result;
use crate::shim::checked;

unsafe extern "C" {
    fn lora_profile_start() -> c_int;
    fn lora_profile_stop() -> *const c_char;
}

/// Operations of one name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Count {
    /// How often it did work itself: neither by calling others, nor by a mere view or allocation. Each is one kernel or a few.
    pub work: u64,
    /// How often the host waited: numbers that were read, and copies between host and device that were not left to run.
    pub waits: u64,
}

/// Operations by libtorch's names (`aten::mm` …).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Operations {
    /// Those that did work.
    pub by_name: BTreeMap<String, Count>,
}

impl Operations {
    /// All together.
    pub fn total(&self) -> Count {
        self.by_name
            .values()
            .fold(Count::default(), |sum, own| Count { work: sum.work + own.work, waits: sum.waits + own.waits })
    }
}

/// Ends the counting, come what may.
struct Counting;

impl Drop for Counting {
    fn drop(&mut self) {
        // SAFETY: takes no pointers; what it gives is not kept.
        unsafe { lora_profile_stop() };
    }
}

/// What `run` gives, and the operations of this thread meanwhile and of those that compute its gradients: what other
/// threads of the program do is not counted. It slows each operation down; one at a time, others wait.
///
/// ```
/// use lora_torch::profile::operations;
/// use lora_torch::tch::{Device, Kind, Tensor};
/// let a = Tensor::ones([4, 4], (Kind::Float, Device::Cpu));
/// let (number, counted) = operations(|| (a.matmul(&a).tr().tanh() + 1.0).double_value(&[0, 0])).unwrap();
/// assert!((number - 1.999).abs() < 1e-3);
/// // A product, a tanh, an addition, and a number that is read; transposing and picking one out are views.
/// assert_eq!((counted.total().work, counted.total().waits), (4, 1), "{counted:?}");
/// assert_eq!(counted.by_name["aten::mm"].work, 1);
/// ```
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) where libtorch refuses the hook.
pub fn operations<T>(run: impl FnOnce() -> T) -> Result<(T, Operations)> {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: takes no pointers; the lock keeps others from counting.
    checked(unsafe { lora_profile_start() })?;
    let counting = Counting;
    let result = run();
    std::mem::forget(counting);
    // SAFETY: counting was begun above; the text lives until this thread's next call, and is copied before.
    let text = unsafe { CStr::from_ptr(lora_profile_stop()) }.to_string_lossy();
    let line = |line: &str| {
        let mut words = line.split(' ');
        let name = words.next()?.to_owned();
        let mut number = || words.next()?.parse().ok();
        Some((name, Count { work: number()?, waits: number()? }))
    };
    Ok((result, Operations { by_name: text.lines().filter_map(line).collect() }))
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn what_other_threads_do_meanwhile_is_not_counted() {
        let (begun, done) = (Barrier::new(2), Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                begun.wait();
                assert!(Tensor::ones([2], (Kind::Float, Device::Cpu)).tanh().sum(Kind::Float).double_value(&[]) > 1.0);
                done.wait();
            });
            let run = || {
                begun.wait();
                done.wait();
                let leaf = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
                leaf.exp().sum(Kind::Float).backward();
            };
            let (_, counted) = operations(run).unwrap();
            assert!(!counted.by_name.contains_key("aten::tanh"), "{counted:?}");
            assert_eq!((counted.total().waits, counted.by_name["aten::exp"].work), (0, 1), "{counted:?}");
            // The gradient's own.
            assert!(counted.by_name["aten::mul"].work > 0, "{counted:?}");
        });
    }
}
