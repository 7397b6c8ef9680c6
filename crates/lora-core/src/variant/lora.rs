//! Plain LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685), on linear
//! layers and, as the image trainers do it, on convolutions.
//!
//! `y = W x + (alpha / rank) · up(down(x))`. For a linear layer `down` is `[rank, in]` and `up` `[out, rank]`; for a
//! convolution `down` is `[rank, in, k, k]` with the stride and padding of the base, and `up` is `[out, rank, 1, 1]`.

use std::collections::BTreeMap;

use super::{BaseLayer, Dropout, Parameters, Variant};
use crate::backend::Backend;
use crate::random::Stream;
use crate::{Error, HostTensor, LayerGeometry, Result};

/// The plain low-rank update.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lora;

const NAME: &str = "lora";
/// Name of the down-projection.
const DOWN: &str = "down";
/// Name of the up-projection.
const UP: &str = "up";

impl<B: Backend> Variant<B> for Lora {
    fn name(&self) -> &str {
        NAME
    }

    /// `down` uniform in ±1/√fan_in (Kaiming with a = √5, as sd-scripts and PEFT), `up` zero.
    fn initialise(
        &self,
        base: &dyn BaseLayer<B>,
        rank: usize,
        stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let geometry = base.geometry();
        ungrouped(&geometry)?;
        if rank == 0 {
            return Err(Error::Option { key: "lora_rank", value: "0".into(), reason: "a rank is at least 1".into() });
        }
        let bound = 1.0 / (geometry.fan_in() as f32).sqrt();
        let mut stream = stream.at(DOWN);
        let shape = geometry.with_outputs(rank).weight_shape();
        let values = (0..rank * geometry.fan_in()).map(|_| (2.0 * stream.uniform() - 1.0) * bound).collect();
        Ok(BTreeMap::from([
            (DOWN.to_owned(), HostTensor::from_f32(shape, values)?),
            (UP.to_owned(), HostTensor::zeros(geometry.pointwise_from(rank).weight_shape())),
        ]))
    }

    fn delta_weight(&self, backend: &B, geometry: &LayerGeometry, parameters: &Parameters<B>) -> Result<B::Tensor> {
        ungrouped(geometry)?;
        let (down, up, rank) = factors(backend, geometry, parameters)?;
        let down = backend.reshape(down, &[rank, geometry.fan_in()])?;
        let up = backend.reshape(up, &[geometry.outputs(), rank])?;
        let product = backend.matmul(&backend.scale(&up, parameters.scale)?, &down)?;
        backend.reshape(&product, &geometry.weight_shape())
    }

    /// Two thin products instead of one with `W + ΔW`; the scale goes onto the `rank` activations in between, where it
    /// touches the fewest numbers, and so does dropout (sd-scripts' `network_dropout`).
    fn forward(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        input: &B::Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let (down, up, rank) = factors(backend, &geometry, parameters)?;
        let (down, up) = (backend.cast_like(down, input)?, backend.cast_like(up, input)?);
        let mut hidden = backend.apply(&geometry.with_outputs(rank), input, &down, None)?;
        if let Some(dropout) = dropout {
            let mask = backend.upload(&dropout.mask(&backend.shape(&hidden))?, &hidden)?;
            hidden = backend.mul(&hidden, &mask)?;
        }
        if parameters.scale != 1.0 {
            hidden = backend.scale(&hidden, parameters.scale)?;
        }
        let update = backend.apply(&geometry.pointwise_from(rank), &hidden, &up, None)?;
        backend.add(base.forward(input)?, &update)
    }
}

/// Both factors and their common rank, checked against the layer.
fn factors<'p, B: Backend>(
    backend: &B,
    geometry: &LayerGeometry,
    parameters: &'p Parameters<B>,
) -> Result<(&'p B::Tensor, &'p B::Tensor, usize)> {
    let (down, up) = (parameters.get(NAME, DOWN)?, parameters.get(NAME, UP)?);
    let (down_shape, up_shape) = (backend.shape(down), backend.shape(up));
    let rank = down_shape.first().copied().unwrap_or(0);
    for (name, expected, found) in [
        (DOWN, geometry.with_outputs(rank).weight_shape(), down_shape),
        (UP, geometry.pointwise_from(rank).weight_shape(), up_shape),
    ] {
        if expected != found || rank == 0 {
            return Err(Error::Shape {
                what: format!("`{name}` of a LoRA on {geometry:?}"),
                expected: format!("{expected:?}"),
                found: format!("{found:?}"),
            });
        }
    }
    Ok((down, up, rank))
}

