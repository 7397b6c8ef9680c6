//! Orthogonal finetuning: the weight is rotated, not added to. OFT (Qiu et al., NeurIPS 2023, arXiv:2306.07280) with
//! one rotation per block of features, BOFT (Liu et al., ICLR 2024, arXiv:2311.06243) with a product of several, mixed
//! like a butterfly. A rotation is the Cayley transform of a skew matrix `Q`.
//!
//! | variant | tensors | rotation | acts on |
//! |---|---|---|---|
//! | `oft` (LyCORIS diag-OFT) | `blocks [n, b, b]`, `Q = B - Bᵀ`; `rescale [out, 1, …]` | `((I + Q)(I - Q)⁻¹)ᵀ` | outputs |
//! | `boft` (LyCORIS) | `blocks [m, n, b, b]`, `rescale` | `(I + Q)(I - Q)⁻¹` each | outputs |
//! | `peft-oft` | `skew [n, b(b-1)/2]`, the upper triangle of `Q`; `n` = 1: shared by all blocks | `(I - Q)(I + Q)⁻¹` | inputs |
//! | `peft-oft-neumann` | the same | `I + 2Q + 2Q² + 2Q³ + Q⁴` | inputs |
//! | `peft-boft` | `blocks [m, n, b, b]`, `Q = (B - Bᵀ)/2`; `rescale [out, 1]` | `(I - Q)(I + Q)⁻¹` each | inputs |
//!
//! LyCORIS' files hold a constraint as alpha: where `‖Q‖` (over all blocks) exceeds constraint · outputs, Q is scaled
//! down to it. It is [`Parameters::scale`] here, 0 for none. `peft-oft` is trained on linear layers and 1×1
//! convolutions; larger kernels are merged as PEFT merges them, by the rotation of all their inputs, which is not quite
//! what PEFT's live layer computes. Merged with a strength other than 1 the weights are interpolated.

use std::collections::BTreeMap;

use super::{BaseLayer, Dropout, Parameters, Request, Variant, at_least_one, unsupported};
use crate::backend::Backend;
use crate::random::Stream;
use crate::{Error, HostTensor, LayerGeometry, Result};

/// One rotation per block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Oft {
    /// LyCORIS' diag-OFT, on the outputs.
    Lycoris,
    /// PEFT's on the inputs, exact.
    PeftExact,
    /// PEFT's with its default series for the rotation.
    PeftNeumann,
}

/// Several rotations with a butterfly between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boft {
    /// LyCORIS', on the outputs.
    Lycoris,
    /// PEFT's, on the inputs (several factors need its CUDA extension there).
    Peft,
}

const BLOCKS: &str = "blocks";
const SKEW: &str = "skew";
const RESCALE: &str = "rescale";

/// PEFT trains such layers with overlapping patches of the input, rotated and summed up, which no weight does.
const SPATIAL: &str = "PEFT trains a kernel larger than 1×1 as no change of its weight; use `oft`";

/// How `Q` becomes a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cayley {
    /// `(I + Q)(I - Q)⁻¹`.
    Forward,
    /// `(I - Q)(I + Q)⁻¹`, the inverse of that.
    Backward,
    /// The first terms of the series of [`Cayley::Forward`].
    Neumann,
}

/// The rotations `[n, b, b]` of skew matrices `[n, b, b]`.
fn rotation<B: Backend>(backend: &B, skew: &B::Tensor, cayley: Cayley) -> Result<B::Tensor> {
    let shape = backend.shape(skew);
    let side = shape[shape.len() - 1];
    let identity = backend.identity(side, skew)?;
    match cayley {
        Cayley::Neumann => {
            let square = backend.matmul(skew, skew)?;
            let cube = backend.matmul(&square, skew)?;
            let fourth = backend.matmul(&cube, skew)?;
            let sum = backend.add(backend.scale(skew, 2.0)?, &identity)?;
            let sum = backend.add(sum, &backend.scale(&square, 2.0)?)?;
            backend.add(backend.add(sum, &backend.scale(&cube, 2.0)?)?, &fourth)
        }
        Cayley::Forward | Cayley::Backward => {
            let sign = if cayley == Cayley::Forward { 1.0 } else { -1.0 };
            let plus = backend.add(backend.scale(skew, sign)?, &identity)?;
            let minus = backend.add(backend.scale(skew, -sign)?, &identity)?;
            backend.matmul(&plus, &backend.inverse(&minus)?)
        }
    }
}

