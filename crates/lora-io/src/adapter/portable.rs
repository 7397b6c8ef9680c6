//! The plainest form of an adapter, which the strictest consumers (vLLM, llama.cpp's converter, mistral.rs) take: plain
//! LoRA alone, one rank and one alpha in the whole file, every scale folded in. What is given up to get there is said.

use lora_core::{Adapter, AdapterModule, HostTensor};

use super::folded;
use crate::Result;

/// The ranks that vLLM allocates; a rank between two of them is padded with zeros.
const RANKS: &[usize] = &[1, 8, 16, 32, 64, 128, 256, 320, 512];

/// The portable form, and notes on what changed. Modules of other variants than plain LoRA are refused.
///
/// # Errors
/// [`crate::Error::Module`] for a module of another variant: flatten it first.
pub fn portable(adapter: &Adapter) -> Result<(Adapter, Vec<String>)> {
    let highest = adapter.modules.values().map(|module| module.rank).max().unwrap_or(1);
    let rank = RANKS.iter().copied().find(|&rank| rank >= highest).unwrap_or(highest);
    let mut notes = Vec::new();
    if rank > 512 {
        notes.push(format!("rank {rank} is beyond the 512 that vLLM takes; `lora resize` makes it smaller"));
    }
    let padded = adapter.modules.values().filter(|module| module.rank != rank).count();
    if padded > 0 {
        notes.push(format!("{padded} modules are padded with zeros to rank {rank}"));
    }
    let mut portable = Adapter { metadata: adapter.metadata.clone(), ..Adapter::default() };
    for (path, module) in &adapter.modules {
        let (down, up, own) = folded(path, module)?;
        let (down, up) = (pad_rows(&down, rank), pad_columns(&up, own, rank));
        portable.modules.insert(path.clone(), AdapterModule::of_factors(down, up, false, rank, rank as f64));
    }
    crate::metadata::refresh(&mut portable);
    notes.push(format!("every scale is folded into the factors: alpha = rank = {rank}"));
    Ok((portable, notes))
}

/// `[rank, …]` with zero rows up to `rows`.
fn pad_rows(down: &HostTensor, rows: usize) -> HostTensor {
    let mut shape = down.shape().to_vec();
    let row = down.elements() / shape[0].max(1);
    let mut values = down.to_f32().into_owned();
    values.resize(rows * row, 0.0);
    shape[0] = rows;
    HostTensor::from_f32(shape, values).expect("as many values as places")
}

/// `[out, rank, …]` with zero columns up to `columns`.
fn pad_columns(up: &HostTensor, rank: usize, columns: usize) -> HostTensor {
    let mut shape = up.shape().to_vec();
    let mut values = Vec::with_capacity(shape[0] * columns);
    for row in up.to_f32().chunks_exact(rank.max(1)) {
        values.extend_from_slice(row);
        values.resize(values.len() + columns - rank, 0.0);
    }
    shape[1] = columns;
    HostTensor::from_f32(shape, values).expect("as many values as places")
}
