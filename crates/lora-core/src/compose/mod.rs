//! Making plain LoRAs out of others: several into one, one into a smaller one, the difference of two weights into one.
//!
//! Combining and resizing work on the factors alone (a QR decomposition of each and the singular values of the small
//! core between them, as `linalg` does): exact, and never a whole matrix. Extraction has to look at the whole
//! difference and takes its largest singular values by random starts.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

mod average;
mod extract;
mod factors;
mod prune;
mod refit;
mod rounding;

pub use average::{average, ema_weights};
pub use extract::{ExtractOptions, difference, extract, flatten};
pub use prune::{Keep, MajoritySign, Pruning};
pub use refit::{can_refit, refit};
pub use rounding::rounding;

use factors::{Factors, plain_only};

use crate::linalg::{self, as_matrix};
use crate::rank::RankPolicy;
use crate::{Adapter, AdapterModule, Error, ModulePath, Result, Strength, variant};

/// How several adapters become one.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Method {
    /// The exact sum: ranks add up (PEFT's `cat`).
    Concatenate,
    /// The sum's best approximation of a lower rank (PEFT's `svd`, which scales twice where alpha is not the rank).
    Svd(RankPolicy),
    /// Factors added one by one, each with the root of its weight (PEFT's `linear`). Not the sum of the updates: it has
    /// cross terms. All ranks must be equal.
    Linear,
    /// As [`Method::Linear`], but the factors are pruned first (PEFT's `ties`, `dare_linear`, `dare_ties`,
    /// `magnitude_prune`).
    Pruned(Pruning),
    /// The whole updates are pruned and added, and the sum is taken apart again (PEFT's forms with `_svd`). Any ranks.
    PrunedSvd(Pruning, RankPolicy),
}

/// What became of one module.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The module.
    pub module: ModulePath,
    /// Its rank now.
    pub rank: usize,
    /// Share of the update's norm that was kept; 1 is all of it.
    pub kept: f64,
}

/// The share of the updates' norm that was kept, from 0 to 1: the mean over modules, and the least of them. Of no
/// module all is kept.
pub fn kept(outcomes: &[Outcome]) -> (f64, f64) {
    let sum: f64 = outcomes.iter().map(|outcome| outcome.kept).sum();
    let least = outcomes.iter().map(|outcome| outcome.kept).fold(1.0, f64::min);
    (if outcomes.is_empty() { 1.0 } else { sum / outcomes.len() as f64 }, least)
}

/// Combines adapters with their strengths. A module that only some adapters have is made of those that do. The results
/// have alpha equal to the rank.
///
/// # Errors
/// [`Error::Option`] for a rule for ranks that keeps nothing;
/// [`Error::Unsupported`] for a module of another variant than plain LoRA, [`Error::Shape`] where modules of one layer
/// differ in size, [`Error::Option`] where the method needs equal ranks and they differ; each names the module.
pub fn combine(adapters: &[(&Adapter, &Strength)], method: Method) -> Result<(Adapter, Vec<Outcome>)> {
    if let Method::Svd(policy) | Method::PrunedSvd(_, policy) = &method {
        policy.check()?;
    }
    let paths: BTreeSet<&ModulePath> = adapters.iter().flat_map(|(adapter, _)| adapter.modules.keys()).collect();
    let modules: Vec<(ModulePath, AdapterModule, f64)> = paths
        .into_par_iter()
        .map(|path| {
            let own: Vec<(&AdapterModule, f64)> = adapters
                .iter()
                .filter_map(|(adapter, strength)| Some((adapter.modules.get(path)?, strength.of(path))))
                .filter(|(_, strength)| *strength != 0.0)
                .collect();
            if own.is_empty() {
                return Ok(None);
            }
            let (module, kept) = combine_modules(path, &own, method)?;
            Ok(Some((path.clone(), module, kept)))
        })
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .flatten()
        .collect();
    Ok(collect(modules))
}

