//! FLUX.2's transformer (Black Forest Labs, 2025) and those of its smaller relatives called klein: FLUX.1's blocks without
//! biases, with gated feed-forwards and one set of shifts, scales and gates for all; diffusers' `Flux2Transformer2DModel`.

use lora_core::Component;
use lora_io::checkpoint::ComponentWeights;
use lora_torch::activation::swiglu;
use lora_torch::checkpoint::Shared;
use lora_torch::tch::{Kind, Tensor};

use super::axial_rotary::{AxialRotary, AxialTables};
use super::config;
use super::joint::{
    Embedder, HeadSizes, Heads, Modulator, Projections, QueryKeyNorms, SINUSOIDS, Sinusoids, attend, gated_sum,
    in_range, layer_norm, modulated, pack, parted, positions, unpack,
};
use crate::layers::{Adaptable, AdaptableLayer, Pass, exclusive};
use crate::weights::{Weights, dimension};
use crate::{Error, Result};

/// Sizes of a transformer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flux2Config {
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
    /// Blocks in which text and picture have layers of their own.
    pub double_blocks: usize,
    /// Blocks in which they share them.
    pub single_blocks: usize,
    /// Whether it is told a strength of guidance.
    pub guidance: bool,
    /// Numbers of a head that are turned by each axis of a position.
    pub axes: Vec<usize>,
}

/// Base of the frequencies of positions.
const THETA: f64 = 2_000.0;

impl Flux2Config {
    /// Read off a component's names and shapes; the axes of positions from its `config.json`, and without one four equal
    /// parts of a head.
    ///
    /// # Errors
    /// Where a weight that sizes are read off is missing or lacks axes, or sizes do not fit each other.
    pub fn detect(component: &ComponentWeights) -> Result<Self> {
        let width = dimension(component, "x_embedder.weight", 0)?;
        let inputs = dimension(component, "x_embedder.weight", 1)?;
        let head = dimension(component, "single_transformer_blocks.0.attn.norm_q.weight", 0)?;
        let outputs = dimension(component, "proj_out.weight", 0)?;
        Ok(Self {
            latent_channels: config::channels(component, inputs, outputs)?,
            width,
            heads: config::heads(component, width, head, 1)?,
            inner: dimension(component, "single_transformer_blocks.0.attn.to_out.weight", 1)?.saturating_sub(width),
            context: dimension(component, "context_embedder.weight", 1)?,
            double_blocks: config::blocks(component, "transformer_blocks", "attn.to_q.weight"),
            single_blocks: config::blocks(component, "single_transformer_blocks", "attn.to_qkv_mlp_proj.weight"),
            guidance: component.contains(GUIDANCE),
            axes: config::axes(component, head, [head / 4; 4])?,
        })
    }

    fn head_sizes(&self) -> HeadSizes {
        HeadSizes { width: self.width, heads: self.heads, bias: false, norms: true }
    }
}

/// The weight that shows whether guidance is embedded.
const GUIDANCE: &str = "time_guidance_embed.guidance_embedder.linear_1.weight";

/// What the transformer is told beside the latents.
#[derive(Debug, Clone, Copy)]
pub struct Flux2Conditions<'t> {
    /// Noise levels σ, `[batch]`, from 0 to 1.
    pub sigmas: &'t Tensor,
    /// Text states, `[batch, tokens, context]`.
    pub context: &'t Tensor,
    /// Strengths of guidance, `[batch]`, where the transformer is told such.
    pub guidance: Option<&'t Tensor>,
}

/// FLUX.2's transformer.
#[derive(Debug)]
pub struct Flux2 {
    config: Flux2Config,
    kind: Kind,
    sinusoids: Sinusoids,
    rotary: AxialRotary,
    timestep_embedder: Embedder,
    guidance_embedder: Option<Embedder>,
    image_modulator: Modulator,
    text_modulator: Modulator,
    single_modulator: Modulator,
    context_embedder: AdaptableLayer,
    x_embedder: AdaptableLayer,
    double_blocks: Vec<Shared<DoubleBlock>>,
    single_blocks: Vec<Shared<SingleBlock>>,
    norm_out: Modulator,
    proj_out: AdaptableLayer,
}

#[derive(Debug)]
struct Stream {
    projections: Projections,
    to_out: AdaptableLayer,
    linear_in: AdaptableLayer,
    linear_out: AdaptableLayer,
}

