//! Blocks that the U-Net and the autoencoder share.

use lora_torch::tch::Tensor;

use crate::Result;
use crate::layers::{AdaptableLayer, GroupNorm, Pass};
use crate::weights::Weights;

/// norm · SiLU · conv, twice, with the time embedding added in between (U-Net only) and a shortcut around.
#[derive(Debug)]
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: AdaptableLayer,
    time_emb_proj: Option<AdaptableLayer>,
    norm2: GroupNorm,
    conv2: AdaptableLayer,
    conv_shortcut: Option<AdaptableLayer>,
}

/// How a block normalises: groups and epsilon.
#[derive(Debug, Clone, Copy)]
pub(super) struct Norm {
    pub(super) groups: usize,
    pub(super) epsilon: f64,
}

impl ResnetBlock {
    /// `time` is the width of the time embedding.
    pub(super) fn new(
        weights: &Weights<'_>,
        inputs: usize,
        outputs: usize,
        time: Option<usize>,
        norm: Norm,
    ) -> Result<Self> {
        let time_emb_proj =
            time.map(|width| AdaptableLayer::linear(&weights.at("time_emb_proj"), width, outputs, true));
        let conv_shortcut =
            (inputs != outputs).then(|| AdaptableLayer::conv2d(&weights.at("conv_shortcut"), inputs, outputs, 1, 1));
        Ok(Self {
            norm1: GroupNorm::new(&weights.at("norm1"), inputs, norm.groups, norm.epsilon)?,
            conv1: AdaptableLayer::conv2d(&weights.at("conv1"), inputs, outputs, 3, 1)?,
            time_emb_proj: time_emb_proj.transpose()?,
            norm2: GroupNorm::new(&weights.at("norm2"), outputs, norm.groups, norm.epsilon)?,
            conv2: AdaptableLayer::conv2d(&weights.at("conv2"), outputs, outputs, 3, 1)?,
            conv_shortcut: conv_shortcut.transpose()?,
        })
    }

    /// `[batch, inputs, height, width]` to `[batch, outputs, height, width]`; `time` is `[batch, time]`, SiLU applied.
    pub(super) fn forward(&self, input: &Tensor, time: Option<&Tensor>, pass: &Pass) -> Result<Tensor> {
        let mut hidden = self.conv1.forward(&self.norm1.forward_silu(input)?, pass)?;
        if let (Some(projection), Some(time)) = (&self.time_emb_proj, time) {
            hidden = hidden.f_add(&projection.forward(time, pass)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?)?;
        }
        let hidden = self.conv2.forward(&self.norm2.forward_silu(&hidden)?, pass)?;
        match &self.conv_shortcut {
            Some(shortcut) => Ok(hidden.f_add(&shortcut.forward(input, pass)?)?),
            None => Ok(hidden.f_add(input)?),
        }
    }

    pub(super) fn visit(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) {
        visit(&mut self.conv1);
        self.time_emb_proj.iter_mut().for_each(&mut *visit);
        visit(&mut self.conv2);
        self.conv_shortcut.iter_mut().for_each(&mut *visit);
    }
}

/// Doubles the size, or brings it to `size`, by repeating pixels, then convolves.
pub(super) fn upsample(conv: &AdaptableLayer, input: &Tensor, size: Option<[i64; 2]>, pass: &Pass) -> Result<Tensor> {
    let (_, _, height, width) = input.size4()?;
    let size = size.unwrap_or([2 * height, 2 * width]);
    conv.forward(&input.f_upsample_nearest2d(size, None, None)?, pass)
}
