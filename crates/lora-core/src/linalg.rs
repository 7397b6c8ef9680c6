//! Decompositions on `faer`: the singular values of whole updates, exact or truncated, and of products of thin factors.
//! What is done with them lives in [`crate::compose`].

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::DenseSolveCore;
use faer::{Accum, Mat, MatMut, MatRef, Par};

use crate::random::Stream;
use crate::{Error, HostTensor, Result};

/// `A = U · diag(s) · Vᵀ` with singular values from the largest down.
#[derive(Debug, Clone)]
pub struct Svd {
    /// Left vectors as columns, `[rows, rank]`.
    pub left: Mat<f32>,
    /// Singular values.
    pub values: Vec<f32>,
    /// Right vectors as columns, `[columns, rank]`.
    pub right: Mat<f32>,
}

impl Svd {
    /// Keeps the `rank` largest.
    #[must_use]
    pub fn truncate(mut self, rank: usize) -> Self {
        let rank = rank.min(self.values.len());
        self.values.truncate(rank);
        self.left.resize_with(self.left.nrows(), rank, |_, _| 0.0);
        self.right.resize_with(self.right.nrows(), rank, |_, _| 0.0);
        self
    }

    /// The factors of a LoRA whose product is this matrix: up `[rows, rank]` `= U · √s`, down `[rank, columns]` `= √s ·
    /// Vᵀ`, row-major. Equal shares keep both among the normal numbers of fp16; `U · s` of a small update is not among
    /// them.
    pub fn factors(&self) -> (Vec<f32>, Vec<f32>) {
        self.shared(0.5)
    }

    /// The same with `up = U · sˢʰᵃʳᵉ` and the rest of the singular values in `down`.
    pub(crate) fn shared(&self, share: f32) -> (Vec<f32>, Vec<f32>) {
        let rank = self.values.len();
        let up = (0..self.left.nrows()).flat_map(|row| (0..rank).map(move |k| (row, k)));
        let down = (0..rank).flat_map(|k| (0..self.right.nrows()).map(move |column| (column, k)));
        let [of_up, of_down] =
            [share, 1.0 - share].map(|power| self.values.iter().map(|value| value.powf(power)).collect::<Vec<f32>>());
        (
            up.map(|(row, k)| self.left[(row, k)] * of_up[k]).collect(),
            down.map(|(column, k)| self.right[(column, k)] * of_down[k]).collect(),
        )
    }
}

/// A tensor as a row-major matrix view: the first axis against all others.
pub(crate) fn as_matrix<'v>(values: &'v [f32], shape: &[usize]) -> MatRef<'v, f32> {
    let rows = shape.first().copied().unwrap_or(1);
    MatRef::from_row_major_slice(values, rows, values.len() / rows.max(1))
}

/// All singular values and vectors of a matrix. Its cost grows with the cube of the shorter side.
///
/// # Errors
/// [`Error::NoConvergence`] where the matrix holds NaN or infinity.
pub fn svd(matrix: MatRef<'_, f32>) -> Result<Svd> {
    let found = matrix.thin_svd().map_err(|_| Error::NoConvergence { what: "singular values" })?;
    let values = found.S().column_vector().iter().copied().collect();
    Ok(Svd { left: found.U().to_owned(), values, right: found.V().to_owned() })
}

/// The singular values and vectors of `up · down` (`[rows, rank] × [rank, columns]`) without ever forming the product:
/// a QR decomposition of each factor and the SVD of the small core between them, in f64. Exact; the cost is linear in
/// rows and columns.
pub(crate) fn svd_of_product(up: MatRef<'_, f32>, down: MatRef<'_, f32>) -> Result<Svd> {
    let double =
        |matrix: MatRef<'_, f32>| Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| f64::from(matrix[(i, j)]));
    let (left, right) = (double(up).qr(), double(down.transpose()).qr());
    let core = multiply(left.thin_R(), right.thin_R().transpose());
    let core = core.thin_svd().map_err(|_| Error::NoConvergence { what: "singular values" })?;
    let single = |matrix: Mat<f64>| Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| matrix[(i, j)] as f32);
    Ok(Svd {
        left: single(multiply(left.compute_thin_Q().as_ref(), core.U())),
        values: core.S().column_vector().iter().map(|&value| value as f32).collect(),
        right: single(multiply(right.compute_thin_Q().as_ref(), core.V())),
    })
}

/// The `rank` largest singular values and vectors by subspace iteration from random starts (Halko, Martinsson & Tropp,
/// "Finding structure with randomness", SIAM Review 2011, algorithms 4.4 and 5.1), with 8 vectors to spare.
///
/// Each of the `iterations` multiplies the error of what is left out by the ratio of the singular values behind and
/// before the cut, squared; 3 keep the total error within 1% of the exact one on spectra as flat as random noise's.
pub(crate) fn truncated_svd(matrix: MatRef<'_, f32>, rank: usize, iterations: usize, stream: &Stream) -> Result<Svd> {
    let (rows, columns) = matrix.shape();
    let shorter = rows.min(columns);
    let width = rank + 8;
    // Beyond a third of the shorter side the exact way is as fast.
    if width * 3 >= shorter {
        return Ok(svd(matrix)?.truncate(rank));
    }
    let starts = stream.clone().normals(columns * width);
    let mut basis = orthonormal(multiply(matrix, MatRef::from_column_major_slice(&starts, columns, width)));
    for _ in 0..iterations {
        let across = orthonormal(multiply(matrix.transpose(), basis.as_ref()));
        basis = orthonormal(multiply(matrix, across.as_ref()));
    }
    // A ≈ Q (Qᵀ A): the SVD of the short, wide Qᵀ A through the QR of its transpose.
    let right = multiply(matrix.transpose(), basis.as_ref()).qr();
    let core = svd(right.thin_R().transpose())?;
    let found = Svd {
        left: multiply(basis.as_ref(), core.left.as_ref()),
        values: core.values,
        right: multiply(right.compute_thin_Q().as_ref(), core.right.as_ref()),
    };
    Ok(found.truncate(rank))
}

