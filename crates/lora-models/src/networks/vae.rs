//! The autoencoder between pictures and latents: what is common to all, and the network that most bases have, diffusers'
//! `AutoencoderKL`. Frozen; it carries no adapters. Another network is in `wan_vae`.

use lora_core::{Component, LayerGeometry};
use lora_io::checkpoint::{Checkpoint, ComponentWeights};
use lora_io::family::{anima, flux2, qwen_image, sdxl};
use lora_torch::tch::{Device, Kind, Tensor};
use serde_json::Value;

use super::blocks::{Norm, ResnetBlock, upsample};
use super::config;
use super::tiles::in_tiles;
use super::wan_vae::{self, WanVae};
use crate::layers::{AdaptableLayer, GroupNorm, Pass, attention};
use crate::weights::{Weights, dimension};
use crate::{Error, Result};

/// Sizes of an autoencoder.
#[derive(Debug, Clone, PartialEq)]
pub struct VaeConfig {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of each level, from the finest; a picture is `2^(levels - 1)` times larger than its latents.
    pub channels: Vec<usize>,
    /// Residual blocks of a level in the encoder; one more in the decoder.
    pub layers_per_block: usize,
    /// Groups of the group norms.
    pub norm_groups: usize,
    /// Factor that brings latents to unit variance.
    pub scaling_factor: f64,
    /// What is taken from them before.
    pub shift_factor: f64,
    /// Instead of both: what each channel is moved and scaled by.
    pub statistics: Option<LatentStatistics>,
    /// Whether a 1×1 convolution stands between the encoder and its moments, and another before the decoder.
    pub quant_convs: bool,
    /// Whether activations leave the range of fp16, as those of SDXL's published weights do.
    pub overflows_in_half: bool,
    /// Whether its convolutions are three-dimensional and see no later frame, as those of Wan's network are; other sizes as its
    /// own.
    pub causal: bool,
}

/// Means and standard deviations of latents: of each channel, or of each channel at each place of small squares.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentStatistics {
    /// Side of the squares; 1 where a channel's latents are alike everywhere.
    pub side: usize,
    /// Means by channel, row and column: `channels · side²` of them.
    pub means: Vec<f32>,
    /// Standard deviations, as many.
    pub deviations: Vec<f32>,
}

impl LatentStatistics {
    /// What batch norms add to a variance under the root, where no file says it.
    const EPSILON: f64 = 1e-4;

    /// Those of an autoencoder whose latents pass a batch norm in squares of 2 by 2, FLUX.2's.
    fn of_batch_norm(component: &ComponentWeights, channels: usize) -> Result<Self> {
        let count = 4 * channels;
        let of = |name: &str| -> Result<Vec<f32>> {
            match component.shape(name) {
                Some(shape) if shape == [count] => Ok(component.values(name)?.to_f32().into_owned()),
                found => {
                    let reason =
                        format!("`{name}` has the shape {found:?}; expected [{count}], of latents' statistics");
                    Err(config::wrong(component, reason))
                }
            }
        };
        let epsilon = config::real(component, "batch_norm_eps")?.unwrap_or(Self::EPSILON);
        let deviation = |variance: f32| (f64::from(variance) + epsilon).sqrt() as f32;
        let deviations: Vec<f32> = of("bn.running_var")?.into_iter().map(deviation).collect();
        if !deviations.iter().all(|deviation| *deviation > 0.0) {
            return Err(config::wrong(component, "`bn.running_var` has numbers that are no variances".into()));
        }
        Ok(Self { side: 2, means: of("bn.running_mean")?, deviations })
    }

    /// Means and deviations laid out for latents `[batch, channels, height, width]`: `[channels, height, width]`.
    fn laid_out(&self, latents: &Tensor) -> Result<[Tensor; 2]> {
        let side = self.side as i64;
        let (_, _, height, width) = latents.size4()?;
        let of = |numbers: &[f32]| -> Result<Tensor> {
            let squares = Tensor::f_from_slice(numbers)?.f_view([-1, side, side])?;
            Ok(squares.f_repeat([1, height / side, width / side])?.f_to_device(latents.device())?)
        };
        Ok([of(&self.means)?, of(&self.deviations)?])
    }
}

