//! Updates whose rows can be computed apart from each other, so that a tensor is merged one tile at a time and a large one
//! never lies in memory as a whole. Other formulas are `lora-core`'s, and get their whole tensor.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use lora_core::backend::CpuBackend;
use lora_core::linalg::add_product;
use lora_core::variant::{EXPERTS_DOWN, EXPERTS_UP, LoraFactors, TOKEN_ROWS, TOKENS, VariantRegistry, WEIGHT_VALUE};
use lora_core::{AdapterModule, HostData, HostTensor};

/// What a module does to the rows of a weight.
#[derive(Debug)]
pub(super) enum Update<'m> {
    /// `+ up[rows] · down`.
    Factors { down: &'m HostTensor, up: &'m HostTensor, rank: usize },
    /// `+ (up · down)ᵀ[rows]`, of an embedding.
    Embedding { down: &'m HostTensor, up: &'m HostTensor, rank: usize },
    /// Other numbers in place of all.
    Value(&'m HostTensor),
    /// Other numbers in place of some rows.
    Tokens { tokens: Vec<usize>, rows: &'m HostTensor },
    /// `+ up · down` of each expert, which are the rows.
    Experts { down: &'m HostTensor, up: &'m HostTensor },
}

/// Some rows of a tensor.
pub(super) struct Tile<'t> {
    /// Their numbers.
    pub(super) values: &'t mut [f32],
    /// The numbers of the base, for updates that take their place.
    pub(super) base: &'t [f32],
    /// Which rows they are.
    pub(super) rows: Range<usize>,
    /// Shape of the whole tensor.
    pub(super) shape: &'t [usize],
}

impl<'m> Update<'m> {
    /// What a module does, where rows of it can be computed apart.
    pub(super) fn of(module: &'m AdapterModule, variants: &VariantRegistry<CpuBackend>) -> Option<Self> {
        let only = |names: [&str; 2]| {
            let [one, other] = names.map(|name| module.tensors.get(name));
            (module.tensors.len() == 2).then_some((one?, other?))
        };
        let by_factors = variants.get(&module.variant).is_ok_and(|variant| variant.merges_by_factors());
        if let Some((down, up)) = only(LoraFactors::names(false)).filter(|_| by_factors) {
            return Some(Update::Factors { down, up, rank: module.rank });
        }
        if let Some((down, up)) = only(LoraFactors::names(true)).filter(|_| module.is_lora()) {
            return Some(Update::Embedding { down, up, rank: module.rank });
        }
        if let Some((down, up)) = only([EXPERTS_DOWN, EXPERTS_UP]) {
            return Some(Update::Experts { down, up });
        }
        if let Some((tokens, rows)) = only([TOKENS, TOKEN_ROWS]) {
            let tokens = tokens.to_f32().iter().map(|&token| token as usize).collect();
            return Some(Update::Tokens { tokens, rows });
        }
        let value = module.tensors.get(WEIGHT_VALUE).filter(|_| module.tensors.len() == 1)?;
        Some(Update::Value(value))
    }

    /// Whether numbers of the base are replaced, which cannot be taken back.
    pub(super) fn replaces(&self) -> bool {
        matches!(self, Update::Value(_) | Update::Tokens { .. })
    }

