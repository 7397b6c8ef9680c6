//! Gated activations (Shazeer, "GLU Variants Improve Transformer", 2020), of which only the inputs are kept for the
//! backward pass. Activations without a gate are libtorch's own; SiLU after a norm is in [`crate::norm`].

use tch::Tensor;

use crate::Result;
use crate::shim::{RawTensor, new_tensor};

unsafe extern "C" {
    fn lora_geglu(projection: *const RawTensor, output: *mut *mut RawTensor) -> std::ffi::c_int;
    fn lora_gated(
        gate: *const RawTensor,
        up: *const RawTensor,
        act: std::ffi::c_int,
        output: *mut *mut RawTensor,
    ) -> std::ffi::c_int;
}

/// The first half of the last axis times the exact GELU of the second, `[…, 2 · width]` to `[…, width]`. Output and
/// gradients are those of libtorch's separate operations to the bit.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) where the last axis is odd; out of memory.
pub fn geglu(projection: &Tensor) -> Result<Tensor> {
    // SAFETY: a live `torch::Tensor*` for the length of the call; the shim takes references of its own.
    new_tensor(|output| unsafe { lora_geglu(projection.as_ptr(), output) })
}

/// The activation of a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// `x · sigmoid(x)`: SwiGLU, as Llama's.
    Silu,
    /// GELU by the error function.
    Gelu,
    /// GELU by the hyperbolic tangent, as Gemma's.
    GeluTanh,
}

/// `act(gate) · up`, both of one shape and type; a new tensor. Output and gradients are those of libtorch's separate
/// operations to the bit; nothing but the two is kept.
///
/// # Errors
/// Where shapes or types differ, or memory runs out.
pub fn gated(gate: &Tensor, up: &Tensor, act: Gate) -> Result<Tensor> {
    let act = match act {
        Gate::Silu => 0,
        Gate::Gelu => 1,
        Gate::GeluTanh => 2,
    };
    // SAFETY: live `torch::Tensor*` for the length of the call; the shim takes references of its own.
    new_tensor(|output| unsafe { lora_gated(gate.as_ptr(), up.as_ptr(), act, output) })
}

/// `silu(gate) · up`: [`gated`] as most language models have it.
///
/// # Errors
/// As [`gated`].
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated(gate, up, Gate::Silu)
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
    #[test]
    fn a_gate_is_the_two_operations_to_the_bit() {
        seed(7);
        for act in [Gate::Silu, Gate::Gelu, Gate::GeluTanh] {
            for kind in [Kind::Float, Kind::BFloat16] {
                let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
                // Halves of one projection, and tensors of their own.
                let both = random(&[3, 7, 48]);
                let halves = both.chunk(2, -1);
                let own = [random(&[2, 40]), random(&[2, 40])];
                for [gate, up] in [[&halves[0], &halves[1]], [&own[0], &own[1]]] {
                    let toward = random(&gate.size());
                    let run = |own: bool, trained: [bool; 2]| {
                        let gate = gate.detach().set_requires_grad(trained[0]);
                        let up = up.detach().set_requires_grad(trained[1]);
                        let output = match (own, act) {
                            (true, _) => gated(&gate, &up, act).unwrap(),
                            (false, Gate::Silu) => gate.silu() * &up,
                            (false, Gate::Gelu) => gate.gelu("none") * &up,
                            (false, Gate::GeluTanh) => gate.gelu("tanh") * &up,
                        };
                        (&output * &toward).sum(Kind::Float).backward();
                        let gradients = [gate, up].map(|leaf| leaf.grad()).into_iter().filter(Tensor::defined);
                        (output.detach(), gradients.collect::<Vec<_>>())
                    };
                    for trained in [[true, true], [true, false], [false, true]] {
                        assert_eq!(run(true, trained), run(false, trained), "{act:?} {kind:?} {trained:?}");
                    }
                }
            }
        }
        let of = |shape: &[i64], kind| Tensor::ones(shape, (kind, Device::Cpu));
        // The sum's gradient goes to both its terms: what the gate makes of it must not be seen by the other.
        let [gate, up, other] = [(); 3].map(|()| of(&[2, 3], Kind::Float).set_requires_grad(true));
        for first in [true, false] {
            let output = swiglu(&gate, &up).unwrap();
            let doubled = &other * 2.0;
            let sum = if first { &output + &doubled } else { &doubled + &output };
            (sum * 3.0).sum(Kind::Float).backward();
        }
        assert_eq!((&other.grad(), &up.grad()), (&(of(&[2, 3], Kind::Float) * 12.0), &(gate.detach().silu() * 6.0)));
        assert!(swiglu(&of(&[2, 3], Kind::Float), &of(&[2, 4], Kind::Float)).is_err());
        assert!(swiglu(&of(&[2, 3], Kind::Float), &of(&[2, 3], Kind::Half)).is_err());
    }
}