fn collect(modules: Vec<(ModulePath, AdapterModule, f64)>) -> (Adapter, Vec<Outcome>) {
    let outcome = |(path, module, kept): &(ModulePath, AdapterModule, f64)| Outcome {
        module: path.clone(),
        rank: module.rank,
        kept: *kept,
    };
    let outcomes = modules.iter().map(outcome).collect();
    let modules = modules.into_iter().map(|(path, module, _)| (path, module)).collect();
    (Adapter { modules, metadata: BTreeMap::new() }, outcomes)
}

/// Combines the modules of one layer.
pub(crate) fn combine_modules(
    path: &ModulePath,
    modules: &[(&AdapterModule, f64)],
    method: Method,
) -> Result<(AdapterModule, f64)> {
    let factors: Vec<Factors> = modules.iter().map(|(module, _)| Factors::of(path, module)).collect::<Result<_>>()?;
    let first = &factors[0];
    if let Some(other) = factors.iter().find(|other| other.rows != first.rows || other.columns != first.columns) {
        return Err(Error::Shape {
            what: format!("adapters of {path}"),
            expected: format!("updates of {}×{}", first.rows, first.columns),
            found: format!("{}×{}", other.rows, other.columns),
        });
    }
    let weights: Vec<f64> = modules.iter().map(|(module, strength)| module.scale() * strength).collect();
    match method {
        Method::Linear => factors_one_by_one(path, &factors, &weights, |parts, weights, _| {
            let mut sum = vec![0.0f64; parts[0].len()];
            for (part, weight) in parts.iter().zip(weights) {
                sum.iter_mut().zip(*part).for_each(|(sum, value)| *sum += weight * f64::from(*value));
            }
            Ok(sum.into_iter().map(|value| value as f32).collect())
        }),
        Method::Pruned(pruning) => factors_one_by_one(path, &factors, &weights, |parts, weights, side| {
            pruning.merge(parts, weights, &pruning.stream(path, side))
        }),
        Method::PrunedSvd(pruning, policy) => {
            let updates: Vec<Vec<f32>> =
                modules.iter().zip(&factors).map(|((module, _), factors)| factors.update(module.scale())).collect();
            let parts: Vec<&[f32]> = updates.iter().map(Vec::as_slice).collect();
            let strengths: Vec<f64> = modules.iter().map(|(_, strength)| *strength).collect();
            let merged = pruning.merge(&parts, &strengths, &pruning.stream(path, "update"))?;
            let options = ExtractOptions { policy, ..ExtractOptions::default() };
            let (svd, rank, kept) = extract::largest(as_matrix(&merged, &[first.rows, first.columns]), &options)?;
            let (up, down) = svd.factors();
            Ok((first.module(up, down, rank)?, kept))
        }
        Method::Concatenate | Method::Svd(_) => {
            // [w₁ up₁, w₂ up₂ …] · [down₁; down₂ …], each weight shared between its two factors.
            let rank: usize = factors.iter().map(|factors| factors.rank).sum();
            let shares: Vec<(f64, f64)> =
                factors.iter().zip(&weights).map(|(factors, weight)| variant::shares(*weight, &factors.down)).collect();
            let mut up = Vec::with_capacity(first.rows * rank);
            for row in 0..first.rows {
                for (factors, (weight, _)) in factors.iter().zip(&shares) {
                    let own = &factors.up[row * factors.rank..(row + 1) * factors.rank];
                    up.extend(own.iter().map(|value| (f64::from(*value) * weight) as f32));
                }
            }
            let mut down = Vec::with_capacity(rank * first.columns);
            for (factors, (_, weight)) in factors.iter().zip(&shares) {
                down.extend(factors.down.iter().map(|value| (f64::from(*value) * weight) as f32));
            }
            let Method::Svd(policy) = method else { return Ok((first.module(up, down, rank)?, 1.0)) };
            let (rows, columns) = (first.rows, first.columns);
            let svd = linalg::svd_of_product(as_matrix(&up, &[rows, rank]), as_matrix(&down, &[rank, columns]))?;
            first.shortened(svd, policy)
        }
    }
}

