//! The feed-forward of a block: a wide layer, GELU, and the way back.

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
    /// How GELU is computed: `tanh` or `none`, which is exact.
    approximate: &'static str,
}

impl FeedForward {
    /// With biases, and GELU by the hyperbolic tangent.
    pub(in super::super) fn new(weights: &Weights<'_>, width: usize, inner: usize) -> Result<Self> {
        Self::of(weights, [width, inner], true, "tanh")
    }

    /// Without biases, and with the exact GELU.
    pub(in super::super) fn exact(weights: &Weights<'_>, width: usize, inner: usize) -> Result<Self> {
        Self::of(weights, [width, inner], false, "none")
    }

    fn of(weights: &Weights<'_>, [width, inner]: [usize; 2], bias: bool, approximate: &'static str) -> Result<Self> {
        Ok(Self {
            inner: Shared::new(AdaptableLayer::linear(&weights.at("net.0.proj"), width, inner, bias)?),
            out: AdaptableLayer::linear(&weights.at("net.2"), inner, width, bias)?,
            approximate,
        })
    }

    /// `[batch, tokens, width]` of the same.
    pub(in super::super) fn forward(&self, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        let approximate = self.approximate;
        let inner = pass.feed_forward(&self.inner, &[input], move |layer, inputs, pass| {
            Ok(layer.forward(&inputs[0], pass)?.f_gelu(approximate)?)
        })?;
        self.out.forward(&inner, pass)
    }

    pub(in super::super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        visit(exclusive(&mut self.inner)?);
        visit(&mut self.out);
        Ok(())
    }
}
