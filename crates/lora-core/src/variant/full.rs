//! The whole difference, without any decomposition: `W' = W + scale · weight`, `b' = b + scale · bias`. LyCORIS calls it
//! full (`diff`, `diff_b`) and, on normalisations, norm (`w_norm`, `b_norm`).

use std::collections::BTreeMap;

use super::{BaseLayer, BiasChange, Changes, Parameters, Request, Variant, expect};
use crate::backend::Backend;
use crate::{HostTensor, LayerGeometry, Result};

/// The difference itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Full;

const NAME: &str = "full";

impl<B: Backend> Variant<B> for Full {
    fn name(&self) -> &str {
        NAME
    }

    /// `bias`: train a difference of the bias too.
    fn options(&self) -> &[&'static str] {
        &["bias"]
    }

    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        let mut shapes = BTreeMap::from([("weight".to_owned(), geometry.weight_shape())]);
        if request.switch("bias") && !matches!(geometry, LayerGeometry::Embedding { .. }) {
            shapes.insert("bias".to_owned(), vec![geometry.outputs()]);
        }
        Ok(shapes)
    }

    fn rank_and_alpha(&self, _geometry: &LayerGeometry, _request: &Request, _alpha: f64) -> (usize, f64) {
        (1, 1.0)
    }

    fn changes(&self, tensors: &BTreeMap<String, HostTensor>) -> Changes {
        let bias = if tensors.contains_key("bias") { BiasChange::Always } else { BiasChange::Never };
        Changes { weight: tensors.contains_key("weight"), bias }
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let shape = base.geometry().weight_shape();
        match parameters.tensors.get("weight") {
            Some(weight) => {
                expect(NAME, "weight", &shape, &backend.shape(weight))?;
                backend.scale(weight, parameters.scale)
            }
            // A file may hold nothing but a bias.
            None => backend.upload(&HostTensor::zeros(shape), parameters.get(NAME, "bias")?),
        }
    }

    fn delta_bias(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
    ) -> Result<Option<B::Tensor>> {
        let Some(bias) = parameters.tensors.get("bias") else { return Ok(None) };
        expect(NAME, "bias", &[base.geometry().outputs()], &backend.shape(bias))?;
        backend.scale(bias, parameters.scale).map(Some)
    }
}
