//! lora-core's adapter formulas on libtorch tensors: they run on the device and differentiate.

use lora_core::backend::Backend;
use lora_core::{HostTensor, LayerGeometry};
use tch::{Device, Tensor};

use crate::tensor::{from_host, to_host};
use crate::{Error, Result};

/// The libtorch backend.
#[derive(Debug, Clone, Copy, Default)]
pub struct TchBackend;

/// The layer of a geometry: linear on `[..., in_features]`, convolution on `[batch, channels, height, width]`, embedding
/// on row numbers.
///
/// # Errors
/// [`Error::Torch`] where shapes or number types do not go together; out of memory.
pub fn apply_layer(geometry: &LayerGeometry, input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    Ok(match *geometry {
        LayerGeometry::Conv2d { stride, padding, groups, .. } => {
            let (stride, padding) = (stride as i64, padding as i64);
            input.f_conv2d(weight, bias, [stride, stride], [padding, padding], [1, 1], groups as i64)?
        }
        LayerGeometry::Embedding { .. } => {
            Tensor::f_embedding(weight, &input.f_to_kind(tch::Kind::Int64)?, -1, false, false)?
        }
        _ => input.f_linear(weight, bias)?,
    })
}

impl Backend for TchBackend {
    type Tensor = Tensor;

    fn shape(&self, tensor: &Tensor) -> Vec<usize> {
        tensor.size().iter().map(|&side| side as usize).collect()
    }

    fn share(&self, tensor: &Tensor) -> Tensor {
        tensor.shallow_clone()
    }

    fn detach(&self, tensor: &Tensor) -> Tensor {
        tensor.detach()
    }

    fn upload(&self, host: &HostTensor, like: &Tensor) -> lora_core::Result<Tensor> {
        let here = from_host(host, Device::Cpu)?;
        Ok(here.f_to_device_(like.device(), like.kind(), false, false).map_err(Error::from)?)
    }

    fn to_host(&self, tensor: &Tensor) -> lora_core::Result<HostTensor> {
        Ok(to_host(tensor)?)
    }

    fn cast_like(&self, tensor: &Tensor, like: &Tensor) -> lora_core::Result<Tensor> {
        Ok(tensor.f_to_kind(like.kind()).map_err(Error::from)?)
    }

    /// In place on `a`, an output that linear layers and convolutions do not keep for their backward pass.
    fn add(&self, mut a: Tensor, b: &Tensor) -> lora_core::Result<Tensor> {
        Ok(a.f_add_(b).map_err(Error::from)?)
    }

    fn mul(&self, a: &Tensor, b: &Tensor) -> lora_core::Result<Tensor> {
        Ok(a.f_mul(b).map_err(Error::from)?)
    }

    fn div(&self, a: &Tensor, b: &Tensor) -> lora_core::Result<Tensor> {
        Ok(a.f_div(b).map_err(Error::from)?)
    }

    fn scale(&self, tensor: &Tensor, factor: f64) -> lora_core::Result<Tensor> {
        Ok(tensor.f_mul_scalar(factor).map_err(Error::from)?)
    }

    fn sqrt(&self, tensor: &Tensor) -> lora_core::Result<Tensor> {
        Ok(tensor.f_sqrt().map_err(Error::from)?)
    }

    fn at_least(&self, tensor: &Tensor, least: f64) -> lora_core::Result<Tensor> {
        Ok(tensor.f_clamp_min(least).map_err(Error::from)?)
    }

    fn sum(&self, tensor: &Tensor, axes: &[usize]) -> lora_core::Result<Tensor> {
        Ok(tensor.f_sum_dim_intlist(whole(axes).as_slice(), true, tensor.kind()).map_err(Error::from)?)
    }

    fn matmul(&self, a: &Tensor, b: &Tensor) -> lora_core::Result<Tensor> {
        Ok(a.f_matmul(b).map_err(Error::from)?)
    }

    fn reshape(&self, tensor: &Tensor, shape: &[usize]) -> lora_core::Result<Tensor> {
        Ok(tensor.f_reshape(whole(shape).as_slice()).map_err(Error::from)?)
    }

    fn permute(&self, tensor: &Tensor, order: &[usize]) -> lora_core::Result<Tensor> {
        Ok(tensor.f_permute(whole(order).as_slice()).map_err(Error::from)?)
    }

    fn select(&self, tensor: &Tensor, axis: usize, indices: &[usize]) -> lora_core::Result<Tensor> {
        let indices = Tensor::from_slice(&whole(indices)).to_device(tensor.device());
        Ok(tensor.f_index_select(axis as i64, &indices).map_err(Error::from)?)
    }

    /// In f32 at least: libtorch inverts no half-precision matrices.
    fn inverse(&self, tensor: &Tensor) -> lora_core::Result<Tensor> {
        let single = tensor.f_to_kind(tch::Kind::Float).map_err(Error::from)?;
        Ok(single.f_inverse().and_then(|inverse| inverse.f_to_kind(tensor.kind())).map_err(Error::from)?)
    }