impl VaeConfig {
    /// The factor between the autoencoder's latents and those that the U-Net sees in Stable Diffusion 1 and 2.
    pub const SCALING_FACTOR: f64 = 0.18215;

    /// The same in Stable Diffusion XL.
    pub const SDXL_SCALING_FACTOR: f64 = 0.13025;

    /// Channels, factor and shift of the families whose autoencoder has others than Stable Diffusion's, as published.
    const PUBLISHED: &[(&str, (usize, f64, f64))] = &[
        ("flux", (16, 0.3611, 0.1159)),
        ("chroma", (16, 0.3611, 0.1159)),
        ("z_image", (16, 0.3611, 0.1159)),
        ("sd3", (16, 1.5305, 0.0609)),
        ("flux2", (32, 1.0, 0.0)),
    ];

    /// Read off a checkpoint's autoencoder: sizes from names and shapes; norm groups, scaling factor and whether fp16 is enough
    /// (`force_upcast`) from its `config.json`, where there is one, or else as the family's published autoencoder has them.
    ///
    /// # Errors
    /// Where a weight that sizes are read off is missing or lacks axes.
    pub fn detect(checkpoint: &Checkpoint) -> Result<Self> {
        let component = checkpoint.component(Component::VAE)?;
        if [&qwen_image::FAMILY, &anima::FAMILY].contains(&checkpoint.family()) {
            return wan_vae::detect(component);
        }
        let is_sdxl = *checkpoint.family() == sdxl::FAMILY;
        let own = Self::PUBLISHED.iter().find(|(family, _)| *family == checkpoint.family().name);
        let (channels, factor, shift) = match own {
            Some((_, published)) => *published,
            None if is_sdxl => (4, Self::SDXL_SCALING_FACTOR, 0.0),
            None => (4, Self::SCALING_FACTOR, 0.0),
        };
        // Folders of other families say it too, by default and without need.
        let enough = config::value(component, "force_upcast").and_then(Value::as_bool) == Some(false);
        let count =
            |name: &dyn Fn(usize) -> String| (0..).take_while(|&index| component.contains(&name(index))).count();
        let resnet = |level: usize| format!("encoder.down_blocks.{level}.resnets.0.conv1.weight");
        let levels = count(&resnet).max(1);
        let latent_channels = dimension(component, "decoder.conv_in.weight", 1)?;
        if latent_channels != channels {
            let reason = format!(
                "an autoencoder of {latent_channels} latent channels, which is another family's; expected {channels}"
            );
            return Err(config::wrong(component, reason));
        }
        let is_flux2 = *checkpoint.family() == flux2::FAMILY;
        Ok(Self {
            latent_channels,
            statistics: is_flux2.then(|| LatentStatistics::of_batch_norm(component, latent_channels)).transpose()?,
            channels: (0..levels).map(|level| dimension(component, &resnet(level), 0)).collect::<Result<_>>()?,
            layers_per_block: count(&|layer| format!("encoder.down_blocks.0.resnets.{layer}.conv1.weight")),
            norm_groups: config::number(component, "norm_num_groups")?.unwrap_or(32),
            scaling_factor: config::real(component, "scaling_factor")?.unwrap_or(factor),
            shift_factor: config::real(component, "shift_factor")?.unwrap_or(shift),
            quant_convs: component.contains("quant_conv.weight"),
            overflows_in_half: is_sdxl && !enough,
            causal: false,
        })
    }

    /// Pixels per latent in each direction.
    pub fn factor(&self) -> usize {
        1 << (self.channels.len() - 1)
    }

    /// Latents of the autoencoder `[batch, channels, height, width]` as a network sees them: `(latents - shift) · factor`, or
    /// `(latents - mean) / deviation`.
    ///
    /// # Errors
    /// Where sides are no multiples of the statistics' squares, and where memory runs out.
    pub fn normalised(&self, latents: &Tensor) -> Result<Tensor> {
        if let Some(statistics) = &self.statistics {
            let [means, deviations] = statistics.laid_out(latents)?;
            return Ok(latents.f_sub(&means)?.f_div(&deviations)?);
        }
        let shifted = if self.shift_factor == 0.0 { latents } else { &latents.f_sub_scalar(self.shift_factor)? };
        Ok(shifted.f_mul_scalar(self.scaling_factor)?)
    }

