//! The transformer of Cosmos-Predict2 (NVIDIA, 2025) as Anima has it: a picture's tokens attend to each other, then to a
//! caption's states, under layers that a noise level shifts, scales and gates through narrow layers of each block and a sum
//! that all blocks share; diffusers' `CosmosTransformer3DModel` of one frame.

use lora_core::Component;
use lora_io::checkpoint::ComponentWeights;
use lora_torch::checkpoint::Shared;
use lora_torch::norm::{RmsWeight, rms_norm};
use lora_torch::tch::{Kind, Tensor};

use super::axial_rotary::{AxialRotary, AxialTables};
use super::config;
use super::joint::{
    Attention, AttentionNames, Embedder, FeedForward, HeadSizes, Sinusoids, gated_sum, in_range, layer_norm, modulated,
    pack, positions, unpack,
};
use crate::layers::{Adaptable, AdaptableLayer, Pass, exclusive};
use crate::weights::{Weights, dimension};
use crate::{Error, Result};

/// Sizes of a transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct CosmosConfig {
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
    /// Width inside of the layers that shift and scale.
    pub modulation: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// How far positions along time, rows and columns are stretched.
    pub rope_scale: [f64; 3],
}

/// Base of the frequencies of positions that are not stretched.
const THETA: f64 = 10_000.0;
/// What the norm of a noise level's sinusoids adds under its root.
const EPSILON: f64 = 1e-6;
/// Numbers of a token by its side.
const PATCH: i64 = 2;
/// Numbers of a head at least: in fewer an axis has no two frequencies.
const LEAST_HEAD: usize = 12;

const NAMES: AttentionNames =
    AttentionNames { layers: ["to_q", "to_k", "to_v", "to_out.0"], norms: ["norm_q", "norm_k"] };

impl CosmosConfig {
    /// How far positions are stretched in the published model.
    pub const ROPE_SCALE: [f64; 3] = [1.0, 4.0, 4.0];

    /// Read off a component's names and shapes; how far positions are stretched from its `config.json`, and without one as
    /// published.
    ///
    /// # Errors
    /// Where a weight that sizes are read off is missing or lacks axes, or sizes do not fit each other.
    pub fn detect(component: &ComponentWeights) -> Result<Self> {
        let width = dimension(component, "patch_embed.proj.weight", 0)?;
        let inputs = dimension(component, "patch_embed.proj.weight", 1)?;
        let outputs = dimension(component, "proj_out.weight", 0)?;
        let head = dimension(component, "transformer_blocks.0.attn1.norm_q.weight", 0)?;
        if inputs.checked_sub(4) != Some(outputs) || !outputs.is_multiple_of(4) {
            let reason = format!("{inputs} numbers a token and {outputs} in its answers; expected 4 fewer, of a mask");
            return Err(config::wrong(component, reason));
        }
        if head < LEAST_HEAD {
            return Err(config::wrong(component, format!("heads of {head}; expected {LEAST_HEAD} numbers or more")));
        }
        let rope_scale = config::reals(component, "rope_scale")?.unwrap_or(Self::ROPE_SCALE);
        if !rope_scale.iter().all(|scale| scale.is_finite() && *scale > 0.0) {
            return Err(config::wrong(component, format!("config.json: rope_scale is {rope_scale:?}")));
        }
        Ok(Self {
            latent_channels: outputs / 4,
            width,
            heads: config::heads(component, width, head, 2)?,
            inner: dimension(component, "transformer_blocks.0.ff.net.0.proj.weight", 0)?,
            context: dimension(component, "transformer_blocks.0.attn2.to_k.weight", 1)?,
            modulation: dimension(component, "transformer_blocks.0.norm1.linear_1.weight", 0)?,
            blocks: config::blocks(component, "transformer_blocks", "attn1.to_q.weight"),
            rope_scale,
        })
    }

    fn head_sizes(&self) -> HeadSizes {
        HeadSizes { width: self.width, heads: self.heads, bias: false, norms: true }
    }

    /// Numbers of a head that time, rows and columns turn, each with the base of its frequencies.
    fn axes(&self) -> [(usize, f64); 3] {
        let head = self.width / self.heads;
        let side = head / 6 * 2;
        let axis = |numbers: usize, scale: f64| (numbers, THETA * scale.powf(numbers as f64 / (numbers as f64 - 2.0)));
        let [time, rows, columns] = self.rope_scale;
        [axis(head - 2 * side, time), axis(side, rows), axis(side, columns)]
    }
}

/// What the transformer is told beside the latents.
#[derive(Debug, Clone, Copy)]
pub struct CosmosConditions<'t> {
    /// Noise levels σ, `[batch]`, from 0 to 1.
    pub sigmas: &'t Tensor,
    /// Text states, `[batch, tokens, context]`; all are read, zeros that fill rows up too.
    pub context: &'t Tensor,
}

