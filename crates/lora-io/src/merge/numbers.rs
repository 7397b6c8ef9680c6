//! Numbers of stored tensors as f32 and back, rounded once.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use lora_core::{HostData, HostTensor};

use crate::safetensors::{StoredDType, from_e4m3, from_e5m2};

/// Whether a merge computes with numbers of this type and writes them in it.
pub(super) fn is_float(dtype: StoredDType) -> bool {
    matches!(dtype, StoredDType::F32 | StoredDType::F16 | StoredDType::BF16)
}

/// Whether numbers of this type can be read and written in another.
pub(super) fn is_readable(dtype: StoredDType) -> bool {
    is_float(dtype) || matches!(dtype, StoredDType::F8E4M3 | StoredDType::F8E5M2 | StoredDType::F64)
}

pub(super) fn to_f32(dtype: StoredDType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        StoredDType::F16 => {
            let halves: Vec<f16> = bytes.as_chunks::<2>().0.iter().map(|&two| f16::from_le_bytes(two)).collect();
            halves.to_f32_vec()
        }
        StoredDType::BF16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&two| f32::from_bits(u32::from(u16::from_le_bytes(two)) << 16))
            .collect(),
        StoredDType::F64 => bytes.as_chunks::<8>().0.iter().map(|&eight| f64::from_le_bytes(eight) as f32).collect(),
        StoredDType::F8E4M3 => bytes.iter().map(|&byte| from_e4m3(byte)).collect(),
        StoredDType::F8E5M2 => bytes.iter().map(|&byte| from_e5m2(byte)).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|&four| f32::from_le_bytes(four)).collect(),
    }
}

pub(super) fn from_f32(dtype: StoredDType, values: Vec<f32>) -> Vec<u8> {
    let count = values.len();
    let data = match dtype {
        StoredDType::F16 => {
            let mut halves = vec![f16::ZERO; count];
            halves.convert_from_f32_slice(&values);
            HostData::F16(halves)
        }
        StoredDType::BF16 => {
            let mut halves = vec![bf16::ZERO; count];
            halves.convert_from_f32_slice(&values);
            HostData::BF16(halves)
        }
        _ => HostData::F32(values),
    };
    HostTensor::new([count], data).map_or_else(|_| Vec::new(), |tensor| tensor.bytes().to_vec())
}

/// Whether no element's exponent is all ones.
pub(super) fn all_finite(dtype: StoredDType, bytes: &[u8]) -> bool {
    let halves = |mask: u16| bytes.as_chunks::<2>().0.iter().all(|&two| u16::from_le_bytes(two) & mask != mask);
    match dtype {
        StoredDType::F16 => halves(0x7c00),
        StoredDType::BF16 => halves(0x7f80),
        _ => bytes.as_chunks::<4>().0.iter().all(|&four| f32::from_le_bytes(four).is_finite()),
    }
}

/// A tensor with the second half of its rows before the first; one without halves as it is.
pub(super) fn swapped(tensor: HostTensor) -> HostTensor {
    if tensor.shape().first().is_none_or(|rows| rows % 2 != 0) {
        return tensor;
    }
    let values = tensor.to_f32();
    let (first, second) = values.split_at(values.len() / 2);
    HostTensor::from_f32(tensor.shape(), [second, first].concat()).expect("as many values as places")
}

/// A matrix with rows and columns exchanged; anything else as it is.
pub(super) fn transposed(tensor: HostTensor) -> HostTensor {
    let &[rows, columns] = tensor.shape() else { return tensor };
    let values = tensor.to_f32();
    let turned = (0..columns).flat_map(|j| (0..rows).map(move |i| i * columns + j)).map(|place| values[place]);
    HostTensor::from_f32([columns, rows], turned.collect()).expect("as many values as places")
}