    /// The way back.
    ///
    /// # Errors
    /// As of [`Self::normalised`].
    pub fn denormalised(&self, latents: &Tensor) -> Result<Tensor> {
        if let Some(statistics) = &self.statistics {
            let [means, deviations] = statistics.laid_out(latents)?;
            return Ok(latents.f_mul(&deviations)?.f_add(&means)?);
        }
        let scaled = latents.f_div_scalar(self.scaling_factor)?;
        Ok(if self.shift_factor == 0.0 { scaled } else { scaled.f_add_scalar(self.shift_factor)? })
    }
}

/// The autoencoder.
#[derive(Debug)]
pub struct Vae {
    config: VaeConfig,
    coders: Box<dyn Coders>,
}

/// The network of an autoencoder. Numbers go in and come out in its own dtype.
pub(super) trait Coders: std::fmt::Debug + Send {
    /// Mean and logarithm of the variance, one after the other, of pictures `[batch, 3, height, width]`.
    fn moments(&self, pictures: &Tensor) -> Result<Tensor>;
    /// Pictures of latents.
    fn pictures(&self, latents: &Tensor) -> Result<Tensor>;
    /// The dtype it computes in.
    fn kind(&self) -> Kind;
    /// Where it is.
    fn device(&self) -> Device;
}

/// diffusers' `AutoencoderKL`.
#[derive(Debug)]
struct KlCoders {
    encoder: Coder,
    quant_conv: Option<AdaptableLayer>,
    post_quant_conv: Option<AdaptableLayer>,
    decoder: Coder,
}

/// The encoder or the decoder: levels on the outside of it, the middle block inside.
#[derive(Debug)]
struct Coder {
    conv_in: AdaptableLayer,
    levels: Vec<(Vec<ResnetBlock>, Option<AdaptableLayer>)>,
    mid_first: ResnetBlock,
    mid_norm: GroupNorm,
    to_q: AdaptableLayer,
    to_k: AdaptableLayer,
    to_v: AdaptableLayer,
    to_out: AdaptableLayer,
    mid_second: ResnetBlock,
    conv_norm_out: GroupNorm,
    conv_out: AdaptableLayer,
}

/// The Gaussian that the encoder gives for a picture: `[batch, channels, height / 8, width / 8]` each, f32, not yet
/// normalised.
#[derive(Debug)]
pub struct LatentDistribution {
    /// Mean.
    pub mean: Tensor,
    /// Natural logarithm of the variance, clamped to [-30, 20].
    pub log_variance: Tensor,
}

impl LatentDistribution {
    fn of(moments: &Tensor) -> Result<Self> {
        let moments = moments.f_chunk(2, 1)?;
        Ok(Self { mean: moments[0].shallow_clone(), log_variance: moments[1].f_clamp(-30.0, 20.0)? })
    }

    /// A sample with the given standard normal noise.
    ///
    /// # Errors
    /// [`Error::Torch`] where the noise has another shape; out of memory.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        Ok(self.mean.f_add(&self.log_variance.f_mul_scalar(0.5)?.f_exp()?.f_mul(noise)?)?)
    }
}

impl Vae {
    /// Side of a tile that is usual where memory is short: 256 pixels of SD 1.x.
    pub const TILE: usize = 32;

    /// Built from its weights.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source has other weights than `config`; out of
    /// memory.
    pub fn new(weights: &Weights<'_>, config: VaeConfig) -> Result<Self> {
        let coders: Box<dyn Coders> = match config.causal {
            true => Box::new(WanVae::new(weights, &config)?),
            false => Box::new(KlCoders::new(weights, &config)?),
        };
        Ok(Self { config, coders })
    }

    /// Its sizes.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// The latent distribution of pictures `[batch, 3, height, width]` in [-1, 1]; sides are multiples of
    /// [`VaeConfig::factor`].
    ///
    /// # Errors
    /// [`Error::Input`] for another shape; out of memory, where [`Vae::encode_in_tiles`] needs less.
    pub fn encode(&self, pictures: &Tensor) -> Result<LatentDistribution> {
        self.check(pictures)?;
        LatentDistribution::of(&self.moments(pictures)?)
    }

