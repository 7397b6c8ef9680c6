//! Plain LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685), on linear
//! layers, on embeddings and, as the image trainers do it, on convolutions.
//!
//! `y = W x + (alpha / rank) · up(down(x))`.
//!
//! | layer | `down` | `mid` | `up` |
//! |---|---|---|---|
//! | linear | `[rank, in]` | | `[out, rank]` |
//! | convolution | `[rank, in / groups, k, k]` | | `[out, rank, 1, 1]` |
//! | convolution, Tucker (LyCORIS `lora_mid`) | `[rank, in / groups, 1, 1]` | `[rank, rank, k, k]` | `[out, rank, 1, 1]` |
//! | embedding | `embedding_down` `[rank, entries]` | | `embedding_up` `[width, rank]` |
//!
//! A file may change the bias too: `bias` `[out]` is added with the scale (PEFT's `lora_bias`), [`BIAS_VALUE`] takes
//! its place (PEFT's `bias = "lora_only"`). Neither is trained here.
//!
//! A convolution's `down` (with Tucker: `mid`) has the stride and padding of the base. On a grouped convolution the
//! update is the product in the shape of the grouped weight, as LyCORIS has it. Tucker:
//! `ΔW[o,i,k,l] = Σ up[o,m] · mid[m,n,k,l] · down[n,i]`.

use std::collections::BTreeMap;

use super::{
    BIAS_VALUE, BaseLayer, BiasChange, Changes, Dropout, EXPERTS_DOWN, EXPERTS_UP, Parameters, Request, Variant,
    at_least_one, expect, kaiming, unsupported,
};
use crate::backend::Backend;
use crate::random::Stream;
use crate::{AdapterModule, HostTensor, LayerGeometry, Result};

/// The plain low-rank update.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lora;

const NAME: &str = "lora";
/// Name of the update of the bias.
const BIAS: &str = "bias";
/// Name of the down-projection.
pub(super) const DOWN: &str = "down";
/// Name of the core between two pointwise projections.
pub(super) const MID: &str = "mid";
/// Name of the up-projection.
pub(super) const UP: &str = "up";
/// Names of an embedding's factors: they tell an embedding from a linear layer where only tensors are at hand.
pub(super) const EMBEDDING_DOWN: &str = "embedding_down";
pub(super) const EMBEDDING_UP: &str = "embedding_up";

/// The factors of a module whose update is `scale · up · down` and nothing else.
#[derive(Debug, Clone, Copy)]
pub struct LoraFactors<'m> {
    /// `[rank, in]`, or in the shape of a convolution.
    pub down: &'m HostTensor,
    /// `[out, rank]`, or in the shape of a convolution.
    pub up: &'m HostTensor,
    /// Whether they are an embedding's.
    pub embedding: bool,
}

impl LoraFactors<'_> {
    /// The names of the two tensors in a module, `down` first.
    pub fn names(embedding: bool) -> [&'static str; 2] {
        if embedding { [EMBEDDING_DOWN, EMBEDDING_UP] } else { [DOWN, UP] }
    }
}

/// A factor on an update in two, for `up` and for `down`. What enlarges is `up`'s. Of what makes smaller, a power of
/// two is `down`'s while the root mean square of its numbers stays a normal one of fp16 (2⁻¹⁴): a trained `up` has the
/// smaller numbers, which would lose their digits. The shares depend on `down` alone, so that modules with the same
/// `down` keep having the same.
pub(crate) fn shares(factor: f64, down: &[f32]) -> (f64, f64) {
    const LEAST: f64 = -14.0;
    let squares: f64 = down.iter().map(|&value| f64::from(value).powi(2)).sum();
    let size = 0.5 * (squares / down.len().max(1) as f64).log2();
    let power = factor.abs().log2().floor().max((LEAST - size).ceil()).min(0.0);
    if factor == 0.0 || !power.is_finite() {
        return (factor, 1.0);
    }
    (factor / power.exp2(), power.exp2())
}

impl AdapterModule {
    /// Whether it is a plain LoRA, with or without a core between its factors.
    pub fn is_lora(&self) -> bool {
        self.variant == NAME
    }