    /// Whether it is one of a weight of this shape; else what it would need.
    pub(super) fn fits(&self, shape: &[usize]) -> Result<(), String> {
        let (first, rest) = (shape.first().copied().unwrap_or(0), shape.iter().skip(1).product::<usize>());
        let right = match self {
            // The same numbers as factors of a 1×1 convolution, or the other way round, are the same module.
            Update::Factors { down, up, rank } => {
                *rank > 0 && down.elements() == rank * rest && up.elements() == first * rank
            }
            Update::Embedding { down, up, rank } => {
                *rank > 0 && down.elements() == rank * first && up.elements() == rest * rank
            }
            Update::Value(value) => value.shape() == shape,
            Update::Tokens { tokens, rows } => {
                if let Some(token) = tokens.iter().find(|token| **token >= first) {
                    return Err(format!("token {token} is trained, and this base has {first} rows"));
                }
                shape.len() == 2 && rows.shape() == [tokens.len(), rest]
            }
            Update::Experts { down, up } => match (down.shape(), up.shape(), shape) {
                (&[experts, rank, inputs], &[others, outputs, same], &[count, rows, columns]) => {
                    rank > 0
                        && rank == same
                        && experts == others
                        && [experts, outputs, inputs] == [count, rows, columns]
                }
                _ => false,
            },
        };
        if right { Ok(()) } else { Err(format!("do not fit this base's weight {shape:?}")) }
    }

    /// Adds `factor` times the update of a tile's rows to them. It must fit the shape.
    pub(super) fn add(&self, tile: &mut Tile<'_>, factor: f64) {
        let columns = tile.shape.iter().skip(1).product::<usize>();
        let rows = tile.rows.clone();
        match self {
            _ if factor == 0.0 => {}
            Update::Factors { down, up, rank } => {
                let up = scaled(values(up, rows.start * rank..rows.end * rank), factor);
                add_product(tile.values, &up, &down.to_f32(), *rank);
            }
            Update::Embedding { down, up, rank } => {
                let entries = tile.shape.first().copied().unwrap_or(0);
                let down: Vec<_> =
                    (0..*rank).map(|r| values(down, r * entries + rows.start..r * entries + rows.end)).collect();
                let turned = (0..rows.len()).flat_map(|row| down.iter().map(move |line| line[row])).collect();
                add_product(tile.values, &scaled(turned, factor), &turn(&up.to_f32(), columns, *rank), *rank);
            }
            Update::Value(value) => {
                replace(tile.values, tile.base, &values(value, rows.start * columns..rows.end * columns), factor);
            }
            Update::Tokens { tokens, rows: own } => {
                for (place, token) in tokens.iter().enumerate().filter(|(_, token)| rows.contains(token)) {
                    let at = (token - rows.start) * columns..(token - rows.start + 1) * columns;
                    let own = values(own, place * columns..(place + 1) * columns);
                    replace(&mut tile.values[at.clone()], &tile.base[at], &own, factor);
                }
            }
            Update::Experts { down, up } => {
                let (&[_, rank, inputs], &[_, outputs, _]) = (down.shape(), up.shape()) else { return };
                for (expert, out) in rows.zip(tile.values.chunks_mut(columns)) {
                    let up = scaled(values(up, expert * outputs * rank..(expert + 1) * outputs * rank), factor);
                    let down = values(down, expert * rank * inputs..(expert + 1) * rank * inputs);
                    add_product(out, &up, &down, rank);
                }
            }
        }
    }
}

/// `values + factor · (own - base)`, and exactly `own` where that is all that is done to the numbers.
fn replace(values: &mut [f32], base: &[f32], own: &[f32], factor: f64) {
    for ((value, base), own) in values.iter_mut().zip(base).zip(own) {
        *value = if factor == 1.0 && value == base {
            *own
        } else {
            (f64::from(*value) + factor * (f64::from(*own) - f64::from(*base))) as f32
        };
    }
}

/// A range of a tensor's numbers.
pub(super) fn values(tensor: &HostTensor, range: Range<usize>) -> Vec<f32> {
    match tensor.data() {
        HostData::F32(numbers) => numbers[range].to_vec(),
        HostData::F16(numbers) => numbers[range].to_f32_vec(),
        HostData::BF16(numbers) => numbers[range].to_f32_vec(),
        _ => tensor.to_f32()[range].to_vec(),
    }
}

fn scaled(values: Vec<f32>, factor: f64) -> Vec<f32> {
    values.into_iter().map(|value| (f64::from(value) * factor) as f32).collect()
}

/// A matrix of `rows` × `columns` with the two exchanged.
pub(super) fn turn(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}
