//! Rotary position embedding (Su et al., "RoFormer", 2021), of which nothing is kept but its tables. The tables
//! themselves, with whatever scaling a model has, are the caller's business.

use tch::Tensor;

use crate::Result;
use crate::shim::{RawTensor, new_tensor};

unsafe extern "C" {
    fn lora_rotary(
        input: *const RawTensor,
        cos: *const RawTensor,
        sin: *const RawTensor,
        neighbours: std::ffi::c_int,
        output: *mut *mut RawTensor,
    ) -> std::ffi::c_int;
}

/// Which numbers of a head are turned together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotaryLayout {
    /// Number `i` and number `i + half`, as Llama's `rotate_half`.
    Halves,
    /// Numbers `2 i` and `2 i + 1`, as GLM's and Cohere's.
    Interleaved,
}

/// `input` `[batch, heads, tokens, width]` turned by the angles whose cosines and sines are `cos` and `sin`, `[batch or
/// 1, tokens, half]` (f32): the first `2 · half` numbers of each head are turned, others stay. A new tensor of the
/// input's type, in which it computes, tables included; gradients reach the input alone.
///
/// # Errors
/// Where the shapes do not fit, or memory runs out.
pub fn rotary(input: &Tensor, cos: &Tensor, sin: &Tensor, layout: RotaryLayout) -> Result<Tensor> {
    let neighbours = (layout == RotaryLayout::Interleaved).into();
    // SAFETY: live `torch::Tensor*` for the length of the call; the shim takes references of its own.
    new_tensor(|output| unsafe { lora_rotary(input.as_ptr(), cos.as_ptr(), sin.as_ptr(), neighbours, output) })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn random(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    /// By the definition, as a complex product.
    fn by_complex_numbers(input: &Tensor, cos: &Tensor, sin: &Tensor, layout: RotaryLayout) -> Tensor {
        let half = cos.size()[2];
        let (own, rest) = (input.narrow(-1, 0, 2 * half), input.slice(-1, 2 * half, None, 1));
        let pairs = match layout {
            RotaryLayout::Halves => own.unflatten(-1, [2, half]).transpose(-1, -2),
            RotaryLayout::Interleaved => own.unflatten(-1, [half, 2]),
        };
        let turn = Tensor::complex(cos, sin).unsqueeze(1);
        let turned = (pairs.contiguous().view_as_complex() * turn).view_as_real();
        let turned = match layout {
            RotaryLayout::Halves => turned.transpose(-1, -2),
            RotaryLayout::Interleaved => turned,
        };
        Tensor::cat(&[turned.flatten(-2, -1), rest], -1)
    }

    #[test]
    fn output_and_gradient_are_those_of_complex_products() {
        crate::seed(21);
        for layout in [RotaryLayout::Halves, RotaryLayout::Interleaved] {
            for (batch, half, tables) in [(1, 4, 1), (2, 4, 2), (3, 3, 1), (2, 1, 2)] {
                let angles = random(&[tables, 5, half]) * 3.0;
                // Cosines and sines may carry a factor, as yarn's.
                let (cos, sin) = (angles.cos() * 1.2, angles.sin() * 1.2);
                // As a projection gives heads: strides of another order.
                let input = random(&[batch, 5, 3, 8]).transpose(1, 2);
                let toward = random(&[batch, 3, 5, 8]);
                let run = |own: bool| {
                    let leaf = input.detach().set_requires_grad(true);
                    let output = match own {
                        true => rotary(&leaf, &cos, &sin, layout).unwrap(),
                        false => by_complex_numbers(&leaf, &cos, &sin, layout),
                    };
                    (&output * &toward).sum(Kind::Float).backward();
                    (output.detach(), leaf.grad())
                };
                let (own, expected) = (run(true), run(false));
                assert!(own.0.allclose(&expected.0, 1e-6, 1e-6, false), "{layout:?} {batch} {half}");
                assert!(own.1.allclose(&expected.1, 1e-6, 1e-6, false), "{layout:?} {batch} {half}");
                // In half precision: numbers up to 5 with a rounding or two each.
                let half_precision = rotary(&input.to_kind(Kind::BFloat16), &cos, &sin, layout).unwrap();
                assert_eq!(half_precision.kind(), Kind::BFloat16);
                assert!(half_precision.to_kind(Kind::Float).allclose(&expected.0, 2e-2, 4e-2, false));
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let refused = |input: &[i64], table: &[i64]| {
            let table = random(table);
            rotary(&random(input), &table, &table, RotaryLayout::Halves).is_err()
        };
        assert!(!refused(&[2, 3, 5, 8], &[1, 5, 4]));
        for (input, table) in [
            (&[2, 3, 5, 8][..], &[1, 6, 4][..]),
            (&[2, 3, 5, 8], &[1, 5, 5]),
            (&[2, 3, 5, 8], &[3, 5, 4]),
            (&[2, 3, 5, 8], &[5, 4]),
            (&[2, 5, 8], &[1, 5, 4]),
        ] {
            assert!(refused(input, table), "{input:?} {table:?}");
        }
    }
}
