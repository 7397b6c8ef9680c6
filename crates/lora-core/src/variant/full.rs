//! The whole difference, without any decomposition: `W' = W + scale · weight`, `b' = b + scale · bias`. LyCORIS calls it
//! full (`diff`, `diff_b`) and, on normalisations, norm (`w_norm`, `b_norm`). Files of PEFT's may hold the trained weight
//! or bias itself ([`WEIGHT_VALUE`], [`BIAS_VALUE`]) or single rows of an embedding ([`TOKEN_ROWS`]), which take the place
//! of the base's (`modules_to_save`). Of these the weight is trained here, with the option `value`: it begins as a copy of
//! the base's.

use std::collections::BTreeMap;

use super::{
    BIAS_VALUE, BaseLayer, BiasChange, Changes, Dropout, Parameters, Request, TOKEN_ROWS, TOKENS, Variant,
    WEIGHT_VALUE, expect, forward_with_weight, replaced_bias, unsupported,
};
use crate::backend::Backend;
use crate::random::Stream;
use crate::{HostTensor, LayerGeometry, Result};

/// The difference itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Full;

const NAME: &str = "full";
/// The option of a weight that takes the place of the base's.
const VALUE: &str = "value";

impl<B: Backend> Variant<B> for Full {
    fn name(&self) -> &str {
        NAME
    }

    /// `bias`: train a difference of the bias too. `value`: train the weight itself, in the place of a difference.
    fn options(&self) -> &[&'static str] {
        &["bias", VALUE]
    }

    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        if request.switch(VALUE) {
            return Ok(BTreeMap::from([(WEIGHT_VALUE.to_owned(), geometry.weight_shape())]));
        }
        let mut shapes = BTreeMap::from([("weight".to_owned(), geometry.weight_shape())]);
        if request.switch("bias") && !matches!(geometry, LayerGeometry::Embedding { .. }) {
            shapes.insert("bias".to_owned(), vec![geometry.outputs()]);
        }
        Ok(shapes)
    }

    fn initialise(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        _stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        if request.switch(VALUE) {
            return Ok(BTreeMap::from([(WEIGHT_VALUE.to_owned(), backend.to_host(&base.weight()?)?)]));
        }
        let shapes = <Self as Variant<B>>::shapes(self, &base.geometry(), request)?;
        Ok(shapes.into_iter().map(|(name, shape)| (name, HostTensor::zeros(shape))).collect())
    }

    fn rank_and_alpha(&self, _geometry: &LayerGeometry, _request: &Request, _alpha: f64) -> (usize, f64) {
        (1, 1.0)
    }

    /// Not the numbers of tokens.
    fn is_trained(&self, tensor: &str) -> bool {
        tensor != TOKENS
    }

    fn changes(&self, tensors: &BTreeMap<String, HostTensor>) -> Changes {
        let has_bias = tensors.contains_key("bias") || tensors.contains_key(BIAS_VALUE);
        let bias = if has_bias { BiasChange::Always } else { BiasChange::Never };
        let weight = ["weight", WEIGHT_VALUE, TOKEN_ROWS].iter().any(|name| tensors.contains_key(*name));
        Changes { weight, bias }
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let shape = base.geometry().weight_shape();
        if let Some(value) = parameters.tensors.get(WEIGHT_VALUE) {
            expect(NAME, WEIGHT_VALUE, &shape, &backend.shape(value))?;
            return backend.add(backend.scale(&backend.cast_like(&base.weight()?, value)?, -1.0)?, value);
        }
        if let Some(rows) = parameters.tensors.get(TOKEN_ROWS) {
            return replaced_rows(backend, base, parameters, rows);
        }
        match parameters.tensors.get("weight") {
            Some(weight) => {
                expect(NAME, "weight", &shape, &backend.shape(weight))?;
                backend.scale(weight, parameters.scale)
            }
            // A file may hold nothing but a bias.
            None => {
                let like = parameters.tensors.get(BIAS_VALUE).map_or_else(|| parameters.get(NAME, "bias"), Ok)?;
                backend.upload(&HostTensor::zeros(shape), like)
            }
        }
    }

    /// With a weight of its own nothing of the base's is computed, and there is no update for dropout to act on.
    fn forward(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        input: &B::Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let Some(value) = parameters.tensors.get(WEIGHT_VALUE) else {
            if parameters.tensors.contains_key("weight") || !matches!(geometry, LayerGeometry::Linear { .. }) {
                return forward_with_weight(self, backend, base, parameters, input, dropout);
            }
            // A bias alone is added to what the base makes.
            let output = base.forward(input)?;
            return match <Self as Variant<B>>::delta_bias(self, backend, base, parameters)? {
                Some(delta) => {
                    let delta = backend.cast_like(&delta, &output)?;
                    backend.add(output, &delta)
                }
                None => Ok(output),
            };
        };
        expect(NAME, WEIGHT_VALUE, &geometry.weight_shape(), &backend.shape(value))?;
        let bias = parameters.tensors.get(BIAS_VALUE).map(|bias| backend.share(bias)).or_else(|| base.bias());
        // Rows are looked up by whole numbers.
        if let LayerGeometry::Embedding { .. } = geometry {
            return backend.apply(&geometry, input, value, bias.as_ref());
        }
        let bias = bias.map(|bias| backend.cast_like(&bias, input)).transpose()?;
        backend.apply(&geometry, input, &backend.cast_like(value, input)?, bias.as_ref())
    }

    fn delta_bias(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
    ) -> Result<Option<B::Tensor>> {
        let Some(bias) = parameters.tensors.get("bias") else {
            return replaced_bias(backend, base, parameters, NAME);
        };
        expect(NAME, "bias", &[base.geometry().outputs()], &backend.shape(bias))?;
        backend.scale(bias, parameters.scale).map(Some)
    }
}

/// The change from the base's rows of these tokens to the ones that take their place; the other rows' is zero.
fn replaced_rows<B: Backend>(
    backend: &B,
    base: &dyn BaseLayer<B>,
    parameters: &Parameters<B>,
    rows: &B::Tensor,
) -> Result<B::Tensor> {
    let shape = base.geometry().weight_shape();
    let &[entries, width] = shape.as_slice() else {
        return Err(unsupported(NAME, &base.geometry(), "rows of tokens belong to an embedding"));
    };
    let tokens: Vec<usize> =
        backend.to_host(parameters.get(NAME, TOKENS)?)?.to_f32().iter().map(|&token| token as usize).collect();
    expect(NAME, TOKEN_ROWS, &[tokens.len(), width], &backend.shape(rows))?;
    if tokens.iter().any(|token| *token >= entries) {
        return Err(unsupported(NAME, &base.geometry(), "it has fewer rows than the trained tokens' numbers"));
    }
    let before = backend.select(&backend.cast_like(&base.weight()?, rows)?, 0, &tokens)?;
    let change = backend.add(backend.scale(&before, -1.0)?, rows)?;
    let mut chosen = vec![0.0; entries * tokens.len()];
    tokens.iter().enumerate().for_each(|(place, token)| chosen[token * tokens.len() + place] = 1.0);
    let chosen = backend.upload(&HostTensor::from_f32([entries, tokens.len()], chosen)?, rows)?;
    backend.matmul(&chosen, &change)
}
