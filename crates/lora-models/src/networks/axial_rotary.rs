//! Rotary positions over several axes, as transformers that denoise pictures have them: the numbers of a head are cut into
//! one run an axis (time, row, column, …), and neighbouring numbers of a run are turned together by the position along
//! its axis (Su et al., "RoFormer", 2021; Heo et al., "Rotary Position Embedding for Vision Transformer", 2024). Which
//! token stands where is each network's to say; the positions of language models are in [`super::decoder`].

use lora_torch::rotary::{RotaryLayout, rotary};
use lora_torch::tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// The frequencies of all axes.
#[derive(Debug)]
pub struct AxialRotary {
    /// Radians a position by pair of numbers, one tensor `[pairs]` an axis, f64: positions by the thousand times a
    /// frequency have too few digits in f32.
    frequencies: Vec<Tensor>,
    layout: RotaryLayout,
}

/// Cosines and sines of a sequence's positions, `[batch or 1, tokens, head / 2]`, f32.
#[derive(Debug)]
pub struct AxialTables {
    cos: Tensor,
    sin: Tensor,
    layout: RotaryLayout,
}

impl AxialRotary {
    /// `axes` are the numbers of a head that each axis turns, all even; the frequencies of an axis of `d` numbers are
    /// `theta^(-2 i / d)`.
    ///
    /// # Errors
    /// [`Error::Input`] where an axis has an odd number or none; out of memory.
    pub fn new(axes: &[usize], theta: f64, device: Device) -> Result<Self> {
        let axes: Vec<_> = axes.iter().map(|&numbers| (numbers, theta)).collect();
        Self::of(&axes, RotaryLayout::Interleaved, device)
    }

    /// The same with a base of its own for each axis, of heads whose pairs are a number of the first half and one of the
    /// second: the axes' runs lie in each half.
    ///
    /// # Errors
    /// As of [`AxialRotary::new`].
    pub fn of_halves(axes: &[(usize, f64)], device: Device) -> Result<Self> {
        Self::of(axes, RotaryLayout::Halves, device)
    }

    fn of(axes: &[(usize, f64)], layout: RotaryLayout, device: Device) -> Result<Self> {
        if axes.is_empty() || axes.iter().any(|&(numbers, _)| numbers == 0 || numbers % 2 != 0) {
            return Err(Error::Input {
                what: "axes of rotary positions",
                expected: "even numbers above 0".into(),
                found: format!("{axes:?}"),
            });
        }
        let frequencies = axes.iter().map(|&(numbers, theta)| {
            let pair = |index: usize| theta.powf(-2.0 * index as f64 / numbers as f64);
            let values: Vec<f64> = (0..numbers / 2).map(pair).collect();
            Ok(Tensor::f_from_slice(&values)?.f_to_device(device)?)
        });
        Ok(Self { frequencies: frequencies.collect::<Result<_>>()?, layout })
    }

    /// Tables of `positions` `[batch or 1, tokens, axes]`, of any number type; angles are in f64.
    ///
    /// # Errors
    /// [`Error::Input`] for another number of axes; out of memory.
    pub fn tables(&self, positions: &Tensor) -> Result<AxialTables> {
        let axes = positions.size3()?.2;
        if axes != self.frequencies.len() as i64 {
            return Err(Error::Input {
                what: "positions",
                expected: format!("[batch, tokens, {}]", self.frequencies.len()),
                found: format!("{:?}", positions.size()),
            });
        }
        let angles = self.frequencies.iter().enumerate().map(|(axis, frequencies)| {
            let along = positions.f_narrow(2, axis as i64, 1)?.f_to_kind(Kind::Double)?;
            Ok(along.f_mul(frequencies)?)
        });
        let angles = Tensor::f_cat(&angles.collect::<Result<Vec<_>>>()?, -1)?;
        let (cos, sin) = (angles.f_cos()?.f_to_kind(Kind::Float)?, angles.f_sin()?.f_to_kind(Kind::Float)?);
        Ok(AxialTables { cos, sin, layout: self.layout })
    }
}

