//! The U-Net's spatial transformer: self-attention, cross-attention to the text, gated feed-forward (diffusers'
//! `Transformer2DModel`).

use lora_torch::activation::geglu;
use lora_torch::checkpoint::Shared;
use lora_torch::tch::Tensor;

use crate::Result;
use crate::layers::{AdaptableLayer, GroupNorm, LayerNorm, Pass, attention, exclusive};
use crate::weights::Weights;

/// Sizes of one spatial transformer.
#[derive(Debug, Clone, Copy)]
pub(super) struct TransformerSizes {
    pub(super) channels: usize,
    pub(super) context: usize,
    pub(super) heads: usize,
    pub(super) depth: usize,
    pub(super) norm_groups: usize,
    /// Projections in and out as linear layers instead of 1×1 convolutions.
    pub(super) linear_projection: bool,
}

#[derive(Debug)]
pub(super) struct SpatialTransformer {
    norm: GroupNorm,
    proj_in: AdaptableLayer,
    blocks: Vec<Block>,
    proj_out: AdaptableLayer,
    linear_projection: bool,
}

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    gate: Shared<Gate>,
    ff_out: AdaptableLayer,
}

/// The wide inner part of the feed-forward, which may be computed again for itself.
#[derive(Debug)]
struct Gate {
    norm: LayerNorm,
    ff_in: AdaptableLayer,
}

#[derive(Debug)]
struct Attention {
    to_q: AdaptableLayer,
    to_k: AdaptableLayer,
    to_v: AdaptableLayer,
    to_out: AdaptableLayer,
    heads: usize,
}

impl SpatialTransformer {
    pub(super) fn new(weights: &Weights<'_>, sizes: TransformerSizes) -> Result<Self> {
        let channels = sizes.channels;
        let projection = |name: &str| match sizes.linear_projection {
            true => AdaptableLayer::linear(&weights.at(name), channels, channels, true),
            false => AdaptableLayer::conv2d(&weights.at(name), channels, channels, 1, 1),
        };
        let blocks = (0..sizes.depth).map(|index| Block::new(&weights.at("transformer_blocks").at(index), sizes));
        Ok(Self {
            norm: GroupNorm::new(&weights.at("norm"), channels, sizes.norm_groups, 1e-6)?,
            proj_in: projection("proj_in")?,
            blocks: blocks.collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
            linear_projection: sizes.linear_projection,
        })
    }

    /// `[batch, channels, height, width]` with text states `[batch, states, context]`.
    pub(super) fn forward(&self, input: &Tensor, context: &Tensor, pass: &Pass) -> Result<Tensor> {
        let (batch, channels, height, width) = input.size4()?;
        let to_tokens = |pixels: &Tensor| pixels.f_flatten(2, 3)?.f_transpose(1, 2);
        let to_pixels = |tokens: &Tensor| tokens.f_transpose(1, 2)?.f_reshape([batch, channels, height, width]);
        let normed = self.norm.forward(input)?;
        let mut tokens = if self.linear_projection {
            self.proj_in.forward(&to_tokens(&normed)?, pass)?
        } else {
            to_tokens(&self.proj_in.forward(&normed, pass)?)?
        };
        for block in &self.blocks {
            tokens = block.forward(tokens, context, pass)?;
        }
        let update = if self.linear_projection {
            to_pixels(&self.proj_out.forward(&tokens, pass)?)?
        } else {
            self.proj_out.forward(&to_pixels(&tokens)?, pass)?
        };
        Ok(update.f_add(input)?)
    }

    pub(super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()> {
        visit(&mut self.proj_in);
        for block in &mut self.blocks {
            for attention in [&mut block.attn1, &mut block.attn2] {
                let Attention { to_q, to_k, to_v, to_out, .. } = attention;
                [to_q, to_k, to_v, to_out].into_iter().for_each(&mut *visit);
            }
            visit(&mut exclusive(&mut block.gate)?.ff_in);
            visit(&mut block.ff_out);
        }
        visit(&mut self.proj_out);
        Ok(())
    }
}

impl Block {
    fn new(weights: &Weights<'_>, sizes: TransformerSizes) -> Result<Self> {
        let channels = sizes.channels;
        Ok(Self {
            norm1: LayerNorm::new(&weights.at("norm1"), channels)?,
            attn1: Attention::new(&weights.at("attn1"), channels, channels, sizes.heads)?,
            norm2: LayerNorm::new(&weights.at("norm2"), channels)?,
            attn2: Attention::new(&weights.at("attn2"), channels, sizes.context, sizes.heads)?,
            gate: Shared::new(Gate {
                norm: LayerNorm::new(&weights.at("norm3"), channels)?,
                ff_in: AdaptableLayer::linear(&weights.at("ff.net.0.proj"), channels, 8 * channels, true)?,
            }),
            ff_out: AdaptableLayer::linear(&weights.at("ff.net.2"), 4 * channels, channels, true)?,
        })
    }

    fn forward(&self, tokens: Tensor, context: &Tensor, pass: &Pass) -> Result<Tensor> {
        let normed = self.norm1.forward(&tokens)?;
        let tokens = self.attn1.forward(&normed, &normed, pass)?.f_add(&tokens)?;
        let normed = self.norm2.forward(&tokens)?;
        let tokens = self.attn2.forward(&normed, context, pass)?.f_add(&tokens)?;
        let gated = pass.feed_forward(&self.gate, &[&tokens], |gate, inputs, pass| {
            Ok(geglu(&gate.ff_in.forward(&gate.norm.forward(&inputs[0])?, pass)?)?)
        })?;
        Ok(self.ff_out.forward(&gated, pass)?.f_add(&tokens)?)
    }
}

impl Attention {
    fn new(weights: &Weights<'_>, width: usize, context: usize, heads: usize) -> Result<Self> {
        Ok(Self {
            to_q: AdaptableLayer::linear(&weights.at("to_q"), width, width, false)?,
            to_k: AdaptableLayer::linear(&weights.at("to_k"), context, width, false)?,
            to_v: AdaptableLayer::linear(&weights.at("to_v"), context, width, false)?,
            to_out: AdaptableLayer::linear(&weights.at("to_out.0"), width, width, true)?,
            heads,
        })
    }

    fn forward(&self, tokens: &Tensor, context: &Tensor, pass: &Pass) -> Result<Tensor> {
        let query = self.to_q.forward(tokens, pass)?;
        let key = self.to_k.forward(context, pass)?;
        let value = self.to_v.forward(context, pass)?;
        self.to_out.forward(&attention(&query, &key, &value, self.heads, false)?, pass)
    }
}
