//! FLUX.1's transformer (Black Forest Labs, 2024): blocks in which text and picture have layers of their own, then blocks
//! in which they share them; diffusers' `FluxTransformer2DModel`. Chroma (Lodestone Rock, 2025) has the same blocks without
//! the layers that shift and scale them: diffusers' `ChromaTransformer2DModel`.

use lora_core::Component;
use lora_io::checkpoint::ComponentWeights;
use lora_torch::checkpoint::Shared;
use lora_torch::tch::{Kind, Tensor};

use super::approximator::{Approximator, ApproximatorConfig};
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
pub struct FluxConfig {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Width of a token's state.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width inside of the feed-forward.
    pub inner: usize,
    /// Width of the text encoder's states.
    pub context: usize,
    /// What shifts and scales are made of.
    pub conditioning: FluxConditioning,
    /// Blocks in which text and picture have layers of their own.
    pub double_blocks: usize,
    /// Blocks in which they share them.
    pub single_blocks: usize,
    /// Numbers of a head that are turned by each axis of a position.
    pub axes: Vec<usize>,
}

/// What the shifts and scales of a transformer's blocks are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FluxConditioning {
    /// The time, pooled text and perhaps a strength of guidance, by a layer in each block: FLUX.1's.
    Embedded {
        /// Width of the pooled text.
        pooled: usize,
        /// Whether it is told a strength of guidance.
        guidance: bool,
    },
    /// The time alone, by one network for all blocks: Chroma's.
    Approximated(ApproximatorConfig),
}

/// Base of the frequencies of positions.
const THETA: f64 = 10_000.0;

impl FluxConfig {
    /// Read off a component's names and shapes; the axes of positions from its `config.json`, and without one an eighth
    /// and twice seven sixteenths of a head, as published ones have.
    ///
    /// # Errors
    /// Where a weight that sizes are read off is missing or lacks axes, or sizes do not fit each other.
    pub fn detect(component: &ComponentWeights) -> Result<Self> {
        let width = dimension(component, "x_embedder.weight", 0)?;
        let inputs = dimension(component, "x_embedder.weight", 1)?;
        let outputs = dimension(component, "proj_out.weight", 0)?;
        let head = dimension(component, "single_transformer_blocks.0.attn.norm_q.weight", 0)?;
        Ok(Self {
            latent_channels: config::channels(component, inputs, outputs)?,
            width,
            heads: config::heads(component, width, head, 1)?,
            inner: dimension(component, "single_transformer_blocks.0.proj_mlp.weight", 0)?,
            context: dimension(component, "context_embedder.weight", 1)?,
            conditioning: match ApproximatorConfig::detect(component)? {
                Some(approximator) => FluxConditioning::Approximated(approximator),
                None => FluxConditioning::Embedded {
                    pooled: dimension(component, "time_text_embed.text_embedder.linear_1.weight", 1)?,
                    guidance: component.contains(GUIDANCE),
                },
            },
            double_blocks: config::blocks(component, "transformer_blocks", "attn.to_q.weight"),
            single_blocks: config::blocks(component, "single_transformer_blocks", "attn.to_q.weight"),
            axes: config::axes(component, head, [head / 8, 7 * head / 16, 7 * head / 16])?,
        })
    }

    /// Whether the transformer is told a strength of guidance.
    pub fn is_guided(&self) -> bool {
        matches!(self.conditioning, FluxConditioning::Embedded { guidance: true, .. })
    }

    /// Where the parts of a block come from: its layer `name`, or rows from `row` on of the table of all blocks.
    fn modulator(&self, weights: &Weights<'_>, name: &str, parts: usize, row: usize) -> Result<Modulator> {
        match self.conditioning {
            FluxConditioning::Embedded { .. } => Modulator::new(&weights.at(name), self.width, parts, true),
            FluxConditioning::Approximated(_) => Ok(Modulator::Rows { first: row, count: parts }),
        }
    }

    /// Rows of the table of all blocks: single ones first, then the picture's of double ones, the text's, the end's.
    fn rows(&self) -> usize {
        self.end_row() + 2
    }