impl AxialTables {
    /// Heads `[batch, heads, tokens, head]`, turned in f32; in their own dtype.
    ///
    /// # Errors
    /// [`Error::Torch`] where heads and tables do not fit each other; out of memory.
    pub fn turn(&self, heads: &Tensor) -> Result<Tensor> {
        let turned = rotary(&heads.f_to_kind(Kind::Float)?, &self.cos, &self.sin, self.layout)?;
        Ok(turned.f_to_kind(heads.kind())?)
    }

    /// Those of a part of the sequence: `count` tokens from `first` on.
    ///
    /// # Errors
    /// [`Error::Torch`] where the sequence is shorter.
    pub fn part(&self, first: i64, count: i64) -> Result<Self> {
        Ok(Self {
            cos: self.cos.f_narrow(1, first, count)?,
            sin: self.sin.f_narrow(1, first, count)?,
            layout: self.layout,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_axis_turns_its_own_pairs_of_neighbours_by_its_own_position() {
        let (axes, theta) = ([4usize, 6, 2], 256.0f64);
        let rotary = AxialRotary::new(&axes, theta, Device::Cpu).unwrap();
        let positions = [[3i64, 1, 7], [1500, 0, 63]];
        let tables = rotary.tables(&Tensor::from_slice2(&positions).unsqueeze(0)).unwrap();
        let heads = Tensor::rand([2, 3, 2, 12], (Kind::Float, Device::Cpu));
        let turned = tables.turn(&heads).unwrap();
        for (token, position) in positions.iter().enumerate() {
            let mut first = 0;
            for (numbers, &place) in axes.iter().zip(position) {
                for pair in 0..numbers / 2 {
                    let angle = place as f64 * theta.powf(-2.0 * pair as f64 / *numbers as f64);
                    let at = |tensor: &Tensor, number| tensor.double_value(&[1, 2, token as i64, number]);
                    let number = (first + 2 * pair) as i64;
                    let (a, b) = (at(&heads, number), at(&heads, number + 1));
                    let expected = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()];
                    let found = [at(&turned, number), at(&turned, number + 1)];
                    let off = (found[0] - expected[0]).abs().max((found[1] - expected[1]).abs());
                    assert!(off < 1e-6, "token {token}, number {number}: {found:?}, expected {expected:?}");
                }
                first += numbers;
            }
        }
        let last = tables.part(1, 1).unwrap().turn(&heads.narrow(2, 1, 1)).unwrap();
        assert_eq!(last, turned.narrow(2, 1, 1));
        let half = tables.turn(&heads.to_kind(Kind::BFloat16)).unwrap();
        assert_eq!(half.kind(), Kind::BFloat16);
    }

    #[test]
    fn pairs_of_two_halves_turn_as_neighbours_do() {
        let (device, positions) = (Device::Cpu, Tensor::from_slice2(&[[3i64, 1], [7, 0]]).unsqueeze(0));
        let neighbours = AxialRotary::new(&[4, 6], 1e4, device).unwrap().tables(&positions).unwrap();
        let halves = AxialRotary::of_halves(&[(4, 1e4), (6, 1e4)], device).unwrap().tables(&positions).unwrap();
        let heads = Tensor::rand([2, 3, 2, 10], (Kind::Float, device));
        let apart = heads.unflatten(-1, [5, 2]).transpose(-1, -2).flatten(-2, -1);
        let together = halves.turn(&apart).unwrap().unflatten(-1, [2, 5]).transpose(-1, -2).flatten(-2, -1);
        assert!(together.allclose(&neighbours.turn(&heads).unwrap(), 1e-6, 1e-6, false));
    }

    #[test]
    fn axes_that_do_not_fit_are_errors() {
        assert!(AxialRotary::new(&[4, 3], 1e4, Device::Cpu).is_err());
        assert!(AxialRotary::new(&[], 1e4, Device::Cpu).is_err());
        let rotary = AxialRotary::new(&[4, 4], 1e4, Device::Cpu).unwrap();
        assert!(rotary.tables(&Tensor::zeros([1, 5, 3], (Kind::Int64, Device::Cpu))).is_err());
    }
}
