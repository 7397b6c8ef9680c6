//! A whole update taken apart into a plain LoRA: the difference of two weights, or the update of another variant.

use faer::MatRef;

use super::factors::Factors;
use crate::linalg::{self, Svd, as_matrix};
use crate::random::Stream;
use crate::rank::RankPolicy;
use crate::{AdapterModule, Error, HostTensor, Result};

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

/// The LoRA that leads from a weight to a tuned one: `tuned - base` by its largest singular values, with alpha equal to
/// the rank, and the share of the difference's norm that it holds. `None` where nothing differs.
///
/// # Errors
/// [`Error::Shape`] where the two differ in shape or have neither two nor four axes; [`Error::NoConvergence`] where one
/// holds NaN or infinity.
pub fn extract(
    tuned: &HostTensor,
    base: &HostTensor,
    options: &ExtractOptions,
) -> Result<Option<(AdapterModule, f64)>> {
    difference(tuned, base, options.minimum_difference)?.map(|delta| flatten(&delta, options)).transpose()
}

/// `tuned - base`; `None` where no element differs by more than `least`.
///
/// # Errors
/// [`Error::Shape`] where the two differ in shape.
pub fn difference(tuned: &HostTensor, base: &HostTensor, least: f32) -> Result<Option<HostTensor>> {
    if tuned.shape() != base.shape() {
        return Err(Error::Shape {
            what: "tuned weight".into(),
            expected: format!("{:?}", base.shape()),
            found: format!("{:?}", tuned.shape()),
        });
    }
    let delta: Vec<f32> = tuned.to_f32().iter().zip(&*base.to_f32()).map(|(tuned, base)| tuned - base).collect();
    if delta.iter().all(|value| value.abs() <= least) {
        return Ok(None);
    }
    HostTensor::from_f32(tuned.shape(), delta).map(Some)
}

/// A whole update `[out, in]` or `[out, in, k, k]` as a plain LoRA.
///
/// # Errors
/// [`Error::Shape`] where it has neither two nor four axes or no elements; [`Error::NoConvergence`] where it holds NaN
/// or infinity.
pub fn flatten(delta: &HostTensor, options: &ExtractOptions) -> Result<(AdapterModule, f64)> {
    options.policy.check()?;
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
    let (svd, rank, kept) = largest(matrix, options)?;
    let (up, down) = options.clamp_quantile.map_or_else(|| svd.factors(), |quantile| clipped(&svd, quantile));
    let factors = Factors {
        rows: matrix.nrows(),
        columns: matrix.ncols(),
        rank,
        up: vec![],
        down: vec![],
        kernel: shape[1..].to_vec(),
        embedding: false,
    };
    Ok((factors.module(up, down, rank)?, kept))
}

/// The factors clipped to a quantile of their magnitudes, as sd-scripts clips `U · s` and `Vᵀ`; the roots of the
/// singular values go to `down` only then.
fn clipped(svd: &Svd, quantile: f64) -> (Vec<f32>, Vec<f32>) {
    let (mut up, mut down) = svd.shared(1.0);
    let mut magnitudes: Vec<f32> = up.iter().chain(&down).map(|value| value.abs()).collect();
    let place = (magnitudes.len().saturating_sub(1) as f64 * quantile.clamp(0.0, 1.0)).round() as usize;
    let (_, &mut limit, _) = magnitudes.select_nth_unstable_by(place, f32::total_cmp);
    up.iter_mut().chain(&mut down).for_each(|value| *value = value.clamp(-limit, limit));
    let roots: Vec<f32> = svd.values.iter().map(|value| value.sqrt()).collect();
    let columns = svd.right.nrows().max(1);
    for row in up.chunks_mut(roots.len().max(1)) {
        row.iter_mut().zip(&roots).filter(|(_, root)| **root > 0.0).for_each(|(value, root)| *value /= root);
    }
    down.chunks_mut(columns).zip(&roots).for_each(|(row, root)| row.iter_mut().for_each(|value| *value *= root));
    (up, down)
}

/// The largest singular values of a whole matrix as the options choose them, how many they are, and the share of the
/// norm that they hold.
pub(super) fn largest(matrix: MatRef<'_, f32>, options: &ExtractOptions) -> Result<(Svd, usize, f64)> {
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
    let norm = f64::from(matrix.norm_l2());
    let svd = svd.truncate(rank);
    let held = svd.values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    Ok((svd, rank, if norm == 0.0 { 1.0 } else { (held / norm).min(1.0) }))
}
