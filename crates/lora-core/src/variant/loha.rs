//! LoHa (Hyeon-Woo et al., "FedPara", ICLR 2022, arXiv:2108.06098; as LyCORIS has it): the element-wise product of two
//! low-rank products, of a rank up to rank² for the numbers of rank 2·rank.
//!
//! `ΔW = scale · (w1_a · w1_b) ⊙ (w2_a · w2_b)` with `a: [out, rank]` and `b: [rank, fan_in]`; with Tucker cores
//! `t: [rank, rank, k, k]`, `a: [rank, out]`, `b: [rank, in]`, each side is `Σ t[i,j,k,l] · a[i,o] · b[j,n]`.

use std::collections::BTreeMap;

use super::{BaseLayer, Parameters, Request, Variant, at_least_one, expect, normal, unsupported};
use crate::backend::Backend;
use crate::random::Stream;
use crate::{HostTensor, LayerGeometry, Result};

/// The Hadamard product of two low-rank updates.
#[derive(Debug, Clone, Copy, Default)]
pub struct Loha;

const NAME: &str = "loha";
const SIDES: [[&str; 3]; 2] = [["w1_a", "w1_b", "t1"], ["w2_a", "w2_b", "t2"]];

impl<B: Backend> Variant<B> for Loha {
    fn name(&self) -> &str {
        NAME
    }

    /// `tucker`: 3×3 convolutions get Tucker cores.
    fn options(&self) -> &[&'static str] {
        &["tucker"]
    }

    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        let rank = at_least_one(request.rank)?;
        let weight = geometry.weight_shape();
        if !matches!(geometry, LayerGeometry::Linear { .. } | LayerGeometry::Conv2d { .. }) {
            return Err(unsupported(NAME, geometry, "it adapts linear layers and convolutions"));
        }
        let tucker = geometry.is_spatial() && request.switch("tucker");
        let mut shapes = BTreeMap::new();
        for [a, b, t] in SIDES {
            if tucker {
                shapes.insert(a.to_owned(), vec![rank, weight[0]]);
                shapes.insert(b.to_owned(), vec![rank, weight[1]]);
                shapes.insert(t.to_owned(), vec![rank, rank, weight[2], weight[3]]);
            } else {
                shapes.insert(a.to_owned(), vec![weight[0], rank]);
                shapes.insert(b.to_owned(), vec![rank, geometry.fan_in()]);
            }
        }
        Ok(shapes)
    }

    /// As LyCORIS: `w1_a` and cores normal with deviation 0.1, `w1_b` and `w2_b` with 1, `w2_a` zero.
    fn initialise(
        &self,
        _backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let first = |(name, shape): (String, Vec<usize>)| {
            let tensor = match name.as_str() {
                "w2_a" => HostTensor::zeros(shape),
                "w1_b" | "w2_b" => normal(&shape, 1.0, stream, &name)?,
                _ => normal(&shape, 0.1, stream, &name)?,
            };
            Ok((name, tensor))
        };
        Variant::<B>::shapes(self, &base.geometry(), request)?.into_iter().map(first).collect()
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let weight = geometry.weight_shape();
        let [first, second] = SIDES.map(|[a_name, b_name, t_name]| -> Result<B::Tensor> {
            let (a, b) = (parameters.get(NAME, a_name)?, parameters.get(NAME, b_name)?);
            let Some(t) = parameters.tensors.get(t_name) else {
                let rank = backend.shape(b).first().copied().unwrap_or(0);
                expect(NAME, a_name, &[weight[0], rank], &backend.shape(a))?;
                expect(NAME, b_name, &[rank, geometry.fan_in()], &backend.shape(b))?;
                return backend.matmul(a, b);
            };
            let core = backend.shape(t);
            let taps = geometry.fan_in() / weight[1];
            let (i, j) = (core.first().copied().unwrap_or(0), core.get(1).copied().unwrap_or(0));
            expect(NAME, a_name, &[i, weight[0]], &backend.shape(a))?;
            expect(NAME, b_name, &[j, weight[1]], &backend.shape(b))?;
            expect(NAME, t_name, &[&[i, j], &weight[2..]].concat(), &core)?;
            tucker(backend, t, a, b, taps)
        });
        let product = backend.mul(&first?, &second?)?;
        backend.reshape(&backend.scale(&product, parameters.scale)?, &weight)
    }
}

/// `Σ t[i,j,…] · a[i,o] · b[j,n]` as `[out, in · taps]`, from `t: [i, j, taps]`, `a: [i, out]`, `b: [j, in]`.
pub(super) fn tucker<B: Backend>(
    backend: &B,
    t: &B::Tensor,
    a: &B::Tensor,
    b: &B::Tensor,
    taps: usize,
) -> Result<B::Tensor> {
    let (&[i, outputs], &[j, inputs]) = (&*backend.shape(a), &*backend.shape(b)) else {
        return Err(unsupported(NAME, &LayerGeometry::linear(0, 0), "its factors are no matrices"));
    };
    let left = backend.matmul(&backend.permute(a, &[1, 0])?, &backend.reshape(t, &[i, j * taps])?)?;
    let left = backend.permute(&backend.reshape(&left, &[outputs, j, taps])?, &[0, 2, 1])?;
    let both = backend.matmul(&backend.reshape(&left, &[outputs * taps, j])?, b)?;
    let both = backend.permute(&backend.reshape(&both, &[outputs, taps, inputs])?, &[0, 2, 1])?;
    backend.reshape(&both, &[outputs, inputs * taps])
}
