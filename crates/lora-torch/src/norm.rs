//! Normalisations of which little is kept for the backward pass: group normalisation followed by SiLU, and RMS
//! normalisation. Other norms alone are libtorch's own.

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
    fn lora_rms_norm(
        input: *const RawTensor,
        weight: *const RawTensor,
        epsilon: f64,
        way: std::ffi::c_int,
        output: *mut *mut RawTensor,
    ) -> std::ffi::c_int;
}

/// SiLU of the normalised input, `[batch, channels, …]`; `weight` and `bias` are `[channels]`, of the input's dtype.
/// Output and gradients are those of libtorch's two operations to the bit; the normalised values are computed again in
/// the backward pass.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) where shapes, number types or groups do not go together; out of memory.
pub fn group_norm_silu(input: &Tensor, groups: i64, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    // SAFETY: live `torch::Tensor*` for the length of the call; the shim takes references of its own.
    new_tensor(|output| unsafe {
        lora_norm_silu(input.as_ptr(), weight.as_ptr(), bias.as_ptr(), groups, epsilon, output)
    })
}

/// How the weight of an RMS normalisation comes in. In f32 the first two are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RmsWeight {
    /// Normalised numbers are rounded to the input's type and then multiplied by the weight in that type, as Llama's.
    Rounded,
    /// They are multiplied in f32 and rounded once, as OLMo 2's and gpt-oss's.
    Single,
    /// They are multiplied by `1 + weight` in f32 and rounded once, as Gemma's.
    OnePlus,
}

/// `input / sqrt(mean(input²) + epsilon)` along the last axis (Zhang and Sennrich, "Root Mean Square Layer
/// Normalization", 2019), times the weight, `[width]`, where there is one. `input` is `[…, width]` in f32, bf16 or f16;
/// the output is of its type, and what is between is in f32. Kept are the input and one f32 number a row. The weight
/// may be trained.
///
/// # Errors
/// Where shapes or types are others, or memory runs out.
pub fn rms_norm(input: &Tensor, weight: Option<&Tensor>, epsilon: f64, way: RmsWeight) -> Result<Tensor> {
    let way = match way {
        RmsWeight::Rounded => 0,
        RmsWeight::Single => 1,
        RmsWeight::OnePlus => 2,
    };
    let weight = weight.map_or(std::ptr::null(), Tensor::as_ptr);
    // SAFETY: live `torch::Tensor*`, or null where the shim allows it, for the length of the call; it takes references
    // of its own.
    new_tensor(|output| unsafe { lora_rms_norm(input.as_ptr(), weight, epsilon, way, output) })
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
    /// By libtorch's operations, rounded where the models' own code rounds.
    fn by_operations(input: &Tensor, weight: Option<&Tensor>, way: RmsWeight) -> Tensor {
        let (kind, single) = (input.kind(), input.to_kind(Kind::Float));
        let normed = &single * (single.square().mean_dim(&[-1i64][..], true, Kind::Float) + 1e-5).rsqrt();
        match (weight, way) {
            (None, _) => normed.to_kind(kind),
            (Some(weight), RmsWeight::Rounded) => normed.to_kind(kind) * weight.to_kind(kind),
            (Some(weight), RmsWeight::Single) => (normed * weight.to_kind(Kind::Float)).to_kind(kind),
            (Some(weight), RmsWeight::OnePlus) => (normed * (weight.to_kind(Kind::Float) + 1.0)).to_kind(kind),
        }
    }

    #[test]
    fn an_rms_norm_is_that_of_its_operations() {
        crate::seed(8);
        for kind in [Kind::Float, Kind::BFloat16] {
            for way in [RmsWeight::Rounded, RmsWeight::Single, RmsWeight::OnePlus] {
                for (shape, weight_kind) in [(vec![2, 7, 96], kind), (vec![5, 640], Kind::Float), (vec![64], kind)] {
                    let random = |shape: &[i64], kind| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
                    let width = shape[shape.len() - 1];
                    let values = [random(&shape, kind), random(&[width], weight_kind)];
                    let toward = random(&shape, kind);
                    let run = |trained: [bool; 2], weighted: bool, own: bool| {
                        let [input, weight] = [0, 1].map(|i| values[i].copy().set_requires_grad(trained[i]));
                        let given = weighted.then_some(&weight);
                        let output = match own {
                            true => rms_norm(&input, given, 1e-5, way).unwrap(),
                            false => by_operations(&input, given, way),
                        };
                        (&output * &toward).sum(Kind::Float).backward();
                        let gradients = [input, weight].map(|leaf| leaf.grad()).into_iter().filter(Tensor::defined);
                        std::iter::once(output.detach()).chain(gradients).collect::<Vec<_>>()
                    };
                    for (trained, weighted) in
                        [([true, false], true), ([true, true], true), ([false, true], true), ([true, false], false)]
                    {
                        let (own, expected) = (run(trained, weighted, true), run(trained, weighted, false));
                        assert_eq!(own.len(), expected.len());
                        for (number, (own, expected)) in own.iter().zip(&expected).enumerate() {
                            assert_eq!((own.size(), own.kind()), (expected.size(), expected.kind()));
                            // The output is rounded in the same places; libtorch rounds gradients more often.
                            let tolerance = match kind {
                                Kind::Float => 1e-6,
                                _ if number == 0 => 0.0,
                                _ => 1.6e-2,
                            };
                            let (own, expected) = (own.to_kind(Kind::Float), expected.to_kind(Kind::Float));
                            let apart = ((own - &expected).abs().max() / expected.abs().max()).double_value(&[]);
                            assert!(apart <= tolerance, "{kind:?} {way:?} {shape:?} {trained:?} {number}: {apart}");
                        }
                    }
                }
            }
        }
        let of = |shape: &[i64], kind| Tensor::ones(shape, (kind, Device::Cpu));
        for (input, weight) in
            [(of(&[3, 4], Kind::Float), 5), (of(&[3, 0], Kind::Float), 0), (of(&[3, 4], Kind::Int64), 4)]
        {
            assert!(rms_norm(&input, Some(&of(&[weight], Kind::Float)), 1e-5, RmsWeight::Rounded).is_err());
        }
    }
}
