//! A backend whose tensors are shapes without elements: whether an adapter's tensors fit a layer, without the arithmetic.
//! What a formula would compute is not known here; where one looks at a number, it finds 0.

use super::Backend;
use crate::{Error, HostTensor, LayerGeometry, Result};

/// Tensors are their shapes.
#[derive(Debug, Clone, Copy, Default)]
pub struct ShapeBackend;

fn misfit(what: &str, expected: impl std::fmt::Debug, found: impl std::fmt::Debug) -> Error {
    Error::Shape { what: what.to_owned(), expected: format!("{expected:?}"), found: format!("{found:?}") }
}

/// The shape of two tensors put together element by element.
fn broadcast(a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let axes = a.len().max(b.len());
    let side = |shape: &[usize], axis: usize| (axis + shape.len()).checked_sub(axes).map_or(1, |place| shape[place]);
    (0..axes)
        .map(|axis| match (side(a, axis), side(b, axis)) {
            (a, b) if a == b || b == 1 => Ok(a),
            (1, b) => Ok(b),
            _ => Err(misfit("tensors put together", a, b)),
        })
        .collect()
}

impl Backend for ShapeBackend {
    type Tensor = Vec<usize>;

    fn shape(&self, tensor: &Vec<usize>) -> Vec<usize> {
        tensor.clone()
    }

    fn share(&self, tensor: &Vec<usize>) -> Vec<usize> {
        tensor.clone()
    }

    fn detach(&self, tensor: &Vec<usize>) -> Vec<usize> {
        tensor.clone()
    }

    fn upload(&self, host: &HostTensor, _like: &Vec<usize>) -> Result<Vec<usize>> {
        Ok(host.shape().to_vec())
    }

    fn to_host(&self, tensor: &Vec<usize>) -> Result<HostTensor> {
        Ok(HostTensor::zeros(tensor.clone()))
    }

    fn cast_like(&self, tensor: &Vec<usize>, _like: &Vec<usize>) -> Result<Vec<usize>> {
        Ok(tensor.clone())
    }

    fn add(&self, a: Vec<usize>, b: &Vec<usize>) -> Result<Vec<usize>> {
        let sum = broadcast(&a, b)?;
        if sum == a { Ok(a) } else { Err(misfit("a tensor added to another", a, b)) }
    }

    fn mul(&self, a: &Vec<usize>, b: &Vec<usize>) -> Result<Vec<usize>> {
        broadcast(a, b)
    }

    fn div(&self, a: &Vec<usize>, b: &Vec<usize>) -> Result<Vec<usize>> {
        broadcast(a, b)
    }

    fn scale(&self, tensor: &Vec<usize>, _factor: f64) -> Result<Vec<usize>> {
        Ok(tensor.clone())
    }

    fn sqrt(&self, tensor: &Vec<usize>) -> Result<Vec<usize>> {
        Ok(tensor.clone())
    }

    fn at_least(&self, tensor: &Vec<usize>, _least: f64) -> Result<Vec<usize>> {
        Ok(tensor.clone())
    }

    fn sum(&self, tensor: &Vec<usize>, axes: &[usize]) -> Result<Vec<usize>> {
        Ok(tensor.iter().enumerate().map(|(axis, &side)| if axes.contains(&axis) { 1 } else { side }).collect())
    }

    fn matmul(&self, a: &Vec<usize>, b: &Vec<usize>) -> Result<Vec<usize>> {
        let ([leading @ .., m, k], [others @ .., inner, n]) = (a.as_slice(), b.as_slice()) else {
            return Err(misfit("a product of matrices", a, b));
        };
        if k != inner || leading != others {
            return Err(misfit("a product of matrices", a, b));
        }
        Ok([leading, &[*m, *n]].concat())
    }

    fn reshape(&self, tensor: &Vec<usize>, shape: &[usize]) -> Result<Vec<usize>> {
        let elements = |shape: &[usize]| shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side));
        if elements(tensor) == elements(shape) { Ok(shape.to_vec()) } else { Err(misfit("a tensor", shape, tensor)) }
    }

    fn permute(&self, tensor: &Vec<usize>, order: &[usize]) -> Result<Vec<usize>> {
        let axis = |axis: &usize| tensor.get(*axis).copied().ok_or_else(|| misfit("axes of a tensor", order, tensor));
        order.iter().map(axis).collect()
    }

    fn select(&self, tensor: &Vec<usize>, axis: usize, indices: &[usize]) -> Result<Vec<usize>> {
        let mut shape = tensor.clone();
        match shape.get_mut(axis) {
            Some(side) if indices.iter().all(|index| index < side) => *side = indices.len(),
            _ => return Err(misfit("slices of an axis", indices.last(), tensor)),
        }
        Ok(shape)
    }

    fn apply(
        &self,
        geometry: &LayerGeometry,
        _input: &Vec<usize>,
        _weight: &Vec<usize>,
        _bias: Option<&Vec<usize>>,
    ) -> Result<Vec<usize>> {
        Err(Error::Unsupported {
            variant: "any".into(),
            layer: format!("{geometry:?}"),
            reason: "shapes alone have no forward pass".into(),
        })
    }

    fn inverse(&self, tensor: &Vec<usize>) -> Result<Vec<usize>> {
        match tensor.as_slice() {
            [.., rows, columns] if rows == columns => Ok(tensor.clone()),
            _ => Err(misfit("a square matrix", "[…, n, n]", tensor)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::CpuBackend;
    use crate::random::Stream;
    use crate::variant::{FrozenLayer, Parameters, Request, VariantRegistry};
    use crate::{AdapterModule, LayerGeometry};

    #[test]
    fn every_variant_fits_the_layer_it_was_made_for_and_no_wider_one() {
        let (shapes, numbers) = (VariantRegistry::<ShapeBackend>::default(), VariantRegistry::<CpuBackend>::default());
        for name in shapes.names() {
            let geometry = LayerGeometry::linear(12, 8);
            let variant = shapes.get(name).unwrap();
            let request = Request::rank(2);
            // The formulas that start from the weight need its numbers.
            let weight = HostTensor::from_f32([8, 12], Stream::new(1).normals(96)).unwrap();
            let frozen = FrozenLayer { backend: CpuBackend, geometry, weight, bias: None };
            let tensors = numbers.get(name).unwrap();
            let tensors = tensors.initialise(&CpuBackend, &frozen, &request, &Stream::new(2)).unwrap();
            let module = AdapterModule { variant: name.to_owned(), tensors, rank: 2, alpha: 2.0 };
            for (geometry, fits) in [(geometry, true), (LayerGeometry::linear(20, 14), false)] {
                let layer =
                    FrozenLayer { backend: ShapeBackend, geometry, weight: geometry.weight_shape(), bias: None };
                let parameters = Parameters::upload(&ShapeBackend, &module, &vec![]).unwrap();
                let delta = variant.delta_weight(&ShapeBackend, &layer, &parameters);
                // VeRA's layers cut what they need out of shared matrices, which suffice here for the first layer alone.
                assert_eq!(delta.is_ok_and(|delta| delta == geometry.weight_shape()), fits, "{name} {geometry:?}");
            }
        }
    }
}