    /// The same in tiles of at most `most` latents a side ([`Self::TILE`], 4 at least) that overlap by a quarter:
    /// memory for one tile, whatever the size of the pictures. Group norms and attention see a tile, so that the result
    /// differs a little.
    ///
    /// # Errors
    /// As of [`Vae::encode`].
    pub fn encode_in_tiles(&self, pictures: &Tensor, most: usize) -> Result<LatentDistribution> {
        self.check(pictures)?;
        let factor = self.config.factor();
        LatentDistribution::of(&in_tiles(pictures, most, (factor, 1), |tile| self.moments(tile))?)
    }

    fn check(&self, pictures: &Tensor) -> Result<()> {
        let factor = self.config.factor() as i64;
        let (_, channels, height, width) = pictures.size4()?;
        if channels != 3 || height % factor != 0 || width % factor != 0 {
            return Err(Error::Input {
                what: "autoencoder",
                expected: format!("[batch, 3, height, width] with sides in multiples of {factor}"),
                found: format!("{:?}", pictures.size()),
            });
        }
        Ok(())
    }

    /// Mean and logarithm of the variance, one after the other, f32.
    fn moments(&self, pictures: &Tensor) -> Result<Tensor> {
        Ok(self.coders.moments(&pictures.f_to_kind(self.kind())?)?.f_to_kind(Kind::Float)?)
    }

    /// Pictures of latents `[batch, channels, height, width]` ([`VaeConfig::denormalised`]); f32, about [-1, 1].
    ///
    /// # Errors
    /// [`Error::Torch`] for another number of channels; out of memory, where [`Vae::decode_in_tiles`] needs less.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(self.coders.pictures(&latents.f_to_kind(self.kind())?)?.f_to_kind(Kind::Float)?)
    }

    /// The same in tiles, as [`Self::encode_in_tiles`].
    ///
    /// # Errors
    /// As of [`Vae::decode`].
    pub fn decode_in_tiles(&self, latents: &Tensor, most: usize) -> Result<Tensor> {
        in_tiles(latents, most, (1, self.config.factor()), |tile| self.decode(tile))
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.coders.kind()
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.coders.device()
    }
}

impl KlCoders {
    fn new(weights: &Weights<'_>, config: &VaeConfig) -> Result<Self> {
        let (latent, moments) = (config.latent_channels, 2 * config.latent_channels);
        let channels = &config.channels;
        let down: Vec<_> =
            (0..channels.len()).map(|level| (channels[level.saturating_sub(1)], channels[level])).collect();
        let up: Vec<_> = (0..channels.len())
            .rev()
            .map(|level| (channels[(level + 1).min(channels.len() - 1)], channels[level]))
            .collect();
        let last = channels[channels.len() - 1];
        let square = |name: &str, width: usize| {
            config.quant_convs.then(|| AdaptableLayer::conv2d(&weights.at(name), width, width, 1, 1)).transpose()
        };
        Ok(Self {
            encoder: Coder::new(&weights.at("encoder"), config, &down, [3, channels[0], last, moments], true)?,
            quant_conv: square("quant_conv", moments)?,
            post_quant_conv: square("post_quant_conv", latent)?,
            decoder: Coder::new(&weights.at("decoder"), config, &up, [latent, last, channels[0], 3], false)?,
        })
    }
}

impl Coders for KlCoders {
    fn moments(&self, pictures: &Tensor) -> Result<Tensor> {
        let pass = Pass::default();
        let encoded = self.encoder.encode(pictures, &pass)?;
        match &self.quant_conv {
            Some(quant_conv) => quant_conv.forward(&encoded, &pass),
            None => Ok(encoded),
        }
    }

    fn pictures(&self, latents: &Tensor) -> Result<Tensor> {
        let pass = Pass::default();
        match &self.post_quant_conv {
            Some(post_quant_conv) => self.decoder.decode(&post_quant_conv.forward(latents, &pass)?, &pass),
            None => self.decoder.decode(latents, &pass),
        }
    }

    fn kind(&self) -> Kind {
        self.decoder.conv_in.kind()
    }

    fn device(&self) -> Device {
        self.decoder.conv_in.device()
    }
}