    fn single_row(index: usize) -> usize {
        3 * index
    }

    fn double_row(&self, index: usize, is_text: bool) -> usize {
        3 * self.single_blocks + 6 * (index + if is_text { self.double_blocks } else { 0 })
    }

    fn end_row(&self) -> usize {
        3 * self.single_blocks + 12 * self.double_blocks
    }

    fn head_sizes(&self) -> HeadSizes {
        HeadSizes { width: self.width, heads: self.heads, bias: true, norms: true }
    }
}

/// The weight that shows whether guidance is embedded.
const GUIDANCE: &str = "time_text_embed.guidance_embedder.linear_1.weight";

/// What the transformer is told beside the latents.
#[derive(Debug, Clone, Copy)]
pub struct FluxConditions<'t> {
    /// Noise levels σ, `[batch]`, from 0 to 1.
    pub sigmas: &'t Tensor,
    /// Text states, `[batch, tokens, context]`.
    pub context: &'t Tensor,
    /// Pooled text, `[batch, pooled]`, where the transformer reads such.
    pub pooled: Option<&'t Tensor>,
    /// Strengths of guidance, `[batch]`, where the transformer is told such.
    pub guidance: Option<&'t Tensor>,
    /// How many of a caption's states are there, `[batch]` int64, where captions differ; the others are not seen.
    pub lengths: Option<&'t Tensor>,
}

/// FLUX.1's transformer.
#[derive(Debug)]
pub struct Flux {
    config: FluxConfig,
    kind: Kind,
    rotary: AxialRotary,
    conditioner: Conditioner,
    context_embedder: AdaptableLayer,
    x_embedder: AdaptableLayer,
    double_blocks: Vec<Shared<DoubleBlock>>,
    single_blocks: Vec<Shared<SingleBlock>>,
    norm_out: Modulator,
    proj_out: AdaptableLayer,
}

/// Makes what blocks are shifted and scaled by.
#[derive(Debug)]
enum Conditioner {
    Embedded(Box<Embedders>),
    Approximated(Box<Approximator>),
}

