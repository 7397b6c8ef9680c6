//! GEGLU (Shazeer, "GLU Variants Improve Transformer", 2020), of which only the input is kept for the backward pass. Activations
//! without a gate are libtorch's own; SiLU after a norm is in [`crate::norm`].

use tch::Tensor;

use crate::Result;
use crate::shim::{RawTensor, new_tensor};

unsafe extern "C" {
    fn lora_geglu(projection: *const RawTensor, output: *mut *mut RawTensor) -> std::ffi::c_int;
}

/// The first half of the last axis times the exact GELU of the second, `[…, 2 · width]` to `[…, width]`. Output and gradients are
/// those of libtorch's separate operations to the bit.
pub fn geglu(projection: &Tensor) -> Result<Tensor> {
    // SAFETY: a live `torch::Tensor*` for the length of the call; the shim takes references of its own.
    new_tensor(|output| unsafe { lora_geglu(projection.as_ptr(), output) })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::seed;

    #[test]
    fn output_and_gradients_are_those_of_the_separate_operations_to_the_bit() {
        seed(6);
        for kind in [Kind::Float, Kind::BFloat16] {
            for shape in [vec![2, 9, 24], vec![1, 64, 128], vec![6]] {
                let half = [&shape[..shape.len() - 1], &[shape[shape.len() - 1] / 2]].concat();
                let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
                let (values, toward) = (random(&shape), random(&half));
                let run = |own: bool| {
                    let leaf = values.copy().set_requires_grad(true);
                    let output = match own {
                        true => geglu(&leaf).unwrap(),
                        false => {
                            let halves = leaf.chunk(2, -1);
                            &halves[0] * halves[1].gelu("none")
                        }
                    };
                    (&output * &toward).sum(Kind::Float).backward();
                    (output.detach(), leaf.grad())
                };
                assert_eq!(run(true), run(false), "{kind:?} {shape:?}");
            }
        }
        assert!(geglu(&Tensor::ones([2, 3], (Kind::Float, Device::Cpu))).is_err());
    }
}
