//! Frozen weights that live in host memory and pass through a ring of device memory, so that a network may be larger than the
//! device: each is copied there while the layers before it compute. The ring learns the order in which layers ask, forward
//! and backward, from the steps before. Layers that compute with such weights are in [`crate::frozen`].

use std::ffi::{c_int, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use tch::{Device, Tensor};

use crate::Result;
use crate::shim::{RawTensor, checked};

unsafe extern "C" {
    fn lora_staging_new(device: i64, staging: *mut *mut c_void) -> c_int;
    fn lora_staging_drop(staging: *mut c_void);
    fn lora_staging_add(
        staging: *mut c_void,
        parts: *const *const RawTensor,
        count: usize,
        out: *mut *mut RawTensor,
        id: *mut i64,
    ) -> c_int;
    fn lora_staging_counts(staging: *const c_void, out: *mut i64);
}

/// Tensors that a weight may consist of.
pub(crate) const PARTS: usize = 5;

/// A ring of device memory; clones are the same one. On the CPU it is host memory too: nothing is saved there, but all is done
/// as on a device.
#[derive(Debug, Clone)]
pub struct Staging {
    handle: Arc<Handle>,
    device: Device,
}

#[derive(Debug)]
struct Handle(NonNull<c_void>);

// SAFETY: the C++ object locks itself in each of its functions.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `lora_staging_new`, and dropped once; layers in a graph hold references of their own.
        unsafe { lora_staging_drop(self.0.as_ptr()) };
    }
}

/// What a ring has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct StagingCounts {
    /// Bytes of the ring: an eighth of all its weights, and room for two to six of the largest.
    pub ring_bytes: u64,
    /// Copies so far.
    pub copies: u64,
    /// Those of them that were not foreseen, so that the device waited.
    pub unforeseen: u64,
}

impl Staging {
    /// A ring on a device, without weights; its memory is taken when the first is used.
    ///
    /// # Errors
    /// [`Error::DeviceLost`](crate::Error::DeviceLost).
    pub fn new(device: Device) -> Result<Self> {
        let index = match device {
            Device::Cuda(index) => index as i64,
            dry if crate::dry::is_dry(dry) => -2,
            _ => -1,
        };
        let mut staging = std::ptr::null_mut();
        // SAFETY: a local to write to.
        checked(unsafe { lora_staging_new(index, &mut staging) })?;
        let handle = NonNull::new(staging).ok_or_else(|| crate::Error::Torch("no ring was made".into()))?;
        Ok(Self { handle: Arc::new(Handle(handle)), device })
    }

    /// Where weights pass through.
    pub fn device(&self) -> Device {
        self.device
    }

    /// What it has done so far.
    pub fn counts(&self) -> StagingCounts {
        let mut out = [0; 3];
        // SAFETY: a live object, and a local of the size that is written.
        unsafe { lora_staging_counts(self.as_ptr(), out.as_mut_ptr()) };
        let [ring_bytes, copies, unforeseen] = out.map(|count| count as u64);
        StagingCounts { ring_bytes, copies, unforeseen }
    }

    /// Moves the tensors of a weight to host memory and gives them there with the weight's number.
    pub(crate) fn add(&self, parts: [Option<&Tensor>; PARTS]) -> Result<([Option<Tensor>; PARTS], i64)> {
        let parts = parts.map(|part| part.map_or(std::ptr::null(), Tensor::as_ptr));
        let (mut out, mut id) = ([std::ptr::null_mut(); PARTS], 0);
        // SAFETY: a live object; arrays of `PARTS` live `torch::Tensor*` or null, and locals to write to.
        checked(unsafe { lora_staging_add(self.handle.0.as_ptr(), parts.as_ptr(), PARTS, out.as_mut_ptr(), &mut id) })?;
        // SAFETY: each is null or a new `torch::Tensor*` that is ours alone.
        let tensor = |pointer: *mut RawTensor| (!pointer.is_null()).then(|| unsafe { Tensor::from_ptr(pointer) });
        Ok((out.map(tensor), id))
    }

    pub(crate) fn as_ptr(&self) -> *const c_void {
        self.handle.0.as_ptr()
    }
}

#[cfg(test)]
mod tests {
    use lora_core::LayerGeometry;
    use lora_core::random::Stream;
    use tch::Kind;

    use super::*;
    use crate::frozen::{FrozenWeight, Storage};
    use crate::tensor::from_f32;

    const SIDE: usize = 64;

