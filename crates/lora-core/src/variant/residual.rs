//! LoRA that starts from the base's own directions: PiSSA (Meng et al., NeurIPS 2024, arXiv:2404.02948) from the largest
//! singular values, OLoRA (Büyükakyüz, arXiv:2406.01775) from a QR decomposition.
//!
//! Elsewhere the base is replaced by `W - scale · up₀ · down₀` for these, and the trained factors fit that changed base
//! only. Here the base stays as it is, quantised or not, and the first values stay beside the trained ones:
//! `ΔW = scale · (up · down - initial_up · initial_down)`. As files hold it (see [`Variant::export`]) it is a plain LoRA of
//! twice the rank, `[up, -initial_up] · [down; initial_down]`, which fits the untouched base; PEFT converts in the same way.
//!
//! A file of PEFT's that was not converted has the trained values alone. What was taken out of the base follows from the
//! base then: it is the same product of the first values, whatever the signs of the singular vectors.

use std::collections::BTreeMap;

use faer::Mat;

use super::lora::{self, DOWN, UP, is_grouped};
use super::{BaseLayer, Dropout, Lora, Parameters, Request, Variant, at_least_one, unsupported};
use crate::backend::Backend;
use crate::linalg::{self, as_matrix};
use crate::random::Stream;
use crate::{AdapterModule, Error, HostTensor, LayerGeometry, Result};

/// Where the first values come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// The largest singular values, exactly.
    Pissa,
    /// The largest singular values by randomised iteration (PEFT's `pissa_niter_…`).
    FastPissa,
    /// The first columns of a QR decomposition.
    Olora,
}

const INITIAL_DOWN: &str = "initial_down";
const INITIAL_UP: &str = "initial_up";
/// Iterations of the randomised decomposition where nobody asks for others.
const ITERATIONS: usize = 16;

impl Residual {
    fn id(self) -> &'static str {
        match self {
            Residual::Pissa => "pissa",
            Residual::FastPissa => "pissa-fast",
            Residual::Olora => "olora",
        }
    }

    /// The first values as parameters of their own, with the sign that takes them out.
    fn initial<B: Backend>(
        self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
    ) -> Result<Parameters<B>> {
        let scale = -parameters.scale;
        if parameters.tensors.contains_key(INITIAL_UP) {
            let share = |name: &str| Ok(backend.share(parameters.get(self.id(), name)?));
            let tensors = [(DOWN, share(INITIAL_DOWN)?), (UP, share(INITIAL_UP)?)];
            return Ok(Parameters { tensors: tensors.map(|(name, tensor)| (name.to_owned(), tensor)).into(), scale });
        }
        let (down, up) = (parameters.get(self.id(), DOWN)?, parameters.get(self.id(), UP)?);
        let rank = backend.shape(down).first().copied().unwrap_or(0);
        let weight = backend.to_host(&backend.detach(&base.weight()?))?;
        let [first_down, first_up] = self.factors(&weight, rank, parameters.scale, ITERATIONS, &Stream::new(0))?;
        let host = |values, like: &B::Tensor| backend.upload(&HostTensor::from_f32(backend.shape(like), values)?, like);
        let tensors = [(DOWN, host(first_down, down)?), (UP, host(first_up, up)?)];
        Ok(Parameters { tensors: tensors.map(|(name, tensor)| (name.to_owned(), tensor)).into(), scale })
    }

    /// `[rank, columns]` and `[rows, rank]` with `scale · up · down` the part of the weight that is taken out.
    fn factors(
        self,
        weight: &HostTensor,
        rank: usize,
        scale: f64,
        iterations: usize,
        stream: &Stream,
    ) -> Result<[Vec<f32>; 2]> {
        let values = weight.to_f32();
        let matrix = as_matrix(&values, weight.shape());
        let (rows, columns) = matrix.shape();
        if rank > rows.min(columns) {
            return Err(Error::Option {
                key: "lora_rank",
                value: rank.to_string(),
                reason: format!("a {rows}×{columns} weight has no more than {} directions", rows.min(columns)),
            });
        }
        let (down, up): (Mat<f32>, Mat<f32>) = match self {
            Residual::Olora => {
                // W = Q R: up = Q[:, :r], down = R[:r], not divided by the scale (as PEFT, by the paper's author).
                let qr = matrix.qr();
                let (q, r) = (qr.compute_thin_Q(), qr.thin_R());
                let down = Mat::from_fn(rank, columns, |i, j| if i <= j { r[(i, j)] } else { 0.0 });
                (down, Mat::from_fn(rows, rank, |i, j| q[(i, j)]))
            }
            _ => {
                let svd = match self {
                    Residual::Pissa => linalg::svd(matrix)?.truncate(rank),
                    _ => linalg::truncated_svd(matrix, rank, iterations, stream)?,
                };
                let root = |k: usize| (svd.values[k] / scale as f32).sqrt();
                (
                    Mat::from_fn(rank, columns, |k, j| root(k) * svd.right[(j, k)]),
                    Mat::from_fn(rows, rank, |i, k| root(k) * svd.left[(i, k)]),
                )
            }
        };
        let row_major = |matrix: &Mat<f32>| {
            (0..matrix.nrows()).flat_map(|i| (0..matrix.ncols()).map(move |j| matrix[(i, j)])).collect()
        };
        Ok([row_major(&down), row_major(&up)])
    }
}

