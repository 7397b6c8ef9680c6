//! Running out of host memory on purpose, so that what happens then can be tested on any machine: chosen allocations of one
//! thread fail inside libtorch, in the forward pass, the backward pass or wherever they are made, with the words of a real
//! failure. For tests; nothing reads a configuration here, and until the first [`Fault`] libtorch's own allocator is in
//! place, so that it costs nothing.

use std::marker::PhantomData;

/// Failures that are set on this thread; dropping it ends them. One at a time: a new one takes the place of the last.
///
/// ```
/// use lora_torch::fault::Fault;
/// use lora_torch::tch::{Device, Kind, Tensor};
/// let fault = Fault::of_allocation(1);
/// let zeros = || Tensor::f_zeros([4], (Kind::Float, Device::Cpu)).map_err(lora_torch::Error::from);
/// assert!(zeros().is_ok() && zeros().unwrap_err().is_out_of_memory() && zeros().is_ok());
/// assert_eq!(fault.failed(), 1);
/// ```
#[derive(Debug)]
pub struct Fault {
    /// The failures are the thread's own.
    _thread: PhantomData<*const ()>,
}

unsafe extern "C" {
    fn lora_fault_set(first: u64, count: u64, bytes: u64);
    fn lora_fault_clear();
    fn lora_fault_counts(seen: *mut u64, failed: *mut u64, largest: *mut u64);
}

impl Fault {
    /// One allocation fails, counted from 0 and from now.
    pub fn of_allocation(number: u64) -> Self {
        Self::set(number, 1, 0)
    }

    /// Every allocation of at least so many bytes fails, as if there were not as much in one piece.
    pub fn from_bytes(bytes: u64) -> Self {
        Self::set(0, 0, bytes.max(1))
    }

    /// Every allocation fails.
    pub fn of_all() -> Self {
        Self::set(0, u64::MAX, 0)
    }

    /// None fails; they are counted.
    pub fn none() -> Self {
        Self::set(0, 0, 0)
    }

    fn set(first: u64, count: u64, bytes: u64) -> Self {
        // SAFETY: takes no pointers. The allocator that the first call puts in place hands every request on to the one that
        // was there, whose memory it gives out as it is.
        unsafe { lora_fault_set(first, count, bytes) };
        Self { _thread: PhantomData }
    }

    /// Allocations since it was set.
    pub fn allocations(&self) -> u64 {
        self.counts()[0]
    }

    /// How many of them failed.
    pub fn failed(&self) -> u64 {
        self.counts()[1]
    }

    /// Bytes of the largest of them.
    pub fn largest(&self) -> u64 {
        self.counts()[2]
    }

    fn counts(&self) -> [u64; 3] {
        let (mut seen, mut failed, mut largest) = (0, 0, 0);
        // SAFETY: three locals to write to.
        unsafe { lora_fault_counts(&mut seen, &mut failed, &mut largest) };
        [seen, failed, largest]
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        // SAFETY: takes no pointers.
        unsafe { lora_fault_clear() };
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::Error;

    #[test]
    fn what_is_chosen_fails_and_nothing_else() {
        let zeros = |count: i64| Tensor::f_zeros([count], (Kind::Float, Device::Cpu)).map_err(Error::from);
        let fault = Fault::from_bytes(4000);
        assert!(zeros(999).is_ok());
        let error = zeros(1000).unwrap_err();
        assert!(error.is_out_of_memory() && error.to_string().contains("4000 bytes"), "{error}");
        assert_eq!((fault.allocations(), fault.failed(), fault.largest()), (2, 1, 4000));
        // Other threads are not concerned.
        std::thread::scope(|scope| assert!(scope.spawn(|| zeros(1000).is_ok()).join().unwrap()));
        drop(fault);
        assert!(zeros(1000).is_ok());
        let all = Fault::of_all();
        assert!(zeros(1).is_err() && zeros(1).is_err());
        drop(all);
        assert!(zeros(1).is_ok());
    }

    /// Wherever an allocation of a forward and backward pass fails, it is an error that says so, and the next pass is whole.
    #[test]
    fn every_allocation_of_both_passes_may_fail() {
        let weight = Tensor::ones([8, 8], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let pass = || -> Result<f64, Error> {
            let part = crate::checkpoint::Shared::new(weight.shallow_clone());
            let input = Tensor::f_ones([2, 8], (Kind::Float, Device::Cpu))?.f_matmul(&weight)?;
            let output = crate::checkpoint::checkpoint(&[&input], crate::checkpoint::Inputs::Kept, move |inputs| {
                Ok(inputs[0].f_matmul(&part)?.f_tanh()?.f_mul_scalar(0.5)?)
            })?;
            output.f_sum(Kind::Float)?.f_backward()?;
            let norm = f64::try_from(weight.grad().f_norm()?)?;
            Ok(norm)
        };
        let clear = || crate::gradients::clear(&mut [weight.shallow_clone()]).unwrap();
        let fault = Fault::none();
        let whole = pass().unwrap();
        let allocations = fault.allocations();
        drop(fault);
        clear();
        assert!(allocations > 10);
        for number in 0..allocations {
            let fault = Fault::of_allocation(number);
            let error = crate::caught(pass).unwrap_err();
            assert!(error.is_out_of_memory(), "{number}: {error}");
            assert_eq!(fault.failed(), 1);
            drop(fault);
            clear();
            assert_eq!(pass().unwrap(), whole, "{number}");
            clear();
        }
    }
}
