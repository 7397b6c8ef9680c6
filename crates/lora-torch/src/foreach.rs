//! Elementwise operations over whole lists of tensors, by one kernel for many of them where the device has one (and a loop
//! inside libtorch where not). What optimisers are written with: a list of 528 tensors is otherwise bound by launches.
//!
//! Operations change their first list in place; no gradient is recorded.
//!
//! # Errors
//! Every operation gives [`Error::Torch`](crate::Error::Torch) where shapes, number types or devices do not go together,
//! and fails where memory runs out or the device is lost. Some tensors may have been changed then.
//!
//! # Panics
//! Lists of one call must be equally long.

#![expect(clippy::missing_errors_doc, reason = "said above for all operations")]

use std::borrow::Borrow;

use tch::Tensor;

use crate::{Result, shim};

/// No list.
const NONE: Option<&[Tensor]> = None;

/// `targets *= factor`.
pub fn scale<A: Borrow<Tensor>>(targets: &[A], factor: f64) -> Result<()> {
    run(0, targets, NONE, NONE, factor)
}

/// `targets += number`.
pub fn shift<A: Borrow<Tensor>>(targets: &[A], number: f64) -> Result<()> {
    run(1, targets, NONE, NONE, number)
}

/// `targets += factor · others`.
pub fn add<A: Borrow<Tensor>, B: Borrow<Tensor>>(targets: &[A], others: &[B], factor: f64) -> Result<()> {
    run(2, targets, Some(others), NONE, factor)
}

/// `targets *= others`.
pub fn mul<A: Borrow<Tensor>, B: Borrow<Tensor>>(targets: &[A], others: &[B]) -> Result<()> {
    run(3, targets, Some(others), NONE, 0.0)
}

/// `targets /= others`.
pub fn div<A: Borrow<Tensor>, B: Borrow<Tensor>>(targets: &[A], others: &[B]) -> Result<()> {
    run(4, targets, Some(others), NONE, 0.0)
}

/// `targets += factor · others · thirds`.
pub fn add_product<A, B, C>(targets: &[A], others: &[B], thirds: &[C], factor: f64) -> Result<()>
where
    A: Borrow<Tensor>,
    B: Borrow<Tensor>,
    C: Borrow<Tensor>,
{
    run(5, targets, Some(others), Some(thirds), factor)
}

/// `targets += factor · others / thirds`.
pub fn add_quotient<A, B, C>(targets: &[A], others: &[B], thirds: &[C], factor: f64) -> Result<()>
where
    A: Borrow<Tensor>,
    B: Borrow<Tensor>,
    C: Borrow<Tensor>,
{
    run(6, targets, Some(others), Some(thirds), factor)
}

/// `targets += weight · (others − targets)`.
pub fn lerp<A: Borrow<Tensor>, B: Borrow<Tensor>>(targets: &[A], others: &[B], weight: f64) -> Result<()> {
    run(7, targets, Some(others), NONE, weight)
}

/// `targets = others`.
pub fn copy<A: Borrow<Tensor>, B: Borrow<Tensor>>(targets: &[A], others: &[B]) -> Result<()> {
    run(8, targets, Some(others), NONE, 0.0)
}

/// `targets = √targets`.
pub fn sqrt<A: Borrow<Tensor>>(targets: &[A]) -> Result<()> {
    run(9, targets, NONE, NONE, 0.0)
}

/// `targets = sign(targets)`, 0 for 0.
pub fn sign<A: Borrow<Tensor>>(targets: &[A]) -> Result<()> {
    run(10, targets, NONE, NONE, 0.0)
}

/// `targets = 0`, whatever they are.
pub fn zero<A: Borrow<Tensor>>(targets: &[A]) -> Result<()> {
    run(11, targets, NONE, NONE, 0.0)
}

/// New tensors: `factor · tensors`.
pub fn scaled<A: Borrow<Tensor>>(tensors: &[A], factor: f64) -> Result<Vec<Tensor>> {
    if tensors.is_empty() { Ok(Vec::new()) } else { shim::foreach_scaled(tensors, factor) }
}

