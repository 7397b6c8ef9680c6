//! The feed-forward of a block: a wide layer, GELU by the hyperbolic tangent, and the way back.

use lora_torch::checkpoint::Shared;
use lora_torch::tch::Tensor;

use crate::Result;
use crate::layers::{AdaptableLayer, Pass, exclusive};
use crate::weights::Weights;

/// The feed-forward.
#[derive(Debug)]
pub(in super::super) struct FeedForward {
    /// May be computed again for itself.
    inner: Shared<AdaptableLayer>,
    out: AdaptableLayer,
}

impl FeedForward {
    pub(in super::super) fn new(weights: &Weights<'_>, width: usize, inner: usize) -> Result<Self> {
        Ok(Self {
            inner: Shared::new(AdaptableLayer::linear(&weights.at("net.0.proj"), width, inner, true)?),
            out: AdaptableLayer::linear(&weights.at("net.2"), inner, width, true)?,
        })
    }

    /// `[batch, tokens, width]` of the same.
    pub(in super::super) fn forward(&self, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        let inner = pass.feed_forward(&self.inner, &[input], |layer, inputs, pass| {
            Ok(layer.forward(&inputs[0], pass)?.f_gelu("tanh")?)
        })?;
        self.out.forward(&inner, pass)
    }

    pub(in super::super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        visit(exclusive(&mut self.inner)?);
        visit(&mut self.out);
        Ok(())
    }
}
