//! Mixtures of experts (Shazeer et al., 2017, arXiv:1701.06538), of which each token goes through a few. Their weights may
//! carry adapters with factors for each expert (PEFT's `target_parameters`); no gradient flows through which ones are taken.

use lora_core::LayerGeometry;
use lora_torch::checkpoint::{Inputs, Shared, checkpoint};
use lora_torch::tch::{Kind, Tensor};

use super::config::{DecoderConfig, Experts, LayerConfig, Shares};
use super::feed_forward::Gated;
use crate::Result;
use crate::layers::{AdaptableLayer, Pass, torch};
use crate::weights::Weights;

/// Every token is computed by every expert and counts where it chose it: shapes then depend on no values, at the price of
/// as many times the work as there are experts to one that is chosen.
#[derive(Debug)]
pub(super) struct Mixture {
    /// `[experts, width]`, and `[experts]`.
    router: Tensor,
    router_bias: Option<Tensor>,
    experts: Vec<Shared<Expert>>,
    chosen: i64,
    shares: Shares,
    /// What adapters on all experts hang on: `gate_up_proj`, `[experts, 2 · inner, width]`, and `down_proj`,
    /// `[experts, width, inner]`.
    parameters: [AdaptableLayer; 2],
}

/// Low-rank updates of one expert's layer: of each the factors `[rank, inputs]` and `[outputs, rank]`, and what their product
/// counts.
pub(super) type Updates<'u> = &'u [(Tensor, Tensor, f64)];

