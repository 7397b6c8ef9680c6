//! Stable Diffusion 3's and 3.5's transformer (Esser et al., "Scaling Rectified Flow Transformers", 2024): text and picture
//! have layers of their own in every block and attend to each other; diffusers' `SD3Transformer2DModel`.

use lora_core::{Component, LayerGeometry};
use lora_io::checkpoint::ComponentWeights;
use lora_torch::checkpoint::Shared;
use lora_torch::tch::{Kind, Tensor};

use super::config;
use super::joint::{
    Embedder, FeedForward, HeadSizes, Heads, Modulation, Modulator, Projections, SINUSOIDS, Sinusoids, attend,
    gated_sum, in_range, layer_norm, modulated, parted,
};
use super::position_table::PositionTable;
use crate::layers::{Adaptable, AdaptableLayer, Pass, exclusive, head_width};
use crate::weights::{Weights, dimension};
use crate::{Error, Result};

/// Sizes of a transformer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sd3Config {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Width of a token's state.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width inside of the feed-forward.
    pub inner: usize,
    /// Width of the text encoders' states.
    pub context: usize,
    /// Width of the pooled text.
    pub pooled: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// Blocks from the first on in which the picture attends to itself a second time.
    pub dual_blocks: usize,
    /// Side of the table of positions, in patches.
    pub positions: usize,
    /// Whether queries and keys are normed.
    pub norms: bool,
}

impl Sd3Config {
    /// Read off a component's names and shapes. Heads are as wide as the norm of queries, where there is one, or as the
    /// `config.json` says, or 64.
    ///
    /// # Errors
    /// Where a weight that sizes are read off is missing or lacks axes, or sizes do not fit each other.
    pub fn detect(component: &ComponentWeights) -> Result<Self> {
        let width = dimension(component, "pos_embed.proj.weight", 0)?;
        let norm = "transformer_blocks.0.attn.norm_q.weight";
        let head = match component.contains(norm) {
            true => dimension(component, norm, 0)?,
            false => config::number(component, "attention_head_dim")?.unwrap_or_else(|| head_width(&[width])),
        };
        let rows = dimension(component, TABLE, 1)?;
        let positions = rows.isqrt();
        let latent_channels = dimension(component, "pos_embed.proj.weight", 1)?;
        if positions * positions != rows || dimension(component, "proj_out.weight", 0)? != 4 * latent_channels {
            let reason = format!("a table of {rows} positions, or an output of other channels than {latent_channels}");
            return Err(config::wrong(component, reason));
        }
        Ok(Self {
            latent_channels,
            width,
            heads: config::heads(component, width, head, 1)?,
            inner: dimension(component, "transformer_blocks.0.ff.net.0.proj.weight", 0)?,
            context: dimension(component, "context_embedder.weight", 1)?,
            pooled: dimension(component, "time_text_embed.text_embedder.linear_1.weight", 1)?,
            blocks: config::blocks(component, "transformer_blocks", "attn.to_q.weight"),
            dual_blocks: config::blocks(component, "transformer_blocks", "attn2.to_q.weight"),
            positions,
            norms: component.contains(norm),
        })
    }

    fn head_sizes(&self) -> HeadSizes {
        HeadSizes { width: self.width, heads: self.heads, bias: true, norms: self.norms }
    }
}

/// The table of positions.
const TABLE: &str = "pos_embed.pos_embed";
/// Side of a patch in latents.
const PATCH: i64 = 2;

/// What the transformer is told beside the latents.
#[derive(Debug, Clone, Copy)]
pub struct Sd3Conditions<'t> {
    /// Noise levels σ, `[batch]`, from 0 to 1.
    pub sigmas: &'t Tensor,
    /// Text states, `[batch, tokens, context]`.
    pub context: &'t Tensor,
    /// Pooled text, `[batch, pooled]`.
    pub pooled: &'t Tensor,
}

