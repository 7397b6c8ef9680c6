//! Dry runs: the peak of memory of any work on tensors, found by doing the work on a device without memory. Tensors there have
//! shapes, strides and number types; networks, adapters, losses, backward passes and optimisers run on it unchanged, and an
//! allocator counts what they would hold. The device itself is in `cpp/dry`; what a run does is the caller's business.
//!
//! Reading a number of such a tensor gives 1 (true; 0 for whole numbers), so that work which decides by numbers goes the way of
//! numbers that are finite and not zero. An operation without a kernel is an error that names it.

use std::ffi::c_int;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Tensor};

use crate::Result;
use crate::shim::{RawTensor, checked};

/// How many labels there are.
pub const LABELS: usize = 32;

/// What CUDA's caching allocator rounds sizes up to.
const CUDA_UNIT: i64 = 512;

unsafe extern "C" {
    fn lora_dry_begin(cuda: c_int, threads: i64, unit: i64) -> c_int;
    fn lora_dry_limit(bytes: i64);
    fn lora_dry_label(label: c_int) -> c_int;
    fn lora_dry_relabel_all(from: c_int, to: c_int);
    fn lora_dry_relabel(tensors: *mut *mut RawTensor, count: usize, to: c_int);
    fn lora_dry_read(out: *mut i64);
    fn lora_dry_reset_peak();
}

/// What work is done on, as far as memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Platform {
    /// The CPU: kernels of oneDNN and libtorch's own, buffers for each thread, sizes exact.
    Cpu {
        /// Threads that kernels run on.
        threads: usize,
    },
    /// An NVIDIA GPU: kernels of cuDNN and cuBLAS, sizes in units of 512 bytes.
    Cuda,
}

impl Platform {
    /// That of this machine's CPU.
    pub fn cpu() -> Self {
        Platform::Cpu { threads: usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1) }
    }

    /// Whether it is the CPU, so that the host's memory is the device's.
    pub fn is_cpu(self) -> bool {
        matches!(self, Platform::Cpu { .. })
    }
}

/// The platform of the dry run under way.
static PLATFORM: Mutex<Option<Platform>> = Mutex::new(None);
/// Counting is the process's: one dry run at a time.
static TURN: Mutex<()> = Mutex::new(());

/// A dry run: what is done on its [device](DryRun::device) is counted while this lives. Another one waits for its end. Tensors of
/// the device must not outlive it.
///
/// ```
/// use lora_torch::dry::{DryRun, Platform};
/// use lora_torch::tch::{Kind, Tensor};
/// let run = DryRun::begin(Platform::Cpu { threads: 1 })?;
/// let weight = Tensor::f_zeros([1 << 20, 1 << 10], (Kind::Float, run.device()))?;
/// let input = Tensor::f_zeros([1, 1 << 10], (Kind::Float, run.device()))?;
/// let output = input.f_matmul(&weight.f_tr()?)?;
/// assert_eq!(run.peak().total(), 4 * ((1 << 30) + (1 << 10) + (1 << 20)));
/// # Ok::<(), lora_torch::Error>(())
/// ```
#[derive(Debug)]
pub struct DryRun {
    _turn: MutexGuard<'static, ()>,
}

/// Bytes by label at the peak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peak {
    labels: [u64; LABELS],
    /// The most that waited in host memory beside a GPU since the run began.
    pub host: u64,
}

impl Peak {
    /// Bytes of a label.
    pub fn of(&self, label: u8) -> u64 {
        self.labels.get(usize::from(label)).copied().unwrap_or(0)
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        self.labels.iter().sum()
    }
}

/// The name that tch has for the device without memory: it has five names, and this one's own device does not exist where there
/// are dry runs.
const DEVICE: Device = Device::Mps;

/// Whether a device is the one without memory.
pub fn is_dry(device: Device) -> bool {
    device == DEVICE
}

/// What a device is or, where it is the one without memory, plays.
pub fn platform(device: Device) -> Platform {
    let playing = || *PLATFORM.lock().unwrap_or_else(PoisonError::into_inner);
    match device {
        Device::Cuda(_) => Platform::Cuda,
        dry if is_dry(dry) => playing().unwrap_or_else(Platform::cpu),
        _ => Platform::cpu(),
    }
}