/// The sum of the updates of a layer's output; none where there are none.
pub(super) fn updated(input: &Tensor, updates: Updates<'_>) -> Result<Option<Tensor>> {
    let mut sum: Option<Tensor> = None;
    for (down, up, scale) in updates {
        let none = None::<&Tensor>;
        let own = input.f_linear(down, none)?.f_mul_scalar(*scale)?.f_linear(up, none)?;
        sum = Some(match sum {
            Some(sum) => sum.f_add(&own)?,
            None => own,
        });
    }
    Ok(sum)
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a mixture has one kind of them")]
enum Expert {
    Gated(Gated),
    Clamped { gate_up: AdaptableLayer, down: AdaptableLayer, limit: f64 },
}

impl Mixture {
    pub(super) fn new(
        weights: &Weights<'_>,
        config: &DecoderConfig,
        layer: &LayerConfig,
        own: Experts,
    ) -> Result<Self> {
        let router = weights.at(if own.stacked.is_some() { "router" } else { "gate" });
        let experts = match own.stacked {
            Some(limit) => stacked(&weights.at("experts"), config.width, layer.intermediate, own.count, limit)?,
            None => {
                let one = |index| Gated::new(&weights.at("experts").at(index), config, layer).map(Expert::Gated);
                (0..own.count).map(one).collect::<Result<_>>()?
            }
        };
        let parameter = |name: &str, in_features, out_features| {
            let geometry = LayerGeometry::Experts { experts: own.count, in_features, out_features };
            AdaptableLayer::experts(&weights.at("experts").at(name), geometry)
        };
        Ok(Self {
            router: router.tensor("weight", &[own.count, config.width])?,
            router_bias: own.stacked.map(|_| router.tensor("bias", &[own.count])).transpose()?,
            experts: experts.into_iter().map(Shared::new).collect(),
            parameters: [
                parameter("gate_up_proj", config.width, 2 * layer.intermediate)?,
                parameter("down_proj", layer.intermediate, config.width)?,
            ],
            chosen: own.chosen as i64,
            shares: own.shares,
        })
    }

    /// `[batch, tokens, width]`.
    pub(super) fn forward(&self, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        let shares = self.shares(input)?.f_to_kind(input.kind())?;
        let [outer, inner] = &self.parameters;
        let (outer, inner) = (outer.expert_factors(input.kind(), pass)?, inner.expert_factors(input.kind(), pass)?);
        let scales: Vec<f64> = outer.iter().chain(&inner).map(|own| own.scale).collect();
        let of_outer = outer.len();
        let mut sum: Option<Tensor> = None;
        for (index, expert) in self.experts.iter().enumerate() {
            let (expert, pass, scales) = (expert.clone(), pass.clone(), scales.clone());
            let share = shares.f_narrow(-1, index as i64, 1)?;
            // Factors are inputs, so that the gradients of all experts come together in one tensor.
            let factors = outer.iter().chain(&inner).map(|own| Some([own.down.get(index)?, own.up.get(index)?]));
            let factors = factors.collect::<Option<Vec<_>>>().ok_or_else(fewer)?;
            let inputs: Vec<&Tensor> = [input, &share].into_iter().chain(factors.into_iter().flatten()).collect();
            let own = checkpoint(&inputs, Inputs::Kept, move |inputs| {
                let pairs = inputs[2..].chunks_exact(2).zip(&scales);
                let updates: Vec<(Tensor, Tensor, f64)> =
                    pairs.map(|(pair, scale)| (pair[0].shallow_clone(), pair[1].shallow_clone(), *scale)).collect();
                let (outer, inner) = updates.split_at(of_outer);
                let own = expert.forward(&inputs[0], [outer, inner], &pass).map_err(torch)?;
                Ok(own.f_mul(&inputs[1])?)
            })?;
            sum = Some(match sum {
                Some(sum) => sum.f_add(&own)?,
                None => own,
            });
        }
        Ok(sum.map_or_else(|| input.f_zeros_like(), Ok)?)
    }

    pub(super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        self.parameters.iter_mut().for_each(visit);
    }

    /// How much each expert counts for each token, `[batch, tokens, experts]`, f32; 0 for those that are not chosen.
    fn shares(&self, input: &Tensor) -> Result<Tensor> {
        let cast = |own: &Tensor| own.f_to_kind(input.kind());
        let bias = self.router_bias.as_ref().map(cast).transpose()?;
        let scores = input.f_linear(&cast(&self.router)?, bias.as_ref())?;
        let scores = if self.shares == Shares::OfChosen { scores } else { scores.f_softmax(-1, Kind::Float)? };
        let (values, indices) = scores.f_topk(self.chosen, -1, true, true)?;
        let values = match self.shares {
            Shares::OfAll => values,
            Shares::Normalised => values.f_div(&values.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?)?,
            Shares::OfChosen => values.f_softmax(-1, Kind::Float)?,
        };
        Ok(scores.f_to_kind(Kind::Float)?.f_zeros_like()?.f_scatter(-1, &indices, &values)?)
    }
}

fn fewer() -> crate::Error {
    crate::Error::Input {
        what: "factors of experts",
        expected: "one of each for every expert".into(),
        found: "fewer".into(),
    }
}

/// Experts whose weights lie in one tensor, `[experts, inputs, outputs]`.
fn stacked(weights: &Weights<'_>, width: usize, inner: usize, count: usize, limit: f64) -> Result<Vec<Expert>> {
    let layers = |name: &str, inputs: usize, outputs: usize| -> Result<Vec<AdaptableLayer>> {
        let all = weights.tensor(name, &[count, inputs, outputs])?;
        let biases = weights.tensor(&format!("{name}_bias"), &[count, outputs])?;
        let one = |index: usize| {
            let weight = all.f_select(0, index as i64)?.f_transpose(0, 1)?;
            let bias = biases.f_select(0, index as i64)?;
            AdaptableLayer::of_part(&weights.at(name).at(index), weight, bias)
        };
        (0..count).map(one).collect()
    };
    let (gates, downs) = (layers("gate_up_proj", width, 2 * inner)?, layers("down_proj", inner, width)?);
    let one = |(gate_up, down)| Expert::Clamped { gate_up, down, limit };
    Ok(gates.into_iter().zip(downs).map(one).collect())
}

impl Expert {
    /// With updates of the gate and up-projection, and of the down-projection.
    fn forward(&self, input: &Tensor, [outer, inner]: [Updates<'_>; 2], pass: &Pass) -> Result<Tensor> {
        let (gate_up, down, limit) = match self {
            Self::Gated(own) => return own.forward_updated(input, [outer, inner], pass),
            Self::Clamped { gate_up, down, limit } => (gate_up, down, *limit),
        };
        let both = gate_up.forward(input, pass)?;
        let both = updated(input, outer)?.map_or_else(|| Ok(both.shallow_clone()), |own| both.f_add(&own))?;
        let both = both.f_unflatten(-1, [-1, 2])?;
        let gate = both.f_select(-1, 0)?.f_clamp_max(limit)?;
        let up = both.f_select(-1, 1)?.f_clamp(-limit, limit)?;
        let gate = gate.f_mul(&gate.f_mul_scalar(1.702)?.f_sigmoid()?)?;
        let between = gate.f_mul(&up.f_add_scalar(1.0)?)?;
        let output = down.forward(&between, pass)?;
        Ok(updated(&between, inner)?.map_or_else(|| Ok(output.shallow_clone()), |own| output.f_add(&own))?)
    }
}
