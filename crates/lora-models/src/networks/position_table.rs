//! A table of positions, one row a patch, of which a picture takes the middle: Stable Diffusion 3's.
//!
//! A published one has 384 × 384 rows of 1536 numbers, 0.42 GiB in 16 bits, of which a picture of 1024 × 1024 takes 64 × 64. It stays
//! in host memory, and a device holds the middle that has been asked for.

use std::sync::{Mutex, PoisonError};

use lora_torch::dry::platform;
use lora_torch::tch::{Device, Tensor};
use lora_torch::tensor::upload;

use crate::Result;
use crate::weights::Weights;

/// Sides of the parts that a device holds are multiples of this, in patches: pictures of many shapes share few parts.
const STEP: i64 = 32;

/// The table.
#[derive(Debug)]
pub(super) struct PositionTable {
    /// `[1, side, side, width]`.
    whole: Tensor,
    /// Whether the whole table is on the device: it is trained, or the device is the CPU.
    is_there: bool,
    device: Device,
    /// `[1, rows, columns, width]` on the device, from the middle of the table. None is let go of: a recorded graph may read it.
    parts: Mutex<Vec<Tensor>>,
}

impl PositionTable {
    /// A table of `side`² positions.
    ///
    /// # Errors
    /// [`Error::MissingWeight`](crate::Error::MissingWeight) or [`Error::WeightShape`](crate::Error::WeightShape) where the source has another table; out of memory.
    pub(super) fn new(weights: &Weights<'_>, name: &str, side: usize, width: usize) -> Result<Self> {
        let (shape, device) = ([1, side * side, width], weights.device());
        let is_there = weights.is_trained() || platform(device).is_cpu();
        let whole = if is_there { weights.tensor(name, &shape)? } else { weights.in_host_memory(name, &shape)? };
        // Where only shapes are asked for there are no numbers to look at.
        let whole =
            if whole.numel() == 0 { whole } else { whole.f_view([1, side as i64, side as i64, width as i64])? };
        Ok(Self { whole, is_there, device, parts: Mutex::default() })
    }

    /// The positions of a picture of so many patches, `[1, rows · columns, width]` on the device.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) where the table has fewer; out of memory.
    pub(super) fn middle(&self, rows: i64, columns: i64) -> Result<Tensor> {
        if self.is_there {
            return Ok(middle(&self.whole, rows, columns)?.f_flatten(1, 2)?);
        }
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        // Each part is as large as those before it: the last is the largest.
        let [high, wide] = parts.last().map_or([0; 2], |part| [part.size()[1], part.size()[2]]);
        if high < rows || wide < columns {
            let part = middle(&self.whole, self.grown(high, rows), self.grown(wide, columns))?.f_contiguous()?;
            parts.push(upload(&part, self.device)?);
        }
        let part = parts.last().unwrap_or(&self.whole);
        Ok(middle(part, rows, columns)?.f_flatten(1, 2)?)
    }

    /// A part's side that had `before` and needs `least`: as even or odd as the table's, so that both have the same middle.
    fn grown(&self, before: i64, least: i64) -> i64 {
        let side = self.whole.size()[1];
        if before >= least { before } else { ((least + STEP - 1) / STEP * STEP + side % 2).min(side) }
    }
}

/// The middle of a table `[1, rows, columns, width]`.
fn middle(table: &Tensor, rows: i64, columns: i64) -> Result<Tensor> {
    let (_, high, wide, _) = table.size4()?;
    Ok(table.f_narrow(1, (high - rows) / 2, rows)?.f_narrow(2, (wide - columns) / 2, columns)?)
}

#[cfg(test)]
mod tests {
    use lora_torch::tch::Kind;

    use super::*;

    #[test]
    fn parts_have_the_positions_of_the_whole_table_whatever_was_asked_for_before() {
        for side in [70, 71] {
            let whole = Tensor::arange(side * side * 2, (Kind::Float, Device::Cpu)).view([1, side, side, 2]);
            let table = |is_there| {
                let whole = whole.shallow_clone();
                PositionTable { whole, is_there, device: Device::Cpu, parts: Mutex::default() }
            };
            let (held, parts) = (table(true), table(false));
            for (rows, columns) in [(4, 6), (33, 7), (7, 33), (32, 20), (64, 5), (side, side), (3, 3)] {
                let found = parts.middle(rows, columns).unwrap();
                assert_eq!(found, held.middle(rows, columns).unwrap(), "{rows} × {columns} of {side}");
            }
            let rows: Vec<i64> = parts.parts.lock().unwrap().iter().map(|part| part.size()[1]).collect();
            assert_eq!(rows, if side == 70 { vec![32, 64, 64, 70] } else { vec![33, 65, 71] });
            assert!(parts.middle(side + 1, 1).is_err());
        }
    }
}
