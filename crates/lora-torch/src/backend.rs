//! lora-core's adapter formulas on libtorch tensors: they run on the device and differentiate.

use lora_core::backend::Backend;
use lora_core::{HostTensor, LayerGeometry};
use tch::{Device, Kind, Tensor};

use crate::tensor::{from_host, to_host};
use crate::{Error, Result};

/// The libtorch backend.
#[derive(Debug, Clone, Copy, Default)]
pub struct TchBackend;

/// The layer of a geometry: linear on `[..., in_features]`, convolution on `[batch, channels, height, width]`,
/// embedding on row numbers.
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
            Tensor::f_embedding(weight, &input.f_to_kind(Kind::Int64)?, -1, false, false)?
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

    /// A view where the indices go up by one from slice to slice, or from each few equal ones to the next: any others
    /// are copied to the device.
    fn select(&self, tensor: &Tensor, axis: usize, indices: &[usize]) -> lora_core::Result<Tensor> {
        let axis = axis as i64;
        let selected = || match repeated_run(indices) {
            Some((first, count, 1)) => tensor.f_narrow(axis, first, count),
            Some((first, count, times)) => {
                let slices = tensor.f_narrow(axis, first, count)?.f_unsqueeze(axis + 1)?;
                let mut shape = slices.size();
                shape[axis as usize + 1] = times;
                slices.f_expand(&shape, false)?.f_flatten(axis, axis + 1)
            }
            None => {
                let indices = Tensor::f_from_slice(&whole(indices))?.f_to_device(tensor.device())?;
                tensor.f_index_select(axis, &indices)
            }
        };
        Ok(selected().map_err(Error::from)?)
    }

    fn shift(&self, tensor: &Tensor, amount: f64) -> lora_core::Result<Tensor> {
        Ok(tensor.f_add_scalar(amount).map_err(Error::from)?)
    }

    fn identity(&self, side: usize, like: &Tensor) -> lora_core::Result<Tensor> {
        Ok(Tensor::f_eye(side as i64, (like.kind(), like.device())).map_err(Error::from)?)
    }

    fn above_diagonal(&self, numbers: &Tensor, side: usize) -> lora_core::Result<Tensor> {
        let side = side as i64;
        let spread = || {
            let (matrices, _) = numbers.size2()?;
            let places = Tensor::f_triu_indices(side, side, 1, (Kind::Int64, numbers.device()))?;
            let places = places.f_select(0, 0)?.f_mul_scalar(side)?.f_add(&places.f_select(0, 1)?)?;
            let zeros = Tensor::f_zeros([matrices, side * side], (numbers.kind(), numbers.device()))?;
            zeros.f_index_copy(1, &places, numbers)?.f_view([matrices, side, side])
        };
        Ok(spread().map_err(Error::from)?)
    }

    /// In f32 at least: libtorch inverts no half-precision matrices. Whether there is an inverse is not asked, which
    /// would wait for the device; what has none gives numbers that are not finite.
    fn inverse(&self, tensor: &Tensor) -> lora_core::Result<Tensor> {
        let inverse = || Tensor::f_linalg_inv_ex(&tensor.f_to_kind(Kind::Float)?, false)?.0.f_to_kind(tensor.kind());
        Ok(inverse().map_err(Error::from)?)
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

/// `(first, count, times)` where indices are those from `first` on, each so many times.
fn repeated_run(indices: &[usize]) -> Option<(i64, i64, i64)> {
    let first = *indices.first()?;
    let times = indices.iter().take_while(|&&index| index == first).count();
    let runs = indices.len().is_multiple_of(times)
        && indices.iter().enumerate().all(|(place, &index)| index == first + place / times);
    runs.then_some((first as i64, (indices.len() / times) as i64, times as i64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::dry::{DryRun, Platform};
    use crate::profile::operations;
    use lora_core::backend::CpuBackend;
    use lora_core::conformance::{Layer, ROWS, check, distance};
    use lora_core::random::Stream;
    use lora_core::variant::{BaseLayer, Dropout, FrozenLayer, Lora, Parameters, Variant, VariantRegistry};

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

    /// Nothing is copied from host memory and no number is read, so that a step can be recorded: on a dry run's device,
    /// which plays a GPU.
    #[test]
    fn no_variant_makes_the_host_wait_in_its_passes() {
        let run = DryRun::begin(Platform::Cuda).unwrap();
        let like = Tensor::zeros([1], (Kind::Float, run.device()));
        let mut waiting = Vec::new();
        for row in ROWS {
            let cpu = VariantRegistry::<CpuBackend>::default().get(row.variant).unwrap();
            let torch = VariantRegistry::<TchBackend>::default().get(row.variant).unwrap();
            for &layer in row.layers {
                let here = layer.frozen(&CpuBackend, &HostTensor::zeros([1])).unwrap();
                let base = layer.frozen(&TchBackend, &like).unwrap();
                let leaf = |(name, host): (String, HostTensor)| {
                    let tensor = TchBackend.upload(&host, &like).unwrap().set_requires_grad(torch.is_trained(&name));
                    (name, tensor)
                };
                let tensors = row.trained(&CpuBackend, &*cpu, &here).unwrap().into_iter().map(leaf).collect();
                let parameters = Parameters::<TchBackend> { tensors, scale: row.scale };
                let input = TchBackend.upload(&layer.input(), &like).unwrap();
                let passes = || {
                    let output = torch.forward(&TchBackend, &base, &parameters, &input, None).unwrap();
                    output.square().mean(Kind::Float).backward();
                };
                let ((), counted) = operations(passes).unwrap();
                let waits = counted.by_name.iter().filter(|(_, own)| own.waits > 0).map(|(name, _)| name.as_str());
                let waits: Vec<_> = waits.collect();
                if !waits.is_empty() {
                    waiting.push(format!("{} {:?} on {layer:?}: {waits:?}", row.variant, row.options));
                }
            }
        }
        assert!(waiting.is_empty(), "{}", waiting.join("\n"));
    }

    #[test]
    fn slices_are_the_same_whether_their_indices_are_copied_or_not() {
        let host = HostTensor::from_f32([2, 4, 3], (0..24).map(|value| value as f32).collect()).unwrap();
        for (axis, indices) in
            [(1, &[1, 2][..]), (1, &[0, 0, 1, 1, 2, 2]), (1, &[3, 3, 3]), (2, &[2, 0]), (0, &[1]), (1, &[])]
        {
            let expected = CpuBackend.select(&host, axis, indices).unwrap();
            let found = to_host(&TchBackend.select(&here(&host), axis, indices).unwrap()).unwrap();
            assert_eq!(found, expected, "{axis} {indices:?}");
        }
        assert!(TchBackend.select(&here(&host), 1, &[3, 4]).is_err());
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
