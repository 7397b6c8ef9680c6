//! LoKr (LyCORIS; Yeh et al., "Navigating Text-To-Image Customization", ICLR 2024, arXiv:2309.14859): a Kronecker product,
//! `ΔW = scale · w1 ⊗ w2`, of a small and a large matrix, each whole or low-rank.
//!
//! For a weight `[a·c, b·d]`: `w1: [a, b]` or `w1_a: [a, rank] · w1_b: [rank, b]`; `w2: [c, d]` (a convolution
//! `[c, d, k, k]`), or `w2_a: [c, rank] · w2_b: [rank, d]` (`[rank, d·k·k]`), or with a core `t2: [rank, rank, k, k]`,
//! `w2_a: [rank, c]`, `w2_b: [rank, d]`. The factors' own shapes say how the weight is cut; nothing is derived from it.

use std::collections::BTreeMap;

use super::loha::tucker;
use super::{BaseLayer, Dropout, Parameters, Request, Variant, at_least_one, expect, kaiming, unsupported};
use crate::backend::Backend;
use crate::random::Stream;
use crate::{Error, HostTensor, LayerGeometry, Result};

/// The Kronecker product.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lokr;

const NAME: &str = "lokr";

impl<B: Backend> Variant<B> for Lokr {
    fn name(&self) -> &str {
        NAME
    }

    /// `factor`: the smaller part of each side (0, the default: as square as can be). `decompose_both`: `w1` low-rank too.
    /// `full_matrix`: neither low-rank. `tucker`: 3×3 convolutions get a core.
    fn options(&self) -> &[&'static str] {
        &["factor", "decompose_both", "full_matrix", "tucker"]
    }

    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        let rank = at_least_one(request.rank)?;
        let weight = geometry.weight_shape();
        if !matches!(geometry, LayerGeometry::Linear { .. } | LayerGeometry::Conv2d { .. }) {
            return Err(unsupported(NAME, geometry, "it adapts linear layers and convolutions"));
        }
        let factor = request.whole("factor", 0);
        let ((a, c), (b, d)) = (split(weight[0], factor), split(weight[1], factor));
        let full = request.switch("full_matrix");
        let mut shapes = BTreeMap::new();
        let mut insert = |name: &str, shape: &[usize]| shapes.insert(name.to_owned(), shape.to_vec());
        if request.switch("decompose_both") && 2 * rank < a.max(b) && !full {
            insert("w1_a", &[a, rank]);
            insert("w1_b", &[rank, b]);
        } else {
            insert("w1", &[a, b]);
        }
        if full || 2 * rank >= c.max(d) {
            insert("w2", &[&[c, d], &weight[2..]].concat());
        } else if geometry.is_spatial() && request.switch("tucker") {
            insert("t2", &[&[rank, rank], &weight[2..]].concat());
            insert("w2_a", &[rank, c]);
            insert("w2_b", &[rank, d]);
        } else {
            insert("w2_a", &[c, rank]);
            insert("w2_b", &[rank, d * weight[2..].iter().product::<usize>()]);
        }
        Ok(shapes)
    }

    /// Without a low-rank factor there is no rank to divide by: the scale is 1, as LyCORIS records it.
    fn rank_and_alpha(&self, geometry: &LayerGeometry, request: &Request, alpha: f64) -> (usize, f64) {
        match Variant::<B>::shapes(self, geometry, request) {
            Ok(shapes) if shapes.contains_key("w1") && shapes.contains_key("w2") => (request.rank, request.rank as f64),
            _ => (request.rank, alpha),
        }
    }

    /// As LyCORIS: all uniform in ±1/√fan_in, but `w2` or `w2_b` zero.
    fn initialise(
        &self,
        _backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let first = |(name, shape): (String, Vec<usize>)| {
            let tensor = match name.as_str() {
                "w2" | "w2_b" => HostTensor::zeros(shape),
                _ => kaiming(&shape, shape[1..].iter().product(), stream, &name)?,
            };
            Ok((name, tensor))
        };
        Variant::<B>::shapes(self, &base.geometry(), request)?.into_iter().map(first).collect()
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let weight = geometry.weight_shape();
        let taps = geometry.fan_in() / weight.get(1).copied().unwrap_or(1);
        let (w1, w2) = (small(backend, parameters)?, large(backend, parameters, taps)?);
        let (&[a, b], &[c, d]) = (&*backend.shape(&w1), &*backend.shape(&w2)) else { return Err(shapeless(&geometry)) };
        expect(NAME, "w1 ⊗ w2", &[weight[0], geometry.fan_in()], &[a * c, b * d])?;
        let left = backend.reshape(&backend.scale(&w1, parameters.scale)?, &[a, 1, b, 1])?;
        let product = backend.mul(&left, &backend.reshape(&w2, &[1, c, 1, d])?)?;
        backend.reshape(&product, &weight)
    }

    /// For a linear layer `(w1 ⊗ w2) x` is `w1 X w2ᵀ` of the input folded to `[b, d]`: far fewer products than with ΔW.
    fn forward(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        input: &B::Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<B::Tensor> {
        let geometry = base.geometry();
        if dropout.is_some() || !matches!(geometry, LayerGeometry::Linear { .. }) {
            return super::forward_with_weight(self, backend, base, parameters, input, dropout);
        }
        let (w1, w2) = (small(backend, parameters)?, large(backend, parameters, 1)?);
        let (&[a, b], &[c, d]) = (&*backend.shape(&w1), &*backend.shape(&w2)) else { return Err(shapeless(&geometry)) };
        expect(NAME, "w1 ⊗ w2", &geometry.weight_shape(), &[a * c, b * d])?;
        let w1 = backend.cast_like(&backend.scale(&w1, parameters.scale)?, input)?;
        let mut shape = backend.shape(input);
        let rows = shape.iter().product::<usize>() / (b * d);
        let mut folded = backend.reshape(input, &[rows * b, d])?;
        let factors: Vec<B::Tensor> = match (parameters.tensors.get("w2_a"), parameters.tensors.get("w2_b")) {
            (Some(first), Some(second)) => vec![backend.share(second), backend.share(first)],
            _ => vec![w2],
        };
        for factor in factors {
            let factor = backend.permute(&backend.cast_like(&factor, input)?, &[1, 0])?;
            folded = backend.matmul(&folded, &factor)?;
        }
        let folded = backend.permute(&backend.reshape(&folded, &[rows, b, c])?, &[0, 2, 1])?;
        let mixed = backend.matmul(&backend.reshape(&folded, &[rows * c, b])?, &backend.permute(&w1, &[1, 0])?)?;
        let update = backend.permute(&backend.reshape(&mixed, &[rows, c, a])?, &[0, 2, 1])?;
        *shape.last_mut().expect("a linear layer's input has an axis") = a * c;
        backend.add(base.forward(input)?, &backend.reshape(&update, &shape)?)
    }
}

