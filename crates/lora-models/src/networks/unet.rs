//! The U-Net that Stable Diffusion's first generations share (Rombach et al., CVPR 2022), conditioned on text, SDXL's (Podell
//! et al., 2023) also on sizes: diffusers' `UNet2DConditionModel`.

use lora_core::Component;
use lora_io::checkpoint::ComponentWeights;
use lora_torch::checkpoint::Shared;
use lora_torch::tch::{Device, Kind, Tensor};

use super::blocks::{Norm, ResnetBlock, upsample};
use super::config;
use super::transformer::{SpatialTransformer, TransformerSizes};
use crate::layers::{Adaptable, AdaptableLayer, GroupNorm, Pass, exclusive, head_width};
use crate::weights::{Weights, dimension};
use crate::{Error, Result};

/// Sizes of a U-Net.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnetConfig {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of each level, from the finest.
    pub channels: Vec<usize>,
    /// Blocks of the transformers of each level, from the finest; 0 where a level has none.
    pub transformer_depths: Vec<usize>,
    /// Blocks of the transformer in the middle.
    pub middle_depth: usize,
    /// Attention heads of each level.
    pub heads: Vec<usize>,
    /// Residual blocks of a level on the way down; one more on the way up.
    pub layers_per_block: usize,
    /// Width of the text encoder's states.
    pub context: usize,
    /// Groups of the group norms.
    pub norm_groups: usize,
    /// Transformers project by linear layers instead of 1×1 convolutions.
    pub linear_projection: bool,
    /// Width of the vector that is added to the time embedding, of pooled text and six sizes; `None` without one.
    pub added: Option<usize>,
}

/// Numbers that one of the six sizes is embedded in.
const SIZE_WIDTH: usize = 256;

impl UnetConfig {
    /// Read off a component: sizes from names and shapes; attention heads and norm groups from its `config.json`. Its
    /// `attention_head_dim` means the number of heads, one for all levels or one each. Without a config, as in a single
    /// file, a level has 8 heads where its transformers project by convolutions, and heads of 64 channels where they
    /// project by linear layers; and norms have 32 groups.
    ///
    /// # Errors
    /// Where a weight that sizes are read off is missing or lacks axes, or sizes do not fit each other.
    pub fn detect(component: &ComponentWeights) -> Result<Self> {
        let wrong = |reason: String| config::wrong(component, reason);
        let count =
            |name: &dyn Fn(usize) -> String| (0..).take_while(|&index| component.contains(&name(index))).count();
        let resnet = |level: usize| format!("down_blocks.{level}.resnets.0.conv1.weight");
        let projection = |level: usize| format!("down_blocks.{level}.attentions.0.proj_in.weight");

        // At least the first, so that its absence is the error.
        let levels = count(&resnet).max(1);
        let channels = (0..levels).map(|level| dimension(component, &resnet(level), 0)).collect::<Result<Vec<_>>>()?;
        let depth =
            |block: &str| count(&|index| format!("{block}.attentions.0.transformer_blocks.{index}.norm1.weight"));
        let transformer_depths: Vec<usize> = (0..levels).map(|level| depth(&format!("down_blocks.{level}"))).collect();
        let Some(first) = transformer_depths.iter().position(|&depth| depth > 0) else {
            return Err(wrong("U-Net without attention; expected one that is conditioned on text".into()));
        };
        let block = format!("down_blocks.{first}.attentions.0.transformer_blocks");
        let linear_projection = component.shape(&projection(first)).is_some_and(|shape| shape.len() == 2);
        let config = Self {
            latent_channels: dimension(component, "conv_in.weight", 1)?,
            transformer_depths,
            middle_depth: depth("mid_block"),
            heads: heads(component, &channels, linear_projection)?,
            layers_per_block: count(&|layer| format!("down_blocks.0.resnets.{layer}.conv1.weight")),
            context: dimension(component, &format!("{block}.0.attn2.to_k.weight"), 1)?,
            norm_groups: config::number(component, "norm_num_groups")?.unwrap_or(32),
            linear_projection,
            added: match component.contains(ADDED) {
                true => Some(dimension(component, ADDED, 1)?),
                false => None,
            },
            channels,
        };
        if config::number(component, "addition_time_embed_dim")?.is_some_and(|width| width != SIZE_WIDTH) {
            return Err(wrong(format!("U-Net with sizes not embedded in {SIZE_WIDTH} numbers each")));
        }
        if config.latent_channels != 4 {
            return Err(wrong(format!(
                "U-Net with {} input channels; expected 4 (9 is an inpainting model, 8 an instruction-editing one: neither can be trained here)",
                config.latent_channels
            )));
        }
        if let Some(bad) = config.channels.iter().find(|&&channels| !channels.is_multiple_of(config.norm_groups)) {
            return Err(wrong(format!("{bad} channels do not divide into {} norm groups", config.norm_groups)));
        }
        Ok(config)
    }

