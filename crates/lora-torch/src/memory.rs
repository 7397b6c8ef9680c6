//! How much memory is in use: on the device as libtorch's allocator counts it, in the host as the kernel counts it.

use tch::Device;

use crate::{Result, shim};

/// Device memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
pub fn device_memory(device: Device) -> Result<Option<DeviceMemory>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let (Some(stats), Some(info)) = (shim::memory_stats(index)?, shim::memory_info(index)?) else { return Ok(None) };
    let [allocated, allocated_peak, reserved, reserved_peak] = stats.map(|bytes| bytes as u64);
    let [free, total] = info.map(|bytes| bytes as u64);
    Ok(Some(DeviceMemory { allocated, allocated_peak, reserved, reserved_peak, free, total }))
}

/// Starts the device's peaks anew. Nothing on the CPU.
pub fn reset_peak(device: Device) -> Result<()> {
    match device {
        Device::Cuda(index) => shim::reset_peak(index),
        _ => Ok(()),
    }
}

/// Gives cached blocks back to the driver. Nothing on the CPU.
pub fn empty_cache(device: Device) -> Result<()> {
    match device {
        Device::Cuda(_) => shim::empty_cache(),
        _ => Ok(()),
    }
}

/// Host memory of this process in bytes, as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_no_device_memory_and_no_peaks() {
        assert_eq!(device_memory(Device::Cpu).unwrap(), None);
        reset_peak(Device::Cpu).unwrap();
        empty_cache(Device::Cpu).unwrap();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn host_memory_sees_an_allocation() {
        let before = host_memory().unwrap();
        let block = tch::Tensor::ones([32 << 20], (tch::Kind::Uint8, Device::Cpu));
        let after = host_memory().unwrap();
        assert!(after.peak >= before.resident + (30 << 20), "{before:?} {after:?}");
        drop(block);
    }
}