    /// Layers whose weights are all different.
    fn layers(count: usize, storage: Option<Storage>, staging: Option<&Staging>) -> Vec<FrozenWeight> {
        let layer = |index| {
            let values = Stream::new(index).normals(SIDE * SIDE);
            let weight = from_f32(&values, &[SIDE, SIDE], Device::Cpu).unwrap() / 8.0;
            let own = match storage {
                Some(storage) => FrozenWeight::stored(&weight, storage).unwrap(),
                None => FrozenWeight::plain(weight),
            };
            match staging {
                Some(staging) => own.staged(staging).unwrap(),
                None => own,
            }
        };
        (0..count as u64).map(layer).collect()
    }

    /// Output and the input's gradient of all layers in a row.
    fn step(layers: &[FrozenWeight], input: &Tensor) -> (Tensor, Tensor) {
        let input = input.copy().set_requires_grad(true);
        let geometry = LayerGeometry::linear(SIDE, SIDE);
        let output =
            layers.iter().fold(input.shallow_clone(), |now, layer| layer.apply(&geometry, &now, None).unwrap().tanh());
        output.square().sum(Kind::Float).backward();
        (output.detach(), input.grad())
    }

    #[test]
    fn layers_compute_the_same_and_few_are_on_the_device() {
        for storage in [None, Some(Storage::Half), Some(Storage::Int8), Some(Storage::Nf4)] {
            let staging = Staging::new(Device::Cpu).unwrap();
            let (plain, staged) = (layers(24, storage, None), layers(24, storage, Some(&staging)));
            let all: usize = plain.iter().map(FrozenWeight::bytes).sum();
            for seed in 0..3 {
                let input = from_f32(&Stream::new(seed).normals(3 * SIDE), &[3, SIDE], Device::Cpu).unwrap();
                assert_eq!(step(&staged, &input), step(&plain, &input), "{storage:?}, step {seed}");
            }
            let counts = staging.counts();
            assert!(counts.ring_bytes < all as u64 / 4, "{counts:?} of {all}");
            assert!(plain.iter().zip(&staged).all(|(own, other)| other.whole().unwrap() == own.whole().unwrap()));
            assert_eq!((staged[0].bytes(), staged[0].device()), (plain[0].bytes(), Device::Cpu));
        }
    }

    #[test]
    fn what_was_asked_for_before_is_fetched_ahead() {
        let staging = Staging::new(Device::Cpu).unwrap();
        let own = layers(24, None, Some(&staging));
        let input = Tensor::ones([1, SIDE as i64], (Kind::Float, Device::Cpu));
        let unforeseen = |staging: &Staging| staging.counts().unforeseen;
        drop(step(&own, &input));
        let first = unforeseen(&staging);
        // At the turn what is in the ring is used again.
        assert!(first > 24 && first < 48, "{:?}", staging.counts());
        drop(step(&own, &input));
        let second = unforeseen(&staging) - first;
        assert!(second < 12, "it takes a few layers to find the place: {second}");
        let before = staging.counts();
        (0..3).for_each(|_| drop(step(&own, &input)));
        let after = staging.counts();
        assert_eq!(after.unforeseen, before.unforeseen, "from then on all are foreseen");
        // Each layer twice, less those that lie in the ring at the two turns.
        let copies = (after.copies - before.copies) / 3;
        assert!((40..=48).contains(&copies), "{copies} copies a step");

        // Another order is no harm, and the old one is found again.
        let geometry = LayerGeometry::linear(SIDE, SIDE);
        for layer in own.iter().step_by(5) {
            drop(layer.apply(&geometry, &input, None).unwrap());
        }
        (0..3).for_each(|_| drop(step(&own, &input)));
        let before = staging.counts().unforeseen;
        drop(step(&own, &input));
        assert_eq!(staging.counts().unforeseen, before);
    }

    #[test]
    fn layers_outlive_the_ring_and_the_ring_its_last_use() {
        let staging = Staging::new(Device::Cpu).unwrap();
        let own = layers(2, None, Some(&staging));
        drop(staging);
        let input = Tensor::ones([1, SIDE as i64], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let output = own[0].apply(&LayerGeometry::linear(SIDE, SIDE), &input, None).unwrap();
        drop(own);
        output.sum(Kind::Float).backward();
        assert!(input.grad().defined());
    }

    #[test]
    fn a_weight_that_comes_late_is_refused() {
        let staging = Staging::new(Device::Cpu).unwrap();
        let own = layers(1, None, Some(&staging));
        drop(own[0].whole().unwrap());
        let late = FrozenWeight::plain(Tensor::ones([2, 2], (Kind::Float, Device::Cpu)));
        assert!(late.staged(&staging).unwrap_err().to_string().contains("before the first"));
    }
}