    /// Width of the pooled text in the added vector.
    pub fn pooled(&self) -> Option<usize> {
        self.added.map(|width| width.saturating_sub(6 * SIZE_WIDTH))
    }

    fn transformer(&self, level: usize, depth: usize) -> TransformerSizes {
        TransformerSizes {
            channels: self.channels[level],
            context: self.context,
            heads: self.heads[level],
            depth,
            norm_groups: self.norm_groups,
            linear_projection: self.linear_projection,
        }
    }
}

/// Attention heads of each level.
fn heads(component: &ComponentWeights, channels: &[usize], linear_projection: bool) -> Result<Vec<usize>> {
    let levels = channels.len();
    // Newer configs have the count under its right name.
    let found = match config::numbers(component, "num_attention_heads")? {
        None => config::numbers(component, "attention_head_dim")?,
        found => found,
    };
    let heads = match found.as_deref() {
        Some([one]) => vec![*one; levels],
        Some(each) if each.len() == levels => each.to_vec(),
        Some(other) => {
            return Err(config::wrong(component, format!("attention_head_dim {other:?} for {levels} levels")));
        }
        None if linear_projection => channels.iter().map(|width| width / head_width(channels)).collect(),
        None => vec![8; levels],
    };
    match channels.iter().zip(&heads).find(|(width, heads)| !width.is_multiple_of(**heads)) {
        Some((width, heads)) => {
            Err(config::wrong(component, format!("{width} channels do not divide into {heads} attention heads")))
        }
        None => Ok(heads),
    }
}

/// The weight that shows the added vector's width.
const ADDED: &str = "add_embedding.linear_1.weight";

/// What a U-Net is conditioned on beside the time.
#[derive(Debug, Clone, Copy)]
pub struct Conditions<'t> {
    /// Text states, `[batch, states, context]`.
    pub context: &'t Tensor,
    /// Pooled text beside [`Unet::size_embedding`], `[batch, added]`, where the U-Net takes such.
    pub added: Option<&'t Tensor>,
}

impl<'t> From<&'t Tensor> for Conditions<'t> {
    fn from(context: &'t Tensor) -> Self {
        Self { context, added: None }
    }
}

/// The U-Net.
#[derive(Debug)]
pub struct Unet {
    config: UnetConfig,
    conv_in: AdaptableLayer,
    time_linear_1: AdaptableLayer,
    time_linear_2: AdaptableLayer,
    /// The two layers that the added vector goes through.
    added: Option<[AdaptableLayer; 2]>,
    down: Vec<Level>,
    mid_first: Shared<Stage>,
    mid_second: Shared<Stage>,
    up: Vec<Level>,
    conv_norm_out: GroupNorm,
    conv_out: AdaptableLayer,
}

/// One level on the way down or up, and the layer that changes the resolution.
#[derive(Debug)]
struct Level {
    stages: Vec<Shared<Stage>>,
    resample: Option<AdaptableLayer>,
}

/// A residual block with its transformer, where it has one: what is computed again as one.
#[derive(Debug)]
struct Stage {
    resnet: ResnetBlock,
    attention: Option<SpatialTransformer>,
}

impl Stage {
    /// Inputs are the hidden state, the time embedding and the text states.
    fn forward(&self, inputs: &[Tensor], pass: &Pass) -> Result<Tensor> {
        let [hidden, time, context] = inputs else {
            let found = inputs.len().to_string();
            return Err(Error::Input { what: "stage", expected: "3 inputs".into(), found });
        };
        let hidden = self.resnet.forward(hidden, Some(time), pass)?;
        match &self.attention {
            Some(attention) => attention.forward(&hidden, context, pass),
            None => Ok(hidden),
        }
    }

    fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        self.resnet.visit(visit);
        self.attention.as_mut().map_or(Ok(()), |attention| attention.visit(visit))
    }
}

impl Unet {
    /// Built from its weights.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source has other weights than `config`; out of
    /// memory.
    #[expect(clippy::missing_panics_doc, reason = "the way up takes as many skips as the way down makes")]
    pub fn new(weights: &Weights<'_>, config: UnetConfig) -> Result<Self> {
        let channels = &config.channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let time = 4 * first;
        let norm = Norm { groups: config.norm_groups, epsilon: 1e-5 };
        let resnet = |scope: Weights<'_>, inputs, outputs| ResnetBlock::new(&scope, inputs, outputs, Some(time), norm);
        let levels = channels.len();
        let attention = |scope: Weights<'_>, level: usize| match config.transformer_depths[level] {
            0 => Ok(None),
            depth => SpatialTransformer::new(&scope, config.transformer(level, depth)).map(Some),
        };

        // The channels of every activation that the way up takes over from the way down, in order of creation.
        let mut skips = vec![first];
        let mut down = Vec::new();
        for level in 0..levels {
            let scope = weights.at("down_blocks").at(level);
            let mut inputs = if level == 0 { first } else { channels[level - 1] };
            let mut built = Level { stages: Vec::new(), resample: None };
            for layer in 0..config.layers_per_block {
                built.stages.push(Shared::new(Stage {
                    resnet: resnet(scope.at("resnets").at(layer), inputs, channels[level])?,
                    attention: attention(scope.at("attentions").at(layer), level)?,
                }));
                inputs = channels[level];
                skips.push(inputs);
            }
            if level + 1 < levels {
                built.resample = Some(AdaptableLayer::conv2d(&scope.at("downsamplers.0.conv"), inputs, inputs, 3, 2)?);
                skips.push(inputs);
            }
            down.push(built);
        }

        let mid = weights.at("mid_block");
        let mut up = Vec::new();
        let mut inputs = last;
        for (index, level) in (0..levels).rev().enumerate() {
            let scope = weights.at("up_blocks").at(index);
            let mut built = Level { stages: Vec::new(), resample: None };
            for layer in 0..=config.layers_per_block {
                let skip = skips.pop().expect("one skip for each block on the way up");
                built.stages.push(Shared::new(Stage {
                    resnet: resnet(scope.at("resnets").at(layer), inputs + skip, channels[level])?,
                    attention: attention(scope.at("attentions").at(layer), level)?,
                }));
                inputs = channels[level];
            }
            if level > 0 {
                built.resample = Some(AdaptableLayer::conv2d(&scope.at("upsamplers.0.conv"), inputs, inputs, 3, 1)?);
            }
            up.push(built);
        }

