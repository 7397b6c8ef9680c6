//! The two factors of a plain LoRA as matrices, whatever layer they belong to. Combining and resizing them is not here.

use crate::linalg::{Svd, as_matrix, multiply};
use crate::rank::{RankPolicy, kept};
use crate::variant::LoraFactors;
use crate::{AdapterModule, Error, HostTensor, ModulePath, Result};

/// A plain LoRA's factors as matrices.
pub(super) struct Factors {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) rank: usize,
    /// `[rows, rank]`.
    pub(super) up: Vec<f32>,
    /// `[rank, columns]`.
    pub(super) down: Vec<f32>,
    /// What follows the first axis of the weight.
    pub(super) kernel: Vec<usize>,
    pub(super) embedding: bool,
}

impl Factors {
    pub(super) fn of(path: &ModulePath, module: &AdapterModule) -> Result<Self> {
        let LoraFactors { down, up, embedding } = module.factors().ok_or_else(|| plain_only(path, module))?;
        let (rows, rank) = (up.shape().first().copied().unwrap_or(0), up.shape().get(1).copied().unwrap_or(0));
        if rank == 0 || down.shape().first() != Some(&rank) || up.elements() != rows * rank {
            return Err(Error::Shape {
                what: format!("factors of {path}"),
                expected: "up [out, rank] and down [rank, in]".into(),
                found: format!("{:?} and {:?}", up.shape(), down.shape()),
            });
        }
        Ok(Self {
            rows,
            columns: down.elements() / rank,
            rank,
            up: up.to_f32().into_owned(),
            down: down.to_f32().into_owned(),
            kernel: down.shape()[1..].to_vec(),
            embedding,
        })
    }

    /// The whole update `[rows, columns]`, row by row.
    pub(super) fn update(&self, scale: f64) -> Vec<f32> {
        let up: Vec<f32> = self.up.iter().map(|value| (f64::from(*value) * scale) as f32).collect();
        let product =
            multiply(as_matrix(&up, &[self.rows, self.rank]), as_matrix(&self.down, &[self.rank, self.columns]));
        (0..self.rows).flat_map(|i| (0..self.columns).map(move |j| (i, j))).map(|place| product[place]).collect()
    }

    /// A module of these axes with other factors; alpha is the rank.
    pub(super) fn module(&self, up: Vec<f32>, down: Vec<f32>, rank: usize) -> Result<AdapterModule> {
        let up_shape: Vec<usize> = [self.rows, rank].into_iter().chain(self.kernel.iter().skip(1).map(|_| 1)).collect();
        let down_shape = [&[rank], &*self.kernel].concat();
        let (down, up) = (HostTensor::from_f32(down_shape, down)?, HostTensor::from_f32(up_shape, up)?);
        Ok(AdapterModule::of_factors(down, up, self.embedding, rank, rank as f64))
    }

    pub(super) fn shortened(&self, svd: Svd, policy: RankPolicy) -> Result<(AdapterModule, f64)> {
        let rank = policy.choose(&svd.values, svd.values.len());
        let kept = kept(&svd.values, rank);
        let (up, down) = svd.truncate(rank).factors();
        Ok((self.module(up, down, rank)?, kept))
    }
}

pub(super) fn plain_only(path: &ModulePath, module: &AdapterModule) -> Error {
    Error::Unsupported {
        variant: module.variant.clone(),
        layer: path.to_string(),
        reason: "only plain LoRA is combined and resized; flatten it to one first".into(),
    }
}