/// Where tensors of a device's run wait that are not at work: in host memory, which for the CPU's dry run is counted as the rest.
pub fn host_of(device: Device) -> Device {
    if is_dry(device) && platform(device).is_cpu() { device } else { Device::Cpu }
}

impl DryRun {
    /// Begins, once no other dry run is under way in this process. Nothing is counted yet.
    ///
    /// # Errors
    /// On macOS, where the name that tch has for the device is a real one's.
    pub fn begin(platform: Platform) -> Result<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (cuda, threads, unit) = match platform {
            Platform::Cpu { threads } => (0, threads as i64, 1),
            Platform::Cuda => (1, 1, CUDA_UNIT),
        };
        // SAFETY: takes no pointers.
        checked(unsafe { lora_dry_begin(cuda, threads, unit) })?;
        *PLATFORM.lock().unwrap_or_else(PoisonError::into_inner) = Some(platform);
        Ok(Self { _turn: turn })
    }

    /// The device without memory.
    pub fn device(&self) -> Device {
        DEVICE
    }

    /// Beyond so many bytes an allocation fails as on a device that is full.
    pub fn limit(&self, bytes: u64) {
        // SAFETY: takes no pointers.
        unsafe { lora_dry_limit(i64::try_from(bytes).unwrap_or(i64::MAX)) };
    }

    /// Bytes at the moment when most were held since the last [`DryRun::reset_peak`].
    pub fn peak(&self) -> Peak {
        let out = self.read();
        let bytes = |index: usize| u64::try_from(out[index]).unwrap_or(0);
        Peak { labels: std::array::from_fn(bytes), host: bytes(LABELS + 1) }
    }

    /// Bytes that are held.
    pub fn live(&self) -> u64 {
        u64::try_from(self.read()[LABELS]).unwrap_or(0)
    }

    fn read(&self) -> [i64; LABELS + 2] {
        let mut out = [0; LABELS + 2];
        // SAFETY: a local of the size that is written.
        unsafe { lora_dry_read(out.as_mut_ptr()) };
        out
    }

    /// Starts the peak anew from what is held.
    pub fn reset_peak(&self) {
        // SAFETY: takes no pointers.
        unsafe { lora_dry_reset_peak() };
    }
}

