//! DoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv:2402.09353): the sum of base and
//! update is normalised and gets trained magnitudes, `W' = magnitude ⊙ (W + Δ) / ‖W + Δ‖`.
//!
//! | variant | Δ | norm over | magnitude | epsilon | gradient through the norm |
//! |---|---|---|---|---|---|
//! | `dora` (PEFT) | LoRA | all axes but the first; an embedding: its entries | `[out]` | 0 | no |
//! | `lycoris-dora`, `-loha`, `-lokr` | LoRA, LoHa, LoKr | as the magnitude's shape says: `[out, 1, …]` all but the first (`wd_on_out`), `[1, in, 1, …]` all but the second | | 2⁻²³ | yes |
//!
//! Merged with a strength other than 1, `W + strength · (W' - W)`, which is what ComfyUI does; PEFT scales Δ inside the
//! norm and LyCORIS only the factor on `W + Δ`.

use std::collections::BTreeMap;

use super::lora::{self, is_grouped};
use super::{BaseLayer, Dropout, Loha, Lokr, Lora, Parameters, Request, Variant, unsupported};
use crate::backend::Backend;
use crate::random::Stream;
use crate::{Error, HostTensor, LayerGeometry, Result};

const MAGNITUDE: &str = "magnitude";

/// The update under the norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inner {
    Lora,
    Loha,
    Lokr,
}

/// A weight-decomposed update.
#[derive(Debug, Clone, Copy)]
pub struct Dora {
    name: &'static str,
    inner: Inner,
    peft: bool,
}

impl Dora {
    /// PEFT's convention.
    pub const PEFT: Self = Self { name: "dora", inner: Inner::Lora, peft: true };
    /// LyCORIS' convention on LoRA.
    pub(crate) const LYCORIS: Self = Self { name: "lycoris-dora", inner: Inner::Lora, peft: false };
    /// LyCORIS' convention on LoHa.
    pub(crate) const LYCORIS_LOHA: Self = Self { name: "lycoris-dora-loha", inner: Inner::Loha, peft: false };
    /// LyCORIS' convention on LoKr.
    pub(crate) const LYCORIS_LOKR: Self = Self { name: "lycoris-dora-lokr", inner: Inner::Lokr, peft: false };

    fn inner<B: Backend>(&self) -> &'static dyn Variant<B> {
        match self.inner {
            Inner::Lora => &Lora,
            Inner::Loha => &Loha,
            Inner::Lokr => &Lokr,
        }
    }

    /// The axis that keeps one magnitude for each of its places, and the magnitude's shape along the weight.
    fn axis(&self, geometry: &LayerGeometry, magnitude: &[usize]) -> Result<(usize, Vec<usize>)> {
        let weight = geometry.weight_shape();
        let along = |axis: usize| {
            let mut shape = vec![1; weight.len()];
            shape[axis] = weight[axis];
            (axis, shape)
        };
        let count: usize = magnitude.iter().product();
        let axis = match geometry {
            // [entries, width]: PEFT keeps one for each feature.
            LayerGeometry::Embedding { .. } => 1,
            _ if self.peft || magnitude.len() < 2 || magnitude[0] == weight[0] && weight[0] != 1 => 0,
            _ => 1,
        };
        if weight.len() < 2 || count != weight[axis] {
            return Err(Error::Shape {
                what: format!("`{MAGNITUDE}` of variant `{}` on {geometry:?}", self.name),
                expected: format!("{} numbers", weight.get(axis).copied().unwrap_or(0)),
                found: format!("{magnitude:?}"),
            });
        }
        Ok(along(axis))
    }

    /// `magnitude / ‖W + Δ‖`, broadcast along the weight, from the squared norm.
    fn gain<B: Backend>(
        &self,
        backend: &B,
        magnitude: &B::Tensor,
        squares: &B::Tensor,
        shape: &[usize],
    ) -> Result<B::Tensor> {
        let mut norm = backend.sqrt(squares)?;
        if !self.peft {
            norm = backend.shift(&norm, f64::from(f32::EPSILON))?;
        }
        backend.div(&backend.reshape(magnitude, shape)?, &norm)
    }
}

impl<B: Backend> Variant<B> for Dora {
    fn name(&self) -> &str {
        self.name
    }

