//! Captions of a batch as tensors, in the ways that several kinds of base share: each as long as the others, or of lengths of
//! their own.

use lora_core::Component;
use lora_torch::tch::{Device, Tensor};
use lora_torch::tensor::upload;

use super::super::{Inputs, Tensors};
use super::tensor;
use super::text::STATES;
use crate::Result;

/// How many states each caption has, where captions differ.
pub(super) const LENGTHS: &str = "caption_lengths";

/// What was kept of captions under a name, one behind the other along a new first axis.
pub(super) fn stacked(captions: &[&Tensors], network: Component, name: &'static str) -> Result<Tensor> {
    let each: Vec<&Tensor> = captions.iter().map(|kept| tensor(kept, network, name)).collect::<Result<_>>()?;
    Ok(Tensor::f_stack(&each, 0)?)
}

/// States of captions of any lengths side by side: as long as the longest is when it is filled up to a multiple, `[captions,
/// tokens, width]` on the host, with zeros behind a caption's own; and how many each has.
pub(super) fn side_by_side(captions: &[&Tensors], multiple: usize) -> Result<(Tensor, Vec<i64>)> {
    let states: Vec<&Tensor> =
        captions.iter().map(|kept| tensor(kept, Component::TEXT_ENCODER, STATES)).collect::<Result<_>>()?;
    let lengths: Vec<i64> = states.iter().map(|states| Ok(states.size2()?.0)).collect::<Result<_>>()?;
    let longest = lengths.iter().map(|&length| (length as usize).next_multiple_of(multiple)).max().unwrap_or(0);
    let behind = |length: i64| [0, 0, 0, longest as i64 - length];
    let long = states.iter().zip(&lengths).map(|(states, &length)| states.f_constant_pad_nd(behind(length)));
    Ok((Tensor::f_stack(&long.collect::<std::result::Result<Vec<_>, _>>()?, 0)?, lengths))
}

/// Captions' states side by side, and how many each has, where they differ.
pub(super) fn ragged(captions: &[&Tensors], device: Device) -> Result<Inputs> {
    let (states, lengths) = side_by_side(captions, 1)?;
    let longest = states.size3()?.1;
    let ragged = lengths.iter().any(|&length| length != longest);
    let lengths = ragged.then(|| upload(&Tensor::from_slice(&lengths), device)).transpose()?;
    Ok(Inputs::default().with(STATES, Some(upload(&states, device)?)).with(LENGTHS, lengths))
}