/// Both factors made from those of the adapters, each with the roots of the weights; the sign goes to the
/// down-projection.
fn factors_one_by_one(
    path: &ModulePath,
    factors: &[Factors],
    weights: &[f64],
    merge: impl Fn(&[&[f32]], &[f64], &str) -> Result<Vec<f32>>,
) -> Result<(AdapterModule, f64)> {
    let first = &factors[0];
    if factors.iter().any(|other| other.rank != first.rank) {
        let ranks: Vec<usize> = factors.iter().map(|factors| factors.rank).collect();
        return Err(Error::Option {
            key: "method",
            value: "factors one by one".into(),
            reason: format!("{path} has the ranks {ranks:?}, which must be equal; name a rank, or concatenate"),
        });
    }
    let roots: Vec<f64> = weights.iter().map(|weight| weight.abs().sqrt()).collect();
    let signed: Vec<f64> = weights.iter().map(|weight| weight.abs().sqrt() * weight.signum()).collect();
    let ups: Vec<&[f32]> = factors.iter().map(|factors| factors.up.as_slice()).collect();
    let downs: Vec<&[f32]> = factors.iter().map(|factors| factors.down.as_slice()).collect();
    Ok((first.module(merge(&ups, &roots, "up")?, merge(&downs, &signed, "down")?, first.rank)?, 1.0))
}

/// An adapter with other ranks: each module's best approximation. Whole differences of vectors, which have no rank,
/// stay as they are and have no outcome; other variants than plain LoRA are refused.
///
/// # Errors
/// [`Error::Option`] for a rule that keeps nothing; [`Error::Unsupported`], which names the module, for another
/// variant; [`Error::NoConvergence`] where a module holds NaN or infinity.
pub fn resize(adapter: &Adapter, policy: RankPolicy) -> Result<(Adapter, Vec<Outcome>)> {
    let (vectors, ranked): (BTreeMap<_, _>, BTreeMap<_, _>) =
        adapter.modules.clone().into_iter().partition(|(_, module)| module.is_of_vectors());
    let ranked = Adapter { modules: ranked, metadata: BTreeMap::new() };
    let (mut resized, outcomes) = combine(&[(&ranked, &Strength::default())], Method::Svd(policy))?;
    resized.metadata = adapter.metadata.clone();
    resized.modules.extend(vectors);
    Ok((resized, outcomes))
}

