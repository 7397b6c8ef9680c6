//! Group normalisation followed by SiLU, of which only the input is kept for the backward pass. Norms alone are libtorch's own.

use tch::Tensor;

use crate::Result;
use crate::shim::{RawTensor, new_tensor};

unsafe extern "C" {
    fn lora_norm_silu(
        input: *const RawTensor,
        weight: *const RawTensor,
        bias: *const RawTensor,
        groups: i64,
        epsilon: f64,
        output: *mut *mut RawTensor,
    ) -> std::ffi::c_int;
}

/// SiLU of the normalised input, `[batch, channels, …]`; `weight` and `bias` are `[channels]`, of the input's dtype. Output and
/// gradients are those of libtorch's two operations to the bit; the normalised values are computed again in the backward
/// pass.
pub fn group_norm_silu(input: &Tensor, groups: i64, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    // SAFETY: live `torch::Tensor*` for the length of the call; the shim takes references of its own.
    new_tensor(|output| unsafe {
        lora_norm_silu(input.as_ptr(), weight.as_ptr(), bias.as_ptr(), groups, epsilon, output)
    })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn output_and_gradients_are_those_of_the_two_operations_to_the_bit() {
        crate::seed(5);
        for kind in [Kind::Float, Kind::BFloat16] {
            for shape in [vec![2, 8, 5, 7], vec![1, 64, 16, 16], vec![3, 8, 9]] {
                let channels = shape[1];
                let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
                let values = [random(&shape), random(&[channels]), random(&[channels])];
                let toward = random(&shape);
                let run = |trained: [bool; 3], own: bool| {
                    let leaves: Vec<Tensor> = (0..3).map(|i| values[i].copy().set_requires_grad(trained[i])).collect();
                    let [input, weight, bias] = [&leaves[0], &leaves[1], &leaves[2]];
                    let output = match own {
                        true => group_norm_silu(input, 4, weight, bias, 1e-5).unwrap(),
                        false => input.group_norm(4, Some(weight), Some(bias), 1e-5, true).silu(),
                    };
                    (&output * &toward).sum(Kind::Float).backward();
                    let gradients = leaves.iter().map(Tensor::grad).filter(Tensor::defined).collect::<Vec<_>>();
                    (output.detach(), gradients)
                };
                for trained in [[true, false, false], [true, true, true], [false, true, true]] {
                    let (own, expected) = (run(trained, true), run(trained, false));
                    assert_eq!(own.1.len(), trained.into_iter().filter(|&each| each).count());
                    assert_eq!(own, expected, "{kind:?} {shape:?} {trained:?}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let of = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
        for (shape, groups) in [(vec![2, 8, 4], 3), (vec![2, 8, 4], 0), (vec![8], 4), (vec![0, 8, 4], 4)] {
            assert!(group_norm_silu(&of(&shape), groups, &of(&[8]), &of(&[8]), 1e-5).is_err(), "{shape:?} {groups}");
        }
        assert!(group_norm_silu(&of(&[2, 8, 4]), 4, &of(&[6]), &of(&[8]), 1e-5).is_err());
    }
}
