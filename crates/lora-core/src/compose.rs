//! Making plain LoRAs out of others: several into one, one into a smaller one, the difference of two weights into one.
//!
//! Combining and resizing work on the factors alone (a QR decomposition of each and the singular values of the small core
//! between them, see [`crate::linalg::svd_of_product`]): exact, and never a whole matrix. Extraction has to look at the
//! whole difference and takes its largest singular values by random starts.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use crate::linalg::{self, Svd, as_matrix};
use crate::random::Stream;
use crate::rank::{RankPolicy, kept};
use crate::{Adapter, AdapterModule, Error, HostTensor, ModulePath, Result, Strength};

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

/// Combines adapters with their strengths. A module that only some adapters have is made of those that do. The results
/// have alpha equal to the rank.
pub fn combine(adapters: &[(&Adapter, &Strength)], method: Method) -> Result<(Adapter, Vec<Outcome>)> {
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
pub fn combine_modules(
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
    if method == Method::Linear {
        if factors.iter().any(|other| other.rank != first.rank) {
            let ranks: Vec<usize> = factors.iter().map(|factors| factors.rank).collect();
            return Err(Error::Option {
                key: "method",
                value: "linear".into(),
                reason: format!("{path} has the ranks {ranks:?}, which must be equal; use concatenate or svd"),
            });
        }
        let sum = |side: fn(&Factors) -> &Vec<f32>, sign: bool| -> Vec<f32> {
            let mut sum = vec![0.0f64; side(first).len()];
            for (factors, weight) in factors.iter().zip(&weights) {
                let root = weight.abs().sqrt() * if sign { weight.signum() } else { 1.0 };
                sum.iter_mut().zip(side(factors)).for_each(|(sum, value)| *sum += root * f64::from(*value));
            }
            sum.into_iter().map(|value| value as f32).collect()
        };
        let combined = (sum(|factors| &factors.up, false), sum(|factors| &factors.down, true));
        return Ok((first.module(combined.0, combined.1, first.rank)?, 1.0));
    }
    // [w₁ up₁, w₂ up₂ …] · [down₁; down₂ …].
    let rank: usize = factors.iter().map(|factors| factors.rank).sum();
    let mut up = Vec::with_capacity(first.rows * rank);
    for row in 0..first.rows {
        for (factors, weight) in factors.iter().zip(&weights) {
            let own = &factors.up[row * factors.rank..(row + 1) * factors.rank];
            up.extend(own.iter().map(|value| (f64::from(*value) * weight) as f32));
        }
    }
    let down: Vec<f32> = factors.iter().flat_map(|factors| factors.down.iter().copied()).collect();
    match method {
        Method::Svd(policy) => {
            let svd =
                linalg::svd_of_product(as_matrix(&up, &[first.rows, rank]), as_matrix(&down, &[rank, first.columns]))?;
            first.shortened(svd, policy)
        }
        _ => Ok((first.module(up, down, rank)?, 1.0)),
    }
}

/// An adapter with other ranks: each module's best approximation. Modules of other variants than plain LoRA are refused.
pub fn resize(adapter: &Adapter, policy: RankPolicy) -> Result<(Adapter, Vec<Outcome>)> {
    let (mut resized, outcomes) = combine(&[(adapter, &Strength::default())], Method::Svd(policy))?;
    resized.metadata = adapter.metadata.clone();
    Ok((resized, outcomes))
}

/// Another alpha for all plain modules, with the same updates: the ratio goes into the up-projections.
pub fn set_alpha(adapter: &mut Adapter, alpha: f64) -> Result<()> {
    for (path, module) in &mut adapter.modules {
        let name = if module.tensors.contains_key("up") { "up" } else { "embedding_up" };
        let Some(up) = module.tensors.get(name).filter(|_| module.variant == "lora") else {
            return Err(plain_only(path, module));
        };
        let ratio = module.alpha / alpha;
        let scaled = up.to_f32().iter().map(|value| (f64::from(*value) * ratio) as f32).collect();
        let scaled = HostTensor::from_f32(up.shape(), scaled)?;
        module.tensors.insert(name.to_owned(), scaled);
        module.alpha = alpha;
    }
    Ok(())
}

/// How to extract.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExtractOptions {
    /// The rule for the ranks, at most `limit`.
    pub policy: RankPolicy,
    /// The highest rank.
    pub limit: usize,
    /// Clip both factors to this quantile of their magnitudes (sd-scripts takes 0.99); none for the best approximation.
    pub clamp_quantile: Option<f64>,
    /// All singular values exactly, at many times the cost.
    pub exact: bool,
    /// No module where no element differs by more (sd-scripts takes 0.01 for the whole text encoder).
    pub minimum_difference: f32,
}

impl Default for ExtractOptions {
    fn default() -> Self {
        Self { policy: RankPolicy::Fixed(32), limit: 512, clamp_quantile: None, exact: false, minimum_difference: 0.0 }
    }
}

