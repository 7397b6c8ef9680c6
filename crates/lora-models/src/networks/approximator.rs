//! Chroma's network that makes the shifts, scales and gates of all blocks at once, of a time and of each one's number:
//! diffusers' `ChromaApproximator`.

use lora_io::checkpoint::ComponentWeights;
use lora_torch::norm::{RmsWeight, rms_norm};
use lora_torch::tch::{Kind, Tensor};

use super::joint::Sinusoids;
use crate::Result;
use crate::layers::{AdaptableLayer, Pass};
use crate::weights::{Weights, dimension};

/// Sizes of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApproximatorConfig {
    /// Numbers that a time and a row's number are told by: a quarter for the time, a quarter for a guidance of 0, half for the
    /// row's number.
    pub channels: usize,
    /// Width inside.
    pub inner: usize,
    /// Residual layers.
    pub layers: usize,
}

/// What the norms add under their root: torch's, where none is given.
const EPSILON: f64 = f32::EPSILON as f64;

impl ApproximatorConfig {
    /// Read off a transformer's names and shapes; `None` where it has none.
    ///
    /// # Errors
    /// Where a weight that sizes are read off lacks axes.
    pub(super) fn detect(transformer: &ComponentWeights) -> Result<Option<Self>> {
        const FIRST: &str = "distilled_guidance_layer.in_proj.weight";
        if !transformer.contains(FIRST) {
            return Ok(None);
        }
        let layer = |index: usize| format!("distilled_guidance_layer.layers.{index}.linear_1.weight");
        let config = Self {
            channels: dimension(transformer, FIRST, 1)?,
            inner: dimension(transformer, FIRST, 0)?,
            layers: (0..).take_while(|&index| transformer.contains(&layer(index))).count(),
        };
        if config.channels == 0 || !config.channels.is_multiple_of(8) {
            let reason = format!("approximator of {} numbers; expected a multiple of 8", config.channels);
            return Err(super::config::wrong(transformer, reason));
        }
        Ok(Some(config))
    }
}

/// The network.
#[derive(Debug)]
pub(super) struct Approximator {
    times: Sinusoids,
    /// Each row's number as sinusoids, `[rows, channels / 2]`, f32.
    rows: Tensor,
    in_proj: AdaptableLayer,
    layers: Vec<Layer>,
    out_proj: AdaptableLayer,
}

#[derive(Debug)]
struct Layer {
    norm: Tensor,
    linear_1: AdaptableLayer,
    linear_2: AdaptableLayer,
}

impl Approximator {
    /// `weights` are its own. It makes so many rows of `width`. Layers in between are held as blocks are, the first and the last in
    /// the compute dtype.
    pub(super) fn new(weights: &Weights<'_>, sizes: ApproximatorConfig, width: usize, rows: usize) -> Result<Self> {
        let ApproximatorConfig { channels, inner, layers } = sizes;
        let device = weights.device();
        let numbers = Tensor::f_arange(rows as i64, (Kind::Float, device))?;
        let linear = |weights: &Weights<'_>, inputs, outputs| AdaptableLayer::linear(weights, inputs, outputs, true);
        let layer = |index: usize| {
            let own = weights.at("layers").at(index);
            Ok(Layer {
                norm: weights.at("norms").at(index).tensor("weight", &[inner])?,
                linear_1: linear(&own.at("linear_1"), inner, inner)?,
                linear_2: linear(&own.at("linear_2"), inner, inner)?,
            })
        };
        Ok(Self {
            times: Sinusoids::of_width(channels / 4, device)?,
            rows: Sinusoids::of_width(channels / 2, device)?.of_thousandfold(&numbers)?,
            in_proj: linear(&weights.plain().at("in_proj"), channels, inner)?,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
            out_proj: linear(&weights.plain().at("out_proj"), inner, width)?,
        })
    }

    /// The table of noise levels `[batch]`: `[batch, rows, width]` in the compute dtype.
    pub(super) fn forward(&self, sigmas: &Tensor, pass: &Pass) -> Result<Tensor> {
        let times = self.times.of_thousandfold(sigmas)?;
        let guidance = self.times.of_thousandfold(&sigmas.f_zeros_like()?)?;
        let told = Tensor::f_cat(&[times, guidance], 1)?.f_unsqueeze(1)?;
        let (batch, rows) = (sigmas.size1()?, self.rows.size2()?.0);
        let told = told.f_expand([batch, rows, -1], false)?;
        let numbers = self.rows.f_unsqueeze(0)?.f_expand([batch, rows, -1], false)?;
        let told = Tensor::f_cat(&[told, numbers], -1)?.f_to_kind(self.in_proj.kind())?;
        let mut state = self.in_proj.forward(&told, pass)?;
        for layer in &self.layers {
            let weight = layer.norm.f_to_kind(state.kind())?;
            let normed = rms_norm(&state, Some(&weight), EPSILON, RmsWeight::Single)?;
            let inner = layer.linear_1.forward(&normed, pass)?.f_silu()?;
            state = state.f_add(&layer.linear_2.forward(&inner, pass)?)?;
        }
        self.out_proj.forward(&state, pass)
    }

    pub(super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        visit(&mut self.in_proj);
        for layer in &mut self.layers {
            visit(&mut layer.linear_1);
            visit(&mut layer.linear_2);
        }
        visit(&mut self.out_proj);
    }
}
