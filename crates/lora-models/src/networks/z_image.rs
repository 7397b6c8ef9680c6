//! Z-Image's transformer (diffusers' `ZImageTransformer2DModel`): two blocks that read the picture alone, two that read
//! the caption alone, then blocks that read both as one sequence, picture first. What is fed in and out is latents and
//! velocities; captions' states are a language model's, and noise levels are [`crate::diffusion`]'s.
//!
//! Both sequences are as long as multiples of 32: learned tokens fill them up, which all others attend to. A caption's
//! fillers stand at the positions behind it, a picture's at the origin.

use lora_core::Component;
use lora_io::checkpoint::ComponentWeights;
use lora_torch::activation::swiglu;
use lora_torch::checkpoint::Shared;
use lora_torch::norm::{RmsWeight, rms_norm};
use lora_torch::tch::{Device, Kind, Tensor};
use serde_json::Value;

use super::axial_rotary::{AxialRotary, AxialTables};
use super::config;
use crate::layers::{Adaptable, AdaptableLayer, Pass, exclusive};
use crate::weights::{Weights, dimension};
use crate::{Error, Result};

/// Sizes of a transformer of Z-Image's kind.
#[derive(Debug, Clone, PartialEq)]
pub struct ZImageConfig {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Numbers of a token.
    pub width: usize,
    /// Heads of its attention.
    pub heads: usize,
    /// Inner width of its feed-forwards.
    pub inner: usize,
    /// Blocks that read picture and caption.
    pub layers: usize,
    /// Blocks that read the picture alone, and as many that read the caption alone.
    pub refiners: usize,
    /// Numbers of a caption's state.
    pub caption: usize,
    /// Inner width of the time's embedding.
    pub time_inner: usize,
    /// Numbers of the time's embedding, which scales and gates are made of.
    pub time: usize,
    /// Numbers of a head that are turned by the place in the sequence, the row and the column.
    pub axes: Vec<usize>,
    /// Base of the wavelengths of these turns.
    pub theta: f64,
    /// What RMS norms add under the root.
    pub epsilon: f64,
}

/// Side of a patch, and so many tokens a sequence's length is a multiple of.
const PATCH: i64 = 2;
const MULTIPLE: i64 = 32;

/// Sinusoids of a time.
const SINUSOIDS: usize = 256;

/// Under the root of the norms of queries and keys, whatever the others add.
const HEAD_EPSILON: f64 = 1e-5;

impl ZImageConfig {
    /// Read off a checkpoint's transformer: sizes from names and shapes; axes, their base and epsilon from its
    /// `config.json`, where there is one, or else as the published model has them.
    ///
    /// # Errors
    /// Where a weight that sizes are read off is missing or lacks axes, the `config.json` has other numbers than can be,
    /// or what it names is not built here.
    pub fn detect(component: &ComponentWeights) -> Result<Self> {
        let width = dimension(component, "all_x_embedder.2-1.weight", 0)?;
        let head = dimension(component, "layers.0.attention.norm_q.weight", 0)?.max(1);
        if component.contains("siglip_pad_token") {
            return Err(config::wrong(component, "a Z-Image of several pictures (`siglip_pad_token`)".into()));
        }
        let axes = match config::value(component, "axes_dims") {
            None => vec![head / 4, head / 8 * 3, head / 8 * 3],
            Some(_) => config::numbers(component, "axes_dims")?.unwrap_or_default(),
        };
        if axes.len() != 3 || axes.iter().sum::<usize>() != head || width % head != 0 {
            let reason = format!("axes of {axes:?} numbers in heads of {head}, {width} numbers in all");
            return Err(config::wrong(component, reason));
        }
        let scale = config::real(component, "t_scale")?.unwrap_or(1000.0);
        if scale != 1000.0 || config::value(component, "qk_norm").and_then(Value::as_bool) == Some(false) {
            let reason = "config.json: t_scale is not 1000, or qk_norm is false".into();
            return Err(config::wrong(component, reason));
        }
        Ok(Self {
            latent_channels: dimension(component, "all_x_embedder.2-1.weight", 1)? / (PATCH * PATCH) as usize,
            width,
            heads: width / head,
            inner: dimension(component, "layers.0.feed_forward.w1.weight", 0)?,
            layers: config::blocks(component, "layers", "attention.to_q.weight"),
            refiners: config::blocks(component, "noise_refiner", "attention.to_q.weight"),
            caption: dimension(component, "cap_embedder.0.weight", 0)?,
            time_inner: dimension(component, "t_embedder.mlp.0.weight", 0)?,
            time: dimension(component, "t_embedder.mlp.2.weight", 0)?,
            axes,
            theta: config::real(component, "rope_theta")?.unwrap_or(256.0),
            epsilon: config::real(component, "norm_eps")?.unwrap_or(1e-5),
        })
    }
}

