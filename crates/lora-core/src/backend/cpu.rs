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

    fn detach(&self, tensor: &HostTensor) -> HostTensor {
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
        let shape = a.shape().to_vec();
        let sum = zip("add", &a, b, |x, y| x + y)?;
        if sum.shape() == shape { Ok(sum) } else { Err(mismatch("add", &shape, b.shape())) }
    }

    fn mul(&self, a: &HostTensor, b: &HostTensor) -> Result<HostTensor> {
        zip("mul", a, b, |x, y| x * y)
    }

    fn div(&self, a: &HostTensor, b: &HostTensor) -> Result<HostTensor> {
        zip("div", a, b, |x, y| x / y)
    }

    fn scale(&self, tensor: &HostTensor, factor: f64) -> Result<HostTensor> {
        let factor = factor as f32;
        HostTensor::from_f32(tensor.shape(), tensor.to_f32().iter().map(|value| value * factor).collect())
    }

    fn sqrt(&self, tensor: &HostTensor) -> Result<HostTensor> {
        HostTensor::from_f32(tensor.shape(), tensor.to_f32().iter().map(|value| value.sqrt()).collect())
    }

    fn at_least(&self, tensor: &HostTensor, least: f64) -> Result<HostTensor> {
        let least = least as f32;
        let larger = |&value: &f32| if value < least { least } else { value };
        HostTensor::from_f32(tensor.shape(), tensor.to_f32().iter().map(larger).collect())
    }

    fn sum(&self, tensor: &HostTensor, axes: &[usize]) -> Result<HostTensor> {
        let mut shape = tensor.shape().to_vec();
        for &axis in axes {
            *shape.get_mut(axis).ok_or_else(|| mismatch("axis of a sum", tensor.shape(), axes))? = 1;
        }
        // In f64: a norm over tens of thousands of elements is compared with one that another library computed.
        let mut sums = vec![0.0f64; shape.iter().product()];
        let strides = broadcast_strides(&shape, tensor.shape());
        let values = tensor.to_f32();
        walk(tensor.shape(), [&strides], |element, [place]| sums[place] += f64::from(values[element]));
        HostTensor::from_f32(shape, sums.into_iter().map(|sum| sum as f32).collect())
    }

    fn matmul(&self, a: &HostTensor, b: &HostTensor) -> Result<HostTensor> {
        let wrong = || mismatch("matmul", a.shape(), b.shape());
        let ([lead @ .., rows, inner], [lead_b @ .., inner_b, columns]) = (a.shape(), b.shape()) else {
            return Err(wrong());
        };
        if inner != inner_b || lead != lead_b {
            return Err(wrong());
        }
        let (rows, inner, columns) = (*rows, *inner, *columns);
        let mut product = vec![0.0; lead.iter().product::<usize>() * rows * columns];
        if !product.is_empty() && inner > 0 {
            let (a, b) = (a.to_f32(), b.to_f32());
            let pairs = a.chunks_exact(rows * inner).zip(b.chunks_exact(inner * columns));
            for ((a, b), product) in pairs.zip(product.chunks_exact_mut(rows * columns)) {
                gemm(
                    MatRef::from_row_major_slice(a, rows, inner),
                    MatRef::from_row_major_slice(b, inner, columns),
                    MatMut::from_row_major_slice_mut(product, rows, columns),
                );
            }
        }
        HostTensor::from_f32([lead, &[rows, columns]].concat(), product)
    }

    fn reshape(&self, tensor: &HostTensor, shape: &[usize]) -> Result<HostTensor> {
        tensor.clone().reshape(shape)
    }

    fn permute(&self, tensor: &HostTensor, order: &[usize]) -> Result<HostTensor> {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..tensor.shape().len()) {
            return Err(mismatch("order of axes", tensor.shape(), order));
        }
        let strides = strides(tensor.shape());
        let shape: Vec<usize> = order.iter().map(|&axis| tensor.shape()[axis]).collect();
        let from: Vec<usize> = order.iter().map(|&axis| strides[axis]).collect();
        let values = tensor.to_f32();
        let mut result = vec![0.0; values.len()];
        walk(&shape, [&from], |element, [place]| result[element] = values[place]);
        HostTensor::from_f32(shape, result)
    }

    fn select(&self, tensor: &HostTensor, axis: usize, indices: &[usize]) -> Result<HostTensor> {
        let length =
            *tensor.shape().get(axis).ok_or_else(|| mismatch("axis of a selection", tensor.shape(), &[axis]))?;
        if let Some(&outside) = indices.iter().find(|&&index| index >= length) {
            return Err(mismatch("index of a selection", &[length], &[outside]));
        }
        let inner: usize = tensor.shape()[axis + 1..].iter().product();
        let values = tensor.to_f32();
        let mut result = Vec::with_capacity(indices.len() * values.len() / length.max(1));
        for slab in values.chunks_exact((length * inner).max(1)) {
            for &index in indices {
                result.extend_from_slice(&slab[index * inner..(index + 1) * inner]);
            }
        }
        let mut shape = tensor.shape().to_vec();
        shape[axis] = indices.len();
        HostTensor::from_f32(shape, result)
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
            LayerGeometry::Embedding { entries, width } => {
                let ids = input.to_f32();
                let mut output = Vec::with_capacity(ids.len() * width);
                for &id in &*ids {
                    if !(id >= 0.0 && id < entries as f32 && id.fract() == 0.0) {
                        return Err(Error::Shape {
                            what: "row of an embedding".into(),
                            expected: format!("a whole number below {entries}"),
                            found: id.to_string(),
                        });
                    }
                    output.extend_from_slice(&kernels[id as usize * width..(id as usize + 1) * width]);
                }
                HostTensor::from_f32([input.shape(), &[width]].concat(), output)
            }
            LayerGeometry::Norm { .. } | LayerGeometry::Experts { .. } => Err(Error::Shape {
                what: "layer to apply".into(),
                expected: "a linear layer, a convolution or an embedding".into(),
                found: "a normalisation or a mixture's experts, whose kind their weights do not tell".into(),
            }),
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

/// Distances between neighbours along each axis, in elements.
fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

/// The strides of `shape` repeated to `target`: 0 along axes that are repeated.
fn broadcast_strides(shape: &[usize], target: &[usize]) -> Vec<usize> {
    let missing = target.len() - shape.len();
    let own = strides(shape).into_iter().zip(shape).map(|(stride, &side)| if side == 1 { 0 } else { stride });
    std::iter::repeat_n(0, missing).chain(own).collect()
}

/// Calls `visit` with each element's number and its places under `N` lists of strides.
fn walk<const N: usize>(shape: &[usize], strides: [&[usize]; N], mut visit: impl FnMut(usize, [usize; N])) {
    let count = shape.iter().product();
    let mut index = vec![0; shape.len()];
    let mut places = [0; N];
    for element in 0..count {
        visit(element, places);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            (0..N).for_each(|operand| places[operand] += strides[operand][axis]);
            if index[axis] < shape[axis] {
                break;
            }
            (0..N).for_each(|operand| places[operand] -= strides[operand][axis] * shape[axis]);
            index[axis] = 0;
        }
    }
}