impl Coder {
    /// `levels` are inputs and outputs of each level in order; `ends` the channels into and out of `conv_in`, and into
    /// and out of `conv_out`.
    fn new(
        weights: &Weights<'_>,
        config: &VaeConfig,
        levels: &[(usize, usize)],
        [first, inside, outside, last]: [usize; 4],
        encodes: bool,
    ) -> Result<Self> {
        let norm = Norm { groups: config.norm_groups, epsilon: 1e-6 };
        let group_norm = |name: &str, channels| GroupNorm::new(&weights.at(name), channels, norm.groups, norm.epsilon);
        let (blocks, resampler, layers) = match encodes {
            true => ("down_blocks", "downsamplers.0.conv", config.layers_per_block),
            false => ("up_blocks", "upsamplers.0.conv", config.layers_per_block + 1),
        };
        let mut built = Vec::new();
        for (index, &(inputs, outputs)) in levels.iter().enumerate() {
            let scope = weights.at(blocks).at(index);
            let resnets = (0..layers).map(|layer| {
                let inputs = if layer == 0 { inputs } else { outputs };
                ResnetBlock::new(&scope.at("resnets").at(layer), inputs, outputs, None, norm)
            });
            let resnets = resnets.collect::<Result<_>>()?;
            // The encoder pads only right and below before it halves, so its convolution pads nothing.
            let geometry = match encodes {
                true => LayerGeometry::conv2d(outputs, outputs, 3, 2, 0),
                false => LayerGeometry::conv2d(outputs, outputs, 3, 1, 1),
            };
            let resample = (index + 1 < levels.len())
                .then(|| AdaptableLayer::new(&scope.at(resampler), geometry, true))
                .transpose()?;
            built.push((resnets, resample));
        }
        let width = config.channels[config.channels.len() - 1];
        let attention = weights.at("mid_block.attentions.0");
        let square = |name: &str| AdaptableLayer::linear(&attention.at(name), width, width, true);
        let mid = |index: usize| ResnetBlock::new(&weights.at("mid_block.resnets").at(index), width, width, None, norm);
        Ok(Self {
            conv_in: AdaptableLayer::conv2d(&weights.at("conv_in"), first, inside, 3, 1)?,
            levels: built,
            mid_first: mid(0)?,
            mid_norm: group_norm("mid_block.attentions.0.group_norm", width)?,
            to_q: square("to_q")?,
            to_k: square("to_k")?,
            to_v: square("to_v")?,
            to_out: square("to_out.0")?,
            mid_second: mid(1)?,
            conv_norm_out: group_norm("conv_norm_out", outside)?,
            conv_out: AdaptableLayer::conv2d(&weights.at("conv_out"), outside, last, 3, 1)?,
        })
    }

    fn encode(&self, pictures: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut hidden = self.conv_in.forward(pictures, pass)?;
        for (resnets, downsample) in &self.levels {
            for resnet in resnets {
                hidden = resnet.forward(&hidden, None, pass)?;
            }
            if let Some(downsample) = downsample {
                hidden = downsample.forward(&hidden.f_constant_pad_nd([0, 1, 0, 1])?, pass)?;
            }
        }
        self.finish(&self.middle(&hidden, pass)?, pass)
    }

    fn decode(&self, latents: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut hidden = self.middle(&self.conv_in.forward(latents, pass)?, pass)?;
        for (resnets, conv) in &self.levels {
            for resnet in resnets {
                hidden = resnet.forward(&hidden, None, pass)?;
            }
            if let Some(conv) = conv {
                hidden = upsample(conv, &hidden, None, pass)?;
            }
        }
        self.finish(&hidden, pass)
    }

    fn middle(&self, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        let input = self.mid_first.forward(input, None, pass)?;
        let (batch, channels, height, width) = input.size4()?;
        let tokens = self.mid_norm.forward(&input)?.f_flatten(2, 3)?.f_transpose(1, 2)?;
        let query = self.to_q.forward(&tokens, pass)?;
        let key = self.to_k.forward(&tokens, pass)?;
        let value = self.to_v.forward(&tokens, pass)?;
        let mixed = self.to_out.forward(&attention(&query, &key, &value, 1, false)?, pass)?;
        let mixed = mixed.f_transpose(1, 2)?.f_reshape([batch, channels, height, width])?;
        self.mid_second.forward(&mixed.f_add(&input)?, None, pass)
    }

    fn finish(&self, hidden: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.conv_out.forward(&self.conv_norm_out.forward_silu(hidden)?, pass)
    }
}