/// What is added up to a vector.
#[derive(Debug)]
struct Embedders {
    sinusoids: Sinusoids,
    timestep: Embedder,
    guidance: Option<Embedder>,
    text: Embedder,
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
struct DoubleBlock {
    image: Stream,
    text: Stream,
}

#[derive(Debug)]
struct SingleBlock {
    modulator: Modulator,
    projections: Projections,
    proj_mlp: AdaptableLayer,
    proj_out: AdaptableLayer,
}

/// What all blocks of a pass share.
#[derive(Debug)]
struct Sequence {
    /// Text tokens, which come first.
    text: i64,
    positions: AxialTables,
    /// `[batch, 1, 1, tokens]`.
    mask: Option<Tensor>,
}

impl Flux {
    /// Built from its weights. The layers outside of the blocks are in the compute dtype, however the others are held.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source has other weights than `config`; out of
    /// memory.
    pub fn new(weights: &Weights<'_>, config: FluxConfig) -> Result<Self> {
        let (width, plain) = (config.width, weights.plain());
        let tokens = 4 * config.latent_channels;
        let (double, single) = (weights.at("transformer_blocks"), weights.at("single_transformer_blocks"));
        let double = (0..config.double_blocks).map(|at| DoubleBlock::new(&double.at(at), &config, at).map(Shared::new));
        let single = (0..config.single_blocks).map(|at| SingleBlock::new(&single.at(at), &config, at).map(Shared::new));
        Ok(Self {
            kind: weights.kind(),
            rotary: AxialRotary::new(&config.axes, THETA, weights.device())?,
            conditioner: Conditioner::new(weights, &config)?,
            context_embedder: AdaptableLayer::linear(&plain.at("context_embedder"), config.context, width, true)?,
            x_embedder: AdaptableLayer::linear(&plain.at("x_embedder"), tokens, width, true)?,
            double_blocks: double.collect::<Result<_>>()?,
            single_blocks: single.collect::<Result<_>>()?,
            norm_out: config.modulator(&plain, "norm_out.linear", 2, config.end_row())?,
            proj_out: AdaptableLayer::linear(&plain.at("proj_out"), width, tokens, true)?,
            config,
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &FluxConfig {
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
    pub fn forward(&self, latents: &Tensor, conditions: &FluxConditions<'_>, pass: &Pass) -> Result<Tensor> {
        self.check(latents, conditions)?;
        let (_, _, height, width) = latents.size4()?;
        let vector = self.conditioner.forward(conditions, pass)?;
        let image = self.x_embedder.forward(&pack(&latents.f_to_kind(self.kind)?)?, pass)?;
        let text = self.context_embedder.forward(&conditions.context.f_to_kind(self.kind)?, pass)?;
        let tokens = text.size3()?.1;
        let places = image.size3()?.1;
        let mask = conditions.lengths.map(|lengths| text_mask(lengths, tokens, places, self.kind)).transpose()?;
        let sequence = Shared::new(Sequence { text: tokens, positions: self.positions(tokens, height, width)?, mask });

        let mut joined = Tensor::f_cat(&[text, image], 1)?;
        for block in &self.double_blocks {
            let sequence = sequence.clone();
            joined = pass.block(block, &[&joined, &vector], move |block, inputs, pass| {
                block.forward(&inputs[0], &inputs[1], &sequence, pass)
            })?;
        }
        for block in &self.single_blocks {
            let sequence = sequence.clone();
            joined = pass.block(block, &[&joined, &vector], move |block, inputs, pass| {
                block.forward(&inputs[0], &inputs[1], &sequence, pass)
            })?;
        }
        let (_, image) = parted(&joined, tokens)?;
        let ends = self.norm_out.forward(&vector, pass)?;
        // The layer's first half scales, as diffusers stores it; the table's first row shifts.
        let (shift, scale) = if matches!(self.norm_out, Modulator::Rows { .. }) { (0, 1) } else { (1, 0) };
        let normed = modulated(&layer_norm(&image)?, &ends.part(shift), &ends.part(scale))?;
        unpack(&self.proj_out.forward(&normed, pass)?.f_to_kind(Kind::Float)?, height, width)
    }

    /// Text at the origin, the picture's tokens by row and column on the second and third axis.
    fn positions(&self, text: i64, height: i64, width: i64) -> Result<AxialTables> {
        let device = self.x_embedder.device();
        let places = positions(height / 2, width / 2, (0, 0), device)?;
        let image = Tensor::f_cat(&[places.f_narrow(1, 0, 1)?.f_zeros_like()?, places], 1)?;
        let text = Tensor::f_zeros([text, 3], (Kind::Int64, device))?;
        self.rotary.tables(&Tensor::f_cat(&[text, image], 0)?.f_unsqueeze(0)?)
    }

    fn check(&self, latents: &Tensor, conditions: &FluxConditions<'_>) -> Result<()> {
        let FluxConditions { sigmas, context, pooled, guidance, lengths } = conditions;
        let FluxConfig { latent_channels, context: context_width, .. } = self.config;
        let pooled_width = match self.config.conditioning {
            FluxConditioning::Embedded { pooled, .. } => Some(pooled as i64),
            FluxConditioning::Approximated(_) => None,
        };
        let (batch, channels, ..) = latents.size4()?;
        let (context_batch, _, found_width) = context.size3()?;
        let one_each = |numbers: &Option<&Tensor>| numbers.is_none_or(|numbers| numbers.size() == [batch]);
        let fits = channels == latent_channels as i64
            && (context_batch, found_width) == (batch, context_width as i64)
            && pooled.map(Tensor::size) == pooled_width.map(|width| vec![batch, width])
            && sigmas.size() == [batch]
            && guidance.is_some() == self.config.is_guided()
            && one_each(guidance)
            && one_each(lengths);
        if fits {
            return Ok(());
        }
        let told = if self.config.is_guided() { "one guidance each" } else { "no guidance" };
        let read = pooled_width.map_or("no pooled text".to_owned(), |width| format!("pooled text [{batch}, {width}]"));
        Err(Error::Input {
            what: "FLUX.1's transformer",
            expected: format!(
                "latents [{batch}, {latent_channels}, …], one σ each, text [{batch}, …, {context_width}], {read}, {told}"
            ),
            found: format!(
                "latents {:?}, σ {:?}, text {:?}, pooled text {:?}, guidance {:?}",
                latents.size(),
                sigmas.size(),
                context.size(),
                pooled.map(Tensor::size),
                guidance.map(Tensor::size)
            ),
        })
    }
}

impl Conditioner {
    fn new(weights: &Weights<'_>, config: &FluxConfig) -> Result<Self> {
        let (pooled, guidance) = match config.conditioning {
            FluxConditioning::Embedded { pooled, guidance } => (pooled, guidance),
            FluxConditioning::Approximated(sizes) => {
                let weights = weights.at("distilled_guidance_layer");
                let approximator = Approximator::new(&weights, sizes, config.width, config.rows())?;
                return Ok(Self::Approximated(Box::new(approximator)));
            }
        };
        let time_text = weights.plain().at("time_text_embed");
        let embedder = |name: &str, inputs| Embedder::new(&time_text.at(name), inputs, config.width, true);
        Ok(Self::Embedded(Box::new(Embedders {
            sinusoids: Sinusoids::new(weights.device())?,
            timestep: embedder("timestep_embedder", SINUSOIDS)?,
            guidance: guidance.then(|| embedder("guidance_embedder", SINUSOIDS)).transpose()?,
            text: embedder("text_embedder", pooled)?,
        })))
    }

    /// A vector `[batch, width]` that has been through SiLU, or a table `[batch, rows, width]`.
    fn forward(&self, conditions: &FluxConditions<'_>, pass: &Pass) -> Result<Tensor> {
        match self {
            Self::Embedded(embedders) => {
                let Embedders { sinusoids, timestep, guidance, text } = &**embedders;
                let mut vector = timestep.forward(&sinusoids.of_thousandfold(conditions.sigmas)?, pass)?;
                if let (Some(embedder), Some(guidance)) = (guidance, conditions.guidance) {
                    vector = vector.f_add(&embedder.forward(&sinusoids.of_thousandfold(guidance)?, pass)?)?;
                }
                if let Some(pooled) = conditions.pooled {
                    vector = vector.f_add(&text.forward(pooled, pass)?)?;
                }
                Ok(vector.f_silu()?)
            }
            Self::Approximated(approximator) => approximator.forward(conditions.sigmas, pass),
        }
    }

    fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        match self {
            Self::Embedded(embedders) => {
                let Embedders { timestep, guidance, text, .. } = &mut **embedders;
                timestep.visit(visit);
                guidance.iter_mut().for_each(|embedder| embedder.visit(visit));
                text.visit(visit);
            }
            Self::Approximated(approximator) => approximator.visit(visit),
        }
    }
}

impl Stream {
    /// The layers' names in a block: the modulator's and the feed-forward's, and those of the attention.
    fn new(weights: &Weights<'_>, config: &FluxConfig, index: usize, is_text: bool) -> Result<Self> {
        let (norm, feed_forward, out) = match is_text {
            true => ("norm1_context.linear", "ff_context", "to_add_out"),
            false => ("norm1.linear", "ff", "to_out.0"),
        };
        let attention = weights.at("attn");
        Ok(Self {
            modulator: config.modulator(weights, norm, 6, config.double_row(index, is_text))?,
            projections: match is_text {
                true => Projections::added(&attention, config.head_sizes())?,
                false => Projections::own(&attention, config.head_sizes())?,
            },
            to_out: AdaptableLayer::linear(&attention.at(out), config.width, config.width, true)?,
            feed_forward: FeedForward::new(&weights.at(feed_forward), config.width, config.inner)?,
        })
    }

    fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        self.modulator.visit(visit);
        self.projections.visit(visit);
        visit(&mut self.to_out);
        self.feed_forward.visit(visit)
    }
}

impl DoubleBlock {
    fn new(weights: &Weights<'_>, config: &FluxConfig, index: usize) -> Result<Self> {
        let stream = |is_text| Stream::new(weights, config, index, is_text);
        Ok(Self { image: stream(false)?, text: stream(true)? })
    }

    /// Tokens `[batch, tokens, width]`, text first, of the same.
    fn forward(&self, joined: &Tensor, vector: &Tensor, sequence: &Sequence, pass: &Pass) -> Result<Tensor> {
        let (text, image) = parted(joined, sequence.text)?;
        let begin = |stream: &Stream, tokens: &Tensor| -> Result<_> {
            let modulation = stream.modulator.forward(vector, pass)?;
            let normed = modulated(&layer_norm(tokens)?, &modulation.part(0), &modulation.part(1))?;
            Ok((stream.projections.forward(&normed, pass)?, modulation))
        };
        let (text_heads, text_modulation) = begin(&self.text, &text)?;
        let (image_heads, image_modulation) = begin(&self.image, &image)?;
        let heads = Heads::joined(&text_heads, &image_heads)?.turned(&sequence.positions)?;
        let mixed = attend(&heads, sequence.mask.as_ref())?;
        let (text_mixed, image_mixed) = parted(&mixed, sequence.text)?;

        let end = |stream: &Stream, tokens: &Tensor, mixed: &Tensor, modulation: &Modulation| -> Result<Tensor> {
            let tokens = gated_sum(tokens, &modulation.part(2), &stream.to_out.forward(mixed, pass)?)?;
            let normed = modulated(&layer_norm(&tokens)?, &modulation.part(3), &modulation.part(4))?;
            gated_sum(&tokens, &modulation.part(5), &stream.feed_forward.forward(&normed, pass)?)
        };
        let text = end(&self.text, &text, &text_mixed, &text_modulation)?;
        let image = end(&self.image, &image, &image_mixed, &image_modulation)?;
        in_range(Tensor::f_cat(&[text, image], 1)?)
    }
}

impl SingleBlock {
    fn new(weights: &Weights<'_>, config: &FluxConfig, index: usize) -> Result<Self> {
        let &FluxConfig { width, inner, .. } = config;
        Ok(Self {
            modulator: config.modulator(weights, "norm.linear", 3, FluxConfig::single_row(index))?,
            projections: Projections::own(&weights.at("attn"), config.head_sizes())?,
            proj_mlp: AdaptableLayer::linear(&weights.at("proj_mlp"), width, inner, true)?,
            proj_out: AdaptableLayer::linear(&weights.at("proj_out"), width + inner, width, true)?,
        })
    }

    /// Tokens `[batch, tokens, width]`, text first, of the same.
    fn forward(&self, joined: &Tensor, vector: &Tensor, sequence: &Sequence, pass: &Pass) -> Result<Tensor> {
        let modulation = self.modulator.forward(vector, pass)?;
        let normed = modulated(&layer_norm(joined)?, &modulation.part(0), &modulation.part(1))?;
        let heads = self.projections.forward(&normed, pass)?.turned(&sequence.positions)?;
        let inner = self.proj_mlp.forward(&normed, pass)?.f_gelu("tanh")?;
        let mixed = attend(&heads, sequence.mask.as_ref())?;
        let added = self.proj_out.forward(&Tensor::f_cat(&[mixed, inner], -1)?, pass)?;
        in_range(gated_sum(joined, &modulation.part(2), &added)?)
    }
}

impl Adaptable for Flux {
    fn component(&self) -> Component {
        Component::TRANSFORMER
    }

    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        self.conditioner.visit(visit);
        visit(&mut self.context_embedder);
        visit(&mut self.x_embedder);
        for block in &mut self.double_blocks {
            let DoubleBlock { image, text } = exclusive(block)?;
            image.visit(visit)?;
            text.visit(visit)?;
        }
        for block in &mut self.single_blocks {
            let SingleBlock { modulator, projections, proj_mlp, proj_out } = exclusive(block)?;
            modulator.visit(visit);
            projections.visit(visit);
            [proj_mlp, proj_out].into_iter().for_each(&mut *visit);
        }
        self.norm_out.visit(visit);
        visit(&mut self.proj_out);
        Ok(())
    }
}