fn ungrouped(geometry: &LayerGeometry) -> Result<()> {
    match geometry {
        LayerGeometry::Conv2d { groups, .. } if *groups != 1 => Err(Error::Shape {
            what: "LoRA on a convolution".into(),
            expected: "one channel group".into(),
            found: format!("{groups} groups"),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::CpuBackend;
    use crate::variant::VariantRegistry;

    /// A frozen layer on the CPU backend.
    struct Frozen {
        geometry: LayerGeometry,
        weight: HostTensor,
    }

    impl BaseLayer<CpuBackend> for Frozen {
        fn geometry(&self) -> LayerGeometry {
            self.geometry
        }
        fn forward(&self, input: &HostTensor) -> Result<HostTensor> {
            CpuBackend.apply(&self.geometry, input, &self.weight, None)
        }
        fn weight(&self) -> Result<HostTensor> {
            Ok(self.weight.clone())
        }
        fn bias(&self) -> Option<HostTensor> {
            None
        }
    }

    fn random(shape: &[usize], seed: u64) -> HostTensor {
        HostTensor::from_f32(shape, Stream::new(seed).normals(shape.iter().product())).unwrap()
    }

    fn cases() -> Vec<(Frozen, HostTensor)> {
        let linear = LayerGeometry::linear(6, 10);
        let conv = LayerGeometry::conv2d(3, 5, 3, 2, 1);
        [(linear, vec![2, 4, 6]), (conv, vec![2, 3, 7, 6]), (LayerGeometry::conv2d(4, 6, 1, 1, 0), vec![1, 4, 3, 3])]
            .into_iter()
            .map(|(geometry, shape)| {
                (Frozen { geometry, weight: random(&geometry.weight_shape(), 1) }, random(&shape, 2))
            })
            .collect()
    }

    #[test]
    fn the_cheap_forward_is_the_forward_with_the_merged_weight() {
        for (base, input) in cases() {
            let parameters = Parameters::<CpuBackend> {
                tensors: BTreeMap::from([
                    (DOWN.into(), random(&base.geometry.with_outputs(2).weight_shape(), 3)),
                    (UP.into(), random(&base.geometry.pointwise_from(2).weight_shape(), 4)),
                ]),
                scale: 0.3,
            };
            let cheap = Lora.forward(&CpuBackend, &base, &parameters, &input, None).unwrap();
            let delta = Lora.delta_weight(&CpuBackend, &base.geometry, &parameters).unwrap();
            let merged = CpuBackend.add(delta, &base.weight).unwrap();
            let expected = CpuBackend.apply(&base.geometry, &input, &merged, None).unwrap();
            let worst = cheap.to_f32().iter().zip(&*expected.to_f32()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-4, "{:?}: {worst}", base.geometry);
        }
    }

    #[test]
    fn training_starts_from_the_base() {
        for (base, input) in cases() {
            let variant = VariantRegistry::<CpuBackend>::default().get("lora").unwrap();
            let tensors = variant.initialise(&base, 4, &Stream::new(1)).unwrap();
            assert!(tensors[DOWN].to_f32().iter().any(|&value| value != 0.0));
            let bound = 1.0 / (base.geometry.fan_in() as f32).sqrt();
            assert!(tensors[DOWN].to_f32().iter().all(|value| value.abs() <= bound));
            let parameters = Parameters::<CpuBackend> { tensors, scale: 1.0 };
            let adapted = variant.forward(&CpuBackend, &base, &parameters, &input, None).unwrap();
            assert_eq!(adapted, base.forward(&input).unwrap());
        }
    }

    #[test]
    fn factors_that_do_not_fit_are_errors() {
        let (base, input) = cases().remove(0);
        let mut parameters = Parameters::<CpuBackend> { tensors: BTreeMap::new(), scale: 1.0 };
        assert!(matches!(
            Lora.forward(&CpuBackend, &base, &parameters, &input, None),
            Err(Error::MissingTensor { .. })
        ));
        parameters.tensors.insert(DOWN.into(), random(&[2, 5], 1));
        parameters.tensors.insert(UP.into(), random(&[10, 2], 1));
        assert!(matches!(Lora.forward(&CpuBackend, &base, &parameters, &input, None), Err(Error::Shape { .. })));
    }
}