/// The sum of absolute values of each tensor, `[count]`; the list must not be empty.
pub fn absolute_sums<A: Borrow<Tensor>>(tensors: &[A]) -> Result<Tensor> {
    shim::foreach_norms(tensors, 1.0)
}

/// The L2 norm of each tensor, `[count]`; the list must not be empty.
pub fn norms<A: Borrow<Tensor>>(tensors: &[A]) -> Result<Tensor> {
    shim::foreach_norms(tensors, 2.0)
}

fn run<A, B, C>(operation: i32, targets: &[A], others: Option<&[B]>, thirds: Option<&[C]>, value: f64) -> Result<()>
where
    A: Borrow<Tensor>,
    B: Borrow<Tensor>,
    C: Borrow<Tensor>,
{
    if targets.is_empty() { Ok(()) } else { shim::foreach(operation, targets, others, thirds, value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One list of two tensors of different shapes through every operation, against the formulas on numbers.
    #[test]
    fn each_operation_follows_its_formula() {
        let list = |values: [f32; 3]| [Tensor::from_slice(&values[..2]), Tensor::from_slice(&values[2..])];
        let numbers = |list: &[Tensor]| -> Vec<f32> {
            list.iter().flat_map(|tensor| Vec::<f32>::try_from(tensor).unwrap()).collect()
        };
        let (first, second, third) = ([1.0f32, -4.0, 9.0], [2.0f32, 0.5, -3.0], [4.0f32, -2.0, 8.0]);
        let (b, c) = (list(second), list(third));
        type Operation<'a> = Box<dyn Fn(&[Tensor]) -> Result<()> + 'a>;
        type Formula = fn(f32, f32, f32) -> f32;
        let cases: Vec<(Operation<'_>, Formula)> = vec![
            (Box::new(|a| scale(a, 0.5)), |a, _, _| a * 0.5),
            (Box::new(|a| shift(a, 0.5)), |a, _, _| a + 0.5),
            (Box::new(|a| add(a, &b, -0.5)), |a, b, _| a - 0.5 * b),
            (Box::new(|a| mul(a, &b)), |a, b, _| a * b),
            (Box::new(|a| div(a, &c)), |a, _, c| a / c),
            (Box::new(|a| add_product(a, &b, &c, 0.5)), |a, b, c| a + 0.5 * b * c),
            (Box::new(|a| add_quotient(a, &b, &c, 0.5)), |a, b, c| a + 0.5 * b / c),
            (Box::new(|a| lerp(a, &b, 0.25)), |a, b, _| a + 0.25 * (b - a)),
            (Box::new(|a| copy(a, &b)), |_, b, _| b),
            (Box::new(sign), |a, _, _| a.signum()),
        ];
        for (index, (operation, formula)) in cases.iter().enumerate() {
            let a = list(first);
            operation(&a).unwrap();
            let expected: Vec<f32> = (0..3).map(|i| formula(first[i], second[i], third[i])).collect();
            assert_eq!(numbers(&a), expected, "operation {index}");
        }
        let a = list([4.0, 9.0, 0.25]);
        sqrt(&a).unwrap();
        assert_eq!(numbers(&a), [2.0, 3.0, 0.5]);
        assert_eq!(numbers(&scaled(&a, 2.0).unwrap()), [4.0, 6.0, 1.0]);
        assert_eq!(Vec::<f32>::try_from(absolute_sums(&list(first)).unwrap()).unwrap(), [5.0, 9.0]);
        assert_eq!(Vec::<f32>::try_from(norms(&list([3.0, -4.0, 2.0])).unwrap()).unwrap(), [5.0, 2.0]);
        let a = list([f32::NAN, f32::INFINITY, 1.0]);
        zero(&a).unwrap();
        assert_eq!(numbers(&a), [0.0; 3]);
        assert!(scale(&[] as &[Tensor], 2.0).is_ok() && scaled(&[] as &[Tensor], 2.0).unwrap().is_empty());
    }
}
