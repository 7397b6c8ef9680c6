//! How much memory is in use: on the device as libtorch's allocator counts it, in the host as the kernel counts it and, on
//! request, as libtorch asks for it; and a bound on the first.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::Device;

use crate::cuda::{Calls, calls};
use crate::{Error, Result, shim};

/// Device memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceMemory {
    /// Held by live tensors.
    pub allocated: u64,
    /// The most held by live tensors since [`reset_peak`].
    pub allocated_peak: u64,
    /// Taken from the driver, cached blocks included.
    pub reserved: u64,
    /// The most taken from the driver since [`reset_peak`].
    pub reserved_peak: u64,
    /// Free on the device, for all processes.
    pub free: u64,
    /// On the device.
    pub total: u64,
}

/// The state of a device's memory; `None` for the CPU.
///
/// # Errors
/// [`Error::DeviceLost`].
pub fn device_memory(device: Device) -> Result<Option<DeviceMemory>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let (Some(stats), Some(info)) = (shim::memory_stats(index)?, shim::memory_info(index)?) else { return Ok(None) };
    let [allocated, allocated_peak, reserved, reserved_peak] = stats.map(|bytes| bytes as u64);
    let [free, total] = info.map(|bytes| bytes as u64);
    Ok(Some(DeviceMemory { allocated, allocated_peak, reserved, reserved_peak, free, total }))
}

/// Starts the device's peaks anew. Nothing on the CPU.
///
/// # Errors
/// [`Error::DeviceLost`].
pub fn reset_peak(device: Device) -> Result<()> {
    match device {
        Device::Cuda(index) => shim::reset_peak(index),
        _ => Ok(()),
    }
}

/// Gives cached blocks back to the driver. Nothing on the CPU.
///
/// # Errors
/// [`Error::DeviceLost`].
pub fn empty_cache(device: Device) -> Result<()> {
    match device {
        Device::Cuda(_) => shim::empty_cache(),
        _ => Ok(()),
    }
}

/// A bound on what libtorch's allocator takes from a device, for as long as this lives.
#[derive(Debug)]
#[must_use]
pub struct Limit {
    calls: &'static Calls,
    index: i64,
}

/// Bounds what libtorch's allocator takes from a device, cached blocks and the memory of recorded graphs included: beyond it
/// an allocation fails as on a device that is full. The bound is the process's; a later one takes its place. Nothing on the CPU.
///
/// # Errors
/// Where the library was built without CUDA's headers.
pub fn limited(device: Device, bytes: u64) -> Result<Option<Limit>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let (calls, index) = (calls()?, index as i64);
    // SAFETY: two numbers.
    calls.checked(unsafe { (calls.memory_limit)(index, bytes) })?;
    Ok(Some(Limit { calls, index }))
}

impl Drop for Limit {
    fn drop(&mut self) {
        // SAFETY: two numbers.
        unsafe { (self.calls.memory_limit)(self.index, u64::MAX) };
    }
}

/// Host memory of this process in bytes, as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostMemory {
    /// Resident now.
    pub resident: u64,
    /// The most resident so far.
    pub peak: u64,
}

/// This process's resident memory; `None` where the kernel does not tell (it does on Linux).
pub fn host_memory() -> Option<HostMemory> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
    };
    Some(HostMemory { resident: field("VmRSS:")?, peak: field("VmHWM:")? })
}

/// Host memory in bytes that new allocations can have without swapping, as the kernel estimates it; `None` where it does not
/// tell. Limits of a container are not looked at.
pub fn host_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

/// Host memory of libtorch's tensors in bytes, exact to the byte; what was allocated before counting began is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostAllocations {
    /// Held now.
    pub live: u64,
    /// The most held since counting began or [`reset_host_peak`].
    pub peak: u64,
}

unsafe extern "C" {
    fn lora_allocations_count() -> c_int;
    fn lora_allocations_read(now: *mut i64, most: *mut i64);
    fn lora_allocations_reset_peak();
}

static COUNTING: AtomicBool = AtomicBool::new(false);

/// Begins to count libtorch's host allocations in this process, for good: every tensor, and every buffer that its kernels
/// take, of all threads together. Costs two atomic additions an allocation. Call it before other threads use libtorch: the
/// allocator is exchanged without a lock.
///
/// # Errors
/// [`Error::Torch`] where another allocator has taken the place of libtorch's own.
pub fn count_host_allocations() -> Result<()> {
    // SAFETY: takes no pointers; it guards itself against a second call.
    if unsafe { lora_allocations_count() } == 0 {
        return Err(Error::Torch(
            "host allocations cannot be counted: another allocator has taken the place of libtorch's own".into(),
        ));
    }
    COUNTING.store(true, Ordering::Relaxed);
    Ok(())
}

/// What libtorch holds in the host; `None` unless [`count_host_allocations`] was called.
pub fn host_allocations() -> Option<HostAllocations> {
    if !COUNTING.load(Ordering::Relaxed) {
        return None;
    }
    let (mut live, mut peak) = (0, 0);
    // SAFETY: both pointers are to locals of the type that is written.
    unsafe { lora_allocations_read(&mut live, &mut peak) };
    // A tensor from before counting began is freed by its own allocator, so neither falls below 0.
    Some(HostAllocations { live: live.max(0) as u64, peak: peak.max(0) as u64 })
}

/// Starts the peak of [`host_allocations`] anew from what is held now.
pub fn reset_host_peak() {
    // SAFETY: takes no pointers.
    unsafe { lora_allocations_reset_peak() };
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    #[test]
    fn the_cpu_has_no_device_memory_and_no_peaks() {
        assert_eq!(device_memory(Device::Cpu).unwrap(), None);
        reset_peak(Device::Cpu).unwrap();
        empty_cache(Device::Cpu).unwrap();
        assert!(limited(Device::Cpu, 1).unwrap().is_none());
    }

    /// On a machine with a GPU.
    #[test]
    fn beyond_a_limit_memory_has_run_out() {
        if !matches!(crate::device::cuda(), crate::device::CudaStatus::Available(_)) {
            println!("not run: {}", crate::device::cuda());
            return;
        }
        let device = Device::Cuda(0);
        let take = |bytes: u64| Tensor::f_zeros([bytes as i64], (Kind::Uint8, device)).map_err(Error::from);
        let taken = device_memory(device).unwrap().unwrap().reserved;
        let limit = limited(device, taken + (512 << 20)).unwrap();
        assert!(take(1 << 30).unwrap_err().is_out_of_memory());
        assert!(take(64 << 20).is_ok());
        drop(limit);
        assert!(take(1 << 30).is_ok());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn host_memory_sees_an_allocation() {
        // More than the process holds beside it. What was held before says nothing: other tests give back meanwhile.
        let block = Tensor::ones([1 << 30], (Kind::Uint8, Device::Cpu));
        let seen = host_memory().unwrap();
        assert!(seen.resident >= 1 << 30 && seen.peak >= seen.resident, "{seen:?}");
        drop(block);
    }
}