/// `factor · (B - Bᵀ)` over the last two axes.
fn antisymmetric<B: Backend>(backend: &B, blocks: &B::Tensor, factor: f64) -> Result<B::Tensor> {
    let axes = backend.shape(blocks).len();
    let mut order: Vec<usize> = (0..axes).collect();
    order.swap(axes - 1, axes - 2);
    let transposed = backend.scale(&backend.permute(blocks, &order)?, -factor)?;
    backend.add(backend.scale(blocks, factor)?, &transposed)
}

/// `Q` no longer than the constraint allows: `Q / max(1, ‖Q‖ / limit)`.
fn constrained<B: Backend>(backend: &B, skew: B::Tensor, limit: f64) -> Result<B::Tensor> {
    if limit <= 0.0 {
        return Ok(skew);
    }
    let axes: Vec<usize> = (0..backend.shape(&skew).len()).collect();
    // Squares, as a norm has no gradient at 0, where training begins. No number is read: that would wait for the
    // device.
    let squares = backend.sum(&backend.mul(&skew, &skew)?, &axes)?;
    let excess = backend.sqrt(&backend.at_least(&backend.scale(&squares, limit.powi(-2))?, 1.0)?)?;
    backend.div(&skew, &excess)
}

/// The weight as a matrix `[out, fan_in]`, in the dtype of `like`.
fn matrix<B: Backend>(backend: &B, base: &dyn BaseLayer<B>, like: &B::Tensor, variant: &str) -> Result<B::Tensor> {
    let geometry = base.geometry();
    supported(&geometry, variant)?;
    backend.reshape(&backend.cast_like(&base.weight()?, like)?, &[geometry.outputs(), geometry.fan_in()])
}

fn supported(geometry: &LayerGeometry, variant: &str) -> Result<()> {
    match geometry {
        LayerGeometry::Linear { .. } | LayerGeometry::Conv2d { .. } => Ok(()),
        _ => Err(unsupported(variant, geometry, "it adapts linear layers and convolutions")),
    }
}

fn wrong_blocks(variant: &str, features: usize, found: &[usize]) -> Error {
    Error::Shape {
        what: format!("blocks of variant `{variant}`"),
        expected: format!("blocks that make up {features} features"),
        found: format!("{found:?}"),
    }
}

/// `M[o, (n b)] → Σ_c M[o, n, c] · R[n, k, c]`: the columns of a matrix, block by block, by the rotations.
fn rotate_columns<B: Backend>(backend: &B, matrix: &B::Tensor, rotations: &B::Tensor) -> Result<B::Tensor> {
    let (&[rows, columns], &[n, side, _]) = (&*backend.shape(matrix), &*backend.shape(rotations)) else {
        return Err(wrong_blocks("oft", 0, &backend.shape(rotations)));
    };
    let blocks = columns / side;
    let folded = backend.permute(&backend.reshape(matrix, &[rows, blocks, side])?, &[1, 0, 2])?;
    let turned = backend.permute(rotations, &[0, 2, 1])?;
    let turned = if n == 1 && blocks > 1 { backend.select(&turned, 0, &vec![0; blocks])? } else { turned };
    let product = backend.matmul(&folded, &turned)?;
    backend.reshape(&backend.permute(&product, &[1, 0, 2])?, &[rows, columns])
}

/// `R · M` with the rows of `M: [(n b), columns]` taken block by block.
fn rotate_rows<B: Backend>(backend: &B, rotations: &B::Tensor, matrix: &B::Tensor) -> Result<B::Tensor> {
    let (&[rows, columns], &[n, side, _]) = (&*backend.shape(matrix), &*backend.shape(rotations)) else {
        return Err(wrong_blocks("oft", 0, &backend.shape(rotations)));
    };
    let product = backend.matmul(rotations, &backend.reshape(matrix, &[n, side, columns])?)?;
    backend.reshape(&product, &[rows, columns])
}

