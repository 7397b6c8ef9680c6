//! The numbers of one piece of a merged tensor: rows by themselves where the updates allow it, else the whole tensor
//! through the variants' own formulas.

use std::borrow::Cow;
use std::collections::BTreeMap;

use lora_core::HostTensor;
use lora_core::backend::CpuBackend;
use lora_core::merge::{Applied, geometry, merged_bias, merged_weight};
use lora_core::variant::{BIAS_VALUE, FrozenLayer, Parameters, TOKEN_ROWS, WEIGHT_VALUE};

use super::numbers::{all_finite, from_f32, to_f32};
use super::rows::{Tile, Update};
use super::targets::Edit;
use super::{Job, Piece};
use crate::safetensors::StoredDType;
use crate::{Error, Result};

const NO_WAY_BACK: &str = "was replaced by the adapter's own; there is no way back";

impl Job<'_> {
    /// The bytes of a piece.
    pub(super) fn compute(&self, piece: &Piece<'_>) -> Result<Cow<'_, [u8]>> {
        let (index, name) = &piece.source;
        let file = &self.base.files[*index];
        let view = file.get(name)?;
        let first_axis = view.shape().first().copied().unwrap_or(1).max(1);
        let row = view.bytes().len() / first_axis;
        let stored = &view.bytes()[piece.rows.start * row..piece.rows.end * row];
        if piece.edits.is_empty() && piece.entry.dtype == view.dtype() {
            return Ok(Cow::Borrowed(stored));
        }
        let mut values = to_f32(view.dtype(), stored);
        self.scales.apply(self.base, (*index, name), view.shape(), piece.rows.clone(), &mut values)?;
        let finite_before = values.iter().all(|value| value.is_finite());
        let updates: Option<Vec<_>> = piece.edits.iter().map(|edit| self.update(edit)).collect();
        match updates.filter(|_| piece.edits.iter().all(|edit| edit.rows.is_none())) {
            Some(updates) => self.add(&updates, view.shape(), piece, &mut values)?,
            None => values = self.whole_tensor(values, view.shape(), piece)?,
        }
        let rounded = from_f32(piece.entry.dtype, values);
        if finite_before && !all_finite(piece.entry.dtype, &rounded) {
            return Err(Error::tensor(file.path(), name, self.overflow(piece)));
        }
        Ok(Cow::Owned(rounded))
    }

    /// Adds updates to the rows of a piece.
    fn add(&self, updates: &[Update<'_>], shape: &[usize], piece: &Piece<'_>, values: &mut [f32]) -> Result<()> {
        let (index, name) = &piece.source;
        let wrong = |reason: &str| Error::tensor(self.base.files[*index].path(), name, reason);
        let replaced = updates.iter().any(Update::replaces);
        if self.options.unmerge && replaced {
            return Err(wrong(NO_WAY_BACK));
        }
        let base = if replaced { values.to_vec() } else { Vec::new() };
        for (edit, update) in piece.edits.iter().zip(updates) {
            update.fits(shape).map_err(|reason| wrong(&format!("the tensors of `{}` {reason}", edit.module)))?;
            let module = self.module(edit);
            let sign = if self.options.unmerge { -1.0 } else { 1.0 };
            let scale = if update.replaces() { 1.0 } else { module.scale() };
            let factor = sign * self.adapters[edit.adapter].strength.of(&edit.module) * scale;
            update.add(&mut Tile { values, base: &base, rows: piece.rows.clone(), shape }, factor);
        }
        Ok(())
    }

    /// What is said of a sum that its type cannot hold.
    fn overflow(&self, piece: &Piece<'_>) -> String {
        let dtype = piece.entry.dtype;
        if dtype == StoredDType::F16 {
            return format!("would hold infinity in {dtype} after the merge; write bf16 or fp32 (--dtype)");
        }
        let names: Vec<_> = piece.edits.iter().map(|edit| self.adapters[edit.adapter].name.as_str()).collect();
        format!(
            "would hold infinity in {dtype} after the merge: the numbers of {names:?} or the strength are too large"
        )
    }

    /// The general way: whole tensors through the variants' own formulas.
    fn whole_tensor(&self, values: Vec<f32>, shape: &[usize], piece: &Piece<'_>) -> Result<Vec<f32>> {
        let mut result = values;
        let mut groups: BTreeMap<(usize, usize), Vec<&Edit>> = BTreeMap::new();
        for edit in piece.edits {
            let rows = edit.rows.clone().unwrap_or(0..shape.first().copied().unwrap_or(1));
            groups.entry((rows.start, rows.end)).or_default().push(edit);
        }
        let row = result.len() / shape.first().copied().unwrap_or(1).max(1);
        // Sorted by where they begin: rows of a group that begins before the end of another are in both.
        let mut ends = groups.keys().map(|&(_, end)| end);
        let mut starts = groups.keys().skip(1).map(|&(start, _)| start);
        let overlap = starts.any(|start| ends.next().is_some_and(|end| start < end));
        // An update that depends on the base is of the untouched one, whatever else is on its rows.
        let base = if overlap { result.clone() } else { Vec::new() };
        for ((start, end), edits) in groups {
            let mut shape = shape.to_vec();
            if let Some(first) = shape.first_mut() {
                *first = end - start;
            }
            let place = start * row..end * row;
            let part = if overlap { &base[place.clone()] } else { &result[place.clone()] };
            let merged = self.layer(part.to_vec(), &shape, piece, &edits)?;
            if !overlap {
                result[place].copy_from_slice(&merged.to_f32());
                continue;
            }
            let changed = merged.to_f32();
            let values = result[place.clone()].iter_mut().zip(&base[place]).zip(&*changed);
            values.for_each(|((value, base), merged)| {
                *value = if value == base { *merged } else { *value + (merged - base) }
            });
        }
        Ok(result)
    }

    /// One layer with what is done to it.
    fn layer(&self, values: Vec<f32>, shape: &[usize], piece: &Piece<'_>, edits: &[&Edit]) -> Result<HostTensor> {
        let (index, name) = &piece.source;
        let file = &self.base.files[*index];
        let wrong = |error: lora_core::Error| Error::tensor(file.path(), name, error.to_string());
        let order = edits[0].order;
        let own = HostTensor::from_f32(shape, values).map_err(wrong)?;
        let own = order.exchanged(own);
        let base = self.frozen(*index, edits[0], own.clone())?;
        let formulas = edits.iter().map(|edit| self.variants.get(&self.module(edit).variant));
        let formulas = formulas.collect::<lora_core::Result<Vec<_>>>().map_err(wrong)?;
        let mut applied: Vec<Applied<'_, CpuBackend>> = Vec::with_capacity(edits.len());
        for (edit, variant) in edits.iter().zip(&formulas) {
            let parameters =
                Parameters::upload(&CpuBackend, self.module(edit), &HostTensor::zeros([1])).map_err(wrong)?;
            let strength = self.adapters[edit.adapter].strength.of(&edit.module);
            applied.push(Applied { variant: &**variant, parameters, strength });
        }
        let replaces = |edit: &&Edit| {
            let names: &[&str] = if edit.bias { &[BIAS_VALUE] } else { &[WEIGHT_VALUE, TOKEN_ROWS] };
            names.iter().any(|name| self.module(edit).tensors.contains_key(*name))
        };
        if self.options.unmerge && edits.iter().any(replaces) {
            return Err(Error::tensor(file.path(), name, NO_WAY_BACK));
        }
        let merged = if edits[0].bias {
            if self.options.unmerge {
                applied.iter_mut().for_each(|applied| applied.strength = -applied.strength);
            }
            merged_bias(&CpuBackend, &base, &applied).map_err(wrong)?.unwrap_or(own)
        } else if self.options.unmerge {
            let [one] = applied.as_slice() else {
                return Err(Error::tensor(file.path(), name, "take one adapter out at a time"));
            };
            one.variant.unmerge(&CpuBackend, &base, &one.parameters, one.strength).map_err(wrong)?
        } else {
            merged_weight(&CpuBackend, &base, &applied).map_err(wrong)?
        };
        Ok(order.exchanged(merged))
    }

    /// The layer under a module, with `own` as its weight, or as its bias where the change is the bias'.
    fn frozen(&self, index: usize, edit: &Edit, own: HostTensor) -> Result<FrozenLayer<CpuBackend>> {
        let file = &self.base.files[index];
        let rows = edit.rows.as_ref();
        let partner = edit.partner.as_ref().map(|(index, name)| self.scales.numbers(self.base, *index, name, rows));
        let partner = partner.transpose()?;
        let partner = partner.map(|partner| edit.order.exchanged(partner));
        let (weight, bias) = match edit.bias {
            true => (partner, Some(own)),
            false => (Some(own), partner),
        };
        let weight = weight.ok_or_else(|| Error::tensor(file.path(), &edit.module.path, "has a bias but no weight"))?;
        let geometry = geometry(self.module(edit), weight.shape()).ok_or_else(|| {
            let reason =
                format!("has the shape {:?}; adapters go on vectors, matrices and square kernels", weight.shape());
            Error::tensor(file.path(), &edit.module.path, reason)
        })?;
        Ok(FrozenLayer { backend: CpuBackend, geometry, weight, bias })
    }
}
