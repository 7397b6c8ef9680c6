//! Tensors from and to host memory, with sizes checked: tch itself trusts the shape it is given.

use half::{bf16, f16};
use lora_core::{DType, HostData, HostTensor};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// The libtorch kind of an adapter dtype.
pub fn kind_of(dtype: DType) -> Kind {
    match dtype {
        DType::F16 => Kind::Half,
        DType::BF16 => Kind::BFloat16,
        _ => Kind::Float,
    }
}

/// A tensor of `kind` on `device` from row-major bytes of `stored` elements, for instance out of a memory map.
///
/// The bytes are read once and converted on the way; no copy in `stored` is kept. They may be misaligned.
///
/// # Errors
/// [`Error::Size`], which names `what`, where there are more or fewer bytes than the shape has; out of memory.
pub fn from_bytes(
    what: &str,
    bytes: &[u8],
    stored: Kind,
    shape: &[usize],
    kind: Kind,
    device: Device,
) -> Result<Tensor> {
    let shape: Vec<i64> = shape.iter().map(|&side| side as i64).collect();
    let expected = shape.iter().product::<i64>() as usize * stored.elt_size_in_bytes();
    if bytes.len() != expected {
        return Err(Error::Size { what: what.to_owned(), expected, found: bytes.len() });
    }
    if bytes.is_empty() {
        return Ok(Tensor::f_zeros(&shape, (kind, device))?);
    }
    if crate::dry::is_dry(device) {
        return Ok(Tensor::f_empty(&shape, (kind, device))?);
    }
    if !bytes.as_ptr().addr().is_multiple_of(stored.elt_size_in_bytes()) {
        let aligned = Tensor::f_empty([bytes.len() as i64], (Kind::Uint8, Device::Cpu))?;
        // SAFETY: the tensor has just been allocated with this many bytes and nobody else holds it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), aligned.data_ptr().cast::<u8>(), bytes.len()) };
        return Ok(aligned.f_view_dtype(stored)?.f_view(shape.as_slice())?.f_to_device_(device, kind, false, false)?);
    }
    let strides = row_major_strides(&shape);
    // SAFETY: the length was checked against the shape, the address is aligned, and the borrowed tensor dies in this
    // function: `copy` makes `f_to_device_` return a tensor with memory of its own.
    let borrowed = unsafe { Tensor::f_from_blob(bytes.as_ptr(), &shape, &strides, stored, Device::Cpu)? };
    Ok(borrowed.f_to_device_(device, kind, false, true)?)
}

/// A tensor with the host tensor's own dtype.
///
/// # Errors
/// Out of memory.
pub fn from_host(host: &HostTensor, device: Device) -> Result<Tensor> {
    let kind = kind_of(host.dtype());
    from_bytes("host tensor", host.bytes(), kind, host.shape(), kind, device)
}

/// A 32-bit tensor from values, row-major.
///
/// # Errors
/// [`Error::Size`] where there are more or fewer values than the shape has; out of memory.
pub fn from_f32(values: &[f32], shape: &[usize], device: Device) -> Result<Tensor> {
    // SAFETY: any f32 is four valid bytes.
    let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    upload(&from_bytes("values", bytes, Kind::Float, shape, Kind::Float, Device::Cpu)?, device)
}

/// A tensor on `device`. One that comes from host memory is on its way there while the host goes on: for what a step needs, not
/// for weights, as it passes through pinned memory.
///
/// # Errors
/// Out of memory, and a device that is lost.
pub fn upload(tensor: &Tensor, device: Device) -> Result<Tensor> {
    match (tensor.device(), device) {
        (Device::Cpu, Device::Cuda(index)) => crate::shim::upload(tensor, index),
        _ => Ok(tensor.f_to_device(device)?),
    }
}