/// The rotations `[m, n, b, b]` one after the other on the rows `[n · b, columns]`. Stage i works on pairs of segments
/// of `unit` rows that lie `2^i · b/2` rows apart.
fn butterfly_rows<B: Backend>(
    backend: &B,
    rotations: &B::Tensor,
    mut rows: B::Tensor,
    columns: usize,
    unit: usize,
) -> Result<B::Tensor> {
    let &[stages, n, side, _] = &*backend.shape(rotations) else {
        return Err(wrong_blocks("boft", 0, &backend.shape(rotations)));
    };
    let features = n * side;
    for stage in 0..stages {
        let rotation = backend.reshape(&backend.select(rotations, 0, &[stage])?, &[n, side, side])?;
        let reach = (1 << stage) * side / 2;
        let spread = reach / unit.max(1);
        if spread <= 1 {
            rows = rotate_rows(backend, &rotation, &rows)?;
            continue;
        }
        // [groups, 2, spread] ⇄ [groups, spread, 2] segments.
        let groups = features / (2 * reach);
        let width = unit * columns;
        rows = backend.permute(&backend.reshape(&rows, &[groups, 2, spread, width])?, &[0, 2, 1, 3])?;
        rows = rotate_rows(backend, &rotation, &backend.reshape(&rows, &[features, columns])?)?;
        rows = backend.permute(&backend.reshape(&rows, &[groups, spread, 2, width])?, &[0, 2, 1, 3])?;
        rows = backend.reshape(&rows, &[features, columns])?;
    }
    Ok(rows)
}

fn rescaled<B: Backend>(backend: &B, parameters: &Parameters<B>, rotated: B::Tensor) -> Result<B::Tensor> {
    let Some(rescale) = parameters.tensors.get(RESCALE) else { return Ok(rotated) };
    let outputs = backend.shape(&rotated)[0];
    backend.mul(&rotated, &backend.reshape(rescale, &[outputs, 1])?)
}

impl Oft {
    fn id(self) -> &'static str {
        match self {
            Oft::Lycoris => "oft",
            Oft::PeftExact => "peft-oft",
            Oft::PeftNeumann => "peft-oft-neumann",
        }
    }

    fn rotations<B: Backend>(
        self,
        backend: &B,
        geometry: &LayerGeometry,
        parameters: &Parameters<B>,
    ) -> Result<B::Tensor> {
        match self {
            Oft::Lycoris => {
                let blocks = parameters.get(self.id(), BLOCKS)?;
                match *backend.shape(blocks) {
                    [n, b, c] if b == c && n * b == geometry.outputs() => {}
                    ref found => return Err(wrong_blocks(self.id(), geometry.outputs(), found)),
                }
                let limit = parameters.scale * geometry.outputs() as f64;
                let skew = constrained(backend, antisymmetric(backend, blocks, 1.0)?, limit)?;
                backend.permute(&rotation(backend, &skew, Cayley::Forward)?, &[0, 2, 1])
            }
            Oft::PeftExact | Oft::PeftNeumann => {
                let skew = parameters.get(self.id(), SKEW)?;
                let shape = backend.shape(skew);
                let count = shape.get(1).copied().unwrap_or(0);
                let blocks = shape.first().copied().unwrap_or(0);
                let side = (1 + 8 * count).isqrt().div_ceil(2);
                let features = geometry.fan_in();
                let fits = side > 1
                    && side * (side - 1) / 2 == count
                    && (blocks * side == features || blocks == 1 && features.is_multiple_of(side));
                if !fits {
                    return Err(wrong_blocks(self.id(), features, &shape));
                }
                let cayley = if self == Oft::PeftExact { Cayley::Backward } else { Cayley::Neumann };
                rotation(backend, &antisymmetric(backend, &backend.above_diagonal(skew, side)?, 1.0)?, cayley)
            }
        }
    }
}

impl<B: Backend> Variant<B> for Oft {
    fn name(&self) -> &str {
        self.id()
    }

    /// `rescale` (LyCORIS): a factor for each output too; `constraint`: see above. `block_share` (PEFT): one rotation
    /// for all blocks.
    fn options(&self) -> &[&'static str] {
        match self {
            Oft::Lycoris => &["rescale", "constraint"],
            _ => &["block_share"],
        }
    }