/// `w1`, `[a, b]`.
fn small<B: Backend>(backend: &B, parameters: &Parameters<B>) -> Result<B::Tensor> {
    match parameters.tensors.get("w1") {
        Some(whole) => Ok(backend.share(whole)),
        None => product(backend, parameters, "w1_a", "w1_b"),
    }
}

/// `w2`, `[c, d · taps]`.
fn large<B: Backend>(backend: &B, parameters: &Parameters<B>, taps: usize) -> Result<B::Tensor> {
    if let Some(whole) = parameters.tensors.get("w2") {
        let shape = backend.shape(whole);
        let rows = shape.first().copied().unwrap_or(1).max(1);
        return backend.reshape(whole, &[rows, shape.iter().product::<usize>() / rows]);
    }
    let Some(core) = parameters.tensors.get("t2") else {
        return product(backend, parameters, "w2_a", "w2_b");
    };
    let (a, b) = (parameters.get(NAME, "w2_a")?, parameters.get(NAME, "w2_b")?);
    let (&[i, ..], &[j, ..]) = (&*backend.shape(a), &*backend.shape(b)) else {
        return Err(shapeless(&LayerGeometry::linear(0, 0)));
    };
    let found = backend.shape(core);
    if found.iter().product::<usize>() != i * j * taps {
        return Err(Error::Shape {
            what: "`t2` of variant `lokr`".into(),
            expected: format!("[{i}, {j}, {taps} taps]"),
            found: format!("{found:?}"),
        });
    }
    tucker(backend, core, a, b, taps)
}

fn product<B: Backend>(backend: &B, parameters: &Parameters<B>, a_name: &str, b_name: &str) -> Result<B::Tensor> {
    let (a, b) = (parameters.get(NAME, a_name)?, parameters.get(NAME, b_name)?);
    // PEFT keeps a convolution's w2_b as [rank, d, k, k] in places; LyCORIS as [rank, d·k·k].
    let shape = backend.shape(b);
    let rank = shape.first().copied().unwrap_or(1).max(1);
    backend.matmul(a, &backend.reshape(b, &[rank, shape.iter().product::<usize>() / rank])?)
}

fn shapeless(geometry: &LayerGeometry) -> Error {
    unsupported(NAME, geometry, "its factors are no matrices")
}

/// The two parts of a side, the smaller first: with a factor that divides it, that and the rest; else the pair nearest to
/// a square whose smaller part does not exceed the factor (0: no limit). LyCORIS' rule.
fn split(side: usize, factor: usize) -> (usize, usize) {
    if factor > 0 && side.is_multiple_of(factor) {
        let rest = side / factor;
        return (factor.min(rest), factor.max(rest));
    }
    let limit = if factor == 0 { side } else { factor };
    let root = (1..=side).take_while(|part| part * part <= side && *part <= limit);
    let small = root.filter(|part| side.is_multiple_of(*part)).last().unwrap_or(1);
    (small, side / small)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_split_as_lycoris_splits_them() {
        for (side, factor, expected) in [
            (127, 0, (1, 127)),
            (128, 0, (8, 16)),
            (128, 4, (4, 32)),
            (250, 0, (10, 25)),
            (250, 4, (2, 125)),
            (250, 8, (5, 50)),
            (360, 16, (15, 24)),
            (512, 16, (16, 32)),
            (1024, 0, (32, 32)),
            (20, 10, (2, 10)),
        ] {
            assert_eq!(split(side, factor), expected, "{side} by {factor}");
        }
    }
}