/// A copy in host memory; fp16 and bf16 stay what they are, everything else becomes f32.
///
/// # Errors
/// [`Error::DeviceLost`], and [`Error::Torch`] for a tensor without storage.
pub fn to_host(tensor: &Tensor) -> Result<HostTensor> {
    let kind = match tensor.f_kind()? {
        half @ (Kind::Half | Kind::BFloat16) => half,
        _ => Kind::Float,
    };
    let shape: Vec<usize> = tensor.size().iter().map(|&side| side as usize).collect();
    let local = tensor.detach().f_to_device_(Device::Cpu, kind, false, false)?.f_contiguous()?;
    let count = shape.iter().product();
    let data = match kind {
        Kind::Half => HostData::F16(elements::<f16>(&local, count)),
        Kind::BFloat16 => HostData::BF16(elements::<bf16>(&local, count)),
        _ => HostData::F32(elements::<f32>(&local, count)),
    };
    Ok(HostTensor::new(shape, data)?)
}

/// The bytes of a tensor of any kind, row-major and little-endian as files hold them, copied to host memory as they are.
///
/// # Errors
/// [`Error::DeviceLost`], and [`Error::Torch`] for a tensor without storage.
pub fn to_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let local = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let bytes = local.numel() * local.f_kind()?.elt_size_in_bytes();
    let mut copy = vec![0u8; bytes];
    if bytes > 0 {
        // SAFETY: a contiguous tensor on the CPU with this many bytes, and a buffer of as many.
        unsafe { std::ptr::copy_nonoverlapping(local.data_ptr().cast::<u8>(), copy.as_mut_ptr(), bytes) };
    }
    Ok(copy)
}

/// Copies `count` elements out of a contiguous CPU tensor whose kind is `T`.
fn elements<T: Copy + Default>(tensor: &Tensor, count: usize) -> Vec<T> {
    let mut values = vec![T::default(); count];
    // SAFETY: the caller made the tensor contiguous on the CPU with `count` elements of exactly this type.
    unsafe { std::ptr::copy_nonoverlapping(tensor.data_ptr().cast::<T>(), values.as_mut_ptr(), count) };
    values
}

fn row_major_strides(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_round_trip_keeps_bits() {
        let host = HostTensor::from_f32([2, 3], vec![1.0, -2.5, 3.0, 0.1, 65504.0, -0.0]).unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let host = host.to_dtype(dtype);
            assert_eq!(to_host(&from_host(&host, Device::Cpu).unwrap()).unwrap(), host);
        }
        let scalar = HostTensor::from_f32([], vec![4.0]).unwrap();
        assert_eq!(to_host(&from_host(&scalar, Device::Cpu).unwrap()).unwrap(), scalar);
    }

    #[test]
    fn bytes_of_any_kind_come_back() {
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double, Kind::Uint8, Kind::Int8, Kind::Int64] {
            // Transposed: what is written is what it means, not how it lies.
            let tensor = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([3, 2]).to_kind(kind).tr();
            let bytes = to_bytes(&tensor).unwrap();
            let again = from_bytes("x", &bytes, kind, &[2, 3], kind, Device::Cpu).unwrap();
            assert!(again.equal(&tensor) && again.kind() == kind, "{kind:?}");
        }
        assert_eq!(to_bytes(&Tensor::zeros([0], (Kind::Float, Device::Cpu))).unwrap(), Vec::<u8>::new());
        assert_eq!(to_bytes(&Tensor::from(2.0f32)).unwrap(), 2.0f32.to_le_bytes());
    }

    #[test]
    fn bytes_may_be_misaligned_but_not_short() {
        let host = HostTensor::from_f32([3], vec![1.0, 2.0, 3.0]).unwrap();
        let mut shifted = vec![0u8];
        shifted.extend_from_slice(host.bytes());
        let tensor = from_bytes("x", &shifted[1..], Kind::Float, &[3], Kind::Double, Device::Cpu).unwrap();
        assert_eq!(Vec::<f64>::try_from(&tensor).unwrap(), [1.0, 2.0, 3.0]);
        let error = from_bytes("w", &shifted[2..], Kind::Float, &[3], Kind::Float, Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("w: 12 bytes expected"), "{error}");
    }

    #[test]
    fn the_copy_outlives_its_source() {
        let tensor = {
            let source = vec![7.0f32; 1000];
            from_f32(&source, &[1000], Device::Cpu).unwrap()
        };
        assert_eq!(f64::try_from(tensor.sum(Kind::Float)).unwrap(), 7000.0);
    }
}