/// The LoRA that leads from a weight to a tuned one: `tuned - base` by its largest singular values, with alpha equal to the
/// rank, and the share of the difference's norm that it holds. `None` where nothing differs.
pub fn extract(
    tuned: &HostTensor,
    base: &HostTensor,
    options: &ExtractOptions,
) -> Result<Option<(AdapterModule, f64)>> {
    if tuned.shape() != base.shape() {
        return Err(Error::Shape {
            what: "tuned weight".into(),
            expected: format!("{:?}", base.shape()),
            found: format!("{:?}", tuned.shape()),
        });
    }
    let difference: Vec<f32> = tuned.to_f32().iter().zip(&*base.to_f32()).map(|(tuned, base)| tuned - base).collect();
    if difference.iter().all(|value| value.abs() <= options.minimum_difference) {
        return Ok(None);
    }
    flatten(&HostTensor::from_f32(tuned.shape(), difference)?, options).map(Some)
}

/// A whole update `[out, in]` or `[out, in, k, k]` as a plain LoRA.
pub fn flatten(delta: &HostTensor, options: &ExtractOptions) -> Result<(AdapterModule, f64)> {
    let shape = delta.shape();
    if !matches!(shape.len(), 2 | 4) || delta.elements() == 0 {
        return Err(Error::Shape {
            what: "update to take apart".into(),
            expected: "a matrix or a convolution's kernel".into(),
            found: format!("{shape:?}"),
        });
    }
    let values = delta.to_f32();
    let matrix = as_matrix(&values, shape);
    let shorter = matrix.nrows().min(matrix.ncols());
    let most = match options.policy {
        RankPolicy::Fixed(rank) => rank.min(options.limit),
        _ => options.limit,
    };
    let svd = match options.exact {
        true => linalg::svd(matrix)?,
        false => linalg::truncated_svd(matrix, most.min(shorter), 3, &Stream::new(0).at("extract"))?,
    };
    let rank = options.policy.choose(&svd.values, most);
    let norm = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    let svd = svd.truncate(rank);
    let held = svd.values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    let (mut up, mut down) = svd.factors();
    if let Some(quantile) = options.clamp_quantile {
        let mut magnitudes: Vec<f32> = up.iter().chain(&down).map(|value| value.abs()).collect();
        let place = ((magnitudes.len() - 1) as f64 * quantile.clamp(0.0, 1.0)).round() as usize;
        let (_, &mut limit, _) = magnitudes.select_nth_unstable_by(place, f32::total_cmp);
        up.iter_mut().chain(&mut down).for_each(|value| *value = value.clamp(-limit, limit));
    }
    let factors = Factors {
        rows: matrix.nrows(),
        columns: matrix.ncols(),
        rank,
        up: vec![],
        down: vec![],
        kernel: shape[1..].to_vec(),
        embedding: false,
    };
    Ok((factors.module(up, down, rank)?, if norm == 0.0 { 1.0 } else { (held / norm).min(1.0) }))
}

/// A plain LoRA's factors as matrices.
struct Factors {
    rows: usize,
    columns: usize,
    rank: usize,
    /// `[rows, rank]`.
    up: Vec<f32>,
    /// `[rank, columns]`.
    down: Vec<f32>,
    /// What follows the first axis of the weight.
    kernel: Vec<usize>,
    embedding: bool,
}

impl Factors {
    fn of(path: &ModulePath, module: &AdapterModule) -> Result<Self> {
        let embedding = module.tensors.contains_key("embedding_up");
        let names = if embedding { ["embedding_down", "embedding_up"] } else { ["down", "up"] };
        let [down, up] = names.map(|name| module.tensors.get(name));
        let (Some(down), Some(up), "lora", 2) = (down, up, module.variant.as_str(), module.tensors.len()) else {
            return Err(plain_only(path, module));
        };
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

    /// A module of these axes with other factors; alpha is the rank.
    fn module(&self, up: Vec<f32>, down: Vec<f32>, rank: usize) -> Result<AdapterModule> {
        let names = if self.embedding { ["embedding_down", "embedding_up"] } else { ["down", "up"] };
        let up_shape: Vec<usize> = [self.rows, rank].into_iter().chain(self.kernel.iter().skip(1).map(|_| 1)).collect();
        let down_shape = [&[rank], &*self.kernel].concat();
        let tensors = BTreeMap::from([
            (names[0].to_owned(), HostTensor::from_f32(down_shape, down)?),
            (names[1].to_owned(), HostTensor::from_f32(up_shape, up)?),
        ]);
        Ok(AdapterModule { variant: "lora".into(), tensors, rank, alpha: rank as f64 })
    }

    fn shortened(&self, svd: Svd, policy: RankPolicy) -> Result<(AdapterModule, f64)> {
        let rank = policy.choose(&svd.values, svd.values.len());
        let kept = kept(&svd.values, rank);
        let (up, down) = svd.truncate(rank).factors();
        Ok((self.module(up, down, rank)?, kept))
    }
}

fn plain_only(path: &ModulePath, module: &AdapterModule) -> Error {
    Error::Unsupported {
        variant: module.variant.clone(),
        layer: path.to_string(),
        reason: "only plain LoRA is combined and resized; flatten it to one first".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Component;
    use crate::conformance::distance;
    use crate::linalg::multiply;

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
        ModulePath::new(Component::Unet, "mid_block.resnets.0.conv1")
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
            assert!((kept(&best.values, 3) - outcomes[0].kept).abs() < 1e-5, "the best there is");
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