    fn apply(
        &self,
        geometry: &LayerGeometry,
        input: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> lora_core::Result<Tensor> {
        Ok(apply_layer(geometry, input, weight, bias)?)
    }
}

fn whole(numbers: &[usize]) -> Vec<i64> {
    numbers.iter().map(|&number| number as i64).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lora_core::backend::CpuBackend;
    use lora_core::conformance::{Layer, ROWS, check, distance};
    use lora_core::random::Stream;
    use lora_core::variant::{BaseLayer, Dropout, FrozenLayer, Lora, Parameters, Variant, VariantRegistry};
    use tch::Kind;

    use super::*;

    fn here(tensor: &HostTensor) -> Tensor {
        from_host(tensor, Device::Cpu).unwrap()
    }

    #[test]
    fn every_variant_conforms_on_libtorch() {
        let (registry, like) =
            (VariantRegistry::<TchBackend>::default(), Tensor::zeros([1], (Kind::Float, Device::Cpu)));
        let wrong: Vec<String> = ROWS
            .iter()
            .filter_map(|row| check(&TchBackend, &like, &*registry.get(row.variant).unwrap(), row).err())
            .collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    /// The parity of the two backends: what is held against other implementations on the one then holds for the other.
    /// And: gradients reach every trained tensor, the adapter's only, in half precision too.
    #[test]
    fn both_backends_agree_and_gradients_reach_the_adapter_alone() {
        for row in ROWS {
            let cpu = VariantRegistry::<CpuBackend>::default().get(row.variant).unwrap();
            let torch = VariantRegistry::<TchBackend>::default().get(row.variant).unwrap();
            for &layer in row.layers {
                let base = layer.frozen(&CpuBackend, &HostTensor::zeros([1])).unwrap();
                let trained = row.trained(&CpuBackend, &*cpu, &base).unwrap();
                let parameters = Parameters { tensors: trained.clone(), scale: row.scale };
                let expected = cpu.forward(&CpuBackend, &base, &parameters, &layer.input(), None).unwrap();
                for kind in [Kind::Float, Kind::BFloat16] {
                    let convert = |tensor: &HostTensor| here(tensor).to_kind(kind);
                    let base = FrozenLayer {
                        backend: TchBackend,
                        geometry: base.geometry,
                        weight: convert(&base.weight),
                        bias: base.bias.as_ref().map(convert),
                    };
                    let leaf = |(name, tensor): (&String, &HostTensor)| {
                        (name.clone(), here(tensor).set_requires_grad(torch.is_trained(name)))
                    };
                    let tensors = trained.iter().map(leaf).collect();
                    let parameters = Parameters::<TchBackend> { tensors, scale: row.scale };
                    let input = match layer {
                        Layer::Embedding => here(&layer.input()),
                        _ => convert(&layer.input()),
                    };
                    let output = torch.forward(&TchBackend, &base, &parameters, &input, None).unwrap();
                    assert_eq!(output.kind(), kind, "{row:?} on {layer:?}");
                    let (apart, tolerance) = (
                        distance(&to_host(&output).unwrap(), &expected),
                        if kind == Kind::Float { 1e-5 } else { 0.03 },
                    );
                    assert!(apart < tolerance, "{row:?} on {layer:?} in {kind:?}: {apart:e}");
                    output.to_kind(Kind::Float).square().mean(Kind::Float).backward();
                    for (name, tensor) in &parameters.tensors {
                        assert_eq!(tensor.grad().defined(), torch.is_trained(name), "{row:?} on {layer:?}: {name}");
                        if tensor.grad().defined() {
                            assert_eq!(tensor.grad().kind(), Kind::Float);
                            assert!(
                                f64::try_from(tensor.grad().abs().sum(Kind::Float)).unwrap() > 0.0,
                                "{row:?}: {name}"
                            );
                        }
                    }
                    assert!(!base.weight.grad().defined());
                }
            }
        }
    }

    #[test]
    fn both_backends_drop_the_same() {
        for layer in [Layer::Linear, Layer::Conv] {
            let base = layer.frozen(&CpuBackend, &HostTensor::zeros([1])).unwrap();
            let trained = ROWS[0].trained(&CpuBackend, &Lora, &base).unwrap();
            let items = vec![Stream::new(1), Stream::new(2), Stream::new(3)];
            let dropout = Dropout { activations: 0.25, ranks: 0.25, module: 0.25, items };
            let there: BTreeMap<String, Tensor> =
                trained.iter().map(|(name, host)| (name.clone(), here(host))).collect();
            let torch_base = FrozenLayer {
                backend: TchBackend,
                geometry: base.geometry,
                weight: here(&base.weight),
                bias: base.bias.as_ref().map(here),
            };
            let cpu = Parameters::<CpuBackend> { tensors: trained, scale: 0.5 };
            let torch = Parameters::<TchBackend> { tensors: there, scale: 0.5 };
            let a = Lora.forward(&CpuBackend, &base, &cpu, &layer.input(), Some(&dropout)).unwrap();
            let plain = Lora.forward(&CpuBackend, &base, &cpu, &layer.input(), None).unwrap();
            let b = Lora.forward(&TchBackend, &torch_base, &torch, &here(&layer.input()), Some(&dropout)).unwrap();
            assert!(distance(&to_host(&b).unwrap(), &a) < 1e-5);
            assert!(distance(&a, &plain) > 1e-2);
            assert!(BaseLayer::<TchBackend>::bias(&torch_base).is_some());
        }
    }
}
