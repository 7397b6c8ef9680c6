//! Qwen-Image's transformer (Qwen team, 2025): text and picture have layers of their own in every block and attend to each
//! other, with positions around the picture's middle; diffusers' `QwenImageTransformer2DModel`.

use lora_core::Component;
use lora_io::checkpoint::ComponentWeights;
use lora_torch::checkpoint::Shared;
use lora_torch::norm::{RmsWeight, rms_norm};
use lora_torch::tch::{Kind, Tensor};

use super::axial_rotary::{AxialRotary, AxialTables};
use super::config;
use super::joint::{
    Embedder, FeedForward, HeadSizes, Heads, Modulation, Modulator, Projections, SINUSOIDS, Sinusoids, attend,
    gated_sum, in_range, layer_norm, modulated, pack, parted, positions, text_mask, unpack,
};
use crate::layers::{Adaptable, AdaptableLayer, Pass, exclusive};
use crate::weights::{Weights, dimension};
use crate::{Error, Result};

/// Sizes of a transformer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QwenImageConfig {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Width of a token's state.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width inside of the feed-forward.
    pub inner: usize,
    /// Width of the text states.
    pub context: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// Numbers of a head that are turned by each axis of a position.
    pub axes: Vec<usize>,
}

/// Base of the frequencies of positions.
const THETA: f64 = 10_000.0;
/// What the norm of text states adds under its root.
const EPSILON: f64 = 1e-6;

impl QwenImageConfig {
    /// Read off a component's names and shapes; the axes of positions from its `config.json`, and without one an eighth
    /// and twice seven sixteenths of a head.
    ///
    /// # Errors
    /// Where a weight that sizes are read off is missing or lacks axes, or sizes do not fit each other.
    pub fn detect(component: &ComponentWeights) -> Result<Self> {
        let width = dimension(component, "img_in.weight", 0)?;
        let inputs = dimension(component, "img_in.weight", 1)?;
        let head = dimension(component, "transformer_blocks.0.attn.norm_q.weight", 0)?;
        let outputs = dimension(component, "proj_out.weight", 0)?;
        Ok(Self {
            latent_channels: config::channels(component, inputs, outputs)?,
            width,
            heads: config::heads(component, width, head, 1)?,
            inner: dimension(component, "transformer_blocks.0.img_mlp.net.0.proj.weight", 0)?,
            context: dimension(component, "txt_in.weight", 1)?,
            blocks: config::blocks(component, "transformer_blocks", "attn.to_q.weight"),
            axes: config::axes(component, head, [head / 8, 7 * head / 16, 7 * head / 16])?,
        })
    }

    fn head_sizes(&self) -> HeadSizes {
        HeadSizes { width: self.width, heads: self.heads, bias: true, norms: true }
    }
}

/// What the transformer is told beside the latents.
#[derive(Debug, Clone, Copy)]
pub struct QwenImageConditions<'t> {
    /// Noise levels σ, `[batch]`, from 0 to 1.
    pub sigmas: &'t Tensor,
    /// Text states, `[batch, tokens, context]`.
    pub context: &'t Tensor,
    /// How many of each row are a caption's, `[batch]` int64; `None` where all are.
    pub lengths: Option<&'t Tensor>,
}

/// Qwen-Image's transformer.
#[derive(Debug)]
pub struct QwenImage {
    config: QwenImageConfig,
    kind: Kind,
    sinusoids: Sinusoids,
    rotary: AxialRotary,
    timestep_embedder: Embedder,
    txt_norm: Tensor,
    img_in: AdaptableLayer,
    txt_in: AdaptableLayer,
    blocks: Vec<Shared<Block>>,
    norm_out: Modulator,
    proj_out: AdaptableLayer,
}

/// What one kind of token has of its own in a block.
#[derive(Debug)]
struct Stream {
    modulator: Modulator,
    projections: Projections,
    to_out: AdaptableLayer,
    feed_forward: FeedForward,
}

#[derive(Debug)]
struct Block {
    image: Stream,
    text: Stream,
    /// Nothing reads the text behind it.
    is_last: bool,
}

/// What all blocks of a pass share.
#[derive(Debug)]
struct Sequence {
    /// Text tokens, which come first.
    text: i64,
    positions: AxialTables,
    /// Added to scores, `[batch, 1, 1, tokens]` in the compute dtype, where rows have tokens that are no caption's.
    mask: Option<Tensor>,
}

