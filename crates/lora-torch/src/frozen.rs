//! Frozen weights in few bytes: stored in half precision, 8-bit floats or 8-bit integers with one factor for each output,
//! and made whole for one layer at a time, in the forward pass and again in the backward pass.

use std::ffi::{CStr, c_char, c_int};

use lora_core::LayerGeometry;
use tch::{Kind, Tensor};

use crate::backend::apply_layer;
use crate::shim::RawTensor;
use crate::{Error, Result};

/// How frozen weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// IEEE half precision.
    Half,
    /// bfloat16.
    BFloat16,
    /// 8-bit floats (e4m3), scaled so that each output's largest weight is 448.
    Float8,
    /// 8-bit integers, scaled so that each output's largest weight is 127.
    Int8,
}

/// A frozen weight of a layer, whole or in few bytes.
#[derive(Debug)]
pub struct FrozenWeight {
    stored: Tensor,
    /// Factor of each output, `[outputs, 1, …]`.
    scale: Option<Tensor>,
    /// What it computes in.
    kind: Kind,
}

unsafe extern "C" {
    fn lora_frozen_last_error() -> *const c_char;
    fn lora_frozen(
        input: *const RawTensor,
        stored: *const RawTensor,
        scale: *const RawTensor,
        bias: *const RawTensor,
        convolution: c_int,
        stride: i64,
        padding: i64,
        groups: i64,
    ) -> *mut RawTensor;
}

impl FrozenWeight {
    /// As it is.
    pub fn plain(weight: Tensor) -> Self {
        Self { kind: weight.kind(), stored: weight, scale: None }
    }

