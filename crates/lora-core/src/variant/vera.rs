//! VeRA (Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024, arXiv:2310.11454): all layers share two
//! frozen random matrices, each trains two vectors. `y = W x + lambda_b ⊙ (b · (lambda_d ⊙ (a · x)))`.
//!
//! `a: [rank, in]` and `b: [out, rank]` are the slices that this layer uses of the shared matrices: their first columns
//! and first rows; wider and taller ones, as files hold them, are cut. Linear layers only.

use std::collections::BTreeMap;

use super::{BaseLayer, Dropout, Parameters, Request, Variant, at_least_one, expect, unsupported};
use crate::backend::Backend;
use crate::random::Stream;
use crate::{HostTensor, LayerGeometry, Result};

/// Vectors around frozen random matrices.
#[derive(Debug, Clone, Copy, Default)]
pub struct Vera;

const NAME: &str = "vera";
/// The shared matrices are the same in every layer and every run, whatever the adapter's seed.
const PROJECTION_SEED: u64 = 0x7665_7261;

impl<B: Backend> Variant<B> for Vera {
    fn name(&self) -> &str {
        NAME
    }

    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        let rank = at_least_one(request.rank)?;
        let LayerGeometry::Linear { in_features, out_features } = *geometry else {
            return Err(unsupported(NAME, geometry, "it adapts linear layers"));
        };
        Ok(BTreeMap::from([
            ("a".to_owned(), vec![rank, in_features]),
            ("b".to_owned(), vec![out_features, rank]),
            ("lambda_d".to_owned(), vec![rank]),
            ("lambda_b".to_owned(), vec![out_features]),
        ]))
    }

    fn rank_and_alpha(&self, _geometry: &LayerGeometry, _request: &Request, _alpha: f64) -> (usize, f64) {
        (1, 1.0)
    }

    /// `lambda_d` 0.1, `lambda_b` zero, as PEFT. The matrices are uniform with the variance of 1/rank, drawn column by
    /// column of `a` and row by row of `b`, so that every layer's slice is one of the same matrix.
    fn initialise(
        &self,
        _backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        _stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let shapes = Variant::<B>::shapes(self, &base.geometry(), request)?;
        let rank = request.rank;
        let bound = (3.0 / rank as f32).sqrt();
        let first = |(name, shape): (String, Vec<usize>)| {
            let count: usize = shape.iter().product();
            let tensor = match name.as_str() {
                "lambda_d" => HostTensor::from_f32(shape, vec![0.1; count])?,
                "lambda_b" => HostTensor::zeros(shape),
                _ => {
                    let mut stream = Stream::new(PROJECTION_SEED).at(&name);
                    let drawn: Vec<f32> = (0..count).map(|_| (2.0 * stream.uniform() - 1.0) * bound).collect();
                    let values = if name == "a" {
                        let columns = shape[1];
                        (0..count).map(|place| drawn[place % columns * rank + place / columns]).collect()
                    } else {
                        drawn
                    };
                    HostTensor::from_f32(shape, values)?
                }
            };
            Ok((name, tensor))
        };
        shapes.into_iter().map(first).collect()
    }

    fn is_trained(&self, tensor: &str) -> bool {
        tensor.starts_with("lambda")
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let (a, b, lambda_d, lambda_b) = tensors(backend, &base.geometry(), parameters)?;
        let (rank, outputs) = (backend.shape(&a)[0], backend.shape(&b)[0]);
        let inner = backend.mul(&a, &backend.reshape(&backend.scale(lambda_d, parameters.scale)?, &[rank, 1])?)?;
        backend.matmul(&backend.mul(&b, &backend.reshape(lambda_b, &[outputs, 1])?)?, &inner)
    }

    fn forward(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        input: &B::Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let (a, b, lambda_d, lambda_b) = tensors(backend, &geometry, parameters)?;
        let (rank, a, b) = (backend.shape(&a)[0], backend.cast_like(&a, input)?, backend.cast_like(&b, input)?);
        let mut hidden = backend.apply(&geometry.with_outputs(rank), input, &a, None)?;
        if let Some(dropout) = dropout {
            for mask in dropout.hidden_masks(&backend.shape(&hidden), usize::MAX, rank)? {
                hidden = backend.mul(&hidden, &backend.upload(&mask, &hidden)?)?;
            }
        }
        let lambda_d = backend.cast_like(&backend.scale(lambda_d, parameters.scale)?, input)?;
        let hidden = backend.mul(&hidden, &lambda_d)?;
        let update = backend.apply(&geometry.pointwise_from(rank), &hidden, &b, None)?;
        let update = backend.mul(&update, &backend.cast_like(lambda_b, input)?)?;
        backend.add(base.forward(input)?, &update)
    }
}

type Tensors<'p, T> = (T, T, &'p T, &'p T);

fn tensors<'p, B: Backend>(
    backend: &B,
    geometry: &LayerGeometry,
    parameters: &'p Parameters<B>,
) -> Result<Tensors<'p, B::Tensor>> {
    let LayerGeometry::Linear { in_features, out_features } = *geometry else {
        return Err(unsupported(NAME, geometry, "it adapts linear layers"));
    };
    let [a, b, lambda_d, lambda_b] = ["a", "b", "lambda_d", "lambda_b"].map(|name| parameters.get(NAME, name));
    let (a, b, lambda_d, lambda_b) = (a?, b?, lambda_d?, lambda_b?);
    let first = |tensor: &B::Tensor, axis: usize, count: usize| match backend.shape(tensor).get(axis) {
        Some(&side) if side > count => backend.select(tensor, axis, &(0..count).collect::<Vec<_>>()),
        _ => Ok(backend.share(tensor)),
    };
    let (a, b) = (first(a, 1, in_features)?, first(b, 0, out_features)?);
    let rank = backend.shape(lambda_d).first().copied().unwrap_or(0);
    expect(NAME, "a", &[rank, in_features], &backend.shape(&a))?;
    expect(NAME, "b", &[out_features, rank], &backend.shape(&b))?;
    expect(NAME, "lambda_b", &[out_features], &backend.shape(lambda_b))?;
    Ok((a, b, lambda_d, lambda_b))
}
