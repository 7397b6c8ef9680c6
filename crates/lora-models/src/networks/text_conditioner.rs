//! Anima's text conditioner (`llm_adapter` in its files): T5's tokens, looked up in a table of its own, read the states of
//! another model of the same caption; diffusers' `AnimaTextConditioner`. T5 itself is not there.

use lora_io::checkpoint::ComponentWeights;
use lora_torch::norm::{RmsWeight, rms_norm};
use lora_torch::tch::{Kind, Tensor};

use super::axial_rotary::{AxialRotary, AxialTables};
use super::config;
use super::joint::{Attention, AttentionNames, HeadSizes};
use crate::layers::{AdaptableLayer, Pass};
use crate::weights::{Weights, dimension};
use crate::{Error, Result};

/// Sizes of a conditioner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextConditionerConfig {
    /// Tokens that there are.
    pub vocabulary: usize,
    /// Width of the states that are read.
    pub source: usize,
    /// Width of the states that are made, and of the table.
    pub target: usize,
    /// Width inside.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width inside of the feed-forward.
    pub inner: usize,
    /// Number of blocks.
    pub blocks: usize,
}

/// What the norms add under their root.
const EPSILON: f64 = 1e-6;
/// Base of the frequencies of positions.
const THETA: f64 = 10_000.0;

const NAMES: AttentionNames =
    AttentionNames { layers: ["q_proj", "k_proj", "v_proj", "o_proj"], norms: ["q_norm", "k_norm"] };

impl TextConditionerConfig {
    /// Read off a component's names and shapes.
    ///
    /// # Errors
    /// Where a weight that sizes are read off is missing or lacks axes, or sizes do not fit each other.
    pub fn detect(component: &ComponentWeights) -> Result<Self> {
        let width = dimension(component, "blocks.0.cross_attn.q_proj.weight", 0)?;
        let head = dimension(component, "blocks.0.cross_attn.q_norm.weight", 0)?;
        Ok(Self {
            vocabulary: dimension(component, "embed.weight", 0)?,
            source: dimension(component, "blocks.0.cross_attn.k_proj.weight", 1)?,
            target: dimension(component, "embed.weight", 1)?,
            width,
            heads: config::heads(component, width, head, 2)?,
            inner: dimension(component, "blocks.0.mlp.0.weight", 0)?,
            blocks: config::blocks(component, "blocks", "cross_attn.q_proj.weight"),
        })
    }
}

/// The conditioner.
#[derive(Debug)]
pub struct TextConditioner {
    config: TextConditionerConfig,
    kind: Kind,
    rotary: AxialRotary,
    embed: AdaptableLayer,
    /// Where the width inside is another than the table's.
    in_proj: Option<AdaptableLayer>,
    blocks: Vec<Block>,
    out_proj: AdaptableLayer,
    /// `[target]`.
    norm: Tensor,
}

#[derive(Debug)]
struct Block {
    own: Attention,
    cross: Attention,
    mlp: [AdaptableLayer; 2],
    /// Before each of the three, `[width]`.
    norms: [Tensor; 3],
}

