//! What travels of a step, in one tensor: the gradients of all trained tensors, for each of them whether it got one, and numbers
//! beside them. A tensor that got none in this rank counts as one of zeros; one that got none in any rank stays without.

use lora_torch::tch::{Kind, Tensor, no_grad_guard};
use lora_torch::{dry, foreach, gradients};

use crate::Result;
use crate::parameters::ParameterList;

/// Gradients, marks and `beside`, `[numbers]` in f32 on the device of the gradients.
pub(super) fn gather(parameters: &ParameterList, beside: &Tensor) -> Result<Tensor> {
    let _guard = no_grad_guard();
    let leaves: Vec<&Tensor> = parameters.leaves().collect();
    let marks: Vec<f32> = leaves.iter().map(|leaf| f32::from(u8::from(leaf.grad().defined()))).collect();
    let marks = Tensor::from_slice(&marks).f_to_device(beside.device())?;
    let mut parts = Vec::with_capacity(leaves.len() + 2);
    for leaf in &leaves {
        let gradient = leaf.grad();
        parts.push(match gradient.defined() {
            true => gradient.f_reshape([-1])?,
            false => Tensor::f_zeros([leaf.numel() as i64], (Kind::Float, leaf.device()))?,
        });
    }
    parts.extend([marks, beside.f_reshape([-1])?.f_to_kind(Kind::Float)?]);
    Ok(Tensor::f_cat(&parts, 0)?)
}

/// Puts what [`gather`] gave, added up over ranks, back into the gradients; the last numbers, those that were beside them.
pub(super) fn scatter(parameters: &ParameterList, fused: &Tensor, beside: usize) -> Result<Tensor> {
    let _guard = no_grad_guard();
    let leaves: Vec<&Tensor> = parameters.leaves().collect();
    let elements: usize = leaves.iter().map(|leaf| leaf.numel()).sum();
    let marks = match dry::is_dry(fused.device()) {
        true => vec![1.0; leaves.len()],
        false => Vec::<f32>::try_from(fused.f_narrow(0, elements as i64, leaves.len() as i64)?)?,
    };
    let (mut there, mut sums, mut without, mut first) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut at = 0;
    for (leaf, mark) in leaves.into_iter().zip(marks) {
        let count = leaf.numel() as i64;
        let sum = fused.f_narrow(0, at, count)?.f_view_as(leaf)?;
        at += count;
        let gradient = leaf.grad();
        match (gradient.defined(), mark > 0.0) {
            (true, _) => {
                there.push(gradient);
                sums.push(sum);
            }
            (false, true) => {
                without.push(leaf.shallow_clone());
                first.push(sum);
            }
            (false, false) => {}
        }
    }
    // In place, as recorded steps go on writing there.
    foreach::copy(&there, &sums)?;
    gradients::put(&without, &first)?;
    Ok(fused.f_narrow(0, fused.size1()? - beside as i64, beside as i64)?)
}