/// The transformer.
#[derive(Debug)]
pub struct Cosmos {
    config: CosmosConfig,
    kind: Kind,
    sinusoids: Sinusoids,
    rotary: AxialRotary,
    time_embedder: Embedder,
    /// `[width]`.
    time_norm: Tensor,
    patch_embed: AdaptableLayer,
    blocks: Vec<Shared<Block>>,
    norm_out: Modulator,
    proj_out: AdaptableLayer,
}

/// Two layers with a narrow one between them; what shifts, scales and gates is their answer and a sum that all of them share.
#[derive(Debug)]
struct Modulator {
    linear_1: AdaptableLayer,
    linear_2: AdaptableLayer,
    parts: i64,
}

#[derive(Debug)]
struct Block {
    modulators: [Modulator; 3],
    own: Attention,
    cross: Attention,
    feed_forward: FeedForward,
}

impl Cosmos {
    /// Built from its weights. The layers outside of the blocks are in the compute dtype, however the others are held.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source has other weights than `config`; out of
    /// memory.
    pub fn new(weights: &Weights<'_>, config: CosmosConfig) -> Result<Self> {
        let (width, plain) = (config.width, weights.plain());
        let linear = |name: &str, inputs, outputs| AdaptableLayer::linear(&plain.at(name), inputs, outputs, false);
        let tokens = 4 * config.latent_channels;
        let blocks = weights.at("transformer_blocks");
        let blocks = (0..config.blocks).map(|at| Block::new(&blocks.at(at), &config).map(Shared::new));
        let time = plain.at("time_embed");
        Ok(Self {
            kind: weights.kind(),
            sinusoids: Sinusoids::of_width(width, weights.device())?,
            rotary: AxialRotary::of_halves(&config.axes(), weights.device())?,
            time_embedder: Embedder::of_sizes(&time.at("t_embedder"), [width, width, 3 * width], false)?,
            time_norm: time.at("norm").tensor("weight", &[width])?,
            patch_embed: linear("patch_embed.proj", tokens + 4, width)?,
            blocks: blocks.collect::<Result<_>>()?,
            norm_out: Modulator::new(&plain.at("norm_out"), &config, 2)?,
            proj_out: linear("proj_out", width, tokens)?,
            config,
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &CosmosConfig {
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
    pub fn forward(&self, latents: &Tensor, conditions: &CosmosConditions<'_>, pass: &Pass) -> Result<Tensor> {
        self.check(latents, conditions)?;
        let (_, _, height, width) = latents.size4()?;
        let times = self.sinusoids.of_numbers(conditions.sigmas)?.f_to_kind(self.kind)?;
        let shared = self.time_embedder.forward(&times, pass)?;
        let norm = self.time_norm.f_to_kind(self.kind)?;
        let time = rms_norm(&times, Some(&norm), EPSILON, RmsWeight::Single)?.f_silu()?;
        // A channel says which part of a picture fills it up: none.
        let latents = latents.f_to_kind(self.kind)?.f_constant_pad_nd([0, 0, 0, 0, 0, 1])?;
        let mut tokens = self.patch_embed.forward(&pack(&latents)?, pass)?;
        let context = conditions.context.f_to_kind(self.kind)?;
        let positions = Shared::new(self.positions(height / PATCH, width / PATCH)?);

        for block in &self.blocks {
            let positions = positions.clone();
            tokens = pass.block(block, &[&tokens, &context, &time, &shared], move |block, inputs, pass| {
                block.forward(inputs, &positions, pass)
            })?;
        }
        let [shift, scale] = self.norm_out.forward(&time, &shared, pass)?;
        let answer = self.proj_out.forward(&modulated(&layer_norm(&tokens)?, &shift, &scale)?, pass)?;
        // The numbers of a token come by row, column and channel, unlike those of the latents' tokens.
        let (batch, count, numbers) = answer.size3()?;
        let squares =
            answer.f_to_kind(Kind::Float)?.f_view([batch, count, PATCH * PATCH, numbers / (PATCH * PATCH)])?;
        unpack(&squares.f_transpose(2, 3)?.f_flatten(2, 3)?, height, width)
    }

    /// Of a picture, which is a film of one frame.
    fn positions(&self, rows: i64, columns: i64) -> Result<AxialTables> {
        let places = positions(rows, columns, (0, 0), self.patch_embed.device())?;
        let first = places.f_narrow(1, 0, 1)?.f_zeros_like()?;
        self.rotary.tables(&Tensor::f_cat(&[first, places], 1)?.f_unsqueeze(0)?)
    }

    fn check(&self, latents: &Tensor, conditions: &CosmosConditions<'_>) -> Result<()> {
        let CosmosConditions { sigmas, context } = conditions;
        let CosmosConfig { latent_channels, context: context_width, .. } = self.config;
        let (batch, channels, ..) = latents.size4()?;
        let (context_batch, _, found_width) = context.size3()?;
        let fits = channels == latent_channels as i64
            && (context_batch, found_width) == (batch, context_width as i64)
            && sigmas.size() == [batch];
        if fits {
            return Ok(());
        }
        let expected =
            format!("latents [{batch}, {latent_channels}, …], one σ each, text [{batch}, …, {context_width}]");
        let (latents, sigmas, context) = (latents.size(), sigmas.size(), context.size());
        let found = format!("latents {latents:?}, σ {sigmas:?}, text {context:?}");
        Err(Error::Input { what: "Cosmos' transformer", expected, found })
    }
}

impl Modulator {
    fn new(weights: &Weights<'_>, config: &CosmosConfig, parts: usize) -> Result<Self> {
        let (width, inner) = (config.width, config.modulation);
        Ok(Self {
            linear_1: AdaptableLayer::linear(&weights.at("linear_1"), width, inner, false)?,
            linear_2: AdaptableLayer::linear(&weights.at("linear_2"), inner, parts * width, false)?,
            parts: parts as i64,
        })
    }

    /// The parts `[batch, 1, width]` of a noise level `[batch, width]` and of the sum `[batch, 3 · width]` that is shared, of
    /// which the first are read.
    fn forward<const PARTS: usize>(&self, time: &Tensor, shared: &Tensor, pass: &Pass) -> Result<[Tensor; PARTS]> {
        let own = self.linear_2.forward(&self.linear_1.forward(time, pass)?, pass)?;
        let sum = own.f_add(&shared.f_narrow(1, 0, own.size2()?.1)?)?;
        let parts = sum.f_unsqueeze(1)?.f_chunk(self.parts, -1)?;
        parts.try_into().map_err(|parts: Vec<Tensor>| Error::Input {
            what: "layers that shift and scale",
            expected: format!("{PARTS} parts"),
            found: parts.len().to_string(),
        })
    }

    fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        [&mut self.linear_1, &mut self.linear_2].into_iter().for_each(visit);
    }
}

impl Block {
    fn new(weights: &Weights<'_>, config: &CosmosConfig) -> Result<Self> {
        let modulator = |name: &str| Modulator::new(&weights.at(name), config, 3);
        let attention = |name: &str, reads| Attention::new(&weights.at(name), NAMES, config.head_sizes(), reads);
        Ok(Self {
            modulators: [modulator("norm1")?, modulator("norm2")?, modulator("norm3")?],
            own: attention("attn1", config.width)?,
            cross: attention("attn2", config.context)?,
            feed_forward: FeedForward::exact(&weights.at("ff"), config.width, config.inner)?,
        })
    }

    /// Tokens `[batch, tokens, width]` of the same, the text's states, the noise level and the shared sum.
    fn forward(&self, inputs: &[Tensor], positions: &AxialTables, pass: &Pass) -> Result<Tensor> {
        let [tokens, context, time, shared] = inputs else {
            let (expected, found) = ("4 inputs".into(), inputs.len().to_string());
            return Err(Error::Input { what: "a block of Cosmos' transformer", expected, found });
        };
        let [own, cross, feed] = &self.modulators;
        let added = |tokens: &Tensor, modulator: &Modulator, part: &dyn Fn(&Tensor) -> Result<Tensor>| {
            let [shift, scale, gate] = modulator.forward(time, shared, pass)?;
            gated_sum(tokens, &gate, &part(&modulated(&layer_norm(tokens)?, &shift, &scale)?)?)
        };
        let tokens = added(tokens, own, &|read| self.own.forward(read, read, Some([positions; 2]), pass))?;
        let tokens = added(&tokens, cross, &|read| self.cross.forward(read, context, None, pass))?;
        in_range(added(&tokens, feed, &|read| self.feed_forward.forward(read, pass))?)
    }
}

impl Adaptable for Cosmos {
    fn component(&self) -> Component {
        Component::TRANSFORMER
    }

    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        visit(&mut self.patch_embed);
        self.time_embedder.visit(visit);
        for block in &mut self.blocks {
            let Block { modulators, own, cross, feed_forward } = exclusive(block)?;
            modulators.iter_mut().for_each(|modulator| modulator.visit(visit));
            own.visit(visit);
            cross.visit(visit);
            feed_forward.visit(visit)?;
        }
        self.norm_out.visit(visit);
        visit(&mut self.proj_out);
        Ok(())
    }
}