/// Another alpha for all plain modules, with the same updates ([`AdapterModule::with_alpha`]).
///
/// # Errors
/// [`Error::Unsupported`], which names the module, for another variant. Modules before it are changed then.
pub fn set_alpha(adapter: &mut Adapter, alpha: f64) -> Result<()> {
    for (path, module) in &mut adapter.modules {
        *module = module.with_alpha(alpha).ok_or_else(|| plain_only(path, module))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::distance;
    use crate::linalg::multiply;
    use crate::random::Stream;
    use crate::{Component, DType, HostTensor};

    fn random(shape: &[usize], seed: u64) -> HostTensor {
        HostTensor::from_f32(shape, Stream::new(seed).normals(shape.iter().product())).unwrap()
    }

    fn lora(rank: usize, alpha: f64, kernel: &[usize], seed: u64) -> AdapterModule {
        let ones: Vec<usize> = kernel.iter().skip(1).map(|_| 1).collect();
        let tensors = BTreeMap::from([
            ("down".to_owned(), random(&[&[rank], kernel].concat(), seed)),
            ("up".to_owned(), random(&[&[20, rank], &*ones].concat(), seed + 1)),
        ]);
        AdapterModule { variant: "lora".into(), tensors, rank, alpha }
    }

    /// The whole update, `[out, in …]`.
    fn update(module: &AdapterModule) -> HostTensor {
        let (down, up) = (&module.tensors["down"], &module.tensors["up"]);
        let rank = module.rank;
        let up_values: Vec<f32> = up.to_f32().iter().map(|value| value * module.scale() as f32).collect();
        let product =
            multiply(as_matrix(&up_values, &[20, rank]), as_matrix(&down.to_f32(), &[rank, down.elements() / rank]));
        let values =
            (0..20).flat_map(|i| (0..product.ncols()).map(move |j| (i, j))).map(|place| product[place]).collect();
        HostTensor::from_f32([&[20], &down.shape()[1..]].concat(), values).unwrap()
    }

    fn path() -> ModulePath {
        ModulePath::new(Component::UNET, "mid_block.resnets.0.conv1")
    }

    fn adapter(module: AdapterModule) -> Adapter {
        Adapter { modules: BTreeMap::from([(path(), module)]), metadata: BTreeMap::new() }
    }

    #[test]
    fn concatenation_is_the_weighted_sum() {
        for kernel in [&[12][..], &[6, 3, 3]] {
            let (a, b) = (lora(4, 2.0, kernel, 1), lora(3, 3.0, kernel, 5));
            let (half, minus) = (Strength::from(0.5), Strength::from(-2.0));
            let (one, two) = (adapter(a.clone()), adapter(b.clone()));
            let (sum, _) = combine(&[(&one, &half), (&two, &minus)], Method::Concatenate).unwrap();
            let module = &sum.modules[&path()];
            assert_eq!((module.rank, module.alpha), (7, 7.0));
            let expected: Vec<f32> =
                update(&a).to_f32().iter().zip(&*update(&b).to_f32()).map(|(a, b)| 0.5 * a - 2.0 * b).collect();
            let expected = HostTensor::from_f32(update(&a).shape(), expected).unwrap();
            assert!(distance(&update(module), &expected) < 1e-6);
            // Nothing is lost at the full rank, and at a lower one what the report says.
            let svd = |rank| combine(&[(&one, &half), (&two, &minus)], Method::Svd(RankPolicy::Fixed(rank))).unwrap();
            assert!(distance(&update(&svd(7).0.modules[&path()]), &expected) < 1e-5);
            let (low, outcomes) = svd(3);
            let lost = distance(&update(&low.modules[&path()]), &expected);
            assert!((lost - (1.0 - outcomes[0].kept.powi(2)).sqrt()).abs() < 1e-4);
            let values = expected.to_f32();
            let best = linalg::svd(as_matrix(&values, expected.shape())).unwrap();
            assert!((crate::rank::kept(&best.values, 3) - outcomes[0].kept).abs() < 1e-5, "the best there is");
        }
    }

    #[test]
    fn linear_is_pefts_and_wants_equal_ranks() {
        let (one, two) = (adapter(lora(2, 4.0, &[12], 1)), adapter(lora(2, 1.0, &[12], 5)));
        let (half, minus) = (Strength::from(0.5), Strength::from(-2.0));
        let (sum, _) = combine(&[(&one, &half), (&two, &minus)], Method::Linear).unwrap();
        // Weights 0.5 · 2 and -2 · 0.5, so roots of 1: A₁ - A₂ and B₁ + B₂.
        let value = |adapter: &Adapter, name: &str| adapter.modules[&path()].tensors[name].to_f32()[5];
        assert!((value(&sum, "down") - (value(&one, "down") - value(&two, "down"))).abs() < 1e-6);
        assert!((value(&sum, "up") - (value(&one, "up") + value(&two, "up"))).abs() < 1e-6);
        let three = adapter(lora(3, 1.0, &[12], 5));
        assert!(
            combine(&[(&one, &half), (&three, &minus)], Method::Linear).unwrap_err().to_string().contains("[2, 3]")
        );
    }

    #[test]
    fn resizing_and_another_alpha_keep_the_update() {
        let mut one = adapter(lora(6, 3.0, &[6, 3, 3], 1));
        let before = update(&one.modules[&path()]);
        let (same, outcomes) = resize(&one, RankPolicy::Fixed(6)).unwrap();
        assert!(distance(&update(&same.modules[&path()]), &before) < 1e-5 && outcomes[0].kept > 0.999_999);
        assert_eq!(resize(&one, RankPolicy::Frobenius(0.5)).unwrap().1[0].rank, 1);
        set_alpha(&mut one, 1.0).unwrap();
        assert_eq!(one.modules[&path()].alpha, 1.0);
        assert!(distance(&update(&one.modules[&path()]), &before) < 1e-6);
        one.modules.get_mut(&path()).unwrap().variant = "loha".into();
        assert!(resize(&one, RankPolicy::Fixed(2)).unwrap_err().to_string().contains("flatten"));
    }

    #[test]
    fn small_updates_of_high_rank_survive_fp16() {
        // alpha 1 at rank 128, and an `up` as short runs leave it.
        let mut module = lora(128, 1.0, &[160], 1);
        let scaled = |tensor: &HostTensor, factor: f32| {
            HostTensor::from_f32(tensor.shape(), tensor.to_f32().iter().map(|value| value * factor).collect()).unwrap()
        };
        let (down, up) = (scaled(&module.tensors["down"], 0.02), scaled(&module.tensors["up"], 1e-4));
        module.tensors = BTreeMap::from([("down".into(), down), ("up".into(), up)]);
        let halves = |module: &AdapterModule| {
            let mut module = module.clone();
            module.tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::F16).to_dtype(DType::F32));
            module
        };
        let stored = halves(&module);
        let (before, one) = (update(&stored), adapter(stored.clone()));
        let mut results = vec![stored.with_alpha(128.0).unwrap(), stored.with_alpha(12.8).unwrap()];
        for method in [Method::Concatenate, Method::Svd(RankPolicy::Fixed(20))] {
            results.push(combine(&[(&one, &Strength::default())], method).unwrap().0.modules[&path()].clone());
        }
        for module in results {
            let lost = distance(&update(&halves(&module)), &before);
            assert!(lost < 2e-3, "{} {}: {lost}", module.rank, module.alpha);
            assert!(
                (rounding(&module, DType::F16) - distance(&update(&halves(&module)), &update(&module))).abs() < 1e-4
            );
        }
        // A fold by 1 changes nothing, and one by a power of two no digit.
        assert_eq!(stored.with_alpha(1.0).unwrap(), stored);
        let there = stored.with_alpha(8.0).unwrap();
        assert_eq!(there.tensors["up"], stored.tensors["up"].to_dtype(DType::F32));
        assert_eq!(update(&there), before);
    }

    #[test]
    fn vectors_have_no_rank_and_stay_as_they_are() {
        let norm = ModulePath::new(Component::UNET, "mid_block.resnets.0.norm1");
        let tensors = BTreeMap::from([("weight".to_owned(), random(&[6], 3)), ("bias".to_owned(), random(&[6], 4))]);
        let module = AdapterModule { variant: "full".into(), tensors, rank: 1, alpha: 1.0 };
        let mut one = adapter(lora(6, 3.0, &[12], 1));
        one.modules.insert(norm.clone(), module.clone());
        let (resized, outcomes) = resize(&one, RankPolicy::Fixed(2)).unwrap();
        assert_eq!((&resized.modules[&norm], outcomes.len()), (&module, 1));
        assert_eq!(resized.modules[&path()].rank, 2);
    }

    #[test]
    fn what_was_put_in_is_extracted() {
        for kernel in [&[48][..], &[6, 3, 3]] {
            let module = lora(3, 1.5, kernel, 1);
            let delta = update(&module);
            let base = random(delta.shape(), 9);
            let tuned: Vec<f32> = base.to_f32().iter().zip(&*delta.to_f32()).map(|(a, b)| a + b).collect();
            let tuned = HostTensor::from_f32(delta.shape(), tuned).unwrap();
            let options = ExtractOptions { policy: RankPolicy::Fixed(3), ..ExtractOptions::default() };
            let (found, held) = extract(&tuned, &base, &options).unwrap().unwrap();
            assert!(distance(&update(&found), &delta) < 1e-5 && held > 0.9999);
            assert_eq!(extract(&base, &base, &options).unwrap(), None);
            let frobenius = ExtractOptions { policy: RankPolicy::Frobenius(0.999_99), ..options };
            assert_eq!(extract(&tuned, &base, &frobenius).unwrap().unwrap().0.rank, 3, "no more than is there");
            let clamped = ExtractOptions { clamp_quantile: Some(0.9), ..options };
            let (found, _) = extract(&tuned, &base, &clamped).unwrap().unwrap();
            assert!(distance(&update(&found), &delta) > 1e-3, "clipping costs");
            assert!(extract(&tuned, &random(&[2, 2], 1), &options).is_err());
        }
    }
}