    /// The factors of a plain LoRA that has nothing else.
    pub fn factors(&self) -> Option<LoraFactors<'_>> {
        if !self.is_lora() || self.tensors.len() != 2 {
            return None;
        }
        let embedding = self.tensors.contains_key(EMBEDDING_UP);
        let [down, up] = LoraFactors::names(embedding).map(|name| self.tensors.get(name));
        Some(LoraFactors { down: down?, up: up?, embedding })
    }

    /// Whether it is nothing but whole differences of vectors, a normalisation's factors or a bias, which have no rank.
    pub fn is_of_vectors(&self) -> bool {
        self.variant == "full" && self.tensors.values().all(|tensor| tensor.shape().len() == 1)
    }

    /// The same update with another alpha; exact where their ratio is a power of two. `None` for another variant than
    /// plain LoRA.
    #[must_use]
    pub fn with_alpha(&self, alpha: f64) -> Option<Self> {
        let names = [false, true].map(LoraFactors::names);
        let [down, up] = names.into_iter().find(|names| names.iter().all(|name| self.tensors.contains_key(*name)))?;
        if !self.is_lora() {
            return None;
        }
        let ratio = self.alpha / alpha;
        let (of_up, of_down) = shares(ratio, &self.tensors[down].to_f32());
        let mut same = Self { alpha, ..self.clone() };
        for (name, factor) in [(down, of_down), (up, of_up), (BIAS, ratio)] {
            if let Some(tensor) = same.tensors.get_mut(name).filter(|_| factor != 1.0) {
                let values = tensor.to_f32().iter().map(|value| (f64::from(*value) * factor) as f32).collect();
                *tensor = HostTensor::from_f32(tensor.shape(), values).ok()?;
            }
        }
        Some(same)
    }

    /// A plain LoRA with these factors.
    pub fn of_factors(down: HostTensor, up: HostTensor, embedding: bool, rank: usize, alpha: f64) -> Self {
        let tensors = LoraFactors::names(embedding).map(str::to_owned).into_iter().zip([down, up]).collect();
        Self { variant: NAME.to_owned(), tensors, rank, alpha }
    }
}

impl<B: Backend> Variant<B> for Lora {
    fn name(&self) -> &str {
        NAME
    }

    /// `tucker`: 3×3 convolutions get a `mid` between two pointwise projections.
    fn options(&self) -> &[&'static str] {
        &["tucker"]
    }

    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        let rank = at_least_one(request.rank)?;
        let named = |tensors: &[(&str, Vec<usize>)]| {
            tensors.iter().map(|(name, shape)| ((*name).to_owned(), shape.clone())).collect()
        };
        let up = geometry.pointwise_from(rank).weight_shape();
        match *geometry {
            LayerGeometry::Embedding { entries, .. } => {
                Ok(named(&[(EMBEDDING_DOWN, vec![rank, entries]), (EMBEDDING_UP, up)]))
            }
            LayerGeometry::Norm { .. } => {
                Err(unsupported(NAME, geometry, "a vector has no rank; use the variant `full`"))
            }
            LayerGeometry::Experts { .. } => Ok(named(&[
                (EXPERTS_DOWN, geometry.with_outputs(rank).weight_shape()),
                (EXPERTS_UP, geometry.pointwise_from(rank).weight_shape()),
            ])),
            LayerGeometry::Conv2d { in_channels, kernel, groups, .. }
                if geometry.is_spatial() && request.switch("tucker") =>
            {
                Ok(named(&[
                    (DOWN, vec![rank, in_channels / groups, 1, 1]),
                    (MID, vec![rank, rank, kernel, kernel]),
                    (UP, up),
                ]))
            }
            _ => Ok(named(&[(DOWN, matrix_down(geometry, rank)), (UP, up)])),
        }
    }

    /// All but `up` uniform in ±1/√fan_in (Kaiming with a = √5, as sd-scripts, PEFT and LyCORIS), `up` zero. An
    /// embedding, as in PEFT: `embedding_down` zero and `embedding_up` normal.
    fn initialise(
        &self,
        _backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let shapes = Variant::<B>::shapes(self, &base.geometry(), request)?;
        let first = |(name, shape): (String, Vec<usize>)| {
            let tensor = match name.as_str() {
                UP | EMBEDDING_DOWN | EXPERTS_UP => HostTensor::zeros(shape),
                EXPERTS_DOWN => kaiming(&shape, base.geometry().fan_in(), stream, &name)?,
                EMBEDDING_UP => super::normal(&shape, 1.0, stream, &name)?,
                _ => kaiming(&shape, shape[1..].iter().product(), stream, &name)?,
            };
            Ok((name, tensor))
        };
        shapes.into_iter().map(first).collect()
    }

    fn merges_by_factors(&self) -> bool {
        true
    }

    fn changes(&self, tensors: &BTreeMap<String, HostTensor>) -> Changes {
        let has_bias = [BIAS, BIAS_VALUE].iter().any(|name| tensors.contains_key(*name));
        Changes { weight: true, bias: if has_bias { BiasChange::Always } else { BiasChange::Never } }
    }

    fn delta_bias(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
    ) -> Result<Option<B::Tensor>> {
        let Some(bias) = parameters.tensors.get(BIAS) else {
            return super::replaced_bias(backend, base, parameters, NAME);
        };
        expect(NAME, BIAS, &[base.geometry().outputs()], &backend.shape(bias))?;
        backend.scale(bias, parameters.scale).map(Some)
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        product(backend, &base.geometry(), parameters, NAME)
    }

    /// Two thin products instead of one with `W + ΔW`; the scale goes onto the `rank` activations in between, where it
    /// touches the fewest numbers, and so does dropout (sd-scripts' `network_dropout`).
    fn forward(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        input: &B::Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let changes_bias = [BIAS, BIAS_VALUE].iter().any(|name| parameters.tensors.contains_key(*name));
        let adds_bias = matches!(geometry, LayerGeometry::Linear { .. });
        if is_grouped(&geometry) || changes_bias && !adds_bias {
            // Within a group the factors are shared across groups: only the product has a layer's shape.
            return super::forward_with_weight(self, backend, base, parameters, input, dropout);
        }
        let output = with_low_rank(backend, base, parameters, input, dropout, NAME)?;
        match changes_bias.then(|| self.delta_bias(backend, base, parameters)).transpose()?.flatten() {
            Some(delta) => {
                let delta = backend.cast_like(&delta, &output)?;
                backend.add(output, &delta)
            }
            None => Ok(output),
        }
    }

    fn computes_in_input_dtype(&self, geometry: &LayerGeometry) -> bool {
        takes_factors_as_input(geometry)
    }
}