    /// Those of the update under the norm, and for LyCORIS' convention `on_input`: magnitudes for the inputs
    /// (`wd_on_out = False`).
    fn options(&self) -> &[&'static str] {
        match (self.inner, self.peft) {
            (Inner::Lora, true) => &[],
            (Inner::Lora | Inner::Loha, _) => &["tucker", "on_input"],
            (Inner::Lokr, _) => &["tucker", "factor", "decompose_both", "full_matrix", "on_input"],
        }
    }

    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        let mut shapes = self.inner::<B>().shapes(geometry, request)?;
        let weight = geometry.weight_shape();
        let magnitude = match (geometry, self.peft) {
            (LayerGeometry::Embedding { width, .. }, true) => vec![*width],
            (LayerGeometry::Embedding { .. }, false) => {
                return Err(unsupported(self.name, geometry, "LyCORIS adapts no embeddings; use `dora`"));
            }
            (_, true) => vec![weight[0]],
            (_, false) => {
                let mut shape = vec![1; weight.len()];
                let axis = usize::from(request.switch("on_input"));
                shape[axis] = weight[axis];
                shape
            }
        };
        shapes.insert(MAGNITUDE.to_owned(), magnitude);
        Ok(shapes)
    }

    fn rank_and_alpha(&self, geometry: &LayerGeometry, request: &Request, alpha: f64) -> (usize, f64) {
        self.inner::<B>().rank_and_alpha(geometry, request, alpha)
    }

    /// The update's own first values, and the norms of the base as magnitudes.
    fn initialise(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let geometry = base.geometry();
        let magnitude = Variant::<B>::shapes(self, &geometry, request)?.remove(MAGNITUDE).unwrap_or_default();
        let mut tensors = self.inner::<B>().initialise(backend, base, request, stream)?;
        let (axis, _) = self.axis(&geometry, &magnitude)?;
        let weight = backend.to_host(&backend.detach(&base.weight()?))?;
        let values = weight.to_f32();
        let shape = weight.shape();
        let inner: usize = shape[axis + 1..].iter().product();
        let mut squares = vec![0.0f64; shape[axis]];
        for (place, value) in values.iter().enumerate() {
            squares[place / inner % shape[axis]] += f64::from(*value).powi(2);
        }
        let norms = squares.into_iter().map(|square| square.sqrt() as f32).collect();
        tensors.insert(MAGNITUDE.to_owned(), HostTensor::from_f32(magnitude, norms)?);
        Ok(tensors)
    }

    fn is_additive(&self) -> bool {
        false
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let magnitude = parameters.get(self.name, MAGNITUDE)?;
        let (axis, shape) = self.axis(&geometry, &backend.shape(magnitude))?;
        let weight = backend.cast_like(&base.weight()?, magnitude)?;
        let sum = backend.add(self.inner::<B>().delta_weight(backend, base, parameters)?, &weight)?;
        let others: Vec<usize> = (0..shape.len()).filter(|&other| other != axis).collect();
        let squares = backend.sum(&backend.mul(&sum, &sum)?, &others)?;
        let squares = if self.peft { backend.detach(&squares) } else { squares };
        let gain = self.gain(backend, magnitude, &squares, &shape)?;
        backend.add(backend.mul(&sum, &gain)?, &backend.scale(&weight, -1.0)?)
    }

    /// PEFT's convention without ever forming `W + Δ`: `gain · (W x + Δ x) + bias`, the squared norm expanded as
    /// `‖W‖² + 2 scale · Σ (W · downᵀ) ⊙ up + scale² · Σ (up · down · downᵀ) ⊙ up`.
    fn forward(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        input: &B::Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let simple = self.peft && self.inner == Inner::Lora && !is_grouped(&geometry);
        if !simple || matches!(geometry, LayerGeometry::Embedding { .. }) || parameters.tensors.contains_key(lora::MID)
        {
            return super::forward_with_weight(self, backend, base, parameters, input, dropout);
        }
        let magnitude = parameters.get(self.name, MAGNITUDE)?;
        let (_, shape) = self.axis(&geometry, &backend.shape(magnitude))?;
        let update = lora::low_rank_output(backend, &geometry, parameters, input, dropout, self.name)?;

        let (outputs, fan_in) = (shape[0], geometry.fan_in());
        let flat = |name, columns| -> Result<B::Tensor> {
            let tensor = backend.detach(parameters.get(self.name, name)?);
            let rows = backend.shape(&tensor).iter().product::<usize>() / columns;
            backend.reshape(&tensor, &[rows, columns])
        };
        let down = flat(lora::DOWN, fan_in)?;
        let up = backend.scale(&flat(lora::UP, backend.shape(&down)[0])?, parameters.scale)?;
        let weight = backend.reshape(&backend.cast_like(&base.weight()?, magnitude)?, &[outputs, fan_in])?;
        let transposed = backend.permute(&down, &[1, 0])?;
        let cross = backend.mul(&backend.matmul(&weight, &transposed)?, &up)?;
        let own = backend.mul(&backend.matmul(&up, &backend.matmul(&down, &transposed)?)?, &up)?;
        let squares = backend.sum(&backend.mul(&weight, &weight)?, &[1])?;
        let squares = backend.add(squares, &backend.scale(&backend.sum(&cross, &[1])?, 2.0)?)?;
        let squares = backend.add(squares, &backend.sum(&own, &[1])?)?;

        let gain = self.gain(backend, magnitude, &squares, &[outputs, 1])?;
        let along = if matches!(geometry, LayerGeometry::Conv2d { .. }) { vec![outputs, 1, 1] } else { vec![outputs] };
        let gain = backend.cast_like(&backend.reshape(&gain, &along)?, input)?;
        let base_output = base.forward(input)?;
        let Some(bias) = base.bias() else {
            return backend.mul(&backend.add(base_output, &update)?, &gain);
        };
        let bias = backend.reshape(&bias, &along)?;
        let plain = backend.add(backend.add(base_output, &backend.scale(&bias, -1.0)?)?, &update)?;
        backend.add(backend.mul(&plain, &gain)?, &bias)
    }
}
