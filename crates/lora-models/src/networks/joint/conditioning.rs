//! Numbers as sinusoids, and the two layers that make a vector of the network's width of them or of pooled text.

use lora_torch::tch::{Device, Kind, Tensor};

use crate::Result;
use crate::layers::{AdaptableLayer, Pass};
use crate::weights::Weights;

/// Numbers that a time or a guidance is embedded in.
pub(in super::super) const SINUSOIDS: usize = 256;

/// Frequencies of sinusoids (Vaswani et al., 2017).
#[derive(Debug)]
pub(in super::super) struct Sinusoids {
    /// `[width / 2]`, f32.
    frequencies: Tensor,
}

impl Sinusoids {
    pub(in super::super) fn new(device: Device) -> Result<Self> {
        Self::of_width(SINUSOIDS, device)
    }

    /// In another width than usual.
    pub(in super::super) fn of_width(width: usize, device: Device) -> Result<Self> {
        let half = (width / 2) as i64;
        // In f32 by libtorch, as the models were trained: a time of 1000 times another frequency is another angle.
        let exponents = Tensor::f_arange(half, (Kind::Float, device))?.f_mul_scalar(-(10_000f64.ln()))?;
        Ok(Self { frequencies: exponents.f_div_scalar(half as f64)?.f_exp()? })
    }

    /// Of `numbers` `[batch]` as they are: `[batch, width]` f32, cosines first.
    pub(in super::super) fn of_numbers(&self, numbers: &Tensor) -> Result<Tensor> {
        self.of(&numbers.f_to_kind(Kind::Float)?, 1.0)
    }

    /// Of a thousand times `numbers` `[batch]`: `[batch, width]` f32, cosines first.
    pub(in super::super) fn of_thousandfold(&self, numbers: &Tensor) -> Result<Tensor> {
        self.of(&numbers.f_to_kind(Kind::Float)?.f_mul_scalar(1000.0)?, 1.0)
    }

    /// Of `numbers` by frequencies a thousand times as high: the same but for roundings, which large angles show.
    pub(in super::super) fn at_thousandfold(&self, numbers: &Tensor) -> Result<Tensor> {
        self.of(&numbers.f_to_kind(Kind::Float)?, 1000.0)
    }

    fn of(&self, numbers: &Tensor, factor: f64) -> Result<Tensor> {
        let angles = numbers.f_unsqueeze(1)?.f_mul(&self.frequencies)?;
        let angles = if factor == 1.0 { angles } else { angles.f_mul_scalar(factor)? };
        Ok(Tensor::f_cat(&[angles.f_cos()?, angles.f_sin()?], -1)?)
    }
}

/// Two linear layers with SiLU between them.
#[derive(Debug)]
pub(in super::super) struct Embedder {
    linear_1: AdaptableLayer,
    linear_2: AdaptableLayer,
}

impl Embedder {
    pub(in super::super) fn new(weights: &Weights<'_>, inputs: usize, width: usize, bias: bool) -> Result<Self> {
        Self::of_sizes(weights, [inputs, width, width], bias)
    }

    /// The same whose answer has another width than what is between the layers.
    pub(in super::super) fn of_sizes(weights: &Weights<'_>, sizes: [usize; 3], bias: bool) -> Result<Self> {
        let [inputs, width, outputs] = sizes;
        Ok(Self {
            linear_1: AdaptableLayer::linear(&weights.at("linear_1"), inputs, width, bias)?,
            linear_2: AdaptableLayer::linear(&weights.at("linear_2"), width, outputs, bias)?,
        })
    }

    /// `[batch, inputs]` of any number type to `[batch, outputs]` in the compute dtype.
    pub(in super::super) fn forward(&self, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        let input = input.f_to_kind(self.linear_1.kind())?;
        self.linear_2.forward(&self.linear_1.forward(&input, pass)?.f_silu()?, pass)
    }

    pub(in super::super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        [&mut self.linear_1, &mut self.linear_2].into_iter().for_each(visit);
    }
}