        let added = weights.at("add_embedding");
        let added = |width| -> Result<[AdaptableLayer; 2]> {
            Ok([
                AdaptableLayer::linear(&added.at("linear_1"), width, time, true)?,
                AdaptableLayer::linear(&added.at("linear_2"), time, time, true)?,
            ])
        };
        Ok(Self {
            added: config.added.map(added).transpose()?,
            conv_in: AdaptableLayer::conv2d(&weights.at("conv_in"), config.latent_channels, first, 3, 1)?,
            time_linear_1: AdaptableLayer::linear(&weights.at("time_embedding.linear_1"), first, time, true)?,
            time_linear_2: AdaptableLayer::linear(&weights.at("time_embedding.linear_2"), time, time, true)?,
            down,
            mid_first: Shared::new(Stage {
                resnet: resnet(mid.at("resnets.0"), last, last)?,
                attention: Some(SpatialTransformer::new(
                    &mid.at("attentions.0"),
                    config.transformer(levels - 1, config.middle_depth),
                )?),
            }),
            mid_second: Shared::new(Stage { resnet: resnet(mid.at("resnets.1"), last, last)?, attention: None }),
            up,
            conv_norm_out: GroupNorm::new(&weights.at("conv_norm_out"), first, config.norm_groups, 1e-5)?,
            conv_out: AdaptableLayer::conv2d(&weights.at("conv_out"), first, config.latent_channels, 3, 1)?,
            config,
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// The prediction for noised latents `[batch, 4, height, width]`, one timestep per item, and what it is conditioned on:
    /// text states alone where the U-Net takes nothing else; f32, shaped as the latents. Inputs are cast to the compute
    /// dtype here.
    ///
    /// After each of its blocks it emits a `tracing` event at level trace with the field `block` (`down_blocks.0` …),
    /// for whoever measures what a block takes.
    ///
    /// # Errors
    /// Where inputs do not fit each other, and where memory runs out.
    pub fn forward<'t>(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        conditions: impl Into<Conditions<'t>>,
        pass: &Pass,
    ) -> Result<Tensor> {
        self.forward_embedded(latents, &self.time_embedding(timesteps, latents.device())?, conditions, pass)
    }

    /// [`Unet::forward`] with timesteps as [`Unet::time_embedding`] has them, so that nothing comes from host memory.
    ///
    /// # Errors
    /// As [`Unet::forward`].
    #[expect(clippy::missing_panics_doc, reason = "the constructor counted the skips")]
    pub fn forward_embedded<'t>(
        &self,
        latents: &Tensor,
        times: &Tensor,
        conditions: impl Into<Conditions<'t>>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let Conditions { context, added } = conditions.into();
        let (batch, latent_channels, ..) = latents.size4()?;
        let (context_batch, _, context_width) = context.size3()?;
        let (times_batch, times_width) = times.size2()?;
        let expected =
            (batch, self.config.latent_channels as i64, self.config.context as i64, self.config.channels[0] as i64);
        if (times_batch, latent_channels, context_width, times_width) != expected || context_batch != batch {
            return Err(Error::Input {
                what: "U-Net",
                expected: format!(
                    "latents [{batch}, {}, …], {batch} timesteps, text [{batch}, …, {}]",
                    self.config.latent_channels, self.config.context
                ),
                found: format!("latents {:?}, {times_batch} timesteps, text {:?}", latents.size(), context.size()),
            });
        }
        let kind = self.kind();
        let context = context.f_to_kind(kind)?;
        let time = times.f_to_kind(kind)?;
        let time = self.time_linear_2.forward(&self.time_linear_1.forward(&time, pass)?.f_silu()?, pass)?;
        let time = match self.embed_added(added, batch, pass)? {
            Some(added) => time.f_add(&added)?,
            None => time,
        };
        let time = time.f_silu()?;

        let stage = |stage: &Shared<Stage>, hidden: &Tensor| {
            pass.block(stage, &[hidden, &time, &context], |stage, inputs, pass| stage.forward(inputs, pass))
        };

        let mut hidden = self.conv_in.forward(&latents.f_to_kind(kind)?, pass)?;
        let mut skips = vec![hidden.shallow_clone()];
        for (index, level) in self.down.iter().enumerate() {
            for block in &level.stages {
                hidden = stage(block, &hidden)?;
                skips.push(hidden.shallow_clone());
            }
            if let Some(downsample) = &level.resample {
                hidden = downsample.forward(&hidden, pass)?;
                skips.push(hidden.shallow_clone());
            }
            tracing::trace!(block = %format_args!("down_blocks.{index}"));
        }

        hidden = stage(&self.mid_second, &stage(&self.mid_first, &hidden)?)?;
        tracing::trace!(block = %"mid_block");

        for (index, level) in self.up.iter().enumerate() {
            for block in &level.stages {
                let skip = skips.pop().expect("the constructor counted them");
                hidden = stage(block, &Tensor::f_cat(&[hidden, skip], 1)?)?;
            }
            if let Some(conv) = &level.resample {
                // To the next skip's size: twice this one, unless an odd size was rounded on the way down.
                let size =
                    skips.last().map(|skip| skip.size4()).transpose()?.map(|(_, _, height, width)| [height, width]);
                hidden = upsample(conv, &hidden, size, pass)?;
            }
            tracing::trace!(block = %format_args!("up_blocks.{index}"));
        }
        let output = self.conv_out.forward(&self.conv_norm_out.forward_silu(&hidden)?, pass)?;
        Ok(output.f_to_kind(Kind::Float)?)
    }