/// An orthonormal basis of the columns' span.
fn orthonormal(matrix: Mat<f32>) -> Mat<f32> {
    matrix.qr().compute_thin_Q()
}

/// `a · b`, on all cores.
pub(crate) fn multiply<T: faer::traits::ComplexField>(a: MatRef<'_, T>, b: MatRef<'_, T>) -> Mat<T> {
    let mut product = Mat::zeros(a.nrows(), b.ncols());
    matmul(product.as_mut(), Accum::Replace, a, b, T::one_impl(), Par::rayon(0));
    product
}

/// `values += up · down` for row-major `up: [rows, rank]` and `down: [rank, columns]`, on the calling thread alone.
pub fn add_product(values: &mut [f32], up: &[f32], down: &[f32], rank: usize) {
    let (rows, columns) = (up.len() / rank.max(1), down.len() / rank.max(1));
    matmul(
        MatMut::from_row_major_slice_mut(values, rows, columns),
        Accum::Add,
        MatRef::from_row_major_slice(up, rows, rank),
        MatRef::from_row_major_slice(down, rank, columns),
        1.0,
        Par::Seq,
    );
}

/// The inverses of square matrices `[..., n, n]`, in f64.
pub(crate) fn inverse(tensor: &HostTensor) -> Result<HostTensor> {
    let &[.., rows, side] = tensor.shape() else {
        return Err(not_square(tensor));
    };
    if rows != side || side == 0 {
        return Err(not_square(tensor));
    }
    let mut inverses = Vec::with_capacity(tensor.elements());
    for block in tensor.to_f32().chunks_exact(side * side) {
        let matrix = Mat::from_fn(side, side, |i, j| f64::from(block[i * side + j]));
        let inverse = matrix.partial_piv_lu().inverse();
        inverses.extend((0..side * side).map(|place| inverse[(place / side, place % side)] as f32));
    }
    HostTensor::from_f32(tensor.shape(), inverses)
}

fn not_square(tensor: &HostTensor) -> Error {
    Error::Shape {
        what: "matrix to invert".into(),
        expected: "a square one".into(),
        found: format!("{:?}", tensor.shape()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Mat<f32> {
        let values = Stream::new(seed).normals(rows * columns);
        Mat::from_fn(rows, columns, |i, j| values[i * columns + j])
    }

    fn rebuilt(svd: &Svd) -> Mat<f32> {
        let scaled = Mat::from_fn(svd.left.nrows(), svd.values.len(), |i, k| svd.left[(i, k)] * svd.values[k]);
        multiply(scaled.as_ref(), svd.right.transpose())
    }

    fn error(a: &Mat<f32>, b: &Mat<f32>) -> f32 {
        (a - b).norm_l2() / a.norm_l2()
    }

    #[test]
    fn a_product_decomposes_as_the_full_matrix_does() {
        for (rows, rank, columns) in [(40, 6, 30), (5, 6, 30), (40, 6, 4)] {
            let (up, down) = (random(rows, rank, 1), random(rank, columns, 2));
            let product = multiply(up.as_ref(), down.as_ref());
            let (thin, full) = (svd_of_product(up.as_ref(), down.as_ref()).unwrap(), svd(product.as_ref()).unwrap());
            assert!(error(&product, &rebuilt(&thin)) < 1e-6);
            for (a, b) in thin.values.iter().zip(&full.values) {
                assert!((a - b).abs() < 1e-5 * full.values[0], "{a} {b}");
            }
        }
    }

    #[test]
    fn truncation_by_random_starts_is_nearly_the_best_there_is() {
        // Noise has the flattest spectrum there is; a LoRA's falls much faster.
        let noise = random(200, 300, 3);
        let best = error(&noise, &rebuilt(&svd(noise.as_ref()).unwrap().truncate(16)));
        let found = truncated_svd(noise.as_ref(), 16, 3, &Stream::new(4)).unwrap();
        assert_eq!(found.values.len(), 16);
        let error_found = error(&noise, &rebuilt(&found));
        assert!(error_found < best * 1.01, "{error_found} {best}");
        let low = multiply(random(200, 5, 5).as_ref(), random(5, 300, 6).as_ref());
        let found = truncated_svd(low.as_ref(), 5, 1, &Stream::new(4)).unwrap();
        assert!(error(&low, &rebuilt(&found)) < 1e-5);
        let (up, down) = found.factors();
        assert_eq!((up.len(), down.len()), (200 * 5, 5 * 300));
    }

    #[test]
    fn only_square_matrices_have_inverses() {
        assert!(inverse(&HostTensor::zeros([2, 3])).is_err());
        assert!(inverse(&HostTensor::zeros([4])).is_err());
    }
}