impl TextConditioner {
    /// Built from its weights.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source has other weights than `config`; out of
    /// memory.
    pub fn new(weights: &Weights<'_>, config: TextConditionerConfig) -> Result<Self> {
        let TextConditionerConfig { vocabulary, target, width, heads, .. } = config;
        let linear = |name: &str, inputs, outputs| AdaptableLayer::linear(&weights.at(name), inputs, outputs, true);
        let blocks = weights.at("blocks");
        Ok(Self {
            kind: weights.kind(),
            rotary: AxialRotary::of_halves(&[(width / heads, THETA)], weights.device())?,
            embed: AdaptableLayer::embedding(&weights.at("embed"), vocabulary, target, true)?,
            in_proj: (width != target).then(|| linear("in_proj", target, width)).transpose()?,
            blocks: (0..config.blocks).map(|at| Block::new(&blocks.at(at), &config)).collect::<Result<_>>()?,
            out_proj: linear("out_proj", width, target)?,
            norm: weights.at("norm").tensor("weight", &[target])?,
            config,
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &TextConditionerConfig {
        &self.config
    }

    /// States `[rows, tokens, target]` in the compute dtype of T5's tokens `[rows, tokens]` (int64) and another model's
    /// states of the same captions, `[rows, others, source]`; `None` where it has no tokens for them.
    ///
    /// # Errors
    /// Where inputs do not fit each other, and where memory runs out.
    pub fn forward(&self, tokens: &Tensor, source: Option<&Tensor>, pass: &Pass) -> Result<Tensor> {
        let fits = |source: &Tensor| {
            matches!(source.size()[..], [rows, _, width]
            if Some(&rows) == tokens.size().first() && width == self.config.source as i64)
        };
        if tokens.dim() != 2 || !source.is_none_or(fits) {
            let expected = format!("rows of tokens, states of {} numbers for each row", self.config.source);
            let found = format!("tokens {:?}, states {:?}", tokens.size(), source.map(Tensor::size));
            return Err(Error::Input { what: "text conditioner", expected, found });
        }
        let mut state = self.embed.forward(tokens, pass)?.f_to_kind(self.kind)?;
        if let Some(in_proj) = &self.in_proj {
            state = in_proj.forward(&state, pass)?;
        }
        let source = source.map(|source| source.f_to_kind(self.kind)).transpose()?;
        let own = self.positions(&state)?;
        let others = source.as_ref().map(|source| self.positions(source)).transpose()?;
        for block in &self.blocks {
            state = block.forward(&state, &own, source.as_ref().zip(others.as_ref()), pass)?;
        }
        normed(&self.out_proj.forward(&state, pass)?, &self.norm)
    }

    /// Of states that stand one behind the other.
    fn positions(&self, states: &Tensor) -> Result<AxialTables> {
        let order = Tensor::f_arange(states.size3()?.1, (Kind::Int64, states.device()))?;
        self.rotary.tables(&order.f_unsqueeze(0)?.f_unsqueeze(-1)?)
    }
}

impl Block {
    fn new(weights: &Weights<'_>, config: &TextConditionerConfig) -> Result<Self> {
        let &TextConditionerConfig { source, width, heads, inner, .. } = config;
        let sizes = HeadSizes { width, heads, bias: false, norms: true };
        let attention = |name: &str, reads| Attention::new(&weights.at(name), NAMES, sizes, reads);
        let linear = |name: &str, inputs, outputs| AdaptableLayer::linear(&weights.at(name), inputs, outputs, true);
        let norm = |name: &str| weights.at(name).tensor("weight", &[width]);
        Ok(Self {
            own: attention("self_attn", width)?,
            cross: attention("cross_attn", source)?,
            mlp: [linear("mlp.0", width, inner)?, linear("mlp.2", inner, width)?],
            norms: [norm("norm_self_attn")?, norm("norm_cross_attn")?, norm("norm_mlp")?],
        })
    }

    fn forward(
        &self,
        state: &Tensor,
        own: &AxialTables,
        source: Option<(&Tensor, &AxialTables)>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let [before_own, before_cross, before_mlp] = &self.norms;
        let read = normed(state, before_own)?;
        let mut state = state.f_add(&self.own.forward(&read, &read, Some([own; 2]), pass)?)?;
        if let Some((source, others)) = source {
            let read = normed(&state, before_cross)?;
            state = state.f_add(&self.cross.forward(&read, source, Some([own, others]), pass)?)?;
        }
        let [wide, narrow] = &self.mlp;
        let inner = wide.forward(&normed(&state, before_mlp)?, pass)?.f_gelu("none")?;
        Ok(state.f_add(&narrow.forward(&inner, pass)?)?)
    }
}

fn normed(state: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(rms_norm(state, Some(&weight.f_to_kind(state.kind())?), EPSILON, RmsWeight::Single)?)
}
