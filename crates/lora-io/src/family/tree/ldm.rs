//! Names of U-Nets and autoencoders in the original (LDM) tree, and of autoencoders in diffusers' older releases. In the
//! table the original names stand with the prefixes that single files give them.
//!
//! | LDM | diffusers |
//! |---|---|
//! | `model.diffusion_model.input_blocks.(1+3i+j).0` | `down_blocks.i.resnets.j` |
//! | `model.diffusion_model.input_blocks.(1+3i+j).1` | `down_blocks.i.attentions.j` |
//! | `model.diffusion_model.input_blocks.(3+3i).0.op` | `down_blocks.i.downsamplers.0.conv` |
//! | `model.diffusion_model.output_blocks.(3i+j).{0,1}` | `up_blocks.i.{resnets,attentions}.j` |
//! | `model.diffusion_model.output_blocks.(3i+2).{1,2}.conv` | `up_blocks.i.upsamplers.0.conv` |
//! | `first_stage_model.decoder.up.i` | `decoder.up_blocks.(levels-1-i)` |
//!
//! The 3 is one more than the residual blocks of a level; it is read off the names, so other depths work too.

use super::{Depths, Piece, Tree, numbered, swap_prefix};

/// The parts inside a residual block: LDM's, diffusers'.
const RESNET: &[(&str, &str)] = &[
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
];

/// U-Net layers outside its blocks: LDM's, diffusers'.
const UNET_ENDS: &[(&str, &str)] = &[
    ("input_blocks.0.0.", "conv_in."),
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
    ("label_emb.0.0.", "add_embedding.linear_1."),
    ("label_emb.0.2.", "add_embedding.linear_2."),
    ("middle_block.1.", "mid_block.attentions.0."),
];

/// Parts of the autoencoder that have a fixed place in each coder: LDM's, diffusers'.
const VAE_PARTS: &[(&str, &str)] = &[
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    ("norm_out.", "conv_norm_out."),
];

