//! Names of Qwen-Image's transformer, whose original tree is diffusers', and of its autoencoder, whose original is Wan's:
//!
//! | Wan | diffusers |
//! |---|---|
//! | `encoder.downsamples.i` | `encoder.down_blocks.i` |
//! | `decoder.upsamples.(4i+j)` | `decoder.up_blocks.i.resnets.j` |
//! | `decoder.upsamples.(4i+3)` | `decoder.up_blocks.i.upsamplers.0` |
//! | `middle.{0,1,2}` | `mid_block.{resnets.0,attentions.0,resnets.1}` |
//! | `residual.{0,2,3,6}`, `shortcut` | `norm1`, `conv1`, `norm2`, `conv2`, `conv_shortcut` |
//!
//! The 4 is one more than the residual blocks of a level on the way up, which are 3 in every published model.

use super::table::{Module, Table};
use super::{Depths, Piece, Tree, numbered, swap_prefix};

/// The transformer.
pub static QWEN_IMAGE: Table = Table { modules: MODULES, tensors: &[], blocks: "transformer_blocks." };

/// The autoencoder in Wan's tree.
#[derive(Debug)]
pub struct WanVae;

/// Blocks of a level on the way up, with what doubles its sides.
const UP: usize = 4;

/// What has a fixed place: Wan's, diffusers'.
const ENDS: &[(&str, &str)] = &[
    ("conv1.", "quant_conv."),
    ("conv2.", "post_quant_conv."),
    ("encoder.conv1.", "encoder.conv_in."),
    ("decoder.conv1.", "decoder.conv_in."),
    ("encoder.head.0.", "encoder.norm_out."),
    ("decoder.head.0.", "decoder.norm_out."),
    ("encoder.head.2.", "encoder.conv_out."),
    ("decoder.head.2.", "decoder.conv_out."),
    ("encoder.middle.1.", "encoder.mid_block.attentions.0."),
    ("decoder.middle.1.", "decoder.mid_block.attentions.0."),
];

/// Middle blocks beside the attention.
const MIDDLE: &[(&str, &str)] = &[
    ("encoder.middle.0.", "encoder.mid_block.resnets.0."),
    ("encoder.middle.2.", "encoder.mid_block.resnets.1."),
    ("decoder.middle.0.", "decoder.mid_block.resnets.0."),
    ("decoder.middle.2.", "decoder.mid_block.resnets.1."),
];

/// The parts of a block; what changes sides has the same names in both.
const BLOCK: &[(&str, &str)] = &[
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
    ("resample.", "resample."),
    ("time_conv.", "time_conv."),
];

fn from_wan(name: &str) -> Option<String> {
    if let Some(name) = swap_prefix(name, ENDS, false) {
        return Some(name);
    }
    let part = |rest: &str| swap_prefix(rest, BLOCK, false);
    if let Some((from, to)) = MIDDLE.iter().find(|(from, _)| name.starts_with(from)) {
        return Some(format!("{to}{}", part(&name[from.len()..])?));
    }
    if let Some((index, rest)) = name.strip_prefix("encoder.downsamples.").and_then(numbered) {
        return Some(format!("encoder.down_blocks.{index}.{}", part(rest)?));
    }
    let (index, rest) = name.strip_prefix("decoder.upsamples.").and_then(numbered)?;
    let (level, layer, rest) = (index / UP, index % UP, part(rest)?);
    Some(match layer + 1 == UP {
        true => format!("decoder.up_blocks.{level}.upsamplers.0.{rest}"),
        false => format!("decoder.up_blocks.{level}.resnets.{layer}.{rest}"),
    })
}