/// The captions of a batch.
#[derive(Debug, Clone, Copy)]
pub struct ZImageCaptions<'t> {
    /// States `[batch, states, caption]`; what is behind a caption's length is not read.
    pub states: &'t Tensor,
    /// How many states each caption has, `[batch]` int64, 1 at least.
    pub lengths: &'t Tensor,
    /// Whether captions need different multiples of 32: then those that need fewer are looked at as far as they go. Without
    /// it, the batch takes less time.
    pub ragged: bool,
}

/// The transformer.
#[derive(Debug)]
pub struct ZImage {
    config: ZImageConfig,
    kind: Kind,
    x_embedder: AdaptableLayer,
    /// `[1, width]`.
    x_pad_token: Tensor,
    cap_norm: Tensor,
    cap_embedder: AdaptableLayer,
    /// `[1, width]`.
    cap_pad_token: Tensor,
    time: [AdaptableLayer; 2],
    noise_refiner: Vec<Shared<Block>>,
    context_refiner: Vec<Shared<Block>>,
    layers: Vec<Shared<Block>>,
    final_modulation: AdaptableLayer,
    final_linear: AdaptableLayer,
    rotary: AxialRotary,
    /// Of the sinusoids, `[128]` f32.
    frequencies: Tensor,
}

/// What all blocks of a sequence read beside it.
#[derive(Debug)]
struct Context {
    tables: AxialTables,
    /// Tokens that are there, `[batch, 1, 1, tokens]`; none where all are.
    mask: Option<Tensor>,
}

