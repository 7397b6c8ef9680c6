//! Weights of 8 bits with scales beside them: which tensor scales which, and the numbers that the two make.
//!
//! A scale belongs to a tensor, to a row (an output), or to a block of rows and columns (DeepSeek's and Qwen's 128 × 128;
//! `weight_block_size` in the configuration says otherwise). All are factors, `weight_scale_inv` too, in spite of its name.
//!
//! Where weights are written in another type, their scales and what else was stored for arithmetic in 8 bits are not.

use std::collections::BTreeMap;

use lora_core::{DType, HostTensor};

use super::folder::Base;
use super::numbers::{is_float, is_readable, to_f32};
use crate::safetensors::SafetensorsFile;
use crate::{Error, Result};

/// What the names of scales end with, after the name of the module.
const SCALES: &[&str] = &["scale_weight", "weight_scale", "weight_scale_inv"];

/// What else belongs to arithmetic in 8 bits: scales of inputs and marks of a file.
const OTHERS: &[&str] = &["input_scale", "scale_input", "scaled_fp8"];

/// Keys of a configuration that say how weights are stored.
pub(super) const KEYS: &[&str] = &["quantization_config", "compression_config"];

/// The scales of a base.
#[derive(Debug, Default)]
pub(super) struct Scales {
    /// By the index of a weight's file and its name: those of its scale.
    by_weight: BTreeMap<(usize, String), (usize, String)>,
    block: Option<[usize; 2]>,
    /// Whether there are weights of few bits that are not read.
    unread: bool,
}

impl Scales {
    pub(super) fn of(base: &Base) -> Self {
        let named = |wanted: &str| base.files.iter().position(|file| file.contains(wanted));
        let (mut by_weight, mut unread) = (BTreeMap::new(), false);
        for (index, file) in base.files.iter().enumerate() {
            for name in file.names() {
                let Some(module) = name.strip_suffix(".weight") else { continue };
                let Ok(view) = file.get(name) else { continue };
                if is_float(view.dtype()) || !is_readable(view.dtype()) {
                    unread |= !is_float(view.dtype());
                    continue;
                }
                let scales = SCALES.iter().map(|end| format!("{module}.{end}"));
                // In the same file, or behind the border between two shards.
                let place = |scale: &String| if file.contains(scale) { Some(index) } else { named(scale) };
                if let Some(found) = scales.into_iter().find_map(|scale| Some((place(&scale)?, scale))) {
                    by_weight.insert((index, name.to_owned()), found);
                }
            }
        }
        let sizes = base
            .config
            .as_ref()
            .and_then(|config| KEYS.iter().find_map(|key| config[key]["weight_block_size"].as_array().cloned()));
        let size = |at: usize| sizes.as_ref()?.get(at)?.as_u64().and_then(|size| usize::try_from(size).ok());
        let block = size(0).zip(size(1)).map(|(rows, columns)| [rows, columns]);
        Self { by_weight, block, unread }
    }

    /// Whether all weights of the base can be written in another type.
    pub(super) fn all_read(&self) -> bool {
        !self.unread
    }

    /// Whether a tensor is left out where nothing is stored in 8 bits any more.
    pub(super) fn leaves_out(&self, name: &str) -> bool {
        let end = name.rsplit('.').next().unwrap_or_default();
        let is_scale = SCALES.contains(&end) && self.by_weight.values().any(|(_, scale)| scale == name);
        is_scale || !self.by_weight.is_empty() && self.all_read() && OTHERS.contains(&end)
    }

    /// Multiplies rows of a weight of this shape by their scales.
    pub(super) fn apply(
        &self,
        base: &Base,
        (index, name): (usize, &str),
        shape: &[usize],
        rows: std::ops::Range<usize>,
        values: &mut [f32],
    ) -> Result<()> {
        let Some((place, scale)) = self.by_weight.get(&(index, name.to_owned())) else { return Ok(()) };
        let file = &base.files[*place];
        let wrong = |reason: String| Error::tensor(file.path(), scale, reason);
        let view = file.get(scale)?;
        if !is_float(view.dtype()) {
            return Err(wrong(format!("is a scale of type {}; expected F32, F16 or BF16", view.dtype())));
        }
        let factors = to_f32(view.dtype(), view.bytes());
        if let [factor] = factors[..] {
            values.iter_mut().for_each(|value| *value *= factor);
            return Ok(());
        }
        let (&[outputs, inputs], &[down, ..]) = (shape, view.shape()) else {
            return Err(wrong(format!("scales {:?} of a weight {shape:?} are not read", view.shape())));
        };
        let across = factors.len() / down.max(1);
        let [block_rows, block_columns] = self.block.map_or([None; 2], |block| block.map(Some));
        let sides = side(outputs, down, block_rows).zip(side(inputs, across, block_columns));
        let (tall, wide) =
            sides.ok_or_else(|| wrong(format!("scales {:?} do not fit a weight {shape:?}", view.shape())))?;
        for (row, values) in rows.zip(values.chunks_mut(inputs.max(1))) {
            let factors = &factors[row / tall * across..][..across];
            values.iter_mut().enumerate().for_each(|(column, value)| *value *= factors[column / wide]);
        }
        Ok(())
    }

    /// A whole tensor, or some rows of it, in f32.
    pub(super) fn numbers(
        &self,
        base: &Base,
        index: usize,
        name: &str,
        rows: Option<&std::ops::Range<usize>>,
    ) -> Result<HostTensor> {
        let file: &SafetensorsFile = &base.files[index];
        let view = file.get(name)?;
        let first = view.shape().first().copied().unwrap_or(1);
        let rows = rows.cloned().unwrap_or(0..first);
        let all = view.to_host()?.to_dtype(DType::F32);
        let row = all.elements() / first.max(1);
        let mut values = all.to_f32().get(rows.start * row..rows.end * row).unwrap_or_default().to_vec();
        self.apply(base, (index, name), view.shape(), rows.clone(), &mut values)?;
        let mut shape = view.shape().to_vec();
        if let Some(first) = shape.first_mut() {
            *first = rows.len();
        }
        HostTensor::from_f32(shape, values).map_err(|error| Error::tensor(file.path(), name, error.to_string()))
    }
}

/// How many rows or columns share a scale, where an axis of `length` has `count` of them.
fn side(length: usize, count: usize, block: Option<usize>) -> Option<usize> {
    const USUAL: usize = 128;
    let fits = |block: &usize| *block > 0 && length.div_ceil(*block) == count;
    match count {
        0 => None,
        1 => Some(length.max(1)),
        _ if count == length => Some(1),
        _ => {
            block.into_iter().chain([USUAL]).find(fits).or_else(|| length.is_multiple_of(count).then(|| length / count))
        }
    }
}