    /// The rank is the size of a block; the nearest smaller size that divides the features is taken.
    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        supported(geometry, self.id())?;
        if *self != Oft::Lycoris && geometry.is_spatial() {
            return Err(unsupported(self.id(), geometry, SPATIAL));
        }
        let wanted = at_least_one(request.rank)?;
        let features = if *self == Oft::Lycoris { geometry.outputs() } else { geometry.fan_in() };
        let side = (1..=wanted.min(features)).rev().find(|side| features % side == 0).unwrap_or(1);
        if side < 2 {
            return Err(unsupported(
                self.id(),
                geometry,
                "no block of 2 or more features divides it; take another rank",
            ));
        }
        let n = features / side;
        let mut shapes = BTreeMap::new();
        if *self == Oft::Lycoris {
            shapes.insert(BLOCKS.to_owned(), vec![n, side, side]);
            if request.switch("rescale") {
                shapes.insert(RESCALE.to_owned(), rescale_shape(geometry));
            }
        } else {
            let n = if request.switch("block_share") { 1 } else { n };
            shapes.insert(SKEW.to_owned(), vec![n, side * (side - 1) / 2]);
        }
        Ok(shapes)
    }

    /// The constraint, 0 for none.
    fn rank_and_alpha(&self, _geometry: &LayerGeometry, request: &Request, _alpha: f64) -> (usize, f64) {
        match self {
            Self::Lycoris => (1, request.options.get("constraint").copied().unwrap_or(0.0)),
            _ => (1, 1.0),
        }
    }

    fn initialise(
        &self,
        _backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        _stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        at_rest(Variant::<B>::shapes(self, &base.geometry(), request)?)
    }

    fn is_additive(&self) -> bool {
        false
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let rotations = self.rotations(backend, &geometry, parameters)?;
        let weight = matrix(backend, base, &rotations, self.id())?;
        let rotated = match self {
            Oft::Lycoris => rescaled(backend, parameters, rotate_rows(backend, &rotations, &weight)?)?,
            _ => rotate_columns(backend, &weight, &rotations)?,
        };
        let delta = backend.add(rotated, &backend.scale(&weight, -1.0)?)?;
        backend.reshape(&delta, &geometry.weight_shape())
    }

    fn forward(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        input: &B::Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<B::Tensor> {
        if *self != Oft::Lycoris && base.geometry().is_spatial() {
            return Err(unsupported(self.id(), &base.geometry(), SPATIAL));
        }
        super::forward_with_weight(self, backend, base, parameters, input, dropout)
    }

    /// Rotates back; exact where the rotation is (`peft-oft-neumann`'s is not) and the strength is 1.
    fn unmerge(
        &self,
        backend: &B,
        merged: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        strength: f64,
    ) -> Result<B::Tensor> {
        if strength != 1.0 || *self == Oft::PeftNeumann || parameters.tensors.contains_key(RESCALE) {
            return Err(Error::NotReversible { variant: self.id().to_owned() });
        }
        let geometry = merged.geometry();
        let back = backend.permute(&self.rotations(backend, &geometry, parameters)?, &[0, 2, 1])?;
        let weight = matrix(backend, merged, &back, self.id())?;
        let weight = match self {
            Oft::Lycoris => rotate_rows(backend, &back, &weight)?,
            _ => rotate_columns(backend, &weight, &back)?,
        };
        backend.reshape(&weight, &geometry.weight_shape())
    }
}

impl Boft {
    fn id(self) -> &'static str {
        match self {
            Boft::Lycoris => "boft",
            Boft::Peft => "peft-boft",
        }
    }
}

impl<B: Backend> Variant<B> for Boft {
    fn name(&self) -> &str {
        self.id()
    }

    /// `rescale` (LyCORIS): a factor for each output too (PEFT always has it); `constraint`: see above.
    fn options(&self) -> &[&'static str] {
        match self {
            Boft::Lycoris => &["rescale", "constraint"],
            Boft::Peft => &[],
        }
    }

