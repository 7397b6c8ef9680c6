//! Wan's autoencoder (Alibaba, 2025) as Qwen-Image has it, for one picture; diffusers' `AutoencoderKLQwenImage`. Frozen; it
//! carries no adapters.
//!
//! Its convolutions are three-dimensional and see earlier frames. Of one frame there are none, so that each is the
//! two-dimensional convolution of its kernel's last frame, and what changes the number of frames does nothing.

use lora_io::checkpoint::ComponentWeights;
use lora_torch::tch::{Device, Kind, Tensor};
use serde_json::Value;

use super::config;
use super::vae::{Coders, LatentStatistics, VaeConfig};
use crate::Result;
use crate::layers::attention;
use crate::weights::{Weights, dimension};

/// Latents' means by channel, as published with Wan 2.1 and Qwen-Image.
pub(crate) const MEANS: [f32; 16] = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
    -0.9497, 0.2503, -0.2921,
];
/// Their standard deviations.
pub(crate) const DEVIATIONS: [f32; 16] = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
    2.8251, 1.9160,
];

/// Read off a component's names and shapes; the statistics of latents from its `config.json`, and without one as published.
///
/// # Errors
/// Where a weight that sizes are read off is missing or lacks axes; for statistics that are no numbers, not as many as
/// channels, or deviations that are not above zero.
pub(super) fn detect(component: &ComponentWeights) -> Result<VaeConfig> {
    let block = |index: usize, end: &str| format!("encoder.down_blocks.{index}.{end}.weight");
    let is_block = |index: &usize| ["conv1", "resample.1"].iter().any(|end| component.contains(&block(*index, end)));
    let count = (0..).take_while(is_block).count();
    let samplers: Vec<usize> = (0..count).filter(|&index| component.contains(&block(index, "resample.1"))).collect();
    let level = |&index: &usize| dimension(component, &block(index, "resample.1"), 0);
    let mut channels = samplers.iter().map(level).collect::<Result<Vec<_>>>()?;
    channels.push(dimension(component, "encoder.conv_out.weight", 1)?);
    let latent_channels = dimension(component, "decoder.conv_in.weight", 1)?;
    let statistic = |key: &str, published: &[f32]| -> Result<Vec<f32>> {
        let said = config::value(component, key).map(|value| value.as_array().map(Vec::as_slice).unwrap_or_default());
        let all: Vec<f32> = match said {
            Some(said) => said.iter().filter_map(Value::as_f64).map(|number| number as f32).collect(),
            None => published.to_vec(),
        };
        if all.len() == latent_channels {
            return Ok(all);
        }
        let reason = format!("{key} has {} numbers for {latent_channels} channels of latents", all.len());
        Err(config::wrong(component, reason))
    };
    let (means, deviations) = (statistic("latents_mean", &MEANS)?, statistic("latents_std", &DEVIATIONS)?);
    if !deviations.iter().all(|deviation| *deviation > 0.0) {
        return Err(config::wrong(component, "latents_std has numbers that are not above zero".into()));
    }
    Ok(VaeConfig {
        latent_channels,
        layers_per_block: samplers.first().copied().unwrap_or(count),
        channels,
        norm_groups: 1,
        scaling_factor: 1.0,
        shift_factor: 0.0,
        statistics: Some(LatentStatistics { side: 1, means, deviations }),
        quant_convs: true,
        overflows_in_half: false,
        causal: true,
    })
}

/// A convolution whose kernel's last frame is taken.
#[derive(Debug)]
struct Convolution {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
}

impl Convolution {
    /// Of three dimensions, one pixel of padding where the kernel is three pixels wide.
    fn causal(weights: &Weights<'_>, [inputs, outputs, side]: [usize; 3]) -> Result<Self> {
        let kernel = weights.tensor("weight", &[outputs, inputs, side, side, side])?;
        // Of a source of shapes alone it has no axes.
        let weight = if kernel.dim() == 5 { kernel.f_select(2, side as i64 - 1)?.f_contiguous()? } else { kernel };
        Ok(Self { weight, bias: weights.tensor("bias", &[outputs])?, stride: 1, padding: side as i64 / 2 })
    }

    /// Of two.
    fn flat(weights: &Weights<'_>, [inputs, outputs, side]: [usize; 3], stride: i64, padding: i64) -> Result<Self> {
        let weight = weights.tensor("weight", &[outputs, inputs, side, side])?;
        Ok(Self { weight, bias: weights.tensor("bias", &[outputs])?, stride, padding })
    }

    fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        Ok(input.f_conv2d(&self.weight, Some(&self.bias), stride, padding, [1, 1], 1)?)
    }
}