    /// In fewer bytes; it goes on computing in the weight's own dtype. The first axis is that of the outputs.
    pub fn stored(weight: &Tensor, storage: Storage) -> Result<Self> {
        let kind = weight.kind();
        let cast = |own: Kind| -> Result<Self> { Ok(Self { stored: weight.f_to_kind(own)?, scale: None, kind }) };
        let (own, largest) = match storage {
            Storage::Half => return cast(Kind::Half),
            Storage::BFloat16 => return cast(Kind::BFloat16),
            Storage::Float8 => (Kind::Float8e4m3fn, 448.0),
            Storage::Int8 => (Kind::Int8, 127.0),
        };
        let whole = weight.f_to_kind(Kind::Float)?;
        let mut shape = vec![1; whole.dim()];
        shape[0] = whole.size()[0];
        let most = whole.f_flatten(1, -1)?.f_abs()?.f_amax([1i64], false)?;
        // An output of zeros has no scale; any does.
        let scale = most.f_div_scalar(largest)?.f_clamp_min(f64::from(f32::MIN_POSITIVE))?.f_view(&*shape)?;
        let scaled = whole.f_div(&scale)?;
        let stored = if own == Kind::Int8 { scaled.f_round()?.f_clamp(-127.0, 127.0)? } else { scaled };
        Ok(Self { stored: stored.f_to_kind(own)?, scale: Some(scale), kind })
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it is.
    pub fn device(&self) -> tch::Device {
        self.stored.device()
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let of = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        of(&self.stored) + self.scale.as_ref().map_or(0, of)
    }

    /// The whole weight.
    pub fn whole(&self) -> Result<Tensor> {
        let whole = self.stored.f_to_kind(self.kind)?;
        Ok(match &self.scale {
            Some(scale) => whole.f_mul(&scale.f_to_kind(self.kind)?)?,
            None => whole,
        })
    }

    /// The layer's output, as [`apply_layer`] gives it.
    pub fn apply(&self, geometry: &LayerGeometry, input: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (convolution, stride, padding, groups) = match *geometry {
            _ if self.scale.is_none() && self.stored.kind() == self.kind => {
                return apply_layer(geometry, input, &self.stored, bias);
            }
            LayerGeometry::Linear { .. } => (0, 1, 0, 1),
            LayerGeometry::Conv2d { stride, padding, groups, .. } => (1, stride as i64, padding as i64, groups as i64),
            _ => return apply_layer(geometry, input, &self.whole()?, bias),
        };
        let pointer = |tensor: Option<&Tensor>| tensor.map_or(std::ptr::null(), Tensor::as_ptr);
        // SAFETY: live `torch::Tensor*`, or null where the shim allows it, for the length of the call; it takes references of
        // its own, and what comes back is a new tensor or null.
        let output = unsafe {
            lora_frozen(
                input.as_ptr(),
                self.stored.as_ptr(),
                pointer(self.scale.as_ref()),
                pointer(bias),
                convolution,
                stride,
                padding,
                groups,
            )
        };
        if output.is_null() {
            // SAFETY: a NUL-terminated text in a thread-local of the shim, valid until this thread's next call.
            let message = unsafe { CStr::from_ptr(lora_frozen_last_error()) }.to_string_lossy().into_owned();
            return Err(Error::from_message(&message));
        }
        // SAFETY: a new tensor that nobody else owns.
        Ok(unsafe { Tensor::from_ptr(output) })
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    const ALL: [(Storage, f64); 4] =
        [(Storage::Half, 6e-4), (Storage::BFloat16, 5e-3), (Storage::Float8, 7e-2), (Storage::Int8, 1e-2)];

    fn random(shape: &[i64]) -> Tensor {
        tch::manual_seed(7);
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    fn largest(tensor: &Tensor) -> f64 {
        tensor.abs().max().double_value(&[])
    }

    #[test]
    fn storages_round_as_they_say() {
        let weight = random(&[16, 24]) * random(&[16, 1]).abs();
        for (storage, tolerance) in ALL {
            let own = FrozenWeight::stored(&weight, storage).unwrap();
            let most = weight.abs().amax([1i64], true);
            // Integers err by half a step of the output's largest, floats by a share of the value.
            let error = largest(&((own.whole().unwrap() - &weight) / &most));
            assert!(error > 0.0 && error < tolerance, "{storage:?}: {error}");
            assert_eq!(own.kind(), Kind::Float);
        }
        let bytes = |storage| FrozenWeight::stored(&weight, storage).unwrap().bytes();
        assert_eq!((bytes(Storage::Half), bytes(Storage::Int8)), (2 * 384, 384 + 64));
        // By hand: the largest is 127 steps.
        let own = FrozenWeight::stored(&Tensor::from_slice(&[2.54f32, -1.27, 0.02, 0.0]).view([1, 4]), Storage::Int8);
        let own = own.unwrap();
        assert_eq!(Vec::<i8>::try_from(own.stored.view([-1])).unwrap(), [127, -64, 1, 0]);
        let zeros = FrozenWeight::stored(&Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)), Storage::Int8).unwrap();
        assert_eq!(largest(&zeros.whole().unwrap()), 0.0);
    }

    #[test]
    fn outputs_and_gradients_are_those_of_the_whole_weight() {
        let layers = [
            (LayerGeometry::linear(6, 10), vec![2, 5, 6]),
            (LayerGeometry::conv2d(6, 10, 3, 1, 1), vec![2, 6, 7, 9]),
            (LayerGeometry::conv2d(6, 10, 3, 2, 1), vec![2, 6, 8, 9]),
            (LayerGeometry::conv2d(6, 10, 1, 1, 0), vec![1, 6, 4, 4]),
        ];
        for (geometry, shape) in layers {
            let weight_shape: Vec<i64> = geometry.weight_shape().iter().map(|&side| side as i64).collect();
            let (weight, bias) = (random(&weight_shape), random(&[10]));
            for (storage, _) in ALL {
                let own = FrozenWeight::stored(&weight, storage).unwrap();
                let (a, b) = (random(&shape).set_requires_grad(true), random(&shape).set_requires_grad(true));
                let output = own.apply(&geometry, &a, Some(&bias)).unwrap();
                let expected = apply_layer(&geometry, &b, &own.whole().unwrap(), Some(&bias)).unwrap();
                assert!(largest(&(&output - &expected)) < 1e-4, "{geometry:?} {storage:?}");
                let toward = random(&output.size());
                (&output * &toward).sum(Kind::Float).backward();
                (&expected * &toward).sum(Kind::Float).backward();
                assert!(largest(&(a.grad() - b.grad())) < 1e-4, "{geometry:?} {storage:?}");
            }
        }
        let wrong = FrozenWeight::stored(&random(&[10, 6]), Storage::Int8).unwrap();
        assert!(wrong.apply(&LayerGeometry::linear(6, 10), &random(&[2, 7]), None).is_err());
    }
}