/// Where [`low_rank_output`] casts the factors, and nothing else is done with them in a forward pass.
pub(super) fn takes_factors_as_input(geometry: &LayerGeometry) -> bool {
    !is_grouped(geometry) && !matches!(geometry, LayerGeometry::Embedding { .. })
}

/// `W x + scale · up([mid](down(x)))`, by the layer in one where it can.
pub(super) fn with_low_rank<B: Backend>(
    backend: &B,
    base: &dyn BaseLayer<B>,
    parameters: &Parameters<B>,
    input: &B::Tensor,
    dropout: Option<&Dropout>,
    variant: &str,
) -> Result<B::Tensor> {
    let geometry = base.geometry();
    if let (LayerGeometry::Linear { .. }, None) = (geometry, dropout) {
        let (down, _, up, _) = factors(backend, &geometry, parameters, variant)?;
        let (down, up) = (backend.cast_like(down, input)?, backend.cast_like(up, input)?);
        if let Some(output) = base.forward_low_rank(input, &down, &up, parameters.scale)? {
            return Ok(output);
        }
    }
    let update = low_rank_output(backend, &geometry, parameters, input, dropout, variant)?;
    backend.add(base.forward(input)?, &update)
}

pub(super) fn is_grouped(geometry: &LayerGeometry) -> bool {
    matches!(geometry, LayerGeometry::Conv2d { groups, .. } if *groups != 1)
}

/// The shape of `down`: the base's weight with `rank` rows.
fn matrix_down(geometry: &LayerGeometry, rank: usize) -> Vec<usize> {
    let mut shape = geometry.weight_shape();
    shape[0] = rank;
    shape
}

/// `scale · up · [mid] · down` in the shape of the weight.
pub(super) fn product<B: Backend>(
    backend: &B,
    geometry: &LayerGeometry,
    parameters: &Parameters<B>,
    variant: &str,
) -> Result<B::Tensor> {
    let outputs = geometry.outputs();
    if let LayerGeometry::Embedding { .. } = geometry {
        let (down, up) = embedding_factors(backend, geometry, parameters, variant)?;
        let product = backend.matmul(&backend.scale(up, parameters.scale)?, down)?;
        return backend.permute(&product, &[1, 0]);
    }
    let (down, mid, up, rank) = factors(backend, geometry, parameters, variant)?;
    let up = backend.scale(&backend.reshape(up, &[outputs, rank])?, parameters.scale)?;
    let product = match mid {
        None => backend.matmul(&up, &backend.reshape(down, &[rank, geometry.fan_in()])?)?,
        Some(mid) => {
            let inputs = geometry.weight_shape()[1];
            let taps = geometry.fan_in() / inputs;
            let inner = backend.shape(down)[0];
            // [m, n, kl] → [(m kl), n] · [n, i] → [m, kl, i] → [m, (i kl)].
            let mid = backend.permute(&backend.reshape(mid, &[rank, inner, taps])?, &[0, 2, 1])?;
            let mid = backend
                .matmul(&backend.reshape(&mid, &[rank * taps, inner])?, &backend.reshape(down, &[inner, inputs])?)?;
            let mid = backend.permute(&backend.reshape(&mid, &[rank, taps, inputs])?, &[0, 2, 1])?;
            backend.matmul(&up, &backend.reshape(&mid, &[rank, inputs * taps])?)?
        }
    };
    backend.reshape(&product, &geometry.weight_shape())
}