/// A root mean square norm over channels.
#[derive(Debug)]
struct Norm {
    /// One number a channel, multiplied by the root of how many there are.
    gamma: Tensor,
}

impl Norm {
    /// `axes` are those of its weight behind the channels.
    fn new(weights: &Weights<'_>, channels: usize, axes: usize) -> Result<Self> {
        let shape = [&[channels], &[1, 1, 1][..axes]].concat();
        Ok(Self { gamma: weights.tensor("gamma", &shape)?.f_mul_scalar((channels as f64).sqrt())? })
    }

    fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let length = input.f_norm_scalaropt_dim_dtype(2.0, [1i64], true, Kind::Float)?.f_clamp_min(1e-12)?;
        let kind = input.kind();
        Ok(input.f_mul(&length.f_reciprocal()?.f_to_kind(kind)?)?.f_mul(&self.gamma.f_view([-1, 1, 1])?)?)
    }
}

#[derive(Debug)]
struct Resnet {
    norm1: Norm,
    conv1: Convolution,
    norm2: Norm,
    conv2: Convolution,
    shortcut: Option<Convolution>,
}

impl Resnet {
    fn new(weights: &Weights<'_>, inputs: usize, outputs: usize) -> Result<Self> {
        let shortcut = || Convolution::causal(&weights.at("conv_shortcut"), [inputs, outputs, 1]);
        Ok(Self {
            norm1: Norm::new(&weights.at("norm1"), inputs, 3)?,
            conv1: Convolution::causal(&weights.at("conv1"), [inputs, outputs, 3])?,
            norm2: Norm::new(&weights.at("norm2"), outputs, 3)?,
            conv2: Convolution::causal(&weights.at("conv2"), [outputs, outputs, 3])?,
            shortcut: (inputs != outputs).then(shortcut).transpose()?,
        })
    }

    fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let hidden = self.conv1.forward(&self.norm1.forward(input)?.f_silu()?)?;
        let hidden = self.conv2.forward(&self.norm2.forward(&hidden)?.f_silu()?)?;
        Ok(match &self.shortcut {
            Some(shortcut) => hidden.f_add(&shortcut.forward(input)?)?,
            None => hidden.f_add(input)?,
        })
    }
}

/// Two residual blocks and the attention between them.
#[derive(Debug)]
struct Middle {
    resnets: [Resnet; 2],
    norm: Norm,
    to_qkv: Convolution,
    proj: Convolution,
}

impl Middle {
    fn new(weights: &Weights<'_>, width: usize) -> Result<Self> {
        let (resnets, attention) = (weights.at("resnets"), weights.at("attentions.0"));
        Ok(Self {
            resnets: [Resnet::new(&resnets.at(0), width, width)?, Resnet::new(&resnets.at(1), width, width)?],
            norm: Norm::new(&attention.at("norm"), width, 2)?,
            to_qkv: Convolution::flat(&attention.at("to_qkv"), [width, 3 * width, 1], 1, 0)?,
            proj: Convolution::flat(&attention.at("proj"), [width, width, 1], 1, 0)?,
        })
    }

    fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let input = self.resnets[0].forward(input)?;
        let (batch, channels, height, width) = input.size4()?;
        let all = self.to_qkv.forward(&self.norm.forward(&input)?)?.f_flatten(2, 3)?.f_transpose(1, 2)?;
        let all = all.f_chunk(3, -1)?;
        let mixed = attention(&all[0], &all[1], &all[2], 1, false)?;
        let mixed = mixed.f_transpose(1, 2)?.f_reshape([batch, channels, height, width])?;
        self.resnets[1].forward(&self.proj.forward(&mixed)?.f_add(&input)?)
    }
}

/// The encoder or the decoder: levels on the outside of it, the middle block inside.
#[derive(Debug)]
struct Coder {
    conv_in: Convolution,
    levels: Vec<(Vec<Resnet>, Option<Convolution>)>,
    middle: Middle,
    norm_out: Norm,
    conv_out: Convolution,
}

