//! GLoRA (Chavan et al., "One-for-All: Generalized LoRA", arXiv:2306.07967) in its two incompatible forms.
//!
//! - `glora` (LyCORIS): `ΔW = scale · (W · a1 · a2 + b1 · b2)` with `a1: [in, rank]`, `a2: [rank, in]`, `b1: [out, rank]`,
//!   `b2: [rank, in]`; of a convolution `a` are pointwise and act on the input channels, `b2` has the kernel.
//! - `peft-glora`: `ΔW = W ⊙ A + B`, `Δb = b ⊙ D + E + W · C`. `A` and `B` are `[out, in]` as `a_up · a_down`, or `a`
//!   `[out, 1]` or `[1]`; `C` is `[in, 1]`, `D` and `E` `[out]` or `[1]`; each may be missing.

use std::collections::BTreeMap;

use super::{BaseLayer, Changes, Parameters, Request, Variant, at_least_one, expect, is_grouped, kaiming, unsupported};
use crate::backend::Backend;
use crate::random::Stream;
use crate::{HostTensor, LayerGeometry, Result};

/// The two forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Glora {
    /// A low-rank change of the input and a low-rank update.
    Lycoris,
    /// Element-wise factors and terms for weight and bias.
    Peft,
}

impl Glora {
    fn id(self) -> &'static str {
        match self {
            Glora::Lycoris => "glora",
            Glora::Peft => "peft-glora",
        }
    }
}

impl<B: Backend> Variant<B> for Glora {
    fn name(&self) -> &str {
        self.id()
    }

    fn is_additive(&self) -> bool {
        false
    }

    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        let rank = at_least_one(request.rank)?;
        let weight = geometry.weight_shape();
        let linear = matches!(geometry, LayerGeometry::Linear { .. });
        let conv = matches!(geometry, LayerGeometry::Conv2d { .. }) && !is_grouped(geometry);
        let named = |tensors: &[(&str, Vec<usize>)]| {
            Ok(tensors.iter().map(|(name, shape)| ((*name).to_owned(), shape.clone())).collect())
        };
        match self {
            Glora::Lycoris if linear || conv => {
                let ones = vec![1; weight.len() - 2];
                named(&[
                    ("a1", [&[weight[1], rank], &*ones].concat()),
                    ("a2", [&[rank, weight[1]], &*ones].concat()),
                    ("b1", [&[weight[0], rank], &*ones].concat()),
                    ("b2", [&[rank], &weight[1..]].concat()),
                ])
            }
            Glora::Peft if linear => named(&[
                ("a_up", vec![weight[0], rank]),
                ("a_down", vec![rank, weight[1]]),
                ("b_up", vec![weight[0], rank]),
                ("b_down", vec![rank, weight[1]]),
            ]),
            _ => Err(unsupported(self.id(), geometry, "it adapts linear layers, LyCORIS' also ungrouped convolutions")),
        }
    }

    /// As the peers: `a1`, `b1` and the `down`s uniform in ±1/√fan_in, their partners zero.
    fn initialise(
        &self,
        _backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let first = |(name, shape): (String, Vec<usize>)| {
            let tensor = match name.as_str() {
                "a2" | "b2" | "a_up" | "b_up" => HostTensor::zeros(shape),
                _ => kaiming(&shape, shape[1..].iter().product(), stream, &name)?,
            };
            Ok((name, tensor))
        };
        Variant::<B>::shapes(self, &base.geometry(), request)?.into_iter().map(first).collect()
    }

    fn changes(&self, _tensors: &BTreeMap<String, HostTensor>) -> Changes {
        match self {
            Glora::Peft => Changes::WEIGHT_AND_BIAS,
            Glora::Lycoris => Changes::WEIGHT,
        }
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let shape = geometry.weight_shape();
        if shape.len() < 2 || is_grouped(&geometry) {
            return Err(unsupported(self.id(), &geometry, "it adapts linear layers and ungrouped convolutions"));
        }
        let (outputs, inputs, taps) = (shape[0], shape[1], geometry.fan_in() / shape[1]);
        match self {
            Glora::Lycoris => {
                let get = |name: &str| parameters.get(self.id(), name);
                let rows = |name: &str, rows: usize| -> Result<B::Tensor> {
                    let tensor = get(name)?;
                    let count: usize = backend.shape(tensor).iter().product();
                    backend.reshape(tensor, &[rows, count / rows.max(1)])
                };
                let (a1, b1) = (rows("a1", inputs)?, rows("b1", outputs)?);
                let (ra, rb) = (backend.shape(&a1)[1], backend.shape(&b1)[1]);
                let (a2, b2) = (rows("a2", ra)?, rows("b2", rb)?);
                expect(self.id(), "a2", &[ra, inputs], &backend.shape(&a2))?;
                expect(self.id(), "b2", &[rb, inputs * taps], &backend.shape(&b2))?;
                // [out, in, taps] → [(out taps), in] · a1 · a2 → back.
                let weight = backend.reshape(&backend.cast_like(&base.weight()?, &a1)?, &[outputs, inputs, taps])?;
                let weight = backend.reshape(&backend.permute(&weight, &[0, 2, 1])?, &[outputs * taps, inputs])?;
                let through = backend.matmul(&backend.matmul(&weight, &a1)?, &a2)?;
                let through = backend.permute(&backend.reshape(&through, &[outputs, taps, inputs])?, &[0, 2, 1])?;
                let direct = backend.matmul(&b1, &b2)?;
                let sum = backend.add(direct, &backend.reshape(&through, &[outputs, inputs * taps])?)?;
                backend.reshape(&backend.scale(&sum, parameters.scale)?, &shape)
            }
            Glora::Peft => {
                let like = parameters.tensors.values().next();
                let weight = match like {
                    Some(like) => backend.cast_like(&base.weight()?, like)?,
                    None => base.weight()?,
                };
                let mut delta = backend.scale(&weight, 0.0)?;
                if let Some(a) = path(backend, parameters, "a")? {
                    delta = backend.add(delta, &backend.mul(&weight, &a)?)?;
                }
                if let Some(b) = path(backend, parameters, "b")? {
                    delta = backend.add(delta, &b)?;
                }
                backend.scale(&delta, parameters.scale)
            }
        }
    }

    fn delta_bias(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
    ) -> Result<Option<B::Tensor>> {
        let (Glora::Peft, Some(bias)) = (self, base.bias()) else { return Ok(None) };
        let mut delta = backend.scale(&bias, 0.0)?;
        if let Some(d) = path(backend, parameters, "d")? {
            delta = backend.add(delta, &backend.mul(&bias, &d)?)?;
        }
        if let Some(e) = path(backend, parameters, "e")? {
            delta = backend.add(delta, &e)?;
        }
        if let Some(c) = path(backend, parameters, "c")? {
            let inputs = base.geometry().fan_in();
            let through = backend.matmul(&base.weight()?, &backend.reshape(&c, &[inputs, 1])?)?;
            delta = backend.add(delta, &backend.reshape(&through, &[base.geometry().outputs()])?)?;
        }
        backend.scale(&delta, parameters.scale).map(Some)
    }
}

/// One of PEFT's paths: the product of its factors, the tensor itself, or nothing.
fn path<B: Backend>(backend: &B, parameters: &Parameters<B>, name: &str) -> Result<Option<B::Tensor>> {
    match (parameters.tensors.get(&format!("{name}_up")), parameters.tensors.get(&format!("{name}_down"))) {
        (Some(up), Some(down)) => backend.matmul(up, down).map(Some),
        _ => Ok(parameters.tensors.get(name).map(|tensor| backend.share(tensor))),
    }
}
