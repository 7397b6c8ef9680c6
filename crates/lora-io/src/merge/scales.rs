//! Weights of 8 bits with scales beside them, in one file or in shards: which tensor scales which. What the two make is
//! [`crate::safetensors::scale`]'s; `weight_block_size` in the configuration says how large blocks are.
//!
//! Where weights are written in another type, their scales and what else was stored for arithmetic in 8 bits are not.

use std::collections::BTreeMap;

use lora_core::{DType, HostTensor};

use super::folder::Base;
use super::numbers::{is_float, is_readable};
use crate::safetensors::SafetensorsFile;
use crate::safetensors::scale::{self, Factors, OTHERS, SCALES};
use crate::{Error, Result};

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
                if !name.ends_with(".weight") {
                    continue;
                }
                let Ok(view) = file.get(name) else { continue };
                if is_float(view.dtype()) || !is_readable(view.dtype()) {
                    unread |= !is_float(view.dtype());
                    continue;
                }
                // In the same file, or behind the border between two shards.
                let place = |scale: &String| if file.contains(scale) { Some(index) } else { named(scale) };
                if let Some(found) = scale::candidates(name).find_map(|scale| Some((place(&scale)?, scale))) {
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
        scale::multiply(values, rows, shape, &Factors::read(&file.get(scale)?)?, self.block)
            .map_err(|reason| Error::tensor(file.path(), scale, reason))
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
