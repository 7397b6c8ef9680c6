//! (IA)³ (Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS 2022,
//! arXiv:2205.05638): a learnt factor for each input or each output. Kept as the offset from 1, so that zero is the base:
//! `output: [out]` or `input: [in]` (channels, of a convolution).
//!
//! `ia3` (PEFT) scales the layer's output with its bias; `lycoris-ia3` scales the weight alone.

use std::collections::BTreeMap;

use super::{BaseLayer, Changes, Dropout, Parameters, Request, Variant, expect, unsupported};
use crate::backend::Backend;
use crate::{Error, HostTensor, LayerGeometry, Result};

/// A factor for each input or output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ia3 {
    /// The bias is an output too.
    Peft,
    /// The bias stays.
    Lycoris,
}

impl Ia3 {
    fn id(self) -> &'static str {
        match self {
            Ia3::Peft => "ia3",
            Ia3::Lycoris => "lycoris-ia3",
        }
    }

    /// The offsets in a shape that broadcasts along the weight.
    fn along_weight<B: Backend>(
        self,
        backend: &B,
        geometry: &LayerGeometry,
        parameters: &Parameters<B>,
    ) -> Result<B::Tensor> {
        let weight = geometry.weight_shape();
        if weight.len() < 2 || matches!(geometry, LayerGeometry::Embedding { .. }) {
            return Err(unsupported(self.id(), geometry, "it adapts linear layers and convolutions"));
        }
        let input = parameters.tensors.contains_key("input");
        let (name, features) = if input { ("input", geometry.inputs()) } else { ("output", geometry.outputs()) };
        let offset = parameters.get(self.id(), name)?;
        expect(self.id(), name, &[features], &backend.shape(offset))?;
        let offset = backend.scale(offset, parameters.scale)?;
        let mut shape = vec![1; weight.len()];
        if !input {
            shape[0] = features;
            return backend.reshape(&offset, &shape);
        }
        // Each output of a grouped convolution sees its own group of the inputs.
        let groups = features / weight[1].max(1);
        (shape[0], shape[1]) = (groups, weight[1]);
        let offset = backend.reshape(&offset, &shape)?;
        if groups == 1 {
            return Ok(offset);
        }
        backend.select(&offset, 0, &(0..weight[0]).map(|output| output / (weight[0] / groups)).collect::<Vec<_>>())
    }
}

impl<B: Backend> Variant<B> for Ia3 {
    fn name(&self) -> &str {
        self.id()
    }

    /// `on_input`: factors for the inputs, as is usual in feed-forward layers.
    fn options(&self) -> &[&'static str] {
        &["on_input"]
    }

    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        match geometry {
            LayerGeometry::Linear { .. } | LayerGeometry::Conv2d { .. } => {
                let on_input = request.switch("on_input");
                let (name, features) =
                    if on_input { ("input", geometry.inputs()) } else { ("output", geometry.outputs()) };
                Ok(BTreeMap::from([(name.to_owned(), vec![features])]))
            }
            _ => Err(unsupported(self.id(), geometry, "it adapts linear layers and convolutions")),
        }
    }

    fn rank_and_alpha(&self, _geometry: &LayerGeometry, _request: &Request, _alpha: f64) -> (usize, f64) {
        (1, 1.0)
    }

    fn changes(&self, _tensors: &BTreeMap<String, HostTensor>) -> Changes {
        match self {
            Ia3::Peft => Changes::WEIGHT_AND_BIAS,
            Ia3::Lycoris => Changes::WEIGHT,
        }
    }

    fn is_additive(&self) -> bool {
        false
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let offset = self.along_weight(backend, &base.geometry(), parameters)?;
        backend.mul(&backend.cast_like(&base.weight()?, &offset)?, &offset)
    }

    fn delta_bias(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
    ) -> Result<Option<B::Tensor>> {
        match (self, base.bias(), parameters.tensors.get("output")) {
            (Ia3::Peft, Some(bias), Some(offset)) => {
                let bias = backend.cast_like(&bias, offset)?;
                backend.mul(&bias, &backend.scale(offset, parameters.scale)?).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Scales activations, of which there are fewer than weights in most layers of a language model; an ungrouped
    /// layer's only.
    fn forward(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        input: &B::Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let scaled = |tensor: &B::Tensor, name: &str, channels: usize| -> Result<B::Tensor> {
            let offset = parameters.get(self.id(), name)?;
            expect(self.id(), name, &[channels], &backend.shape(offset))?;
            let spatial = matches!(geometry, LayerGeometry::Conv2d { .. });
            let along: &[usize] = if spatial { &[channels, 1, 1] } else { &[channels] };
            let factor = backend.reshape(&backend.scale(offset, parameters.scale)?, along)?;
            let factor = backend.cast_like(&factor, tensor)?;
            backend.add(backend.mul(tensor, &factor)?, tensor)
        };
        if super::is_grouped(&geometry) || dropout.is_some() {
            return super::forward_with_weight(self, backend, base, parameters, input, dropout);
        }
        if parameters.tensors.contains_key("input") {
            base.forward(&scaled(input, "input", geometry.inputs())?)
        } else if *self == Ia3::Peft || base.bias().is_none() {
            scaled(&base.forward(input)?, "output", geometry.outputs())
        } else {
            super::forward_with_weight(self, backend, base, parameters, input, dropout)
        }
    }

    /// Divides; a factor of zero left nothing to divide.
    fn unmerge(
        &self,
        backend: &B,
        merged: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        strength: f64,
    ) -> Result<B::Tensor> {
        let offset = backend.scale(&self.along_weight(backend, &merged.geometry(), parameters)?, strength)?;
        let host = backend.to_host(&backend.detach(&offset))?;
        if host.to_f32().iter().any(|value| (1.0 + value).abs() < 1e-6) {
            return Err(Error::NotReversible { variant: self.id().to_owned() });
        }
        let ones = HostTensor::from_f32(host.shape(), vec![1.0; host.elements()])?;
        let factor = backend.add(backend.upload(&ones, &offset)?, &offset)?;
        backend.div(&merged.weight()?, &factor)
    }
}
