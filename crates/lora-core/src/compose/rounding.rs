//! What a type of fewer bits costs a plain LoRA: the error of its update, not of its factors one by one.

use faer::{Mat, MatRef};

use super::factors::Factors;
use crate::linalg::{as_matrix, multiply};
use crate::{AdapterModule, Component, DType, HostTensor, ModulePath};

/// The norm of what rounding the factors to a type changes of a module's update, as a share of the update's norm; 0 for
/// a module that is no plain LoRA. The product of the factors is never formed.
pub fn rounding(module: &AdapterModule, dtype: DType) -> f64 {
    let path = ModulePath::new(Component::MODEL, "rounded");
    let Ok(own) = Factors::of(&path, module) else { return 0.0 };
    let round = |values: &[f32]| {
        let tensor = HostTensor::from_f32([values.len()], values.to_vec()).ok()?;
        Some(tensor.to_dtype(dtype).to_f32().into_owned())
    };
    let (Some(up), Some(down)) = (round(&own.up), round(&own.down)) else { return 0.0 };
    if up == own.up && down == own.down {
        return 0.0;
    }
    let (shape_up, shape_down) = ([own.rows, own.rank], [own.rank, own.columns]);
    let wide = |values: &[f32], shape: &[usize]| {
        let matrix = as_matrix(values, shape);
        Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| f64::from(matrix[(i, j)]))
    };
    let [own_up, own_down] = [wide(&own.up, &shape_up), wide(&own.down, &shape_down)];
    let [up, down] = [wide(&up, &shape_up), wide(&down, &shape_down)];
    // up · down - up' · down' = (up - up') · down + up' · (down - down').
    let (left, right) = (&own_up - &up, &own_down - &down);
    let side =
        |a: &Mat<f64>, b: &Mat<f64>| {
            Mat::from_fn(a.nrows(), a.ncols() + b.ncols(), |i, j| {
                if j < a.ncols() { a[(i, j)] } else { b[(i, j - a.ncols())] }
            })
        };
    let ups = side(&left, &up);
    let downs = side(&own_down.transpose().to_owned(), &right.transpose().to_owned());
    let whole = norm(own_up.as_ref(), own_down.transpose());
    if whole == 0.0 { 0.0 } else { norm(ups.as_ref(), downs.as_ref()) / whole }
}

/// The norm of `up · downᵀ`, from the products of the columns of each.
fn norm(up: MatRef<'_, f64>, down: MatRef<'_, f64>) -> f64 {
    let (ups, downs) = (multiply(up.transpose(), up), multiply(down.transpose(), down));
    let entries = (0..ups.nrows()).flat_map(|i| (0..ups.ncols()).map(move |j| (i, j)));
    entries.map(|place| ups[place] * downs[place]).sum::<f64>().max(0.0).sqrt()
}