impl ZImage {
    /// Built from its weights, under diffusers' names.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source has other weights than `config`; out of
    /// memory.
    pub fn new(weights: &Weights<'_>, config: ZImageConfig) -> Result<Self> {
        let (width, plain) = (config.width, weights.plain());
        let patch = config.latent_channels * (PATCH * PATCH) as usize;
        let blocks = |name: &str, count: usize, modulated: bool| -> Result<Vec<_>> {
            let block = |index| Ok(Shared::new(Block::new(&weights.at(name).at(index), &config, modulated)?));
            (0..count).map(block).collect()
        };
        let last = plain.at("all_final_layer.2-1");
        Ok(Self {
            kind: weights.kind(),
            x_embedder: AdaptableLayer::linear(&plain.at("all_x_embedder.2-1"), patch, width, true)?,
            x_pad_token: weights.tensor("x_pad_token", &[1, width])?,
            cap_norm: weights.tensor("cap_embedder.0.weight", &[config.caption])?,
            cap_embedder: AdaptableLayer::linear(&plain.at("cap_embedder.1"), config.caption, width, true)?,
            cap_pad_token: weights.tensor("cap_pad_token", &[1, width])?,
            time: [
                AdaptableLayer::linear(&plain.at("t_embedder.mlp.0"), SINUSOIDS, config.time_inner, true)?,
                AdaptableLayer::linear(&plain.at("t_embedder.mlp.2"), config.time_inner, config.time, true)?,
            ],
            noise_refiner: blocks("noise_refiner", config.refiners, true)?,
            context_refiner: blocks("context_refiner", config.refiners, false)?,
            layers: blocks("layers", config.layers, true)?,
            final_modulation: AdaptableLayer::linear(&last.at("adaLN_modulation.1"), config.time, width, true)?,
            final_linear: AdaptableLayer::linear(&last.at("linear"), width, patch, true)?,
            rotary: AxialRotary::new(&config.axes, config.theta, weights.device())?,
            frequencies: frequencies(weights.device())?,
            config,
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &ZImageConfig {
        &self.config
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The velocity, noise minus data, of noised latents `[batch, channels, height, width]` of even sides at noise levels
    /// `sigmas` `[batch]` from 0 to 1; f32, of the latents' shape. All tensors are on its device, and nothing comes from
    /// host memory.
    ///
    /// # Errors
    /// [`Error::Input`] where shapes do not fit; out of memory.
    pub fn forward(
        &self,
        latents: &Tensor,
        sigmas: &Tensor,
        captions: ZImageCaptions<'_>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let (batch, channels, height, width) = latents.size4()?;
        self.check(latents, sigmas, captions)?;
        let (rows, columns) = (height / PATCH, width / PATCH);
        let time = self.embed_time(sigmas, pass)?;

        // The numbers of a patch are by row, column and channel.
        let patches = latents.f_to_kind(self.kind)?.f_view([batch, channels, rows, PATCH, columns, PATCH])?;
        let patches = patches.f_permute([0, 2, 4, 3, 5, 1])?.f_reshape([batch, rows * columns, -1])?;
        let picture = self.x_embedder.forward(&patches, pass)?;
        let picture = filled_up(&picture, &self.x_pad_token)?;
        let caption = self.embed_captions(captions, pass)?;
        let (places, states) = (picture.size3()?.1, caption.size3()?.1);

        let tables = self.tables((rows, columns), states, captions.lengths)?;
        let there = captions.ragged.then(|| there(captions.lengths, states)).transpose()?;
        let masks = |before: i64| there.as_ref().map(|there| mask(there, before)).transpose();
        let of_picture = Context { tables: tables.part(0, places)?, mask: None };
        let of_caption = Context { tables: tables.part(places, states)?, mask: masks(0)? };
        let picture = run(&self.noise_refiner, picture, Some(&time), of_picture, pass)?;
        let caption = run(&self.context_refiner, caption, None, of_caption, pass)?;
        let both = Tensor::f_cat(&[picture, caption], 1)?;
        let both = run(&self.layers, both, Some(&time), Context { tables, mask: masks(places)? }, pass)?;

        let picture = both.f_narrow(1, 0, rows * columns)?;
        let scale = self.final_modulation.forward(&time.f_silu()?, pass)?.f_add_scalar(1)?.f_unsqueeze(1)?;
        let normed = picture.f_layer_norm([self.config.width as i64], None::<&Tensor>, None::<&Tensor>, 1e-6, true)?;
        let answer = self.final_linear.forward(&normed.f_mul(&scale)?, pass)?;
        let answer = answer.f_view([batch, rows, columns, PATCH, PATCH, channels])?.f_permute([0, 5, 1, 3, 2, 4])?;
        // It answers with data minus noise.
        Ok(answer.f_reshape([batch, channels, height, width])?.f_to_kind(Kind::Float)?.f_neg()?)
    }

    fn check(&self, latents: &Tensor, sigmas: &Tensor, captions: ZImageCaptions<'_>) -> Result<()> {
        let (batch, channels, height, width) = latents.size4()?;
        let (captioned, states, numbers) = captions.states.size3()?;
        let fits = channels == self.config.latent_channels as i64
            && height % PATCH == 0
            && width % PATCH == 0
            && numbers == self.config.caption as i64
            && states > 0
            && captioned == batch
            && sigmas.size() == [batch]
            && captions.lengths.size() == [batch];
        if fits {
            return Ok(());
        }
        Err(Error::Input {
            what: "Z-Image's transformer",
            expected: format!(
                "latents [batch, {}, height, width] of even sides, states [batch, 1 or more, {}], a noise level and a \
                 length each",
                self.config.latent_channels, self.config.caption
            ),
            found: format!(
                "latents {:?}, states {:?}, noise levels {:?}, lengths {:?}",
                latents.size(),
                captions.states.size(),
                sigmas.size(),
                captions.lengths.size()
            ),
        })
    }

    /// `[batch, time]`. Its time runs the other way: 0 is noise alone.
    fn embed_time(&self, sigmas: &Tensor, pass: &Pass) -> Result<Tensor> {
        let time = sigmas.f_to_kind(Kind::Float)?.f_neg()?.f_add_scalar(1)?.f_mul_scalar(1000.0)?;
        let angles = time.f_unsqueeze(1)?.f_mul(&self.frequencies)?;
        let sinusoids = Tensor::f_cat(&[angles.f_cos()?, angles.f_sin()?], -1)?.f_to_kind(self.kind)?;
        let [first, second] = &self.time;
        second.forward(&first.forward(&sinusoids, pass)?.f_silu()?, pass)
    }

    /// `[batch, states, width]`, as many states as the longest caption fills up.
    fn embed_captions(&self, captions: ZImageCaptions<'_>, pass: &Pass) -> Result<Tensor> {
        let states = captions.states.f_to_kind(self.kind)?;
        let norm = self.cap_norm.f_to_kind(self.kind)?;
        let normed = rms_norm(&states, Some(&norm), self.config.epsilon, RmsWeight::Rounded)?;
        let embedded = filled_up(&self.cap_embedder.forward(&normed, pass)?, &self.cap_pad_token)?;
        let count = embedded.size3()?.1;
        let place = Tensor::f_arange(count, (Kind::Int64, embedded.device()))?;
        let own = place.f_unsqueeze(0)?.f_lt_tensor(&captions.lengths.f_unsqueeze(1)?)?.f_unsqueeze(-1)?;
        Ok(embedded.f_where_self(&own, &self.cap_pad_token.f_to_kind(self.kind)?)?)
    }

    /// Of the whole sequence: captions at 1, 2, …, pictures behind them on the first axis and by row and column on the
    /// others.
    fn tables(&self, (rows, columns): (i64, i64), states: i64, lengths: &Tensor) -> Result<AxialTables> {
        let options = (Kind::Int64, lengths.device());
        let (batch, places) = (lengths.size1()?, rows * columns);
        let zeros = Tensor::f_zeros([batch, states], options)?;
        let along = Tensor::f_arange_start(1, 1 + states, options)?.f_unsqueeze(0)?.f_expand([batch, states], false)?;
        let caption = Tensor::f_stack(&[&along, &zeros, &zeros], -1)?;
        let behind = up_to_multiple(lengths)?.f_add_scalar(1)?.f_unsqueeze(1)?.f_expand([batch, places], false)?;
        let grid = |count: i64, axis: i64| -> Result<Tensor> {
            let along = Tensor::f_arange(count, options)?.f_unsqueeze(axis)?.f_expand([rows, columns], false)?;
            Ok(along.f_reshape([1, places])?.f_expand([batch, places], false)?)
        };
        let picture = Tensor::f_stack(&[behind, grid(rows, 1)?, grid(columns, 0)?], -1)?;
        let fillers = places.next_multiple_of_32() - places;
        let picture = picture.f_constant_pad_nd([0, 0, 0, fillers])?;
        self.rotary.tables(&Tensor::f_cat(&[picture, caption], 1)?)
    }
}

/// Lengths of sequences that are filled up.
trait Multiple {
    fn next_multiple_of_32(self) -> i64;
}

impl Multiple for i64 {
    fn next_multiple_of_32(self) -> i64 {
        (self + MULTIPLE - 1) / MULTIPLE * MULTIPLE
    }
}

/// The same for lengths on the device, int64.
fn up_to_multiple(lengths: &Tensor) -> Result<Tensor> {
    // It is a power of two.
    Ok(lengths.f_add_scalar(MULTIPLE - 1)?.f_bitwise_and(-MULTIPLE)?)
}

/// `[batch, tokens, width]` with a token `[1, width]` as often behind them as makes their number a multiple of 32.
fn filled_up(tokens: &Tensor, filler: &Tensor) -> Result<Tensor> {
    let (batch, count, width) = tokens.size3()?;
    let missing = count.next_multiple_of_32() - count;
    if missing == 0 {
        return Ok(tokens.shallow_clone());
    }
    let fillers = filler.f_to_kind(tokens.kind())?.f_unsqueeze(0)?.f_expand([batch, missing, width], false)?;
    Ok(Tensor::f_cat(&[tokens, &fillers], 1)?)
}

/// Which of `states` tokens captions of these lengths have when they are filled up, bool `[batch, states]`.
fn there(lengths: &Tensor, states: i64) -> Result<Tensor> {
    let place = Tensor::f_arange(states, (Kind::Int64, lengths.device()))?.f_unsqueeze(0)?;
    Ok(place.f_lt_tensor(&up_to_multiple(lengths)?.f_unsqueeze(1)?)?)
}

/// The mask of captions' tokens behind so many others that are all there, `[batch, 1, 1, tokens]`.
fn mask(there: &Tensor, before: i64) -> Result<Tensor> {
    let batch = there.size2()?.0;
    let others = Tensor::f_ones([batch, before], (Kind::Bool, there.device()))?;
    Ok(Tensor::f_cat(&[&others, there], 1)?.f_unsqueeze(1)?.f_unsqueeze(1)?)
}

/// Frequencies of sinusoids (Vaswani et al., 2017), in f32 by libtorch as the model was trained.
fn frequencies(device: Device) -> Result<Tensor> {
    let half = (SINUSOIDS / 2) as i64;
    let exponents = Tensor::f_arange(half, (Kind::Float, device))?.f_mul_scalar(-(10_000f64.ln()))?;
    Ok(exponents.f_div_scalar(half as f64)?.f_exp()?)
}

/// A sequence through blocks, whose activations may be computed again.
fn run(
    blocks: &[Shared<Block>],
    mut tokens: Tensor,
    time: Option<&Tensor>,
    context: Context,
    pass: &Pass,
) -> Result<Tensor> {
    let context = Shared::new(context);
    // Nothing is learnt before the layers, as a rule: then nothing has to be computed again, or kept for that.
    let learns =
        tokens.requires_grad() || time.is_some_and(Tensor::requires_grad) || blocks.iter().any(|block| block.learns());
    let kept = Pass {
        recompute: pass.recompute && learns,
        recompute_feed_forward: pass.recompute_feed_forward && learns,
        ..pass.clone()
    };
    let pass = &kept;
    for block in blocks {
        let inputs: Vec<&Tensor> = std::iter::once(&tokens).chain(time).collect();
        let context = context.clone();
        tokens = pass.block(block, &inputs, move |block, inputs, pass| {
            block.forward(&inputs[0], inputs.get(1), &context, pass)
        })?;
    }
    Ok(tokens)
}

/// Attention and a gated feed-forward, scaled and gated by the time in all but the blocks that read captions alone.
#[derive(Debug)]
struct Block {
    modulation: Option<AdaptableLayer>,
    mix: Shared<Mix>,
    feed: Shared<Feed>,
}

/// What the time makes of a part of a block: what its input is multiplied by, and what it adds, `[batch, 1, width]` each.
type Modulation<'t> = Option<[&'t Tensor; 2]>;

/// The modulation among the inputs of a part.
fn modulation(inputs: &[Tensor]) -> Modulation<'_> {
    match inputs {
        [_, scale, gate] => Some([scale, gate]),
        _ => None,
    }
}

/// Tokens that a feed-forward takes at once where it is computed again by itself: wide as it is, it would be the most
/// that a step holds.
const TOKENS_AT_ONCE: i64 = 1024;

impl Block {
    fn new(weights: &Weights<'_>, config: &ZImageConfig, modulated: bool) -> Result<Self> {
        let modulation =
            || AdaptableLayer::linear(&weights.plain().at("adaLN_modulation.0"), config.time, 4 * config.width, true);
        Ok(Self {
            modulation: modulated.then(modulation).transpose()?,
            mix: Shared::new(Mix::new(weights, config)?),
            feed: Shared::new(Feed::new(weights, config)?),
        })
    }

    /// `[batch, tokens, width]` of the same; `time` is `[batch, time]`.
    fn forward(
        &self,
        tokens: &Tensor,
        time: Option<&Tensor>,
        context: &Shared<Context>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let parts = match (&self.modulation, time) {
            (Some(layer), Some(time)) => layer.forward(time, pass)?.f_unsqueeze(1)?.f_chunk(4, -1)?,
            _ => Vec::new(),
        };
        let [for_mix, for_feed] = [parts.get(..2), parts.get(2..4)].map(Option::unwrap_or_default);
        // A block that is computed again holds all of its activations at once; by parts it holds the largest's.
        let by_parts = pass.recompute && pass.recompute_feed_forward;
        if !by_parts {
            let tokens = self.mix.forward(&inputs_of(tokens, for_mix), context, pass)?;
            return self.feed.forward(&inputs_of(&tokens, for_feed), pass);
        }
        let inputs = inputs_of(tokens, for_mix);
        let context = context.clone();
        let tokens = pass.feed_forward(&self.mix, &inputs.iter().collect::<Vec<_>>(), move |mix, inputs, pass| {
            mix.forward(inputs, &context, pass)
        })?;
        let count = tokens.size3()?.1;
        let slices = (0..count).step_by(TOKENS_AT_ONCE as usize);
        let fed = slices.map(|first| {
            let slice = tokens.f_narrow(1, first, TOKENS_AT_ONCE.min(count - first))?;
            let inputs = inputs_of(&slice, for_feed);
            pass.feed_forward(&self.feed, &inputs.iter().collect::<Vec<_>>(), |feed, inputs, pass| {
                feed.forward(inputs, &Pass { recompute_feed_forward: false, ..pass.clone() })
            })
        });
        match fed.collect::<Result<Vec<_>>>()?.as_slice() {
            [one] => Ok(one.shallow_clone()),
            several => Ok(Tensor::f_cat(several, 1)?),
        }
    }

    /// Whether anything in it is trained.
    fn learns(&self) -> bool {
        let Attention { to_q, to_k, to_v, to_out, .. } = &self.mix.attention;
        let Feed { gate, w2, .. } = &*self.feed;
        let layers = [to_q, to_k, to_v, to_out, &gate.w1, w2, &gate.w3];
        layers.into_iter().chain(&self.modulation).any(AdaptableLayer::learns)
    }

    fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        self.modulation.iter_mut().for_each(&mut *visit);
        let Attention { to_q, to_k, to_v, to_out, .. } = &mut exclusive(&mut self.mix)?.attention;
        [to_q, to_k, to_v, to_out].into_iter().for_each(&mut *visit);
        let Feed { gate, w2, .. } = exclusive(&mut self.feed)?;
        let Gate { w1, w3 } = exclusive(gate)?;
        [w1, w2, w3].into_iter().for_each(visit);
        Ok(())
    }
}

/// Tokens with the modulation of a part, as its inputs.
fn inputs_of(tokens: &Tensor, modulation: &[Tensor]) -> Vec<Tensor> {
    std::iter::once(tokens).chain(modulation).map(Tensor::shallow_clone).collect()
}

/// What a part of a block adds to tokens, between two norms.
fn added(
    tokens: &Tensor,
    modulation: Modulation<'_>,
    norms: &[Tensor; 2],
    epsilon: f64,
    part: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let norm = |weight: &Tensor, input: &Tensor| {
        rms_norm(input, Some(&weight.f_to_kind(input.kind())?), epsilon, RmsWeight::Rounded)
    };
    let [before, behind] = norms;
    let read = norm(before, tokens)?;
    let Some([scale, gate]) = modulation else { return Ok(tokens.f_add(&norm(behind, &part(&read)?)?)?) };
    let read = read.f_mul(&scale.f_add_scalar(1)?)?;
    Ok(tokens.f_add(&norm(behind, &part(&read)?)?.f_mul(&gate.f_tanh()?)?)?)
}

/// The attention of a block with the norms around it.
#[derive(Debug)]
struct Mix {
    attention: Attention,
    /// `[width]` each.
    norms: [Tensor; 2],
    epsilon: f64,
}

impl Mix {
    fn new(weights: &Weights<'_>, config: &ZImageConfig) -> Result<Self> {
        let norm = |name: &str| weights.at(name).tensor("weight", &[config.width]);
        Ok(Self {
            attention: Attention::new(&weights.at("attention"), config)?,
            norms: [norm("attention_norm1")?, norm("attention_norm2")?],
            epsilon: config.epsilon,
        })
    }