impl QwenImage {
    /// Built from its weights. The layers outside of the blocks are in the compute dtype, however the others are held.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source has other weights than `config`; out of
    /// memory.
    pub fn new(weights: &Weights<'_>, config: QwenImageConfig) -> Result<Self> {
        let (width, plain) = (config.width, weights.plain());
        let linear = |name: &str, inputs, outputs| AdaptableLayer::linear(&plain.at(name), inputs, outputs, true);
        let tokens = 4 * config.latent_channels;
        let blocks = weights.at("transformer_blocks");
        let blocks = (0..config.blocks).map(|at| Block::new(&blocks.at(at), &config, at).map(Shared::new));
        let embedder = plain.at("time_text_embed.timestep_embedder");
        Ok(Self {
            kind: weights.kind(),
            sinusoids: Sinusoids::new(weights.device())?,
            rotary: AxialRotary::new(&config.axes, THETA, weights.device())?,
            timestep_embedder: Embedder::new(&embedder, SINUSOIDS, width, true)?,
            txt_norm: weights.at("txt_norm").tensor("weight", &[config.context])?,
            img_in: linear("img_in", tokens, width)?,
            txt_in: linear("txt_in", config.context, width)?,
            blocks: blocks.collect::<Result<_>>()?,
            norm_out: Modulator::new(&plain.at("norm_out.linear"), width, 2, true)?,
            proj_out: linear("proj_out", width, tokens)?,
            config,
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &QwenImageConfig {
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
    /// Where inputs do not fit each other, and where memory runs out.
    pub fn forward(&self, latents: &Tensor, conditions: &QwenImageConditions<'_>, pass: &Pass) -> Result<Tensor> {
        self.check(latents, conditions)?;
        let (_, _, height, width) = latents.size4()?;
        let times = self.sinusoids.at_thousandfold(conditions.sigmas)?;
        let vector = self.timestep_embedder.forward(&times, pass)?.f_silu()?;
        let image = self.img_in.forward(&pack(&latents.f_to_kind(self.kind)?)?, pass)?;
        let context = conditions.context.f_to_kind(self.kind)?;
        let norm = self.txt_norm.f_to_kind(self.kind)?;
        let text = self.txt_in.forward(&rms_norm(&context, Some(&norm), EPSILON, RmsWeight::Single)?, pass)?;
        let (tokens, places) = (text.size3()?.1, image.size3()?.1);
        let mask = conditions.lengths.map(|lengths| text_mask(lengths, tokens, places, self.kind)).transpose()?;
        let positions = self.positions(tokens, height / 2, width / 2)?;
        let sequence = Shared::new(Sequence { text: tokens, positions, mask });

        let mut joined = Tensor::f_cat(&[text, image], 1)?;
        for block in &self.blocks {
            let sequence = sequence.clone();
            joined = pass.block(block, &[&joined, &vector], move |block, inputs, pass| {
                block.forward(&inputs[0], &inputs[1], &sequence, pass)
            })?;
        }
        // The last block leaves the picture alone.
        let ends = self.norm_out.forward(&vector, pass)?;
        let normed = modulated(&layer_norm(&joined)?, &ends.part(1), &ends.part(0))?;
        unpack(&self.proj_out.forward(&normed, pass)?.f_to_kind(Kind::Float)?, height, width)
    }

    /// The picture's rows and columns are counted from its middle; text stands behind the larger half of it on every axis.
    fn positions(&self, text: i64, rows: i64, columns: i64) -> Result<AxialTables> {
        let device = self.img_in.device();
        let places = positions(rows, columns, (rows / 2 - rows, columns / 2 - columns), device)?;
        let image = Tensor::f_cat(&[places.f_narrow(1, 0, 1)?.f_zeros_like()?, places], 1)?;
        let start = (rows / 2).max(columns / 2);
        let order = Tensor::f_arange_start(start, start + text, (Kind::Int64, device))?;
        let text = order.f_unsqueeze(1)?.f_expand([text, 3], false)?;
        self.rotary.tables(&Tensor::f_cat(&[text, image], 0)?.f_unsqueeze(0)?)
    }

    fn check(&self, latents: &Tensor, conditions: &QwenImageConditions<'_>) -> Result<()> {
        let QwenImageConditions { sigmas, context, lengths } = conditions;
        let QwenImageConfig { latent_channels, context: context_width, .. } = self.config;
        let (batch, channels, ..) = latents.size4()?;
        let (context_batch, _, found_width) = context.size3()?;
        let fits = channels == latent_channels as i64
            && (context_batch, found_width) == (batch, context_width as i64)
            && sigmas.size() == [batch]
            && lengths.is_none_or(|lengths| lengths.size() == [batch]);
        if fits {
            return Ok(());
        }
        let expected =
            format!("latents [{batch}, {latent_channels}, …], one σ each, text [{batch}, …, {context_width}]");
        let (latents, sigmas, context) = (latents.size(), sigmas.size(), context.size());
        let found = format!("latents {latents:?}, σ {sigmas:?}, text {context:?}");
        Err(Error::Input { what: "Qwen-Image's transformer", expected, found })
    }
}

impl Stream {
    fn new(weights: &Weights<'_>, config: &QwenImageConfig, is_text: bool) -> Result<Self> {
        let (modulator, feed_forward, out) =
            if is_text { ("txt_mod.1", "txt_mlp", "to_add_out") } else { ("img_mod.1", "img_mlp", "to_out.0") };
        let attention = weights.at("attn");
        Ok(Self {
            modulator: Modulator::new(&weights.at(modulator), config.width, 6, true)?,
            projections: match is_text {
                true => Projections::added(&attention, config.head_sizes())?,
                false => Projections::own(&attention, config.head_sizes())?,
            },
            to_out: AdaptableLayer::linear(&attention.at(out), config.width, config.width, true)?,
            feed_forward: FeedForward::new(&weights.at(feed_forward), config.width, config.inner)?,
        })
    }

    fn begin(&self, tokens: &Tensor, vector: &Tensor, pass: &Pass) -> Result<(Heads, Modulation)> {
        let modulation = self.modulator.forward(vector, pass)?;
        let normed = modulated(&layer_norm(tokens)?, &modulation.part(0), &modulation.part(1))?;
        Ok((self.projections.forward(&normed, pass)?, modulation))
    }

    fn end(&self, tokens: &Tensor, mixed: &Tensor, modulation: &Modulation, pass: &Pass) -> Result<Tensor> {
        let tokens = gated_sum(tokens, &modulation.part(2), &self.to_out.forward(mixed, pass)?)?;
        let normed = modulated(&layer_norm(&tokens)?, &modulation.part(3), &modulation.part(4))?;
        gated_sum(&tokens, &modulation.part(5), &self.feed_forward.forward(&normed, pass)?)
    }

    fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        self.modulator.visit(visit);
        self.projections.visit(visit);
        visit(&mut self.to_out);
        self.feed_forward.visit(visit)
    }
}

impl Block {
    fn new(weights: &Weights<'_>, config: &QwenImageConfig, index: usize) -> Result<Self> {
        Ok(Self {
            image: Stream::new(weights, config, false)?,
            text: Stream::new(weights, config, true)?,
            is_last: index + 1 == config.blocks,
        })
    }

    /// Tokens `[batch, tokens, width]`, text first, of the same; behind the last block those of the picture alone.
    fn forward(&self, joined: &Tensor, vector: &Tensor, sequence: &Sequence, pass: &Pass) -> Result<Tensor> {
        let (text, image) = parted(joined, sequence.text)?;
        let (text_heads, text_modulation) = self.text.begin(&text, vector, pass)?;
        let (image_heads, image_modulation) = self.image.begin(&image, vector, pass)?;
        let heads = Heads::joined(&text_heads, &image_heads)?.turned(&sequence.positions)?;
        let (text_mixed, image_mixed) = parted(&attend(&heads, sequence.mask.as_ref())?, sequence.text)?;
        let image = self.image.end(&image, &image_mixed, &image_modulation, pass)?;
        if self.is_last {
            return in_range(image);
        }
        in_range(Tensor::f_cat(&[self.text.end(&text, &text_mixed, &text_modulation, pass)?, image], 1)?)
    }
}

impl Adaptable for QwenImage {
    fn component(&self) -> Component {
        Component::TRANSFORMER
    }

    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        self.timestep_embedder.visit(visit);
        visit(&mut self.img_in);
        visit(&mut self.txt_in);
        for block in &mut self.blocks {
            let Block { image, text, .. } = exclusive(block)?;
            image.visit(visit)?;
            text.visit(visit)?;
        }
        self.norm_out.visit(visit);
        visit(&mut self.proj_out);
        Ok(())
    }
}
