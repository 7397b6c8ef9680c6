//! The backend without a tensor library: f32 arithmetic on [`HostTensor`]s, matrix products by `faer` on all cores.
//! It serves merging and embedding; it does not differentiate.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::Backend;
use crate::{Error, HostTensor, LayerGeometry, Result};

/// f32 arithmetic in host memory. Every result is f32, whatever the operands' storage.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuBackend;

impl Backend for CpuBackend {
    type Tensor = HostTensor;

    fn shape(&self, tensor: &HostTensor) -> Vec<usize> {
        tensor.shape().to_vec()
    }

    fn share(&self, tensor: &HostTensor) -> HostTensor {
        tensor.clone()
    }

    fn upload(&self, host: &HostTensor, like: &HostTensor) -> Result<HostTensor> {
        Ok(host.to_dtype(like.dtype()))
    }

    fn to_host(&self, tensor: &HostTensor) -> Result<HostTensor> {
        Ok(tensor.clone())
    }

    fn cast_like(&self, tensor: &HostTensor, like: &HostTensor) -> Result<HostTensor> {
        Ok(tensor.to_dtype(like.dtype()))
    }

    fn add(&self, a: HostTensor, b: &HostTensor) -> Result<HostTensor> {
        zip("add", &a, b, |x, y| x + y)
    }

    fn mul(&self, a: &HostTensor, b: &HostTensor) -> Result<HostTensor> {
        zip("mul", a, b, |x, y| x * y)
    }

    fn scale(&self, tensor: &HostTensor, factor: f64) -> Result<HostTensor> {
        let factor = factor as f32;
        HostTensor::from_f32(tensor.shape(), tensor.to_f32().iter().map(|value| value * factor).collect())
    }

    fn matmul(&self, a: &HostTensor, b: &HostTensor) -> Result<HostTensor> {
        match (a.shape(), b.shape()) {
            (&[rows, inner], &[inner_b, columns]) if inner == inner_b => {
                let mut product = vec![0.0; rows * columns];
                gemm(
                    MatRef::from_row_major_slice(&a.to_f32(), rows, inner),
                    MatRef::from_row_major_slice(&b.to_f32(), inner, columns),
                    MatMut::from_row_major_slice_mut(&mut product, rows, columns),
                );
                HostTensor::from_f32([rows, columns], product)
            }
            (left, right) => Err(mismatch("matmul", left, right)),
        }
    }

    fn reshape(&self, tensor: &HostTensor, shape: &[usize]) -> Result<HostTensor> {
        tensor.clone().reshape(shape)
    }

    fn apply(
        &self,
        geometry: &LayerGeometry,
        input: &HostTensor,
        weight: &HostTensor,
        bias: Option<&HostTensor>,
    ) -> Result<HostTensor> {
        if weight.shape() != geometry.weight_shape() {
            return Err(mismatch("weight of a layer", &geometry.weight_shape(), weight.shape()));
        }
        let (outputs, fan_in) = (geometry.outputs(), geometry.fan_in());
        let (kernels, bias) = (weight.to_f32(), bias.map(HostTensor::to_f32));
        match *geometry {
            LayerGeometry::Linear { in_features, .. } => {
                if input.shape().last() != Some(&in_features) {
                    return Err(mismatch("input of a linear layer", &[in_features], input.shape()));
                }
                let rows = input.elements() / in_features.max(1);
                let mut output = vec![0.0; rows * outputs];
                gemm(
                    MatRef::from_row_major_slice(&input.to_f32(), rows, in_features),
                    MatRef::from_row_major_slice(&kernels, outputs, in_features).transpose(),
                    MatMut::from_row_major_slice_mut(&mut output, rows, outputs),
                );
                if let Some(bias) = bias {
                    output
                        .chunks_exact_mut(outputs)
                        .for_each(|row| row.iter_mut().zip(&*bias).for_each(|(y, b)| *y += b));
                }
                let mut shape = input.shape().to_vec();
                *shape.last_mut().expect("checked above") = outputs;
                HostTensor::from_f32(shape, output)
            }
            LayerGeometry::Conv2d { in_channels, kernel, stride, padding, groups, .. } => {
                let &[batch, channels, height, width] = input.shape() else {
                    return Err(mismatch("input of a convolution", &[0, in_channels, 0, 0], input.shape()));
                };
                if channels != in_channels || height + 2 * padding < kernel || width + 2 * padding < kernel {
                    return Err(mismatch(
                        "input of a convolution",
                        &[batch, in_channels, kernel, kernel],
                        input.shape(),
                    ));
                }
                let out_height = (height + 2 * padding - kernel) / stride + 1;
                let out_width = (width + 2 * padding - kernel) / stride + 1;
                let positions = out_height * out_width;
                let pixels = input.to_f32();
                let mut output = vec![0.0; batch * outputs * positions];
                let (group_inputs, group_outputs) = (in_channels / groups, outputs / groups);
                let mut columns = vec![0.0; fan_in * positions];
                for image in 0..batch {
                    for group in 0..groups {
                        let first = (image * in_channels + group * group_inputs) * height * width;
                        let planes = &pixels[first..first + group_inputs * height * width];
                        unfold(planes, [height, width], kernel, stride, padding, [out_height, out_width], &mut columns);
                        let first = (image * outputs + group * group_outputs) * positions;
                        let group_kernels =
                            &kernels[group * group_outputs * fan_in..(group + 1) * group_outputs * fan_in];
                        let group_output = &mut output[first..first + group_outputs * positions];
                        gemm(
                            MatRef::from_row_major_slice(group_kernels, group_outputs, fan_in),
                            MatRef::from_row_major_slice(&columns, fan_in, positions),
                            MatMut::from_row_major_slice_mut(group_output, group_outputs, positions),
                        );
                    }
                    if let Some(bias) = &bias {
                        let planes = &mut output[image * outputs * positions..(image + 1) * outputs * positions];
                        planes
                            .chunks_exact_mut(positions)
                            .zip(&**bias)
                            .for_each(|(plane, b)| plane.iter_mut().for_each(|y| *y += b));
                    }
                }
                HostTensor::from_f32([batch, outputs, out_height, out_width], output)
            }
        }
    }
}

