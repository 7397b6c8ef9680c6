//! lora-core's adapter formulas on libtorch tensors: they run on the device and differentiate.

use lora_core::backend::Backend;
use lora_core::{HostTensor, LayerGeometry};
use tch::{Device, Tensor};

use crate::tensor::{from_host, to_host};
use crate::{Error, Result};

/// The libtorch backend.
#[derive(Debug, Clone, Copy, Default)]
pub struct TchBackend;

/// The layer of a geometry: linear on `[..., in_features]`, convolution on `[batch, channels, height, width]`.
pub fn apply_layer(geometry: &LayerGeometry, input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    Ok(match *geometry {
        LayerGeometry::Conv2d { stride, padding, groups, .. } => {
            let (stride, padding) = (stride as i64, padding as i64);
            input.f_conv2d(weight, bias, [stride, stride], [padding, padding], [1, 1], groups as i64)?
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

    fn scale(&self, tensor: &Tensor, factor: f64) -> lora_core::Result<Tensor> {
        Ok(tensor.f_mul_scalar(factor).map_err(Error::from)?)
    }

    fn matmul(&self, a: &Tensor, b: &Tensor) -> lora_core::Result<Tensor> {
        Ok(a.f_matmul(b).map_err(Error::from)?)
    }

    fn reshape(&self, tensor: &Tensor, shape: &[usize]) -> lora_core::Result<Tensor> {
        let shape: Vec<i64> = shape.iter().map(|&side| side as i64).collect();
        Ok(tensor.f_reshape(shape.as_slice()).map_err(Error::from)?)
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lora_core::backend::CpuBackend;
    use lora_core::random::Stream;
    use lora_core::variant::{BaseLayer, Dropout, Parameters, Variant, VariantRegistry};
    use tch::Kind;

    use super::*;

    /// A frozen layer in any backend.
    struct Frozen<B: Backend>(B, LayerGeometry, B::Tensor, B::Tensor);

    impl<B: Backend> BaseLayer<B> for Frozen<B> {
        fn geometry(&self) -> LayerGeometry {
            self.1
        }
        fn forward(&self, input: &B::Tensor) -> lora_core::Result<B::Tensor> {
            self.0.apply(&self.1, input, &self.2, Some(&self.3))
        }
        fn weight(&self) -> lora_core::Result<B::Tensor> {
            Ok(self.0.share(&self.2))
        }
        fn bias(&self) -> Option<B::Tensor> {
            Some(self.0.share(&self.3))
        }
    }

    fn random(shape: &[usize], seed: u64) -> HostTensor {
        HostTensor::from_f32(shape, Stream::new(seed).normals(shape.iter().product())).unwrap()
    }

    fn variant<B: Backend>() -> std::sync::Arc<dyn Variant<B>> {
        VariantRegistry::default().get("lora").unwrap()
    }

    fn distance(a: &HostTensor, b: &HostTensor) -> f32 {
        assert_eq!(a.shape(), b.shape());
        a.to_f32().iter().zip(&*b.to_f32()).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
    }

    /// The parity of the two backends: what holds for the one (held against PEFT in training) then holds for the other.
    #[test]
    fn both_backends_agree() {
        let cases = [
            (LayerGeometry::linear(12, 20), vec![2, 5, 12]),
            (LayerGeometry::conv2d(6, 9, 3, 2, 1), vec![2, 6, 8, 7]),
            (LayerGeometry::conv2d(6, 9, 1, 1, 0), vec![2, 6, 4, 4]),
        ];
        for (geometry, input_shape) in cases {
            let host = BTreeMap::from([
                ("down".to_owned(), random(&geometry.with_outputs(3).weight_shape(), 1)),
                ("up".to_owned(), random(&geometry.pointwise_from(3).weight_shape(), 2)),
            ]);
            let (weight, bias) = (random(&geometry.weight_shape(), 3), random(&[geometry.outputs()], 4));
            let input = random(&input_shape, 5);
            let dropout = Dropout::new(0.25, vec![Stream::new(1), Stream::new(2)]);
            let there =
                host.iter().map(|(name, tensor)| (name.clone(), from_host(tensor, Device::Cpu).unwrap())).collect();
            let cpu = Parameters::<CpuBackend> { tensors: host, scale: 0.5 };
            let torch = Parameters::<TchBackend> { tensors: there, scale: 0.5 };
            let on = |tensor: &HostTensor| from_host(tensor, Device::Cpu).unwrap();
            let torch_base = Frozen(TchBackend, geometry, on(&weight), on(&bias));
            let cpu_base = Frozen(CpuBackend, geometry, weight.clone(), bias.clone());

            let a = variant().delta_weight(&CpuBackend, &geometry, &cpu).unwrap();
            let b = to_host(&variant().delta_weight(&TchBackend, &geometry, &torch).unwrap()).unwrap();
            assert!(distance(&a, &b) < 1e-5);
            for dropout in [None, Some(&dropout)] {
                let a = variant()
                    .forward(&CpuBackend, &cpu_base, &cpu, &input, dropout)
                    .unwrap_or_else(|error| panic!("{geometry:?}: {error}"));
                let b = variant().forward(&TchBackend, &torch_base, &torch, &on(&input), dropout).unwrap();
                assert!(distance(&a, &to_host(&b).unwrap()) < 1e-4, "{geometry:?}");
            }
        }
    }

    #[test]
    fn gradients_reach_the_factors_in_half_precision_too() {
        let geometry = LayerGeometry::linear(8, 6);
        for kind in [Kind::Float, Kind::BFloat16] {
            let on = |shape: &[usize], seed| from_host(&random(shape, seed), Device::Cpu).unwrap();
            let base = Frozen(TchBackend, geometry, on(&[6, 8], 1).to_kind(kind), on(&[6], 2).to_kind(kind));
            let factors = [("down", on(&[2, 8], 3)), ("up", on(&[6, 2], 4))];
            let tensors = factors.map(|(name, tensor)| (name.to_owned(), tensor.set_requires_grad(true))).into();
            let parameters = Parameters::<TchBackend> { tensors, scale: 1.0 };
            let input = on(&[4, 8], 5).to_kind(kind);
            let output = variant().forward(&TchBackend, &base, &parameters, &input, None).unwrap();
            assert_eq!(output.kind(), kind);
            output.to_kind(Kind::Float).square().mean(Kind::Float).backward();
            for tensor in parameters.tensors.values() {
                assert_eq!(tensor.grad().kind(), Kind::Float);
                assert!(f64::try_from(tensor.grad().abs().sum(Kind::Float)).unwrap() > 0.0);
            }
            assert!(!base.2.grad().defined());
        }
    }
}