impl Drop for DryRun {
    fn drop(&mut self) {
        self.limit(u64::MAX);
        *PLATFORM.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// While this lives, what is allocated has a label.
#[derive(Debug)]
#[must_use]
pub struct Labelled {
    before: c_int,
}

/// Labels what is allocated from now on, until the answer is dropped; 0 is the label of what has no other. It matters to dry
/// runs only.
///
/// # Panics
/// For a label that is not below [`LABELS`].
pub fn label(label: u8) -> Labelled {
    assert!(usize::from(label) < LABELS, "there are {LABELS} labels");
    // SAFETY: takes no pointers; the number is in range.
    Labelled { before: unsafe { lora_dry_label(c_int::from(label)) } }
}

impl Drop for Labelled {
    fn drop(&mut self) {
        // SAFETY: as above, a number that was in force.
        unsafe { lora_dry_label(self.before) };
    }
}

/// All that lives under one label has another from now on.
///
/// # Panics
/// For a label that is not below [`LABELS`].
pub fn relabel_all(from: u8, to: u8) {
    assert!(usize::from(from.max(to)) < LABELS, "there are {LABELS} labels");
    // SAFETY: takes no pointers; the numbers are in range.
    unsafe { lora_dry_relabel_all(c_int::from(from), c_int::from(to)) };
}

/// What these tensors take has another label from now on; those of real devices are passed over.
///
/// # Panics
/// For a label that is not below [`LABELS`].
pub fn relabel(tensors: &[Tensor], to: u8) {
    assert!(usize::from(to) < LABELS, "there are {LABELS} labels");
    let mut pointers: Vec<*mut RawTensor> = tensors.iter().map(|tensor| tensor.as_ptr().cast_mut()).collect();
    // SAFETY: live `torch::Tensor*` for the length of the call; the number is in range.
    unsafe { lora_dry_relabel(pointers.as_mut_ptr(), pointers.len(), c_int::from(to)) };
}

#[cfg(all(test, not(target_os = "macos")))]
mod tests {
    use tch::{Kind, no_grad};

    use super::*;
    use crate::Error;

    fn zeros(shape: &[i64], device: Device) -> Tensor {
        Tensor::zeros(shape, (Kind::Float, device))
    }

    #[test]
    fn bytes_are_counted_by_label_while_they_are_held() {
        let run = DryRun::begin(Platform::Cuda).unwrap();
        let before = run.live();
        let kept = {
            let _label = label(3);
            zeros(&[1], run.device())
        };
        let passing = zeros(&[200], run.device());
        assert_eq!(run.live() - before, 512 + 1024);
        drop(passing);
        assert_eq!((run.peak().of(3), run.peak().of(0) - before), (512, 1024));
        relabel(std::slice::from_ref(&kept), 4);
        run.reset_peak();
        assert_eq!((run.peak().of(3), run.peak().of(4)), (0, 512));
        relabel_all(4, 5);
        run.reset_peak();
        assert_eq!((run.peak().of(5), run.peak().total() - before), (512, 512));
        drop(kept);
        assert_eq!(run.live(), before);
    }

    #[test]
    fn beyond_its_limit_memory_has_run_out() {
        let run = DryRun::begin(Platform::Cpu { threads: 1 }).unwrap();
        run.limit(run.live() + 1000);
        let take = |count: i64| Tensor::f_zeros([count], (Kind::Float, run.device())).map_err(Error::from);
        assert!(take(251).unwrap_err().is_out_of_memory());
        let most = take(250).unwrap();
        assert!(take(1).unwrap_err().is_out_of_memory());
        // Where tch panics instead of returning, too.
        let failed: Result<Tensor> = crate::caught(|| Ok(most.f_mul_scalar(2.0)?));
        assert!(failed.unwrap_err().is_out_of_memory());
        drop(most);
        assert!(take(250).is_ok());
    }

    #[test]
    fn an_operation_without_a_kernel_is_named_and_the_next_run_counts_on() {
        {
            let run = DryRun::begin(Platform::Cpu { threads: 1 }).unwrap();
            let error = Error::from(zeros(&[4], run.device()).f_median().unwrap_err());
            assert!(error.to_string().contains("the plan does not know aten::median"), "{error}");
        }
        let run = DryRun::begin(Platform::Cpu { threads: 1 }).unwrap();
        let before = run.live();
        let tensor = zeros(&[4], run.device());
        assert_eq!(run.live() - before, 16);
        drop(tensor);
    }

    #[test]
    fn copies_to_where_a_tensor_is_are_none_and_numbers_can_be_read() {
        let run = DryRun::begin(Platform::Cpu { threads: 1 }).unwrap();
        let tensor = zeros(&[2, 3], run.device());
        let before = run.live();
        let same = tensor.f_to_device(run.device()).unwrap().f_to_kind(Kind::Float).unwrap();
        assert_eq!((run.live(), same.size(), same.device()), (before, vec![2, 3], run.device()));
        assert_eq!(f64::try_from(tensor.sum(Kind::Float)).unwrap(), 1.0);
        assert_eq!(Vec::<f32>::try_from(tensor.to_device(Device::Cpu).view([-1])).unwrap(), [1.0; 6]);
        assert_eq!((platform(run.device()), host_of(run.device())), (Platform::Cpu { threads: 1 }, run.device()));
    }

    /// A backward pass by libtorch's engine, with gradients that are added up.
    #[test]
    fn backward_passes_run_and_leave_nothing_behind() {
        let run = DryRun::begin(Platform::Cpu { threads: 2 }).unwrap();
        let before = run.live();
        {
            let weight = zeros(&[8, 4], run.device()).set_requires_grad(true);
            for _ in 0..2 {
                let input = zeros(&[3, 4], run.device());
                let output = input.matmul(&weight.tr());
                (&output * &output).sum(Kind::Float).backward();
            }
            assert_eq!(weight.grad().size(), [8, 4]);
            assert_eq!(run.live() - before, 2 * 4 * 8 * 4);
            no_grad(|| drop(weight.detach() + 1.0));
        }
        assert_eq!(run.live(), before);
    }
}