/// `product = a · b`.
fn gemm(a: MatRef<'_, f32>, b: MatRef<'_, f32>, product: MatMut<'_, f32>) {
    matmul(product, Accum::Replace, a, b, 1.0, Par::rayon(0));
}

/// Patches of `[channels, height, width]` as columns `[channels · kernel², positions]`.
fn unfold(
    planes: &[f32],
    [height, width]: [usize; 2],
    kernel: usize,
    stride: usize,
    padding: usize,
    [out_height, out_width]: [usize; 2],
    columns: &mut [f32],
) {
    for (row, column) in columns.chunks_exact_mut(out_height * out_width).enumerate() {
        let (channel, offset_y, offset_x) = (row / (kernel * kernel), row / kernel % kernel, row % kernel);
        for (position, value) in column.iter_mut().enumerate() {
            let y = (position / out_width * stride + offset_y).wrapping_sub(padding);
            let x = (position % out_width * stride + offset_x).wrapping_sub(padding);
            *value = if y < height && x < width { planes[(channel * height + y) * width + x] } else { 0.0 };
        }
    }
}

fn zip(what: &str, a: &HostTensor, b: &HostTensor, operation: impl Fn(f32, f32) -> f32) -> Result<HostTensor> {
    if a.shape() != b.shape() {
        return Err(mismatch(what, a.shape(), b.shape()));
    }
    let values = a.to_f32().iter().zip(&*b.to_f32()).map(|(&x, &y)| operation(x, y)).collect();
    HostTensor::from_f32(a.shape(), values)
}

fn mismatch(what: &str, expected: &[usize], found: &[usize]) -> Error {
    Error::Shape { what: what.into(), expected: format!("{expected:?}"), found: format!("{found:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    /// The definition of a convolution, term by term.
    fn direct_convolution(geometry: &LayerGeometry, x: &HostTensor, w: &HostTensor) -> Vec<f32> {
        let LayerGeometry::Conv2d { in_channels, out_channels, kernel, stride, padding, groups } = *geometry else {
            unreachable!("only called with convolutions")
        };
        let (height, width) = (x.shape()[2], x.shape()[3]);
        let side = |length: usize| (length + 2 * padding - kernel) / stride + 1;
        let (x, w) = (x.to_f32(), w.to_f32());
        let mut result = Vec::new();
        for o in 0..out_channels {
            for oy in 0..side(height) {
                for ox in 0..side(width) {
                    let mut sum = 0.0;
                    for i in 0..in_channels / groups {
                        let channel = o / (out_channels / groups) * (in_channels / groups) + i;
                        for ky in 0..kernel {
                            for kx in 0..kernel {
                                let (y, z) = (
                                    (oy * stride + ky).wrapping_sub(padding),
                                    (ox * stride + kx).wrapping_sub(padding),
                                );
                                if y < height && z < width {
                                    sum += x[(channel * height + y) * width + z]
                                        * w[((o * (in_channels / groups) + i) * kernel + ky) * kernel + kx];
                                }
                            }
                        }
                    }
                    result.push(sum);
                }
            }
        }
        result
    }

    #[test]
    fn convolutions_follow_their_definition() {
        for (kernel, stride, padding, groups) in [(1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 2), (2, 2, 0, 4)] {
            let geometry = LayerGeometry::Conv2d { in_channels: 4, out_channels: 8, kernel, stride, padding, groups };
            let mut stream = Stream::new(9);
            let x = HostTensor::from_f32([1, 4, 6, 5], stream.normals(120)).unwrap();
            let shape = geometry.weight_shape();
            let w = HostTensor::from_f32(shape.clone(), stream.normals(shape.iter().product())).unwrap();
            let found = CpuBackend.apply(&geometry, &x, &w, None).unwrap();
            let expected = direct_convolution(&geometry, &x, &w);
            let worst = found.to_f32().iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "kernel {kernel} stride {stride} groups {groups}: {worst}");
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let (a, b) = (HostTensor::zeros([2, 3]), HostTensor::zeros([2, 3]));
        assert!(CpuBackend.matmul(&a, &b).is_err());
        assert!(CpuBackend.mul(&a, &HostTensor::zeros([3, 2])).is_err());
        assert!(CpuBackend.apply(&LayerGeometry::linear(4, 2), &a, &HostTensor::zeros([2, 4]), None).is_err());
        assert!(
            CpuBackend
                .apply(
                    &LayerGeometry::conv2d(1, 1, 3, 1, 0),
                    &HostTensor::zeros([1, 1, 2, 2]),
                    &HostTensor::zeros([1, 1, 3, 3]),
                    None
                )
                .is_err()
        );
    }
}