    /// What the added vectors `[batch, added]` add to the time embedding.
    fn embed_added(&self, added: Option<&Tensor>, batch: i64, pass: &Pass) -> Result<Option<Tensor>> {
        match (&self.added, added) {
            (None, None) => Ok(None),
            (Some([first, second]), Some(vectors))
                if vectors.size() == [batch, self.config.added.unwrap_or_default() as i64] =>
            {
                let inner = first.forward(&vectors.f_to_kind(self.kind())?, pass)?.f_silu()?;
                Ok(Some(second.forward(&inner, pass)?))
            }
            (_, found) => Err(Error::Input {
                what: "U-Net",
                expected: match self.config.added {
                    Some(width) => format!("pooled text and sizes [{batch}, {width}]"),
                    None => "no pooled text and sizes".into(),
                },
                found: found.map_or("none".into(), |found| format!("{:?}", found.size())),
            }),
        }
    }

    /// Sinusoids of the timesteps, f32 `[batch, channels of the finest level]`.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn time_embedding(&self, timesteps: &[f64], device: Device) -> Result<Tensor> {
        let width = self.config.channels[0];
        Ok(lora_torch::tensor::from_f32(&sinusoids(timesteps, width), &[timesteps.len(), width], device)?)
    }

    /// What the second part of an added vector is made of: height and width of the picture in its file, top and left edge of the part
    /// that is shown, its height and width (Podell et al., 2023, section 2.2), each as sinusoids; f32 `[batch, 1536]`.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn size_embedding(sizes: &[[f64; 6]], device: Device) -> Result<Tensor> {
        let width = 6 * SIZE_WIDTH;
        Ok(lora_torch::tensor::from_f32(&sinusoids(sizes.as_flattened(), SIZE_WIDTH), &[sizes.len(), width], device)?)
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.conv_in.kind()
    }
}

/// Sinusoids of numbers, `width` of each (Vaswani et al., 2017), cosines first, as diffusers with `flip_sin_to_cos`.
fn sinusoids(numbers: &[f64], width: usize) -> Vec<f32> {
    let half = width / 2;
    let mut values = Vec::with_capacity(numbers.len() * width);
    for &number in numbers {
        let angle = |index: usize| number * (-(10_000f64.ln()) * index as f64 / half as f64).exp();
        values.extend((0..half).map(|index| angle(index).cos() as f32));
        values.extend((0..half).map(|index| angle(index).sin() as f32));
    }
    values
}

impl Adaptable for Unet {
    fn component(&self) -> Component {
        Component::UNET
    }

    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        visit(&mut self.conv_in);
        visit(&mut self.time_linear_1);
        visit(&mut self.time_linear_2);
        self.added.iter_mut().flatten().for_each(&mut *visit);
        self.down.iter_mut().try_for_each(|level| level.visit(visit))?;
        exclusive(&mut self.mid_first)?.visit(visit)?;
        exclusive(&mut self.mid_second)?.visit(visit)?;
        self.up.iter_mut().try_for_each(|level| level.visit(visit))?;
        visit(&mut self.conv_out);
        Ok(())
    }
}

impl Level {
    fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        self.stages.iter_mut().try_for_each(|stage| exclusive(stage)?.visit(visit))?;
        self.resample.iter_mut().for_each(visit);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, read_to_string};
    use std::sync::Arc;

    use lora_torch::tch::{Device, no_grad};

    use super::*;
    use crate::synthetic::SyntheticModel;
    use crate::weights::SyntheticWeights;

    #[test]
    fn each_block_is_reported_in_order() {
        let weights = SyntheticWeights::new("unet");
        let config = SyntheticModel::tiny().unet;
        let (levels, width) = (config.channels.len(), config.context as i64);
        let unet = Unet::new(&Weights::new(&weights, Kind::Float, Device::Cpu), config).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        let events = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(Arc::new(File::create(&path).unwrap()))
            .finish();
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let (latents, context) = (zeros(&[1, 4, 16, 16]), zeros(&[1, 77, width]));
        let forward = || no_grad(|| unet.forward(&latents, &[7.0], &context, &Pass::default()));
        let answer = tracing::subscriber::with_default(events, forward).unwrap();
        assert_eq!(answer.size(), latents.size());
        let down = (0..levels).map(|level| format!("down_blocks.{level}"));
        let up = (0..levels).map(|level| format!("up_blocks.{level}"));
        let expected: Vec<String> = down.chain(["mid_block".to_owned()]).chain(up).collect();
        let text = read_to_string(&path).unwrap();
        let reported: Vec<&str> = text.lines().filter_map(|line| Some(line.split_once("block=")?.1)).collect();
        assert_eq!(reported, expected, "{text}");
    }
}