impl<B: Backend> Variant<B> for Residual {
    fn name(&self) -> &str {
        self.id()
    }

    /// `iterations` of `pissa-fast` (16).
    fn options(&self) -> &[&'static str] {
        match self {
            Residual::FastPissa => &["iterations"],
            _ => &[],
        }
    }

    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
        at_least_one(request.rank)?;
        if is_grouped(geometry) || !matches!(geometry, LayerGeometry::Linear { .. } | LayerGeometry::Conv2d { .. }) {
            return Err(unsupported(self.id(), geometry, "it adapts linear layers and ungrouped convolutions"));
        }
        let mut shapes = Variant::<B>::shapes(&Lora, geometry, &Request::rank(request.rank))?;
        let initial =
            [(INITIAL_DOWN, DOWN), (INITIAL_UP, UP)].map(|(name, like)| (name.to_owned(), shapes[like].clone()));
        shapes.extend(initial);
        Ok(shapes)
    }

    fn initialise(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let geometry = base.geometry();
        let shapes = Variant::<B>::shapes(self, &geometry, request)?;
        let weight = backend.to_host(&backend.detach(&base.weight()?))?;
        let iterations = request.whole("iterations", ITERATIONS);
        let [down, up] = self.factors(&weight, request.rank, request.scale, iterations, stream)?;
        let (down, up) = (HostTensor::from_f32(&*shapes[DOWN], down)?, HostTensor::from_f32(&*shapes[UP], up)?);
        Ok(BTreeMap::from([
            (DOWN.to_owned(), down.clone()),
            (UP.to_owned(), up.clone()),
            (INITIAL_DOWN.to_owned(), down),
            (INITIAL_UP.to_owned(), up),
        ]))
    }

    fn is_trained(&self, tensor: &str) -> bool {
        !tensor.starts_with("initial")
    }

    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor> {
        let geometry = base.geometry();
        let trained = lora::product(backend, &geometry, parameters, self.id())?;
        let initial = self.initial(backend, base, parameters)?;
        backend.add(trained, &lora::product(backend, &geometry, &initial, self.id())?)
    }

    fn forward(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        input: &B::Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<B::Tensor> {
        let initial = self.initial(backend, base, parameters)?;
        let trained = lora::with_low_rank(backend, base, parameters, input, dropout, self.id())?;
        let removed = lora::low_rank_output(backend, &base.geometry(), &initial, input, dropout, self.id())?;
        backend.add(trained, &removed)
    }

    fn computes_in_input_dtype(&self, geometry: &LayerGeometry) -> bool {
        lora::takes_factors_as_input(geometry)
    }

    /// Subtracts, where the first values are at hand: a merged weight does not tell them.
    fn unmerge(
        &self,
        backend: &B,
        merged: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        strength: f64,
    ) -> Result<B::Tensor> {
        if !parameters.tensors.contains_key(INITIAL_UP) {
            return Err(Error::NotReversible { variant: self.id().to_owned() });
        }
        let delta = self.delta_weight(backend, merged, parameters)?;
        backend.add(backend.scale(&delta, -strength)?, &merged.weight()?)
    }

    fn export(&self, module: AdapterModule) -> Result<AdapterModule> {
        let get = |name: &str| {
            let missing = || Error::MissingTensor { variant: self.id().to_owned(), tensor: name.to_owned() };
            module.tensors.get(name).ok_or_else(missing)
        };
        let (down, up) = (get(DOWN)?, get(UP)?);
        let (first_down, first_up) = (get(INITIAL_DOWN)?, get(INITIAL_UP)?);
        let rank = module.rank;
        let stacked = [&*down.to_f32(), &*first_down.to_f32()].concat();
        let rows = up.to_f32().chunks_exact(rank).zip(first_up.to_f32().chunks_exact(rank)).fold(
            Vec::with_capacity(2 * up.elements()),
            |mut rows, (now, first)| {
                rows.extend_from_slice(now);
                rows.extend(first.iter().map(|value| -value));
                rows
            },
        );
        let (mut down_shape, mut up_shape) = (down.shape().to_vec(), up.shape().to_vec());
        (down_shape[0], up_shape[1]) = (2 * rank, 2 * rank);
        let tensors = BTreeMap::from([
            (DOWN.to_owned(), HostTensor::from_f32(down_shape, stacked)?),
            (UP.to_owned(), HostTensor::from_f32(up_shape, rows)?),
        ]);
        Ok(AdapterModule { variant: "lora".into(), tensors, rank: 2 * rank, alpha: 2.0 * module.alpha })
    }
}