/// Names of the autoencoder's attention in older diffusers releases, and today's.
const OLD_ATTENTION: &[(&str, &str)] =
    &[(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];

/// Words with underscores in module paths of U-Nets, in either tree.
pub(crate) const WORDS: &[&str] = &[
    "transformer_blocks",
    "skip_connection",
    "time_embedding",
    "add_embedding",
    "conv_norm_out",
    "conv_shortcut",
    "output_blocks",
    "time_emb_proj",
    "downsamplers",
    "input_blocks",
    "middle_block",
    "down_blocks",
    "class_embedding",
    "attentions",
    "emb_layers",
    "out_layers",
    "time_embed",
    "upsamplers",
    "in_layers",
    "label_emb",
    "mid_block",
    "up_blocks",
    "conv_out",
    "linear_1",
    "linear_2",
    "proj_out",
    "conv_in",
    "proj_in",
    "resnets",
    "to_out",
    "attn1",
    "attn2",
    "conv1",
    "conv2",
    "norm1",
    "norm2",
    "norm3",
    "conv",
    "norm",
    "proj",
    "to_k",
    "to_q",
    "to_v",
    "net",
    "out",
    "ff",
    "op",
];

/// A U-Net in the original tree.
#[derive(Debug)]
pub struct LdmUnet;

impl Tree for LdmUnet {
    fn depths_of_stored(&self, names: &[&str]) -> Depths {
        let sampler = |name: &&str| {
            let (index, rest) = numbered(name.strip_prefix("input_blocks.")?)?;
            rest.starts_with("0.op.").then_some(index.max(1))
        };
        let depths = Depths::default();
        Depths { stride: names.iter().filter_map(sampler).min().unwrap_or(depths.stride), ..depths }
    }

    fn depths_of_canonical(&self, names: &[&str]) -> Depths {
        let mut depths = Depths { stride: 1, ..Depths::default() };
        for name in names {
            if let Some((layer, _)) = name.strip_prefix("down_blocks.0.resnets.").and_then(numbered) {
                depths.stride = depths.stride.max(layer + 2);
            }
            if let Some((level, rest)) = name.strip_prefix("up_blocks.").and_then(numbered)
                && rest.starts_with("attentions.")
            {
                depths.up_attention |= level_bit(level);
            }
        }
        depths
    }

    fn weights(&self, stored: &str, depths: &Depths) -> Option<Vec<(String, Piece)>> {
        Some(vec![(unet_from_ldm(stored, depths)?, Piece::All)])
    }

    fn stored(&self, canonical: &str, depths: &Depths) -> Option<(String, Piece)> {
        Some((unet_to_ldm(canonical, depths)?, Piece::All))
    }
}

/// The bit of a level; none for a level that no model has.
fn level_bit(level: usize) -> u64 {
    u32::try_from(level).ok().and_then(|level| 1u64.checked_shl(level)).unwrap_or(0)
}

/// An autoencoder in the original tree.
#[derive(Debug)]
pub struct LdmVae;

impl Tree for LdmVae {
    fn depths_of_stored(&self, names: &[&str]) -> Depths {
        Depths { levels: levels(names, "decoder.up."), ..Depths::default() }
    }

    fn depths_of_canonical(&self, names: &[&str]) -> Depths {
        Depths { levels: levels(names, "decoder.up_blocks."), ..Depths::default() }
    }

    fn weights(&self, stored: &str, depths: &Depths) -> Option<Vec<(String, Piece)>> {
        if stored.starts_with("loss.") {
            return Some(Vec::new());
        }
        Some(vec![vae_weight(vae_from_ldm(stored, depths)?)])
    }

    fn stored(&self, canonical: &str, depths: &Depths) -> Option<(String, Piece)> {
        let (_, piece) = vae_weight(canonical.to_owned());
        Some((vae_to_ldm(canonical, depths)?, piece))
    }
}

/// One more than the highest level that begins a name after the prefix.
fn levels(names: &[&str], prefix: &str) -> usize {
    names.iter().filter_map(|name| Some(numbered(name.strip_prefix(prefix)?)?.0 + 1)).max().unwrap_or(0)
}

/// Attention's matrices are stored as 1×1 convolutions in the original.
fn vae_weight(canonical: String) -> (String, Piece) {
    let attention = canonical.contains("coder.mid_block.attentions.") && canonical.ends_with(".weight");
    let piece = if attention && !canonical.contains("group_norm") { Piece::Pointwise } else { Piece::All };
    (canonical, piece)
}

/// An autoencoder in diffusers' folders, today's or older ones.
#[derive(Debug)]
pub struct DiffusersVae;

impl Tree for DiffusersVae {
    fn weights(&self, stored: &str, _depths: &Depths) -> Option<Vec<(String, Piece)>> {
        let todays = OLD_ATTENTION.iter().fold(stored.to_owned(), |name, (old, new)| name.replace(old, new));
        Some(vec![vae_weight(todays)])
    }

    fn stored(&self, canonical: &str, _depths: &Depths) -> Option<(String, Piece)> {
        Some((canonical.to_owned(), Piece::All))
    }
}

fn unet_from_ldm(name: &str, depths: &Depths) -> Option<String> {
    if let Some(name) = swap_prefix(name, UNET_ENDS, false) {
        return Some(name);
    }
    if let Some((index, rest)) = name.strip_prefix("middle_block.").and_then(numbered) {
        return (index % 2 == 0)
            .then(|| swap_prefix(rest, RESNET, false).map(|rest| format!("mid_block.resnets.{}.{rest}", index / 2)))?;
    }
    if let Some((index, rest)) = name.strip_prefix("input_blocks.").and_then(numbered) {
        let (level, layer) = (index.checked_sub(1)? / depths.stride, (index - 1) % depths.stride);
        let (inner, rest) = numbered(rest)?;
        if let Some(rest) = rest.strip_prefix("op.") {
            return Some(format!("down_blocks.{level}.downsamplers.0.conv.{rest}"));
        }
        return match inner {
            0 => swap_prefix(rest, RESNET, false).map(|rest| format!("down_blocks.{level}.resnets.{layer}.{rest}")),
            _ => Some(format!("down_blocks.{level}.attentions.{layer}.{rest}")),
        };
    }
    let (index, rest) = name.strip_prefix("output_blocks.").and_then(numbered)?;
    let (level, layer) = (index / depths.stride, index % depths.stride);
    let (inner, rest) = numbered(rest)?;
    match inner {
        0 => swap_prefix(rest, RESNET, false).map(|rest| format!("up_blocks.{level}.resnets.{layer}.{rest}")),
        _ if rest.starts_with("conv.") => Some(format!("up_blocks.{level}.upsamplers.0.{rest}")),
        _ => Some(format!("up_blocks.{level}.attentions.{layer}.{rest}")),
    }
}

fn vae_from_ldm(name: &str, depths: &Depths) -> Option<String> {
    if name.starts_with("quant_conv.") || name.starts_with("post_quant_conv.") {
        return Some(name.to_owned());
    }
    let (coder, rest) = name.split_once('.')?;
    let rest = if let Some(rest) = swap_prefix(rest, VAE_PARTS, false) {
        rest
    } else if let Some((level, rest)) = rest.strip_prefix("down.").and_then(numbered) {
        match rest.strip_prefix("block.") {
            Some(rest) => format!("down_blocks.{level}.resnets.{rest}"),
            None => format!("down_blocks.{level}.downsamplers.0.{}", rest.strip_prefix("downsample.")?),
        }
    } else if let Some((level, rest)) = rest.strip_prefix("up.").and_then(numbered) {
        let level = depths.levels.checked_sub(level + 1)?;
        match rest.strip_prefix("block.") {
            Some(rest) => format!("up_blocks.{level}.resnets.{rest}"),
            None => format!("up_blocks.{level}.upsamplers.0.{}", rest.strip_prefix("upsample.")?),
        }
    } else {
        rest.to_owned()
    };
    Some(format!("{coder}.{}", rest.replace("nin_shortcut.", "conv_shortcut.")))
}

fn unet_to_ldm(name: &str, depths: &Depths) -> Option<String> {
    if let Some(name) = swap_prefix(name, UNET_ENDS, true) {
        return Some(name);
    }
    if let Some((index, rest)) = name.strip_prefix("mid_block.resnets.").and_then(numbered) {
        return Some(format!("middle_block.{}.{}", 2 * index, swap_prefix(rest, RESNET, true)?));
    }
    let down = name.strip_prefix("down_blocks.").and_then(numbered);
    let (level, rest) = down.or_else(|| name.strip_prefix("up_blocks.").and_then(numbered))?;
    let (kind, rest) = rest.split_once('.')?;
    let (layer, rest) = numbered(rest)?;
    let first = level * depths.stride;
    match (kind, down.is_some()) {
        ("resnets", true) => Some(format!("input_blocks.{}.0.{}", 1 + first + layer, swap_prefix(rest, RESNET, true)?)),
        ("attentions", true) => Some(format!("input_blocks.{}.1.{rest}", 1 + first + layer)),
        ("downsamplers", true) => {
            Some(format!("input_blocks.{}.0.op.{}", first + depths.stride, rest.strip_prefix("conv.")?))
        }
        ("resnets", false) => Some(format!("output_blocks.{}.0.{}", first + layer, swap_prefix(rest, RESNET, true)?)),
        ("attentions", false) => Some(format!("output_blocks.{}.1.{rest}", first + layer)),
        ("upsamplers", false) => {
            let inner = if depths.up_attention & level_bit(level) != 0 { 2 } else { 1 };
            Some(format!("output_blocks.{}.{inner}.{rest}", first + depths.stride - 1))
        }
        _ => None,
    }
}

fn vae_to_ldm(name: &str, depths: &Depths) -> Option<String> {
    if name.starts_with("quant_conv.") || name.starts_with("post_quant_conv.") {
        return Some(name.to_owned());
    }
    let (coder, rest) = name.split_once('.')?;
    let down = rest.strip_prefix("down_blocks.").and_then(numbered);
    let up = rest.strip_prefix("up_blocks.").and_then(numbered);
    let rest = if let Some(rest) = swap_prefix(rest, VAE_PARTS, true) {
        rest
    } else if let Some((level, rest)) = down {
        match rest.strip_prefix("resnets.") {
            Some(rest) => format!("down.{level}.block.{rest}"),
            None => format!("down.{level}.downsample.{}", rest.strip_prefix("downsamplers.0.")?),
        }
    } else if let Some((level, rest)) = up {
        let level = depths.levels.checked_sub(level + 1)?;
        match rest.strip_prefix("resnets.") {
            Some(rest) => format!("up.{level}.block.{rest}"),
            None => format!("up.{level}.upsample.{}", rest.strip_prefix("upsamplers.0.")?),
        }
    } else {
        rest.to_owned()
    };
    Some(format!("{coder}.{}", rest.replace("conv_shortcut.", "nin_shortcut.")))
}
#[cfg(test)]
mod tests {
    use lora_core::Component;

    use super::super::super::sd1;
    use super::*;

    #[test]
    fn known_names_map_both_ways() {
        let pairs = [
            (Component::UNET, "model.diffusion_model.input_blocks.0.0.weight", "conv_in.weight"),
            (
                Component::UNET,
                "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
                "down_blocks.1.resnets.0.conv_shortcut.weight",
            ),
            (
                Component::UNET,
                "model.diffusion_model.input_blocks.6.0.op.bias",
                "down_blocks.1.downsamplers.0.conv.bias",
            ),
            (
                Component::UNET,
                "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn1.to_out.0.bias",
                "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0.bias",
            ),
            (
                Component::UNET,
                "model.diffusion_model.middle_block.2.in_layers.2.weight",
                "mid_block.resnets.1.conv1.weight",
            ),
            (
                Component::UNET,
                "model.diffusion_model.middle_block.1.proj_in.weight",
                "mid_block.attentions.0.proj_in.weight",
            ),
            (
                Component::UNET,
                "model.diffusion_model.output_blocks.2.1.conv.weight",
                "up_blocks.0.upsamplers.0.conv.weight",
            ),
            (
                Component::UNET,
                "model.diffusion_model.output_blocks.5.2.conv.weight",
                "up_blocks.1.upsamplers.0.conv.weight",
            ),
            (
                Component::UNET,
                "model.diffusion_model.output_blocks.3.0.emb_layers.1.bias",
                "up_blocks.1.resnets.0.time_emb_proj.bias",
            ),
            (Component::UNET, "model.diffusion_model.out.0.weight", "conv_norm_out.weight"),
            (
                Component::VAE,
                "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight",
                "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
            ),
            (
                Component::VAE,
                "first_stage_model.decoder.up.3.block.2.norm1.weight",
                "decoder.up_blocks.0.resnets.2.norm1.weight",
            ),
            (
                Component::VAE,
                "first_stage_model.decoder.up.1.upsample.conv.bias",
                "decoder.up_blocks.2.upsamplers.0.conv.bias",
            ),
            (
                Component::VAE,
                "first_stage_model.decoder.mid.attn_1.proj_out.weight",
                "decoder.mid_block.attentions.0.to_out.0.weight",
            ),
            (Component::VAE, "first_stage_model.quant_conv.bias", "quant_conv.bias"),
            (
                Component::TEXT_ENCODER,
                "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
                "text_model.encoder.layers.0.mlp.fc1.weight",
            ),
        ];
        for (component, original, canonical) in pairs {
            let names = sd1::FAMILY.component(component).and_then(|names| names.single_file).unwrap();
            let stored = original.strip_prefix(names.place).unwrap();
            let depths = Depths { stride: 3, up_attention: 0b1110, levels: 4, layers: 0 };
            let weights = names.tree.weights(stored, &depths).unwrap();
            assert_eq!(weights.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), [canonical]);
            assert_eq!(names.tree.stored(canonical, &depths).map(|(name, _)| name).as_deref(), Some(stored));
        }
    }

    #[test]
    fn depths_are_read_off_the_names() {
        let stored = ["input_blocks.3.0.op.weight", "input_blocks.6.0.op.weight", "input_blocks.0.0.weight"];
        assert_eq!(LdmUnet.depths_of_stored(&stored).stride, 3);
        let canonical = ["down_blocks.0.resnets.2.conv1.weight", "up_blocks.1.attentions.0.norm.bias", "conv_in.bias"];
        let depths = LdmUnet.depths_of_canonical(&canonical);
        assert_eq!((depths.stride, depths.up_attention), (4, 0b10));
        assert_eq!(LdmVae.depths_of_stored(&["decoder.up.3.block.0.conv1.bias"]).levels, 4);
        assert_eq!(LdmVae.depths_of_canonical(&["decoder.up_blocks.3.resnets.0.conv1.bias"]).levels, 4);
    }

    #[test]
    fn names_that_are_no_weights_are_left_out() {
        for name in ["input_blocks.99999999999999999999.0.weight", "output_blocks."] {
            assert_eq!(LdmUnet.weights(name, &Depths::default()), None, "{name}");
        }
        let hostile = LdmUnet.depths_of_canonical(&["up_blocks.65535.attentions.0.norm.bias"]);
        assert_eq!(hostile.up_attention, 0);
    }

    #[test]
    fn older_spellings_are_todays() {
        let todays = "decoder.mid_block.attentions.0.to_out.0.weight".to_owned();
        let found = DiffusersVae.weights("decoder.mid_block.attentions.0.proj_attn.weight", &Depths::default());
        assert_eq!(found, Some(vec![(todays, Piece::Pointwise)]));
        let convolution = DiffusersVae.weights("decoder.conv_in.weight", &Depths::default());
        assert_eq!(convolution, Some(vec![("decoder.conv_in.weight".into(), Piece::All)]));
    }
}
