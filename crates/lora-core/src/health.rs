//! How an adapter's numbers look: norms, use of the rank, damage. Worked out from the factors, never from whole updates.

use rayon::prelude::*;

use crate::linalg::{as_matrix, svd_of_product};
use crate::variant::LoraFactors;
use crate::{Adapter, AdapterModule, ModulePath};

/// One module's numbers.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModuleHealth {
    /// The module.
    pub module: ModulePath,
    /// Norm (Frobenius) of the update for plain LoRA; of all tensors together for others.
    pub norm: f64,
    /// Largest singular value of the update; none for other variants than plain LoRA.
    pub largest: Option<f64>,
    /// Ranks whose singular value is above a hundredth of the largest.
    pub used_ranks: Option<usize>,
    /// Rank.
    pub rank: usize,
    /// Share of the elements that are zero.
    pub zeros: f64,
    /// Elements that are NaN or infinite.
    pub not_finite: usize,
}

impl ModuleHealth {
    /// Whether the module does nothing at all.
    pub fn is_dead(&self) -> bool {
        self.not_finite == 0 && self.norm == 0.0
    }
}

/// Every module's numbers, by path.
pub fn health(adapter: &Adapter) -> Vec<ModuleHealth> {
    let modules: Vec<_> = adapter.modules.iter().collect();
    modules.into_par_iter().map(|(path, module)| of_module(path, module)).collect()
}

fn of_module(path: &ModulePath, module: &AdapterModule) -> ModuleHealth {
    let (mut zeros, mut count, mut not_finite, mut squares) = (0usize, 0usize, 0usize, 0.0f64);
    for tensor in module.tensors.values() {
        for &value in &*tensor.to_f32() {
            count += 1;
            zeros += usize::from(value == 0.0);
            not_finite += usize::from(!value.is_finite());
            squares += f64::from(value).powi(2);
        }
    }
    let mut health = ModuleHealth {
        module: path.clone(),
        norm: squares.sqrt(),
        largest: None,
        used_ranks: None,
        rank: module.rank,
        zeros: zeros as f64 / count.max(1) as f64,
        not_finite,
    };
    if let Some(LoraFactors { down, up, embedding: false }) = module.factors()
        && not_finite == 0
        && module.rank > 0
        && up.elements() % module.rank == 0
        && down.elements() % module.rank == 0
        && up.elements() > 0
        && down.elements() > 0
    {
        let (up_values, down_values) = (up.to_f32(), down.to_f32());
        let up = as_matrix(&up_values, &[up.elements() / module.rank, module.rank]);
        if let Ok(svd) = svd_of_product(up, as_matrix(&down_values, &[module.rank, down.elements() / module.rank])) {
            let scale = module.scale().abs();
            let largest = svd.values.first().map_or(0.0, |&value| f64::from(value));
            let used = svd.values.iter().filter(|&&value| f64::from(value) > largest / 100.0).count();
            health.norm = scale * svd.values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
            health.largest = Some(scale * largest);
            health.used_ranks = Some(used);
        }
    }
    health
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{Component, HostTensor};

    #[test]
    fn numbers_are_those_of_the_update() {
        let module = |down: Vec<f32>| AdapterModule {
            variant: "lora".into(),
            tensors: BTreeMap::from([
                ("down".to_owned(), HostTensor::from_f32([2, 2], down).unwrap()),
                ("up".to_owned(), HostTensor::from_f32([2, 2], vec![1.0, 0.0, 0.0, 1.0]).unwrap()),
            ]),
            rank: 2,
            alpha: 1.0,
        };
        let of = |down: Vec<f32>| of_module(&ModulePath::new(Component::UNET, "x"), &module(down));
        let healthy = of(vec![6.0, 0.0, 0.0, 8.0]);
        assert!((healthy.norm - 5.0).abs() < 1e-6 && (healthy.largest.unwrap() - 4.0).abs() < 1e-6);
        assert_eq!((healthy.used_ranks, healthy.zeros), (Some(2), 0.5));
        assert_eq!(of(vec![6.0, 0.0, 0.0, 0.01]).used_ranks, Some(1));
        assert!(of(vec![0.0; 4]).is_dead() && !healthy.is_dead());
        let damaged = of(vec![f32::NAN, 1.0, f32::INFINITY, 1.0]);
        assert_eq!((damaged.not_finite, damaged.largest), (2, None));
    }
}