#[derive(Debug)]
struct DoubleBlock {
    image: Stream,
    text: Stream,
}

#[derive(Debug)]
struct SingleBlock {
    to_qkv_mlp_proj: AdaptableLayer,
    norms: QueryKeyNorms,
    to_out: AdaptableLayer,
    width: i64,
    inner: i64,
}

/// What all blocks of a pass share.
#[derive(Debug)]
struct Sequence {
    /// Text tokens, which come first.
    text: i64,
    positions: AxialTables,
}

/// The gated inner part of a feed-forward: the first half of the numbers through SiLU times the second.
fn gate(both: &Tensor) -> Result<Tensor> {
    let halves = both.f_chunk(2, -1)?;
    Ok(swiglu(&halves[0].f_contiguous()?, &halves[1].f_contiguous()?)?)
}

impl Flux2 {
    /// Built from its weights. The layers outside of the blocks are in the compute dtype, however the others are held.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source has other weights than `config`; out of
    /// memory.
    pub fn new(weights: &Weights<'_>, config: Flux2Config) -> Result<Self> {
        let (width, plain) = (config.width, weights.plain());
        let embed = plain.at("time_guidance_embed");
        let embedder = |name: &str| Embedder::new(&embed.at(name), SINUSOIDS, width, false);
        let modulator = |name: &str, parts| Modulator::new(&plain.at(name).at("linear"), width, parts, false);
        let linear = |name: &str, inputs, outputs| AdaptableLayer::linear(&plain.at(name), inputs, outputs, false);
        let tokens = 4 * config.latent_channels;
        let (double, single) = (weights.at("transformer_blocks"), weights.at("single_transformer_blocks"));
        let double = (0..config.double_blocks).map(|at| DoubleBlock::new(&double.at(at), &config).map(Shared::new));
        let single = (0..config.single_blocks).map(|at| SingleBlock::new(&single.at(at), &config).map(Shared::new));
        Ok(Self {
            kind: weights.kind(),
            sinusoids: Sinusoids::new(weights.device())?,
            rotary: AxialRotary::new(&config.axes, THETA, weights.device())?,
            timestep_embedder: embedder("timestep_embedder")?,
            guidance_embedder: if config.guidance { Some(embedder("guidance_embedder")?) } else { None },
            image_modulator: modulator("double_stream_modulation_img", 6)?,
            text_modulator: modulator("double_stream_modulation_txt", 6)?,
            single_modulator: modulator("single_stream_modulation", 3)?,
            context_embedder: linear("context_embedder", config.context, width)?,
            x_embedder: linear("x_embedder", tokens, width)?,
            double_blocks: double.collect::<Result<_>>()?,
            single_blocks: single.collect::<Result<_>>()?,
            norm_out: modulator("norm_out", 2)?,
            proj_out: linear("proj_out", width, tokens)?,
            config,
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &Flux2Config {
        &self.config
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The velocity, noise less data, of noised latents `[batch, channels, height, width]`, which are cut into patches of
    /// 2×2 here; f32, shaped as the latents. Inputs are cast to the compute dtype here.
    ///
    /// # Errors
    /// Where inputs do not fit each other, and where memory runs out.
    pub fn forward(&self, latents: &Tensor, conditions: &Flux2Conditions<'_>, pass: &Pass) -> Result<Tensor> {
        self.check(latents, conditions)?;
        let (_, _, height, width) = latents.size4()?;
        let mut vector = self.timestep_embedder.forward(&self.sinusoids.of_thousandfold(conditions.sigmas)?, pass)?;
        if let (Some(embedder), Some(guidance)) = (&self.guidance_embedder, conditions.guidance) {
            vector = vector.f_add(&embedder.forward(&self.sinusoids.of_thousandfold(guidance)?, pass)?)?;
        }
        let vector = vector.f_silu()?;
        let image = self.x_embedder.forward(&pack(&latents.f_to_kind(self.kind)?)?, pass)?;
        let text = self.context_embedder.forward(&conditions.context.f_to_kind(self.kind)?, pass)?;
        let tokens = text.size3()?.1;
        let sequence = Shared::new(Sequence { text: tokens, positions: self.positions(tokens, height, width)? });

        let [image_parts, text_parts, single_parts] =
            [&self.image_modulator, &self.text_modulator, &self.single_modulator]
                .map(|modulator| modulator.forward(&vector, pass));
        let (image_parts, text_parts, single_parts) = (image_parts?, text_parts?, single_parts?);
        let mut joined = Tensor::f_cat(&[text, image], 1)?;
        for block in &self.double_blocks {
            let sequence = sequence.clone();
            let inputs: Vec<&Tensor> =
                std::iter::once(&joined).chain(image_parts.all()).chain(text_parts.all()).collect();
            joined = pass.block(block, &inputs, move |block, inputs, pass| block.forward(inputs, &sequence, pass))?;
        }
        for block in &self.single_blocks {
            let sequence = sequence.clone();
            let inputs: Vec<&Tensor> = std::iter::once(&joined).chain(single_parts.all()).collect();
            joined = pass.block(block, &inputs, move |block, inputs, pass| block.forward(inputs, &sequence, pass))?;
        }
        let (_, image) = parted(&joined, tokens)?;
        let ends = self.norm_out.forward(&vector, pass)?;
        let normed = modulated(&layer_norm(&image)?, &ends.part(1), &ends.part(0))?;
        unpack(&self.proj_out.forward(&normed, pass)?.f_to_kind(Kind::Float)?, height, width)
    }

    /// The picture's tokens by row and column on the second and third axis, text by its place on the fourth.
    fn positions(&self, text: i64, height: i64, width: i64) -> Result<AxialTables> {
        let device = self.x_embedder.device();
        let places = positions(height / 2, width / 2, (0, 0), device)?;
        let zero = places.f_narrow(1, 0, 1)?.f_zeros_like()?;
        let image = Tensor::f_cat(&[&zero, &places, &zero], 1)?;
        let order = Tensor::f_arange(text, (Kind::Int64, device))?.f_unsqueeze(1)?;
        let text = Tensor::f_cat(&[Tensor::f_zeros([text, 3], (Kind::Int64, device))?, order], 1)?;
        self.rotary.tables(&Tensor::f_cat(&[text, image], 0)?.f_unsqueeze(0)?)
    }

    fn check(&self, latents: &Tensor, conditions: &Flux2Conditions<'_>) -> Result<()> {
        let Flux2Conditions { sigmas, context, guidance } = conditions;
        let Flux2Config { latent_channels, context: context_width, .. } = self.config;
        let (batch, channels, ..) = latents.size4()?;
        let (context_batch, _, found_width) = context.size3()?;
        let fits = channels == latent_channels as i64
            && (context_batch, found_width) == (batch, context_width as i64)
            && sigmas.size() == [batch]
            && guidance.is_some() == self.config.guidance
            && guidance.is_none_or(|guidance| guidance.size() == [batch]);
        if fits {
            return Ok(());
        }
        let told = if self.config.guidance { "one guidance each" } else { "no guidance" };
        let expected =
            format!("latents [{batch}, {latent_channels}, …], one σ each, text [{batch}, …, {context_width}], {told}");
        let (latents, sigmas, context) = (latents.size(), sigmas.size(), context.size());
        let found = format!("latents {latents:?}, σ {sigmas:?}, text {context:?}");
        Err(Error::Input { what: "FLUX.2's transformer", expected, found })
    }
}

impl Stream {
    fn new(weights: &Weights<'_>, config: &Flux2Config, is_text: bool) -> Result<Self> {
        let (feed_forward, out) = if is_text { ("ff_context", "to_add_out") } else { ("ff", "to_out.0") };
        let (attention, feed_forward) = (weights.at("attn"), weights.at(feed_forward));
        let linear = |weights: Weights<'_>, inputs, outputs| AdaptableLayer::linear(&weights, inputs, outputs, false);
        Ok(Self {
            projections: match is_text {
                true => Projections::added(&attention, config.head_sizes())?,
                false => Projections::own(&attention, config.head_sizes())?,
            },
            to_out: linear(attention.at(out), config.width, config.width)?,
            linear_in: linear(feed_forward.at("linear_in"), config.width, 2 * config.inner)?,
            linear_out: linear(feed_forward.at("linear_out"), config.inner, config.width)?,
        })
    }

    /// `parts` are shift, scale and gate of the attention, then of the feed-forward.
    fn begin(&self, tokens: &Tensor, parts: &[Tensor], pass: &Pass) -> Result<Heads> {
        self.projections.forward(&modulated(&layer_norm(tokens)?, &parts[0], &parts[1])?, pass)
    }

    fn end(&self, tokens: &Tensor, mixed: &Tensor, parts: &[Tensor], pass: &Pass) -> Result<Tensor> {
        let tokens = gated_sum(tokens, &parts[2], &self.to_out.forward(mixed, pass)?)?;
        let normed = modulated(&layer_norm(&tokens)?, &parts[3], &parts[4])?;
        let inner = gate(&self.linear_in.forward(&normed, pass)?)?;
        gated_sum(&tokens, &parts[5], &self.linear_out.forward(&inner, pass)?)
    }

    fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        self.projections.visit(visit);
        [&mut self.to_out, &mut self.linear_in, &mut self.linear_out].into_iter().for_each(visit);
    }
}

impl DoubleBlock {
    fn new(weights: &Weights<'_>, config: &Flux2Config) -> Result<Self> {
        Ok(Self { image: Stream::new(weights, config, false)?, text: Stream::new(weights, config, true)? })
    }

    /// Inputs are the tokens, text first, and six parts of the modulation of the picture, then of the text.
    fn forward(&self, inputs: &[Tensor], sequence: &Sequence, pass: &Pass) -> Result<Tensor> {
        let (joined, image_parts, text_parts) = (&inputs[0], &inputs[1..7], &inputs[7..13]);
        let (text, image) = parted(joined, sequence.text)?;
        let text_heads = self.text.begin(&text, text_parts, pass)?;
        let image_heads = self.image.begin(&image, image_parts, pass)?;
        let mixed = attend(&Heads::joined(&text_heads, &image_heads)?.turned(&sequence.positions)?, None)?;
        let (text_mixed, image_mixed) = parted(&mixed, sequence.text)?;
        let text = self.text.end(&text, &text_mixed, text_parts, pass)?;
        let image = self.image.end(&image, &image_mixed, image_parts, pass)?;
        in_range(Tensor::f_cat(&[text, image], 1)?)
    }
}

impl SingleBlock {
    fn new(weights: &Weights<'_>, config: &Flux2Config) -> Result<Self> {
        let &Flux2Config { width, inner, .. } = config;
        let attention = weights.at("attn");
        let fused = 3 * width + 2 * inner;
        Ok(Self {
            to_qkv_mlp_proj: AdaptableLayer::linear(&attention.at("to_qkv_mlp_proj"), width, fused, false)?,
            norms: QueryKeyNorms::new(&attention, config.head_sizes())?,
            to_out: AdaptableLayer::linear(&attention.at("to_out"), width + inner, width, false)?,
            width: width as i64,
            inner: inner as i64,
        })
    }

    /// Inputs are the tokens, text first, and shift, scale and gate.
    fn forward(&self, inputs: &[Tensor], sequence: &Sequence, pass: &Pass) -> Result<Tensor> {
        let (joined, parts) = (&inputs[0], &inputs[1..4]);
        let normed = modulated(&layer_norm(joined)?, &parts[0], &parts[1])?;
        let all = self.to_qkv_mlp_proj.forward(&normed, pass)?;
        let sides = [self.width, self.width, self.width, 2 * self.inner];
        let all = all.f_split_with_sizes(sides, -1)?;
        let heads = self.norms.heads([&all[0], &all[1], &all[2]])?.turned(&sequence.positions)?;
        let added = self.to_out.forward(&Tensor::f_cat(&[attend(&heads, None)?, gate(&all[3])?], -1)?, pass)?;
        in_range(gated_sum(joined, &parts[2], &added)?)
    }
}

impl Adaptable for Flux2 {
    fn component(&self) -> Component {
        Component::TRANSFORMER
    }

    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        self.timestep_embedder.visit(visit);
        self.guidance_embedder.iter_mut().for_each(|embedder| embedder.visit(visit));
        for modulator in [&mut self.image_modulator, &mut self.text_modulator, &mut self.single_modulator] {
            modulator.visit(visit);
        }
        visit(&mut self.context_embedder);
        visit(&mut self.x_embedder);
        for block in &mut self.double_blocks {
            let DoubleBlock { image, text } = exclusive(block)?;
            image.visit(visit);
            text.visit(visit);
        }
        for block in &mut self.single_blocks {
            let SingleBlock { to_qkv_mlp_proj, to_out, .. } = exclusive(block)?;
            [to_qkv_mlp_proj, to_out].into_iter().for_each(&mut *visit);
        }
        self.norm_out.visit(visit);
        visit(&mut self.proj_out);
        Ok(())
    }
}
