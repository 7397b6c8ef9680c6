//! Numbers in 8 bits, by blocks (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022): each block of
//! 256 is divided by its largest magnitude, and each number becomes the nearest of 256 values that lie closer together
//! towards zero (the dynamic map of Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016).

use lora_torch::tch::{Device, Kind, Tensor};

use crate::Result;

/// Numbers in a block.
pub(super) const BLOCK: i64 = 256;

/// The 256 values of a map, ascending, on a device.
#[derive(Debug)]
pub(super) struct DynamicMap {
    values: Tensor,
    /// Halfway from each value to the next.
    bounds: Tensor,
    /// The code of 0.
    zero: i64,
}

impl DynamicMap {
    /// For numbers of both signs, or for numbers from 0 on.
    pub(super) fn new(signed: bool, device: Device) -> Result<Self> {
        let mut values = vec![0.0f32, 1.0];
        for exponent in 0..7 {
            let fractions = 1i64 << if signed { exponent } else { exponent + 1 };
            let edges = Tensor::f_linspace(0.1, 1.0, fractions + 1, (Kind::Float, Device::Cpu))?;
            let edges = Vec::<f32>::try_from(edges)?;
            let power = 10f64.powi(exponent - 6) as f32;
            for pair in edges.windows(2) {
                let value = power * ((pair[0] + pair[1]) / 2.0);
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        debug_assert_eq!(values.len(), 256);
        let zero = values.iter().position(|&value| value == 0.0).unwrap_or_default() as i64;
        let values = Tensor::f_from_slice(&values)?;
        let bounds = values.f_slice(0, 1, None::<i64>, 1)?.f_add(&values.f_slice(0, 0, 255, 1)?)?.f_div_scalar(2.0)?;
        Ok(Self { values: values.f_to_device(device)?, bounds: bounds.f_to_device(device)?, zero })
    }

    /// What pads a block.
    pub(super) fn zero(&self) -> i64 {
        self.zero
    }

    pub(super) fn device(&self) -> Device {
        self.values.device()
    }

    /// `[blocks, 256]` in 8 bits (u8), and the largest magnitudes, `[blocks]`.
    pub(super) fn quantised(&self, numbers: &Tensor) -> Result<(Tensor, Tensor)> {
        let largest = numbers.f_abs()?.f_amax([1i64].as_slice(), false)?;
        // A block of zeros stays one.
        let scaled = numbers.f_div(&largest.f_clamp_min(1e-38)?.f_unsqueeze(1)?)?;
        Ok((scaled.f_bucketize(&self.bounds, true, false)?.f_to_kind(Kind::Uint8)?, largest))
    }

    /// The numbers again, `[blocks, 256]` in f32.
    pub(super) fn dequantised(&self, codes: &Tensor, largest: &Tensor) -> Result<Tensor> {
        let values = self.values.f_index_select(0, &codes.f_view([-1])?.f_to_kind(Kind::Int)?)?;
        Ok(values.f_view([-1, BLOCK])?.f_mul_(&largest.f_unsqueeze(1)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_within_the_spacing_of_the_map() {
        for signed in [true, false] {
            let map = DynamicMap::new(signed, Device::Cpu).unwrap();
            let values = Vec::<f32>::try_from(&map.values).unwrap();
            assert_eq!((values.len(), values[map.zero as usize], values[255]), (256, 0.0, 1.0));
            let mut numbers: Vec<f32> = (0..512).map(|i| ((i * 37 % 512) as f32 - 200.0).powi(3) / 1e4).collect();
            if !signed {
                numbers.iter_mut().for_each(|number| *number = number.abs());
            }
            let numbers = Tensor::from_slice(&numbers).view([2, BLOCK]);
            let (codes, largest) = map.quantised(&numbers).unwrap();
            let again = map.dequantised(&codes, &largest).unwrap();
            // Neighbouring values are at most 1/64 (signed; half of that unsigned) of the largest apart.
            let worst = (&again - &numbers).abs() / largest.unsqueeze(1);
            let limit = if signed { 1.0 / 128.0 } else { 1.0 / 256.0 };
            assert!(f64::try_from(worst.max()).unwrap() <= limit, "{signed}");
            // What the map holds comes back as it is.
            assert_eq!(map.quantised(&again).unwrap().0, codes);
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let map = DynamicMap::new(true, Device::Cpu).unwrap();
        let (codes, largest) = map.quantised(&Tensor::zeros([1, BLOCK], (Kind::Float, Device::Cpu))).unwrap();
        assert_eq!(f64::try_from(map.dequantised(&codes, &largest).unwrap().abs().max()).unwrap(), 0.0);
        assert_eq!(map.zero, 127);
    }
}