    /// Of tokens `[batch, tokens, width]` and their modulation.
    fn forward(&self, inputs: &[Tensor], context: &Context, pass: &Pass) -> Result<Tensor> {
        let attend = |read: &Tensor| self.attention.forward(read, context, pass);
        added(&inputs[0], modulation(inputs), &self.norms, self.epsilon, attend)
    }
}

/// The feed-forward of a block with the norms around it.
#[derive(Debug)]
struct Feed {
    gate: Shared<Gate>,
    w2: AdaptableLayer,
    /// `[width]` each.
    norms: [Tensor; 2],
    epsilon: f64,
}

/// The wide inner part of the feed-forward, which may be computed again for itself.
#[derive(Debug)]
struct Gate {
    w1: AdaptableLayer,
    w3: AdaptableLayer,
}

impl Feed {
    fn new(weights: &Weights<'_>, config: &ZImageConfig) -> Result<Self> {
        let (width, inner) = (config.width, config.inner);
        let norm = |name: &str| weights.at(name).tensor("weight", &[width]);
        let own = weights.at("feed_forward");
        Ok(Self {
            gate: Shared::new(Gate {
                w1: AdaptableLayer::linear(&own.at("w1"), width, inner, false)?,
                w3: AdaptableLayer::linear(&own.at("w3"), width, inner, false)?,
            }),
            w2: AdaptableLayer::linear(&own.at("w2"), inner, width, false)?,
            norms: [norm("ffn_norm1")?, norm("ffn_norm2")?],
            epsilon: config.epsilon,
        })
    }

