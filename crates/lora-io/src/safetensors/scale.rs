//! Scales of weights in 8-bit floats: how they are named, and the numbers that a weight and its scale make.
//!
//! A scale belongs to a tensor, to a row (an output), or to a block of rows and columns (DeepSeek's and Qwen's 128 × 128).
//! All are factors, `weight_scale_inv` too, in spite of its name. Where a base spreads over several files is for who reads
//! it to know.

use std::ops::Range;

use lora_core::{DType, HostTensor};

use super::{SafetensorsFile, StoredDType, TensorView};
use crate::{Error, Result};

/// What the names of scales end with, after the name of the module.
pub(crate) const SCALES: &[&str] = &["scale_weight", "weight_scale", "weight_scale_inv"];

/// What else belongs to arithmetic in 8 bits: scales of inputs, marks of a file, marks of a layer.
pub(crate) const OTHERS: &[&str] = &["input_scale", "scale_input", "scaled_fp8", "comfy_quant"];

/// What tells weights in 4 bits, which are not read: bitsandbytes' tables, and a second scale.
const UNREAD: &[&str] = &["absmax", "quant_map", "weight_scale_2"];

/// Whether a tensor's name says that it scales weights, and nothing here multiplies them by it.
pub(crate) fn is_unread(file: &SafetensorsFile, name: &str) -> bool {
    let end = name.rsplit('.').next().unwrap_or_default();
    UNREAD.contains(&end) || SCALES.contains(&end) && !belongs_to_another(file, name)
}

/// Names that the scale of a weight may have; none for what is no weight.
pub(crate) fn candidates(weight: &str) -> impl Iterator<Item = String> {
    let module = weight.strip_suffix(".weight");
    module.into_iter().flat_map(|module| SCALES.iter().map(move |end| format!("{module}.{end}")))
}

/// The name of a weight's scale, where the weight is in 8-bit floats and has one in its file.
pub(crate) fn of(file: &SafetensorsFile, weight: &str) -> Option<String> {
    let mut candidates = candidates(weight).filter(|scale| file.contains(scale)).peekable();
    candidates.peek()?;
    let dtype = file.get(weight).ok()?.dtype();
    matches!(dtype, StoredDType::F8E4M3 | StoredDType::F8E5M2).then(|| candidates.next())?
}

/// Whether a tensor says how a weight of the same file is stored, and is no weight itself.
pub(crate) fn belongs_to_another(file: &SafetensorsFile, name: &str) -> bool {
    let (module, end) = name.rsplit_once('.').unwrap_or(("", name));
    let weight = || format!("{module}.weight");
    match end {
        "scaled_fp8" => true,
        _ if SCALES.contains(&end) => of(file, &weight()).is_some_and(|scale| scale == name),
        _ if OTHERS.contains(&end) => of(file, &weight()).is_some(),
        _ => false,
    }
}

/// Rows of a tensor as numbers: with its scale in f32, without one as [`TensorView::to_host`].
pub(crate) fn rows(file: &SafetensorsFile, name: &str, rows: Range<usize>) -> Result<HostTensor> {
    let view = file.get(name)?;
    let shape = view.shape();
    let part: Vec<usize> = match shape {
        [] => Vec::new(),
        [_, rest @ ..] => [&[rows.len()], rest].concat(),
    };
    let values = view.rows(&rows, &part).to_host()?;
    let Some(scale) = of(file, name) else { return Ok(values) };
    let mut numbers = values.to_f32().into_owned();
    multiply(&mut numbers, rows, shape, &Factors::read(&file.get(&scale)?)?, None)
        .map_err(|reason| Error::tensor(file.path(), &scale, reason))?;
    HostTensor::from_f32(part, numbers).map_err(|error| Error::tensor(file.path(), name, error.to_string()))
}

/// The numbers of a scale, with its shape.
pub(crate) struct Factors {
    values: Vec<f32>,
    shape: Vec<usize>,
}

impl Factors {
    pub(crate) fn read(view: &TensorView<'_>) -> Result<Self> {
        let is_float = matches!(view.dtype(), StoredDType::F32 | StoredDType::F16 | StoredDType::BF16);
        if !is_float {
            let reason = format!("is a scale of type {}; expected F32, F16 or BF16", view.dtype());
            return Err(Error::tensor(view.path(), view.name(), reason));
        }
        Ok(Self { values: view.to_host()?.to_dtype(DType::F32).to_f32().into_owned(), shape: view.shape().to_vec() })
    }
}

/// Multiplies rows of a weight of a shape by their scales. `block` is the size of blocks where it is known.
///
/// # Errors
/// In words, where the scales fit no such weight.
pub(crate) fn multiply(
    values: &mut [f32],
    rows: Range<usize>,
    shape: &[usize],
    Factors { values: factors, shape: scales }: &Factors,
    block: Option<[usize; 2]>,
) -> Result<(), String> {
    if let [factor] = factors[..] {
        values.iter_mut().for_each(|value| *value *= factor);
        return Ok(());
    }
    let (&[outputs, inputs], &[down, ..]) = (shape, scales.as_slice()) else {
        return Err(format!("scales {scales:?} of a weight {shape:?} are not read"));
    };
    let across = factors.len() / down.max(1);
    let [block_rows, block_columns] = block.map_or([None; 2], |block| block.map(Some));
    let sides = side(outputs, down, block_rows).zip(side(inputs, across, block_columns));
    let (tall, wide) = sides.ok_or_else(|| format!("scales {scales:?} do not fit a weight {shape:?}"))?;
    for (row, values) in rows.zip(values.chunks_mut(inputs.max(1))) {
        let factors = &factors[row / tall * across..][..across];
        values.iter_mut().enumerate().for_each(|(column, value)| *value *= factors[column / wide]);
    }
    Ok(())
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
