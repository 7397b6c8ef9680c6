//! The feed-forward of a decoder's layer: gated, or a mixture of experts.

use lora_torch::activation::{Gate, gated};
use lora_torch::checkpoint::Shared;
use lora_torch::tch::Tensor;

use super::config::{DecoderConfig, LayerConfig};
use super::experts::{Mixture, Updates, updated};
use crate::Result;
use crate::layers::{AdaptableLayer, Pass, exclusive};
use crate::weights::Weights;

/// `down(activation(gate(x)) · up(x))`, or such a one for each of several experts.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a layer has one")]
pub(super) enum FeedForward {
    Gated(Gated),
    Mixture(Mixture),
}

#[derive(Debug)]
pub(super) struct Gated {
    inner: Shared<Inner>,
    down_proj: AdaptableLayer,
}

/// The wide inner part, which may be computed again for itself.
#[derive(Debug)]
struct Inner {
    projections: GateProjections,
    activation: Gate,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a layer has one")]
enum GateProjections {
    Separate { gate_proj: AdaptableLayer, up_proj: AdaptableLayer },
    Fused(AdaptableLayer),
}

/// A linear layer that has a bias where the file has one.
pub(super) fn linear(weights: &Weights<'_>, inputs: usize, outputs: usize) -> Result<AdaptableLayer> {
    AdaptableLayer::linear(weights, inputs, outputs, weights.contains("bias"))
}

impl FeedForward {
    pub(super) fn new(weights: &Weights<'_>, config: &DecoderConfig, layer: &LayerConfig) -> Result<Self> {
        match layer.experts {
            Some(experts) => Ok(Self::Mixture(Mixture::new(weights, config, layer, experts)?)),
            None => Ok(Self::Gated(Gated::new(weights, config, layer)?)),
        }
    }

    /// `[batch, tokens, width]`.
    pub(super) fn forward(&self, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        match self {
            Self::Gated(own) => own.forward(input, pass),
            Self::Mixture(own) => own.forward(input, pass),
        }
    }

    pub(super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        match self {
            Self::Gated(own) => own.visit(visit),
            Self::Mixture(own) => {
                own.visit(visit);
                Ok(())
            }
        }
    }
}

impl Gated {
    pub(super) fn new(weights: &Weights<'_>, config: &DecoderConfig, layer: &LayerConfig) -> Result<Self> {
        let (width, inner) = (config.width, layer.intermediate);
        let projections = if config.fused_feed_forward {
            GateProjections::Fused(linear(&weights.at("gate_up_proj"), width, 2 * inner)?)
        } else {
            GateProjections::Separate {
                gate_proj: linear(&weights.at("gate_proj"), width, inner)?,
                up_proj: linear(&weights.at("up_proj"), width, inner)?,
            }
        };
        Ok(Self {
            inner: Shared::new(Inner { projections, activation: config.activation }),
            down_proj: linear(&weights.at("down_proj"), inner, width)?,
        })
    }

    pub(super) fn forward(&self, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        let inner = pass.feed_forward(&self.inner, &[input], |inner, inputs, pass| inner.forward(&inputs[0], pass))?;
        self.down_proj.forward(&inner, pass)
    }

    /// With updates of both outer projections, whose outputs lie behind one another, and of the inner one.
    pub(super) fn forward_updated(
        &self,
        input: &Tensor,
        [outer, inner]: [Updates<'_>; 2],
        pass: &Pass,
    ) -> Result<Tensor> {
        if outer.is_empty() && inner.is_empty() {
            return self.forward(input, pass);
        }
        let between = self.inner.gated_with(input, updated(input, outer)?.as_ref(), pass)?;
        let output = self.down_proj.forward(&between, pass)?;
        Ok(updated(&between, inner)?.map_or_else(|| Ok(output.shallow_clone()), |own| output.f_add(&own))?)
    }

    fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        match &mut exclusive(&mut self.inner)?.projections {
            GateProjections::Separate { gate_proj, up_proj } => {
                visit(gate_proj);
                visit(up_proj);
            }
            GateProjections::Fused(gate_up_proj) => visit(gate_up_proj),
        }
        visit(&mut self.down_proj);
        Ok(())
    }
}

impl Inner {
    fn forward(&self, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.gated_with(input, None, pass)
    }

    /// `added` to the outputs of both projections, `[…, 2 · inner]`, the gate's first.
    fn gated_with(&self, input: &Tensor, added: Option<&Tensor>, pass: &Pass) -> Result<Tensor> {
        let (mut gate, mut up) = match &self.projections {
            GateProjections::Separate { gate_proj, up_proj } => {
                (gate_proj.forward(input, pass)?, up_proj.forward(input, pass)?)
            }
            GateProjections::Fused(both) => {
                let both = both.forward(input, pass)?;
                let inner = both.size().last().copied().unwrap_or(0) / 2;
                (both.f_narrow(-1, 0, inner)?, both.f_narrow(-1, inner, inner)?)
            }
        };
        if let Some(added) = added {
            let halves = added.f_chunk(2, -1)?;
            (gate, up) = (gate.f_add(&halves[0])?, up.f_add(&halves[1])?);
        }
        Ok(gated(&gate, &up, self.activation)?)
    }
}
