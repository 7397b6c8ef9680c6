//! NF4 with double quantisation (Dettmers et al., "QLoRA", 2023): 4 bits a number, on quantiles of the normal distribution
//! scaled by each block's largest magnitude, which is itself stored in 8 bits. 4.13 bits a number in all. The numbers are
//! those of bitsandbytes (`quantize_4bit` with `quant_type="nf4"`, `blocksize=64`, `compress_statistics=True`). Layers
//! that compute with it are in [`crate::frozen`].

use std::ffi::c_int;

use tch::{Kind, Tensor};

use crate::Result;
use crate::shim::{RawTensor, checked};

/// A weight in NF4, whatever its shape: numbers in row-major order.
#[derive(Debug)]
pub struct Nf4 {
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor,
    offset: Tensor,
    portable: bool,
}

unsafe extern "C" {
    fn lora_nf4_quantise(weight: *const RawTensor, portable: c_int, out: *mut *mut RawTensor) -> c_int;
}

impl Nf4 {
    /// A weight's numbers in NF4; the weight has elements and is of f32, f16 or bf16 (f64 goes by way of f32).
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) for other weights; out of memory.
    pub fn quantise(weight: &Tensor) -> Result<Self> {
        Self::made(weight, false)
    }

    /// `portable`: by libtorch's operations alone.
    fn made(weight: &Tensor, portable: bool) -> Result<Self> {
        let single = (weight.kind() == Kind::Double).then(|| weight.f_to_kind(Kind::Float)).transpose()?;
        let weight = single.as_ref().unwrap_or(weight);
        let mut parts: [*mut RawTensor; 4] = [std::ptr::null_mut(); 4];
        // SAFETY: a live `torch::Tensor*` for the length of the call, and a local of the size the shim writes.
        checked(unsafe { lora_nf4_quantise(weight.as_ptr(), portable.into(), parts.as_mut_ptr()) })?;
        // SAFETY: without a failure the shim has written four new tensors that nobody else owns.
        let [packed, absmax, nested, offset] = parts.map(|part| unsafe { Tensor::from_ptr(part) });
        Ok(Self { packed, absmax, nested, offset, portable })
    }

    /// Two codes a byte, the first in the high half: u8.
    pub fn packed(&self) -> &Tensor {
        &self.packed
    }

    /// The code of each block's largest magnitude in the signed dynamic 8-bit map: u8.
    pub fn absmax(&self) -> &Tensor {
        &self.absmax
    }

    /// The largest magnitude of each 256 of those, offset taken off: f32.
    pub fn nested(&self) -> &Tensor {
        &self.nested
    }

    /// The mean of the largest magnitudes: f32, no axes.
    pub fn offset(&self) -> &Tensor {
        &self.offset
    }

    pub(crate) fn shallow_clone(&self) -> Self {
        let [packed, absmax, nested, offset] =
            [&self.packed, &self.absmax, &self.nested, &self.offset].map(Tensor::shallow_clone);
        Self { packed, absmax, nested, offset, portable: self.portable }
    }

    /// The same numbers in other places.
    pub(crate) fn moved(self, packed: Tensor, absmax: Tensor, nested: Tensor, offset: Tensor) -> Self {
        Self { packed, absmax, nested, offset, ..self }
    }

    pub(crate) fn is_portable(&self) -> bool {
        self.portable
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use tch::Device;

    use super::*;
    use crate::frozen::{FrozenWeight, Storage};

    /// What runs where there are neither loops nor a kernel, tried on the CPU.
    #[test]
    fn libtorchs_operations_give_the_same_numbers() {
        crate::seed(3);
        // Blocks that end early, several chunks of a million, and odd counts.
        for shape in [vec![3, 7], vec![40, 12, 3, 3], vec![1100, 1000], vec![1, 1]] {
            for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
                let weight = (Tensor::randn(&*shape, (Kind::Float, Device::Cpu)) * 0.1).to_kind(kind);
                let (own, other) = (Nf4::made(&weight, false).unwrap(), Nf4::made(&weight, true).unwrap());
                assert_eq!(own.packed, other.packed, "{shape:?} {kind:?}");
                assert_eq!(own.absmax, other.absmax, "{shape:?} {kind:?}");
                assert_eq!(own.nested, other.nested, "{shape:?} {kind:?}");
                let whole = |own: Nf4| FrozenWeight::nf4(own, weight.size(), kind).whole().unwrap();
                assert_eq!(whole(own), whole(other), "{shape:?} {kind:?}");
            }
        }
    }

    unsafe extern "C" {
        fn lora_nf4_tables(out: *mut *mut RawTensor) -> c_int;
        fn lora_host_nf4(parts: *const *const c_void, count: i64, kind: c_int, values: *mut c_void) -> c_int;
    }

    /// CUDA's kernel, compiled for the host.
    #[test]
    fn the_kernels_arithmetic_is_that_of_the_loops() {
        let mut tables = [std::ptr::null_mut(); 2];
        // SAFETY: a local of the size that is written.
        checked(unsafe { lora_nf4_tables(tables.as_mut_ptr()) }).unwrap();
        // SAFETY: two new tensors that nobody else owns.
        let [dynamic, code] = tables.map(|table| unsafe { Tensor::from_ptr(table) });
        for shape in [vec![3, 7], vec![40, 12, 3, 3], vec![1100, 100], vec![1, 1], vec![77, 64]] {
            for (number, kind) in [Kind::Float, Kind::Half, Kind::BFloat16].into_iter().enumerate() {
                let weight = (Tensor::randn(&*shape, (Kind::Float, Device::Cpu)) * 0.1).to_kind(kind);
                let own = Nf4::quantise(&weight).unwrap();
                let parts = [&own.packed, &own.absmax, &own.nested, &own.offset, &dynamic, &code];
                let parts = parts.map(|part| part.data_ptr().cast_const());
                let found = Tensor::empty(&*shape, (kind, Device::Cpu));
                // SAFETY: contiguous tensors of a weight of this size.
                checked(unsafe {
                    lora_host_nf4(parts.as_ptr(), weight.numel() as i64, number as c_int, found.data_ptr())
                })
                .unwrap();
                assert_eq!(found, FrozenWeight::nf4(own, weight.size(), kind).whole().unwrap(), "{shape:?} {kind:?}");
            }
        }
    }

    /// On a machine with a GPU: the kernel gives the bits of the CPU's loops, and nothing else runs.
    #[test]
    fn the_kernel_gives_the_same_numbers() {
        if !matches!(crate::device::cuda(), crate::device::CudaStatus::Available(_)) {
            println!("not run: {}", crate::device::cuda());
            return;
        }
        for shape in [vec![3, 7], vec![40, 12, 3, 3], vec![1100, 1000], vec![1, 1], vec![77, 64]] {
            for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
                let weight = (Tensor::randn(&*shape, (Kind::Float, Device::Cpu)) * 0.1).to_kind(kind);
                let own = Nf4::quantise(&weight).unwrap();
                let [packed, absmax, nested, offset] =
                    [&own.packed, &own.absmax, &own.nested, &own.offset].map(|part| part.to_device(Device::Cuda(0)));
                let there = own.moved(packed, absmax, nested, offset);
                let there = FrozenWeight::nf4(there, weight.size(), kind);
                let expected = FrozenWeight::stored(&weight, Storage::Nf4).unwrap().whole().unwrap();
                drop(there.whole().unwrap());
                let (found, counted) = crate::profile::operations(|| there.whole().unwrap()).unwrap();
                assert_eq!(found.to_device(Device::Cpu), expected, "{shape:?} {kind:?}");
                assert_eq!(counted.total().work, 0, "{:?}", counted.by_name);
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_is_refused() {
        let zeros = Tensor::zeros([5, 40], (Kind::Float, Device::Cpu));
        assert_eq!(FrozenWeight::stored(&zeros, Storage::Nf4).unwrap().whole().unwrap(), zeros);
        for wrong in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let weight = Tensor::randn([5, 40], (Kind::Float, Device::Cpu));
            let _ = weight.get(2).fill_(wrong);
            for storage in [Storage::Nf4, Storage::Int8, Storage::Float8] {
                let error = FrozenWeight::stored(&weight, storage).unwrap_err().to_string();
                assert!(error.contains(&format!("[5, 40] cannot be stored as {storage}")), "{error}");
            }
        }
        for weight in [zeros.narrow(0, 0, 0), zeros.to_kind(Kind::Int64)] {
            assert!(matches!(FrozenWeight::stored(&weight, Storage::Nf4), Err(crate::Error::Storage { .. })));
        }
    }
}