fn zip(what: &str, a: &HostTensor, b: &HostTensor, operation: impl Fn(f32, f32) -> f32) -> Result<HostTensor> {
    let (x, y) = (a.to_f32(), b.to_f32());
    if a.shape() == b.shape() {
        return HostTensor::from_f32(a.shape(), x.iter().zip(&*y).map(|(&x, &y)| operation(x, y)).collect());
    }
    let axes = a.shape().len().max(b.shape().len());
    let side = |shape: &[usize], axis: usize| (axis + shape.len()).checked_sub(axes).map_or(1, |own| shape[own]);
    let mut shape = Vec::with_capacity(axes);
    for axis in 0..axes {
        match (side(a.shape(), axis), side(b.shape(), axis)) {
            (left, right) if left == right || right == 1 => shape.push(left),
            (1, right) => shape.push(right),
            _ => return Err(mismatch(what, a.shape(), b.shape())),
        }
    }
    let (from_a, from_b) = (broadcast_strides(a.shape(), &shape), broadcast_strides(b.shape(), &shape));
    let mut result = vec![0.0; shape.iter().product()];
    walk(&shape, [&from_a, &from_b], |element, [i, j]| result[element] = operation(x[i], y[j]));
    HostTensor::from_f32(shape, result)
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
    fn axes_broadcast_permute_sum_and_select() {
        let a = HostTensor::from_f32([2, 3], (0..6).map(|v| v as f32).collect()).unwrap();
        let column = HostTensor::from_f32([2, 1], vec![10.0, 20.0]).unwrap();
        let row = HostTensor::from_f32([3], vec![1.0, 2.0, 3.0]).unwrap();
        let values = |tensor: HostTensor| tensor.to_f32().into_owned();
        assert_eq!(values(CpuBackend.mul(&a, &column).unwrap()), [0.0, 10.0, 20.0, 60.0, 80.0, 100.0]);
        assert_eq!(values(CpuBackend.add(a.clone(), &row).unwrap()), [1.0, 3.0, 5.0, 4.0, 6.0, 8.0]);
        let outer = CpuBackend.mul(&column, &row).unwrap();
        assert_eq!((outer.shape(), outer.to_f32()[5]), (&[2, 3][..], 60.0));
        let turned = CpuBackend.permute(&a, &[1, 0]).unwrap();
        assert_eq!((turned.shape(), &*turned.to_f32()), (&[3, 2][..], &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0][..]));
        assert_eq!(values(CpuBackend.sum(&a, &[1]).unwrap()), [3.0, 12.0]);
        assert_eq!(values(CpuBackend.sum(&a, &[0, 1]).unwrap()), [15.0]);
        assert_eq!(values(CpuBackend.select(&a, 1, &[2, 0]).unwrap()), [2.0, 0.0, 5.0, 3.0]);
        let stack = HostTensor::from_f32([2, 2, 2], vec![2.0, 0.0, 0.0, 4.0, 1.0, 1.0, 0.0, 1.0]).unwrap();
        let inverse = CpuBackend.inverse(&stack).unwrap();
        assert_eq!(values(inverse.clone()), [0.5, 0.0, 0.0, 0.25, 1.0, -1.0, 0.0, 1.0]);
        assert_eq!(values(CpuBackend.matmul(&stack, &inverse).unwrap()), [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let (a, b) = (HostTensor::zeros([2, 3]), HostTensor::zeros([2, 3]));
        assert!(CpuBackend.matmul(&a, &b).is_err());
        assert!(CpuBackend.mul(&a, &HostTensor::zeros([3, 2])).is_err());
        assert!(CpuBackend.add(HostTensor::zeros([3]), &a).is_err());
        assert!(CpuBackend.permute(&a, &[0, 0]).is_err() && CpuBackend.select(&a, 0, &[2]).is_err());
        assert!(CpuBackend.sum(&a, &[2]).is_err());
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