/// Stable Diffusion 3's transformer.
#[derive(Debug)]
pub struct Sd3 {
    config: Sd3Config,
    kind: Kind,
    sinusoids: Sinusoids,
    positions: PositionTable,
    patches: AdaptableLayer,
    timestep_embedder: Embedder,
    text_embedder: Embedder,
    context_embedder: AdaptableLayer,
    blocks: Vec<Shared<Block>>,
    norm_out: Modulator,
    proj_out: AdaptableLayer,
}

#[derive(Debug)]
struct Block {
    image: Stream,
    text: TextStream,
    dual: Option<Dual>,
}

/// What one kind of token has of its own in a block.
#[derive(Debug)]
struct Stream {
    modulator: Modulator,
    projections: Projections,
    to_out: AdaptableLayer,
    feed_forward: FeedForward,
}

/// The text's, of which nothing is left behind the last block.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "all but one are whole")]
enum TextStream {
    Whole(Stream),
    Last { modulator: Modulator, projections: Projections },
}

/// The picture's second attention.
#[derive(Debug)]
struct Dual {
    projections: Projections,
    to_out: AdaptableLayer,
}

impl Sd3 {
    /// Built from its weights. The layers outside of the blocks are in the compute dtype, however the others are held.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source has other weights than `config`; out of
    /// memory.
    pub fn new(weights: &Weights<'_>, config: Sd3Config) -> Result<Self> {
        let (width, plain) = (config.width, weights.plain());
        let time_text = plain.at("time_text_embed");
        let patches = LayerGeometry::conv2d(config.latent_channels, width, PATCH as usize, PATCH as usize, 0);
        let blocks = weights.at("transformer_blocks");
        let blocks = (0..config.blocks).map(|at| Block::new(&blocks.at(at), &config, at).map(Shared::new));
        let outputs = 4 * config.latent_channels;
        Ok(Self {
            kind: weights.kind(),
            sinusoids: Sinusoids::new(weights.device())?,
            positions: PositionTable::new(weights, TABLE, config.positions, width)?,
            patches: AdaptableLayer::new(&plain.at("pos_embed.proj"), patches, true)?,
            timestep_embedder: Embedder::new(&time_text.at("timestep_embedder"), SINUSOIDS, width, true)?,
            text_embedder: Embedder::new(&time_text.at("text_embedder"), config.pooled, width, true)?,
            context_embedder: AdaptableLayer::linear(&plain.at("context_embedder"), config.context, width, true)?,
            blocks: blocks.collect::<Result<_>>()?,
            norm_out: Modulator::new(&plain.at("norm_out.linear"), width, 2, true)?,
            proj_out: AdaptableLayer::linear(&plain.at("proj_out"), width, outputs, true)?,
            config,
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &Sd3Config {
        &self.config
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The velocity, noise less data, of noised latents `[batch, channels, height, width]`; f32, shaped as the latents.
    /// Inputs are cast to the compute dtype here.
    ///
    /// # Errors
    /// Where inputs do not fit each other, or the picture is larger than the table of positions; where memory runs out.
    pub fn forward(&self, latents: &Tensor, conditions: &Sd3Conditions<'_>, pass: &Pass) -> Result<Tensor> {
        self.check(latents, conditions)?;
        let (batch, channels, height, width) = latents.size4()?;
        let (rows, columns) = (height / PATCH, width / PATCH);
        let times = self.timestep_embedder.forward(&self.sinusoids.of_thousandfold(conditions.sigmas)?, pass)?;
        let vector = times.f_add(&self.text_embedder.forward(conditions.pooled, pass)?)?.f_silu()?;
        let image = self.patches.forward(&latents.f_to_kind(self.kind)?, pass)?.f_flatten(2, 3)?.f_transpose(1, 2)?;
        let image = image.f_add(&self.positions.middle(rows, columns)?.f_to_kind(self.kind)?)?;
        let text = self.context_embedder.forward(&conditions.context.f_to_kind(self.kind)?, pass)?;
        let tokens = text.size3()?.1;

        let mut joined = Tensor::f_cat(&[text, image], 1)?;
        for block in &self.blocks {
            joined = pass.block(block, &[&joined, &vector], move |block, inputs, pass| {
                block.forward(&inputs[0], &inputs[1], tokens, pass)
            })?;
        }
        // The last block leaves the picture alone.
        let ends = self.norm_out.forward(&vector, pass)?;
        let normed = modulated(&layer_norm(&joined)?, &ends.part(1), &ends.part(0))?;
        let out = self.proj_out.forward(&normed, pass)?.f_to_kind(Kind::Float)?;
        let patches = out.f_view([batch, rows, columns, PATCH, PATCH, channels])?;
        Ok(patches.f_permute([0, 5, 1, 3, 2, 4])?.f_reshape([batch, channels, height, width])?)
    }

    fn check(&self, latents: &Tensor, conditions: &Sd3Conditions<'_>) -> Result<()> {
        let Sd3Conditions { sigmas, context, pooled } = conditions;
        let Sd3Config { latent_channels, context: context_width, pooled: pooled_width, positions, .. } = self.config;
        let (batch, channels, height, width) = latents.size4()?;
        let (context_batch, _, found_width) = context.size3()?;
        let most = PATCH * positions as i64;
        let is_side = |side: i64| side % PATCH == 0 && (PATCH..=most).contains(&side);
        let fits = channels == latent_channels as i64
            && is_side(height)
            && is_side(width)
            && (context_batch, found_width) == (batch, context_width as i64)
            && pooled.size() == [batch, pooled_width as i64]
            && sigmas.size() == [batch];
        if fits {
            return Ok(());
        }
        Err(Error::Input {
            what: "Stable Diffusion 3's transformer",
            expected: format!(
                "latents [{batch}, {latent_channels}, …] of even sides up to {most}, one σ each, text [{batch}, …, \
                 {context_width}], pooled text [{batch}, {pooled_width}]"
            ),
            found: format!(
                "latents {:?}, σ {:?}, text {:?}, pooled text {:?}",
                latents.size(),
                sigmas.size(),
                context.size(),
                pooled.size()
            ),
        })
    }
}

impl Stream {
    fn new(weights: &Weights<'_>, config: &Sd3Config, is_text: bool, parts: usize) -> Result<Self> {
        let (norm, feed_forward, out) = match is_text {
            true => ("norm1_context", "ff_context", "to_add_out"),
            false => ("norm1", "ff", "to_out.0"),
        };
        let attention = weights.at("attn");
        Ok(Self {
            modulator: Modulator::new(&weights.at(norm).at("linear"), config.width, parts, true)?,
            projections: match is_text {
                true => Projections::added(&attention, config.head_sizes())?,
                false => Projections::own(&attention, config.head_sizes())?,
            },
            to_out: AdaptableLayer::linear(&attention.at(out), config.width, config.width, true)?,
            feed_forward: FeedForward::new(&weights.at(feed_forward), config.width, config.inner)?,
        })
    }

    /// The feed-forward on what attention left.
    fn end(&self, tokens: &Tensor, modulation: &Modulation, pass: &Pass) -> Result<Tensor> {
        let normed = modulated(&layer_norm(tokens)?, &modulation.part(3), &modulation.part(4))?;
        gated_sum(tokens, &modulation.part(5), &self.feed_forward.forward(&normed, pass)?)
    }

    fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        self.modulator.visit(visit);
        self.projections.visit(visit);
        visit(&mut self.to_out);
        self.feed_forward.visit(visit)
    }
}

impl TextStream {
    /// Modulation and normed tokens: shift comes first but in the last block.
    fn begin(&self, text: &Tensor, vector: &Tensor, pass: &Pass) -> Result<(Heads, Modulation)> {
        let (modulator, projections, [shift, scale]) = match self {
            Self::Whole(stream) => (&stream.modulator, &stream.projections, [0, 1]),
            Self::Last { modulator, projections } => (modulator, projections, [1, 0]),
        };
        let modulation = modulator.forward(vector, pass)?;
        let normed = modulated(&layer_norm(text)?, &modulation.part(shift), &modulation.part(scale))?;
        Ok((projections.forward(&normed, pass)?, modulation))
    }
}

impl Block {
    fn new(weights: &Weights<'_>, config: &Sd3Config, index: usize) -> Result<Self> {
        let is_dual = index < config.dual_blocks;
        let attention = weights.at("attn2");
        let text = if index + 1 < config.blocks {
            TextStream::Whole(Stream::new(weights, config, true, 6)?)
        } else {
            TextStream::Last {
                modulator: Modulator::new(&weights.at("norm1_context.linear"), config.width, 2, true)?,
                projections: Projections::added(&weights.at("attn"), config.head_sizes())?,
            }
        };
        let dual = || -> Result<Dual> {
            Ok(Dual {
                projections: Projections::own(&attention, config.head_sizes())?,
                to_out: AdaptableLayer::linear(&attention.at("to_out.0"), config.width, config.width, true)?,
            })
        };
        Ok(Self {
            image: Stream::new(weights, config, false, if is_dual { 9 } else { 6 })?,
            text,
            dual: is_dual.then(dual).transpose()?,
        })
    }

    /// Tokens `[batch, tokens, width]`, text first, of the same; behind the last block those of the picture alone.
    fn forward(&self, joined: &Tensor, vector: &Tensor, tokens: i64, pass: &Pass) -> Result<Tensor> {
        let (text, image) = parted(joined, tokens)?;
        let modulation = self.image.modulator.forward(vector, pass)?;
        let plain = layer_norm(&image)?;
        let normed = modulated(&plain, &modulation.part(0), &modulation.part(1))?;
        let image_heads = self.image.projections.forward(&normed, pass)?;
        let (text_heads, text_modulation) = self.text.begin(&text, vector, pass)?;
        let mixed = attend(&Heads::joined(&text_heads, &image_heads)?, None)?;
        let (text_mixed, image_mixed) = parted(&mixed, tokens)?;

        let mut image = gated_sum(&image, &modulation.part(2), &self.image.to_out.forward(&image_mixed, pass)?)?;
        if let Some(dual) = &self.dual {
            let normed = modulated(&plain, &modulation.part(6), &modulation.part(7))?;
            let mixed = attend(&dual.projections.forward(&normed, pass)?, None)?;
            image = gated_sum(&image, &modulation.part(8), &dual.to_out.forward(&mixed, pass)?)?;
        }
        let image = self.image.end(&image, &modulation, pass)?;
        let TextStream::Whole(stream) = &self.text else { return in_range(image) };
        let text = gated_sum(&text, &text_modulation.part(2), &stream.to_out.forward(&text_mixed, pass)?)?;
        in_range(Tensor::f_cat(&[stream.end(&text, &text_modulation, pass)?, image], 1)?)
    }
}

impl Adaptable for Sd3 {
    fn component(&self) -> Component {
        Component::TRANSFORMER
    }

    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        visit(&mut self.patches);
        self.timestep_embedder.visit(visit);
        self.text_embedder.visit(visit);
        visit(&mut self.context_embedder);
        for block in &mut self.blocks {
            let Block { image, text, dual } = exclusive(block)?;
            image.visit(visit)?;
            if let Some(dual) = dual {
                dual.projections.visit(visit);
                visit(&mut dual.to_out);
            }
            match text {
                TextStream::Whole(stream) => stream.visit(visit)?,
                TextStream::Last { modulator, projections } => {
                    modulator.visit(visit);
                    projections.visit(visit);
                }
            }
        }
        self.norm_out.visit(visit);
        visit(&mut self.proj_out);
        Ok(())
    }
}