    /// The rank is the largest size of a block. LyCORIS: `outputs = block · 2^p`, with as many stages as p and one.
    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        supported(geometry, self.id())?;
        let wanted = at_least_one(request.rank)?;
        let features = if *self == Boft::Lycoris { geometry.outputs() } else { geometry.fan_in() };
        let fits = |side: &usize| {
            features % side == 0
                && (*self == Boft::Peft || side.is_multiple_of(2) && (features / side).is_power_of_two())
        };
        let side = (2..=wanted.min(features)).rev().find(fits);
        let Some(side) = side else {
            return Err(unsupported(
                self.id(),
                geometry,
                "no block size up to the rank divides it as a butterfly must",
            ));
        };
        let n = features / side;
        let stages = if *self == Boft::Peft { 1 } else { (n - 1).count_ones() as usize + 1 };
        let mut shapes = BTreeMap::from([(BLOCKS.to_owned(), vec![stages, n, side, side])]);
        if *self == Boft::Peft {
            shapes.insert(RESCALE.to_owned(), vec![geometry.outputs(), 1]);
        } else if request.switch("rescale") {
            shapes.insert(RESCALE.to_owned(), rescale_shape(geometry));
        }
        Ok(shapes)
    }

    /// The constraint, 0 for none.
    fn rank_and_alpha(&self, _geometry: &LayerGeometry, request: &Request, _alpha: f64) -> (usize, f64) {
        match self {
            Self::Lycoris => (1, request.options.get("constraint").copied().unwrap_or(0.0)),
            _ => (1, 1.0),
        }
    }

    fn initialise(
        &self,
        _backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        _stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        at_rest(Variant::<B>::shapes(self, &base.geometry(), request)?)
    }

    fn is_additive(&self) -> bool {
        false
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let blocks = parameters.get(self.id(), BLOCKS)?;
        let features = if *self == Boft::Lycoris { geometry.outputs() } else { geometry.fan_in() };
        let &[stages, n, side, square] = &*backend.shape(blocks) else {
            return Err(wrong_blocks(self.id(), features, &backend.shape(blocks)));
        };
        let pairs = match self {
            Boft::Lycoris => n.is_power_of_two(),
            Boft::Peft => n > 0 && n.trailing_zeros() as usize + 1 >= stages,
        };
        let butterfly = pairs && side % 2 == 0 && stages <= n.ilog2() as usize + 1;
        let shaped = side == square && n * side == features;
        if !shaped || stages == 0 || (stages > 1 && !butterfly) {
            return Err(wrong_blocks(self.id(), features, &backend.shape(blocks)));
        }
        let weight = matrix(backend, base, blocks, self.id())?;
        let columns = geometry.fan_in();
        let rotated = match self {
            Boft::Peft => {
                let skew = antisymmetric(backend, blocks, 0.5)?;
                let rotations = rotation(backend, &skew, Cayley::Backward)?;
                let inputs = backend.permute(&weight, &[1, 0])?;
                // Segments of half a block are mixed.
                backend.permute(&butterfly_rows(backend, &rotations, inputs, geometry.outputs(), side / 2)?, &[1, 0])?
            }
            Boft::Lycoris => {
                let limit = parameters.scale * geometry.outputs() as f64;
                let skew = constrained(backend, antisymmetric(backend, blocks, 1.0)?, limit)?;
                let rotations = rotation(backend, &skew, Cayley::Forward)?;
                // Single features are mixed.
                butterfly_rows(backend, &rotations, backend.share(&weight), columns, 1)?
            }
        };
        let rotated = rescaled(backend, parameters, rotated)?;
        let delta = backend.add(backend.scale(&rotated, 1.0)?, &backend.scale(&weight, -1.0)?)?;
        backend.reshape(&delta, &geometry.weight_shape())
    }
}

fn rescale_shape(geometry: &LayerGeometry) -> Vec<usize> {
    let mut shape = vec![1; geometry.weight_shape().len()];
    shape[0] = geometry.outputs();
    shape
}

/// No rotation, factors of one.
fn at_rest(shapes: BTreeMap<String, Vec<usize>>) -> Result<BTreeMap<String, HostTensor>> {
    let first = |(name, shape): (String, Vec<usize>)| {
        let count = shape.iter().product();
        let value = if name == RESCALE { 1.0 } else { 0.0 };
        Ok((name, HostTensor::from_f32(shape, vec![value; count])?))
    };
    shapes.into_iter().map(first).collect()
}
