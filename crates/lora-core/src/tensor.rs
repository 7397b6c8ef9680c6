//! [`HostTensor`]: a small dense tensor in host memory, the exchange format between crates and the CPU backend's tensor.
//! Not a tensor library: arithmetic lives in [`crate::backend`].

use std::borrow::Cow;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::{Error, Result};

/// Element types of adapters and their parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary32.
    #[default]
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F32 => "fp32",
            DType::F16 => "fp16",
            DType::BF16 => "bf16",
        })
    }
}

/// The elements of a [`HostTensor`], row-major.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum HostData {
    /// 32-bit elements.
    F32(Vec<f32>),
    /// 16-bit IEEE elements.
    F16(Vec<f16>),
    /// 16-bit brain-float elements.
    BF16(Vec<bf16>),
}

/// A dense row-major tensor in host memory. A scalar has the empty shape.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    shape: Vec<usize>,
    data: HostData,
}

impl HostTensor {
    /// From elements and a shape that must agree.
    ///
    /// # Errors
    /// [`Error::Shape`] where the shape is not of as many elements as there are.
    pub fn new(shape: impl Into<Vec<usize>>, data: HostData) -> Result<Self> {
        let shape = shape.into();
        let found = match &data {
            HostData::F32(values) => values.len(),
            HostData::F16(values) => values.len(),
            HostData::BF16(values) => values.len(),
        };
        match shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side)) {
            Some(expected) if expected == found => Ok(Self { shape, data }),
            _ => Err(Error::Shape {
                what: "host tensor".into(),
                expected: format!("{shape:?} elements"),
                found: format!("{found} elements"),
            }),
        }
    }

    /// From 32-bit elements.
    ///
    /// # Errors
    /// [`Error::Shape`] where the shape is not of as many elements as there are.
    pub fn from_f32(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Result<Self> {
        Self::new(shape, HostData::F32(values))
    }

    /// All zeros, 32 bits.
    pub fn zeros(shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        let count = shape.iter().product();
        Self { shape, data: HostData::F32(vec![0.0; count]) }
    }

    /// The shape, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self.data {
            HostData::F32(_) => DType::F32,
            HostData::F16(_) => DType::F16,
            HostData::BF16(_) => DType::BF16,
        }
    }

    /// The elements.
    pub fn data(&self) -> &HostData {
        &self.data
    }

    /// The elements as 32-bit floats, without a copy where they are.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        match &self.data {
            HostData::F32(values) => Cow::Borrowed(values),
            HostData::F16(values) => Cow::Owned(values.to_f32_vec()),
            HostData::BF16(values) => Cow::Owned(values.to_f32_vec()),
        }
    }

    /// The same values rounded (to nearest, ties to even) to `dtype`.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        if dtype == self.dtype() {
            return self.clone();
        }
        let values = self.to_f32();
        let data = match dtype {
            DType::F32 => HostData::F32(values.into_owned()),
            DType::F16 => {
                let mut rounded = vec![f16::ZERO; values.len()];
                rounded.convert_from_f32_slice(&values);
                HostData::F16(rounded)
            }
            DType::BF16 => {
                let mut rounded = vec![bf16::ZERO; values.len()];
                rounded.convert_from_f32_slice(&values);
                HostData::BF16(rounded)
            }
        };
        Self { shape: self.shape.clone(), data }
    }

    /// The same elements under another shape of equal size.
    ///
    /// # Errors
    /// [`Error::Shape`] where the other shape is not of as many elements.
    pub fn reshape(self, shape: impl Into<Vec<usize>>) -> Result<Self> {
        Self::new(shape, self.data)
    }

    /// The elements as they stand in memory, little-endian on the platforms that this crate supports.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            HostData::F32(values) => bytemuck::cast_slice(values),
            HostData::F16(values) => bytemuck::cast_slice(values),
            HostData::BF16(values) => bytemuck::cast_slice(values),
        }
    }

    /// Whether every element is finite.
    pub fn is_finite(&self) -> bool {
        // Without a branch on each element, so that many are looked at at once.
        fn all<T: Copy>(values: &[T], finite: impl Fn(T) -> bool) -> bool {
            values.chunks(4096).all(|block| block.iter().fold(true, |all, &value| all & finite(value)))
        }
        match &self.data {
            HostData::F32(values) => all(values, f32::is_finite),
            HostData::F16(values) => all(values, f16::is_finite),
            HostData::BF16(values) => all(values, bf16::is_finite),
        }
    }
}

#[cfg(target_endian = "big")]
compile_error!("files of this field are little-endian, and tensors are written as they stand in memory");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shape_and_elements_must_agree() {
        assert!(HostTensor::from_f32([2, 3], vec![0.0; 5]).is_err());
        assert!(HostTensor::from_f32([usize::MAX, 2], vec![]).is_err());
        assert_eq!(HostTensor::from_f32([], vec![1.0]).unwrap().elements(), 1);
    }

    #[test]
    fn rounding_to_half_types_is_to_nearest_even() {
        let tensor = HostTensor::from_f32([2], vec![1.0 + 1.0 / 2048.0, 65536.0]).unwrap();
        let half = tensor.to_dtype(DType::F16);
        assert_eq!(half.to_f32()[0], 1.0);
        assert!(!half.is_finite());
        assert!(tensor.to_dtype(DType::BF16).is_finite());
    }
}