/// `scale · up([mid](down(x)))`, with dropout on what lies between the factors.
pub(super) fn low_rank_output<B: Backend>(
    backend: &B,
    geometry: &LayerGeometry,
    parameters: &Parameters<B>,
    input: &B::Tensor,
    dropout: Option<&Dropout>,
    variant: &str,
) -> Result<B::Tensor> {
    let (mut hidden, up, rank) = if let LayerGeometry::Embedding { .. } = geometry {
        let (down, up) = embedding_factors(backend, geometry, parameters, variant)?;
        let rank = backend.shape(down)[0];
        let rows = backend.permute(down, &[1, 0])?;
        (backend.apply(&geometry.with_outputs(rank), input, &rows, None)?, backend.share(up), rank)
    } else {
        let (down, mid, up, rank) = factors(backend, geometry, parameters, variant)?;
        let (down, up) = (backend.cast_like(down, input)?, backend.cast_like(up, input)?);
        let hidden = match mid {
            None => backend.apply(&geometry.with_outputs(rank), input, &down, None)?,
            Some(mid) => {
                let mid = backend.cast_like(mid, input)?;
                let inner = backend.shape(&down)[0];
                let pointwise = LayerGeometry::conv2d(geometry.inputs(), inner, 1, 1, 0);
                let LayerGeometry::Conv2d { kernel, stride, padding, .. } = *geometry else {
                    return Err(unsupported(variant, geometry, "only convolutions have a `mid`"));
                };
                let hidden = backend.apply(&pointwise, input, &down, None)?;
                backend.apply(&LayerGeometry::conv2d(inner, rank, kernel, stride, padding), &hidden, &mid, None)?
            }
        };
        (hidden, up, rank)
    };
    if let Some(dropout) = dropout {
        let channels = if matches!(geometry, LayerGeometry::Conv2d { .. }) { 1 } else { usize::MAX };
        for mask in dropout.hidden_masks(&backend.shape(&hidden), channels, rank)? {
            hidden = backend.mul(&hidden, &backend.upload(&mask, &hidden)?)?;
        }
    }
    if parameters.scale != 1.0 {
        hidden = backend.scale(&hidden, parameters.scale)?;
    }
    backend.apply(&geometry.pointwise_from(rank), &hidden, &up, None)
}

type FactorTensors<'p, B> =
    (&'p <B as Backend>::Tensor, Option<&'p <B as Backend>::Tensor>, &'p <B as Backend>::Tensor, usize);

/// The factors and the rank of `up`, checked against the layer.
fn factors<'p, B: Backend>(
    backend: &B,
    geometry: &LayerGeometry,
    parameters: &'p Parameters<B>,
    variant: &str,
) -> Result<FactorTensors<'p, B>> {
    let (down, up) = (parameters.get(variant, DOWN)?, parameters.get(variant, UP)?);
    let mid = parameters.tensors.get(MID);
    let (down_shape, up_shape) = (backend.shape(down), backend.shape(up));
    let rank = up_shape.get(1).copied().unwrap_or(0);
    if rank == 0 || geometry.weight_shape().len() < 2 {
        return Err(unsupported(variant, geometry, "its `up` shows no rank"));
    }
    expect(variant, UP, &geometry.pointwise_from(rank).weight_shape(), &up_shape)?;
    match mid {
        None => expect(variant, DOWN, &matrix_down(geometry, rank), &down_shape)?,
        Some(mid) => {
            let weight = geometry.weight_shape();
            let inner = down_shape.first().copied().unwrap_or(0);
            let kernel = weight.get(2).copied().unwrap_or(1);
            expect(variant, DOWN, &[inner, weight[1], 1, 1], &down_shape)?;
            expect(variant, MID, &[rank, inner, kernel, kernel], &backend.shape(mid))?;
        }
    }
    Ok((down, mid, up, rank))
}

fn embedding_factors<'p, B: Backend>(
    backend: &B,
    geometry: &LayerGeometry,
    parameters: &'p Parameters<B>,
    variant: &str,
) -> Result<(&'p B::Tensor, &'p B::Tensor)> {
    let (down, up) = (parameters.get(variant, EMBEDDING_DOWN)?, parameters.get(variant, EMBEDDING_UP)?);
    let down_shape = backend.shape(down);
    let rank = down_shape.first().copied().unwrap_or(0);
    expect(variant, EMBEDDING_DOWN, &[rank.max(1), geometry.inputs()], &down_shape)?;
    expect(variant, EMBEDDING_UP, &[geometry.outputs(), rank], &backend.shape(up))?;
    Ok((down, up))
}