impl Coder {
    fn encoder(weights: &Weights<'_>, config: &VaeConfig) -> Result<Self> {
        let (channels, blocks) = (&config.channels, weights.at("down_blocks"));
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let (mut levels, mut at, mut inputs) = (Vec::new(), 0, first);
        for (index, &outputs) in channels.iter().enumerate() {
            let mut resnets = Vec::new();
            for _ in 0..config.layers_per_block {
                resnets.push(Resnet::new(&blocks.at(at), inputs, outputs)?);
                (at, inputs) = (at + 1, outputs);
            }
            // It pads only right and below before it halves, so its convolution pads nothing.
            let halves = || Convolution::flat(&blocks.at(at).at("resample.1"), [outputs, outputs, 3], 2, 0);
            levels.push((resnets, (index + 1 < channels.len()).then(halves).transpose()?));
            at += 1;
        }
        Ok(Self {
            conv_in: Convolution::causal(&weights.at("conv_in"), [3, first, 3])?,
            levels,
            middle: Middle::new(&weights.at("mid_block"), last)?,
            norm_out: Norm::new(&weights.at("norm_out"), last, 3)?,
            conv_out: Convolution::causal(&weights.at("conv_out"), [last, 2 * config.latent_channels, 3])?,
        })
    }

    fn decoder(weights: &Weights<'_>, config: &VaeConfig) -> Result<Self> {
        let (channels, blocks) = (&config.channels, weights.at("up_blocks"));
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let (mut levels, mut inputs) = (Vec::new(), last);
        for (index, &outputs) in channels.iter().rev().enumerate() {
            let (block, mut resnets) = (blocks.at(index), Vec::new());
            for layer in 0..=config.layers_per_block {
                resnets.push(Resnet::new(&block.at("resnets").at(layer), inputs, outputs)?);
                inputs = outputs;
            }
            // What doubles sides halves channels.
            let sampler = block.at("upsamplers.0.resample.1");
            let doubles = || Convolution::flat(&sampler, [outputs, outputs / 2, 3], 1, 1);
            levels.push((resnets, (index + 1 < channels.len()).then(doubles).transpose()?));
            inputs = outputs / 2;
        }
        Ok(Self {
            conv_in: Convolution::causal(&weights.at("conv_in"), [config.latent_channels, last, 3])?,
            levels,
            middle: Middle::new(&weights.at("mid_block"), last)?,
            norm_out: Norm::new(&weights.at("norm_out"), first, 3)?,
            conv_out: Convolution::causal(&weights.at("conv_out"), [first, 3, 3])?,
        })
    }

    fn encode(&self, pictures: &Tensor) -> Result<Tensor> {
        let mut hidden = self.conv_in.forward(pictures)?;
        for (resnets, halves) in &self.levels {
            for resnet in resnets {
                hidden = resnet.forward(&hidden)?;
            }
            if let Some(halves) = halves {
                hidden = halves.forward(&hidden.f_constant_pad_nd([0, 1, 0, 1])?)?;
            }
        }
        self.finish(&self.middle.forward(&hidden)?)
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let mut hidden = self.middle.forward(&self.conv_in.forward(latents)?)?;
        for (resnets, doubles) in &self.levels {
            for resnet in resnets {
                hidden = resnet.forward(&hidden)?;
            }
            if let Some(doubles) = doubles {
                let (_, _, height, width) = hidden.size4()?;
                hidden = doubles.forward(&hidden.f_upsample_nearest2d([2 * height, 2 * width], None, None)?)?;
            }
        }
        self.finish(&hidden)
    }

    fn finish(&self, hidden: &Tensor) -> Result<Tensor> {
        self.conv_out.forward(&self.norm_out.forward(hidden)?.f_silu()?)
    }
}

/// The autoencoder.
#[derive(Debug)]
pub(super) struct WanVae {
    encoder: Coder,
    quant_conv: Convolution,
    post_quant_conv: Convolution,
    decoder: Coder,
}

impl WanVae {
    pub(super) fn new(weights: &Weights<'_>, config: &VaeConfig) -> Result<Self> {
        let (latents, moments) = (config.latent_channels, 2 * config.latent_channels);
        Ok(Self {
            encoder: Coder::encoder(&weights.at("encoder"), config)?,
            quant_conv: Convolution::causal(&weights.at("quant_conv"), [moments, moments, 1])?,
            post_quant_conv: Convolution::causal(&weights.at("post_quant_conv"), [latents, latents, 1])?,
            decoder: Coder::decoder(&weights.at("decoder"), config)?,
        })
    }
}

impl Coders for WanVae {
    fn moments(&self, pictures: &Tensor) -> Result<Tensor> {
        self.quant_conv.forward(&self.encoder.encode(pictures)?)
    }

    fn pictures(&self, latents: &Tensor) -> Result<Tensor> {
        // Its own range is held to, as in diffusers.
        Ok(self.decoder.decode(&self.post_quant_conv.forward(latents)?)?.f_clamp(-1.0, 1.0)?)
    }

    fn kind(&self) -> Kind {
        self.post_quant_conv.bias.kind()
    }

    fn device(&self) -> Device {
        self.post_quant_conv.bias.device()
    }
}