    /// Of tokens `[batch, tokens, width]` and their modulation.
    fn forward(&self, inputs: &[Tensor], pass: &Pass) -> Result<Tensor> {
        let feed = |read: &Tensor| {
            let inner = pass.feed_forward(&self.gate, &[read], |gate, inputs, pass| {
                Ok(swiglu(&gate.w1.forward(&inputs[0], pass)?, &gate.w3.forward(&inputs[0], pass)?)?)
            })?;
            self.w2.forward(&inner, pass)
        };
        added(&inputs[0], modulation(inputs), &self.norms, self.epsilon, feed)
    }
}

/// Self-attention with normed and turned queries and keys.
#[derive(Debug)]
struct Attention {
    to_q: AdaptableLayer,
    to_k: AdaptableLayer,
    to_v: AdaptableLayer,
    to_out: AdaptableLayer,
    /// `[head]` each.
    norm_q: Tensor,
    norm_k: Tensor,
    heads: i64,
}

impl Attention {
    fn new(weights: &Weights<'_>, config: &ZImageConfig) -> Result<Self> {
        let (width, head) = (config.width, config.width / config.heads);
        let square = |name: &str| AdaptableLayer::linear(&weights.at(name), width, width, false);
        Ok(Self {
            to_q: square("to_q")?,
            to_k: square("to_k")?,
            to_v: square("to_v")?,
            to_out: square("to_out.0")?,
            norm_q: weights.tensor("norm_q.weight", &[head])?,
            norm_k: weights.tensor("norm_k.weight", &[head])?,
            heads: config.heads as i64,
        })
    }