fn to_wan(name: &str) -> Option<String> {
    if let Some(name) = swap_prefix(name, ENDS, true) {
        return Some(name);
    }
    let part = |rest: &str| swap_prefix(rest, BLOCK, true);
    if let Some((to, from)) = MIDDLE.iter().find(|(_, from)| name.starts_with(from)) {
        return Some(format!("{to}{}", part(&name[from.len()..])?));
    }
    if let Some((index, rest)) = name.strip_prefix("encoder.down_blocks.").and_then(numbered) {
        return Some(format!("encoder.downsamples.{index}.{}", part(rest)?));
    }
    let (level, rest) = name.strip_prefix("decoder.up_blocks.").and_then(numbered)?;
    let (layer, rest) = match rest.strip_prefix("upsamplers.0.") {
        Some(rest) => (UP - 1, rest),
        None => rest.strip_prefix("resnets.").and_then(numbered)?,
    };
    Some(format!("decoder.upsamples.{}.{}", UP * level + layer, part(rest)?))
}

impl Tree for WanVae {
    fn weights(&self, stored: &str, _depths: &Depths) -> Option<Vec<(String, Piece)>> {
        Some(vec![(from_wan(stored)?, Piece::All)])
    }

    fn stored(&self, canonical: &str, _depths: &Depths) -> Option<(String, Piece)> {
        Some((to_wan(canonical)?, Piece::All))
    }
}

/// Words with underscores in module paths, beside FLUX.1's.
pub(crate) const WORDS: &[&str] = &["txt_norm"];

macro_rules! same {
    ($($name:literal),* $(,)?) => {
        &[$(Module::new($name, &[($name, 1)])),*]
    };
}

const MODULES: &[Module] = same![
    "img_in",
    "txt_norm",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
    "transformer_blocks.#.img_mod.1",
    "transformer_blocks.#.txt_mod.1",
    "transformer_blocks.#.img_mlp.net.0.proj",
    "transformer_blocks.#.img_mlp.net.2",
    "transformer_blocks.#.txt_mlp.net.0.proj",
    "transformer_blocks.#.txt_mlp.net.2",
    "transformer_blocks.#.attn.to_q",
    "transformer_blocks.#.attn.to_k",
    "transformer_blocks.#.attn.to_v",
    "transformer_blocks.#.attn.to_out.0",
    "transformer_blocks.#.attn.add_q_proj",
    "transformer_blocks.#.attn.add_k_proj",
    "transformer_blocks.#.attn.add_v_proj",
    "transformer_blocks.#.attn.to_add_out",
    "transformer_blocks.#.attn.norm_q",
    "transformer_blocks.#.attn.norm_k",
    "transformer_blocks.#.attn.norm_added_q",
    "transformer_blocks.#.attn.norm_added_k",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_autoencoder_map_both_ways() {
        for (wan, diffusers) in [
            ("conv1.weight", "quant_conv.weight"),
            ("encoder.conv1.bias", "encoder.conv_in.bias"),
            ("decoder.head.0.gamma", "decoder.norm_out.gamma"),
            ("decoder.middle.1.to_qkv.weight", "decoder.mid_block.attentions.0.to_qkv.weight"),
            ("encoder.middle.2.residual.6.weight", "encoder.mid_block.resnets.1.conv2.weight"),
            ("encoder.downsamples.5.time_conv.bias", "encoder.down_blocks.5.time_conv.bias"),
            ("encoder.downsamples.3.shortcut.weight", "encoder.down_blocks.3.conv_shortcut.weight"),
            ("decoder.upsamples.4.residual.0.gamma", "decoder.up_blocks.1.resnets.0.norm1.gamma"),
            ("decoder.upsamples.7.resample.1.weight", "decoder.up_blocks.1.upsamplers.0.resample.1.weight"),
            ("decoder.upsamples.14.residual.2.weight", "decoder.up_blocks.3.resnets.2.conv1.weight"),
        ] {
            assert_eq!(from_wan(wan).as_deref(), Some(diffusers));
            assert_eq!(to_wan(diffusers).as_deref(), Some(wan));
        }
        for strange in ["encoder.middle.3.proj.bias", "decoder.upsamples.x.residual.0.gamma", "encoder.conv_in.weight"]
        {
            assert_eq!(from_wan(strange), None, "{strange}");
        }
    }
}
