//! HRA (Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
//! NeurIPS 2024, arXiv:2405.17484), as PEFT has it: the inputs of a layer pass through reflections, one for each column of
//! `u`, `[fan_in, rank]`.
//!
//! `W' = W · H₁ · H₂ · …` with `Hᵢ = I - 2 ûᵢ ûᵢᵀ` and `ûᵢ = uᵢ / ‖uᵢ‖`. Where the tensor is called `orthogonal`, its columns
//! are made orthogonal to those before them first (Gram–Schmidt, PEFT's `apply_GS`). There is no scale. Training starts
//! from equal pairs of columns, which cancel, and knows `u` alone.

use std::collections::BTreeMap;

use super::{BaseLayer, Parameters, Request, Variant, at_least_one, expect, is_grouped, kaiming, unsupported};
use crate::backend::Backend;
use crate::random::Stream;
use crate::{Error, HostTensor, LayerGeometry, Result};

/// Reflections of the inputs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hra;

const NAME: &str = "peft-hra";
const U: &str = "u";
const ORTHOGONAL: &str = "orthogonal";

impl Hra {
    /// The unit vectors `[fan_in, 1]` of the reflections.
    fn directions<B: Backend>(backend: &B, columns: &Columns<'_, B>) -> Result<Vec<B::Tensor>> {
        let rank = backend.shape(columns.u).get(1).copied().unwrap_or(0);
        let mut units: Vec<B::Tensor> = Vec::with_capacity(rank);
        for column in 0..rank {
            let mut vector = backend.select(columns.u, 1, &[column])?;
            for unit in units.iter().filter(|_| columns.orthogonal) {
                let along = backend.sum(&backend.mul(unit, &vector)?, &[0])?;
                vector = backend.add(backend.scale(&backend.mul(unit, &along)?, -1.0)?, &vector)?;
            }
            let length = backend.sqrt(&backend.sum(&backend.mul(&vector, &vector)?, &[0])?)?;
            units.push(backend.div(&vector, &length)?);
        }
        Ok(units)
    }

    /// `M · H₁ · H₂ · …` of a matrix `[out, fan_in]`, or with the reflections in the other order.
    fn reflected<B: Backend>(
        backend: &B,
        matrix: &B::Tensor,
        columns: &Columns<'_, B>,
        back: bool,
    ) -> Result<B::Tensor> {
        let mut units = Self::directions(backend, columns)?;
        if back {
            units.reverse();
        }
        let mut result = backend.scale(matrix, 1.0)?;
        for unit in &units {
            let along = backend.scale(&backend.matmul(&result, unit)?, -2.0)?;
            let step = backend.matmul(&along, &backend.permute(unit, &[1, 0])?)?;
            result = backend.add(step, &result)?;
        }
        Ok(result)
    }

    /// The columns and the weight as a matrix, checked against each other.
    fn parts<'p, B: Backend>(
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &'p Parameters<B>,
    ) -> Result<(Columns<'p, B>, B::Tensor)> {
        let geometry = base.geometry();
        supported(&geometry)?;
        let orthogonal = parameters.tensors.contains_key(ORTHOGONAL);
        let u = parameters.get(NAME, if orthogonal { ORTHOGONAL } else { U })?;
        let found = backend.shape(u);
        expect(NAME, U, &[geometry.fan_in(), found.get(1).copied().unwrap_or(1)], &found)?;
        let weight = backend.cast_like(&base.weight()?, u)?;
        let weight = backend.reshape(&weight, &[geometry.outputs(), geometry.fan_in()])?;
        Ok((Columns { u, orthogonal }, weight))
    }
}

/// The vectors of the reflections, `[fan_in, rank]`.
struct Columns<'p, B: Backend> {
    u: &'p B::Tensor,
    orthogonal: bool,
}

fn supported(geometry: &LayerGeometry) -> Result<()> {
    match geometry {
        LayerGeometry::Linear { .. } | LayerGeometry::Conv2d { .. } if !is_grouped(geometry) => Ok(()),
        _ => Err(unsupported(NAME, geometry, "it adapts linear layers and ungrouped convolutions")),
    }
}

impl<B: Backend> Variant<B> for Hra {
    fn name(&self) -> &str {
        NAME
    }

    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        supported(geometry)?;
        let rank = at_least_one(request.rank)?;
        if !rank.is_multiple_of(2) {
            let reason = "equal pairs of reflections start as none; the rank has to be even".into();
            return Err(Error::Option { key: "lora_rank", value: rank.to_string(), reason });
        }
        Ok(BTreeMap::from([(U.to_owned(), vec![geometry.fan_in(), rank])]))
    }

    fn rank_and_alpha(&self, _geometry: &LayerGeometry, _request: &Request, _alpha: f64) -> (usize, f64) {
        (1, 1.0)
    }

    /// Equal pairs of columns, uniform in ±1/√(half the rank), as PEFT.
    fn initialise(
        &self,
        _backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let shapes = Variant::<B>::shapes(self, &base.geometry(), request)?;
        let (rows, pairs) = (shapes[U][0], shapes[U][1] / 2);
        let half = kaiming(&[rows, pairs], pairs, stream, U)?;
        let values = half.to_f32().iter().flat_map(|&value| [value, value]).collect();
        Ok(BTreeMap::from([(U.to_owned(), HostTensor::from_f32([rows, 2 * pairs], values)?)]))
    }

    fn is_additive(&self) -> bool {
        false
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let (columns, weight) = Self::parts(backend, base, parameters)?;
        let reflected = Self::reflected(backend, &weight, &columns, false)?;
        let delta = backend.add(reflected, &backend.scale(&weight, -1.0)?)?;
        backend.reshape(&delta, &base.geometry().weight_shape())
    }

    /// Reflects back, which is exact where the strength is 1.
    fn unmerge(
        &self,
        backend: &B,
        merged: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        strength: f64,
    ) -> Result<B::Tensor> {
        if strength != 1.0 {
            return Err(Error::NotReversible { variant: NAME.to_owned() });
        }
        let (columns, weight) = Self::parts(backend, merged, parameters)?;
        backend.reshape(&Self::reflected(backend, &weight, &columns, true)?, &merged.geometry().weight_shape())
    }
}