    fn forward(&self, tokens: &Tensor, context: &Context, pass: &Pass) -> Result<Tensor> {
        let split = |layer: &AdaptableLayer| -> Result<Tensor> {
            Ok(layer.forward(tokens, pass)?.f_unflatten(-1, [self.heads, -1])?)
        };
        let turned = |layer: &AdaptableLayer, norm: &Tensor| -> Result<Tensor> {
            let heads = split(layer)?;
            let normed = rms_norm(&heads, Some(&norm.f_to_kind(heads.kind())?), HEAD_EPSILON, RmsWeight::Rounded)?;
            context.tables.turn(&normed.f_transpose(1, 2)?)
        };
        let (query, key) = (turned(&self.to_q, &self.norm_q)?, turned(&self.to_k, &self.norm_k)?);
        let value = split(&self.to_v)?.f_transpose(1, 2)?;
        let mask = context.mask.as_ref();
        let mixed = Tensor::f_scaled_dot_product_attention(&query, &key, &value, mask, 0.0, false, None, false)?;
        self.to_out.forward(&mixed.f_transpose(1, 2)?.f_flatten(2, 3)?, pass)
    }
}

impl Adaptable for ZImage {
    fn component(&self) -> Component {
        Component::TRANSFORMER
    }

    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        visit(&mut self.x_embedder);
        visit(&mut self.cap_embedder);
        self.time.iter_mut().for_each(&mut *visit);
        let Self { noise_refiner, context_refiner, layers, .. } = self;
        for block in noise_refiner.iter_mut().chain(context_refiner).chain(layers) {
            exclusive(block)?.visit(visit)?;
        }
        visit(&mut self.final_modulation);
        visit(&mut self.final_linear);
        Ok(())
    }
}
