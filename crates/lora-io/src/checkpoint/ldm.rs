//! Names of the original (LDM) layout and diffusers' names, both ways.
//!
//! | LDM | diffusers |
//! |---|---|
//! | `model.diffusion_model.input_blocks.(1+3i+j).0` | `down_blocks.i.resnets.j` |
//! | `model.diffusion_model.input_blocks.(1+3i+j).1` | `down_blocks.i.attentions.j` |
//! | `model.diffusion_model.input_blocks.(3+3i).0.op` | `down_blocks.i.downsamplers.0.conv` |
//! | `model.diffusion_model.output_blocks.(3i+j).{0,1}` | `up_blocks.i.{resnets,attentions}.j` |
//! | `model.diffusion_model.output_blocks.(3i+2).{1,2}.conv` | `up_blocks.i.upsamplers.0.conv` |
//! | `first_stage_model.decoder.up.i` | `decoder.up_blocks.(levels-1-i)` |
//! | `cond_stage_model.transformer.text_model` | `text_model` |
//!
//! The 3 is one more than the residual blocks of a level; it is read off the names, so other depths work too.

use std::collections::BTreeSet;

use lora_core::Component;

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
const TEXT: &str = "cond_stage_model.transformer.";

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

/// What both directions need to know of a model's depth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LdmNames {
    /// Residual blocks of a U-Net level on the way down, plus one.
    stride: usize,
    /// Levels of the autoencoder.
    vae_levels: usize,
    /// Levels of the U-Net's way up that have transformers, counted from the middle.
    up_attention: BTreeSet<usize>,
}

impl LdmNames {
    /// From the names of an LDM file.
    pub fn of_ldm<S: AsRef<str>>(names: &[S]) -> Self {
        let mut stride = usize::MAX;
        let mut vae_levels = 0;
        for name in names.iter().map(AsRef::as_ref) {
            if let Some((index, rest)) = name.strip_prefix("model.diffusion_model.input_blocks.").and_then(numbered)
                && rest.starts_with("0.op.")
            {
                stride = stride.min(index);
            }
            if let Some((index, _)) = name.strip_prefix("first_stage_model.decoder.up.").and_then(numbered) {
                vae_levels = vae_levels.max(index + 1);
            }
        }
        Self { stride: if stride == usize::MAX { 3 } else { stride.max(1) }, vae_levels, up_attention: BTreeSet::new() }
    }

    /// From diffusers' names of the U-Net and of the autoencoder.
    pub fn of_diffusers<S: AsRef<str>>(unet: &[S], vae: &[S]) -> Self {
        let mut stride = 1;
        let mut up_attention = BTreeSet::new();
        for name in unet.iter().map(AsRef::as_ref) {
            if let Some((layer, _)) = name.strip_prefix("down_blocks.0.resnets.").and_then(numbered) {
                stride = stride.max(layer + 2);
            }
            if let Some((level, rest)) = name.strip_prefix("up_blocks.").and_then(numbered)
                && rest.starts_with("attentions.")
            {
                up_attention.insert(level);
            }
        }
        let level =
            |name: &S| name.as_ref().strip_prefix("decoder.up_blocks.").and_then(numbered).map(|(level, _)| level + 1);
        Self { stride, vae_levels: vae.iter().filter_map(level).max().unwrap_or(0), up_attention }
    }

    /// The component and diffusers' name of an LDM tensor; `None` for a tensor that no component takes.
    pub fn canonical(&self, name: &str) -> Option<(Component, String)> {
        if is_ignored(name) {
            return None;
        }
        if let Some(rest) = name.strip_prefix(TEXT) {
            return Some((Component::TEXT_ENCODER, with_text_model(rest)));
        }
        if let Some(rest) = name.strip_prefix(VAE) {
            return self.vae_from_ldm(rest).map(|name| (Component::VAE, name));
        }
        self.unet_from_ldm(name.strip_prefix(UNET)?).map(|name| (Component::UNET, name))
    }

    fn unet_from_ldm(&self, name: &str) -> Option<String> {
        if let Some(name) = swap_prefix(name, UNET_ENDS, false) {
            return Some(name);
        }
        if let Some((index, rest)) = name.strip_prefix("middle_block.").and_then(numbered) {
            return (index % 2 == 0).then(|| {
                swap_prefix(rest, RESNET, false).map(|rest| format!("mid_block.resnets.{}.{rest}", index / 2))
            })?;
        }
        if let Some((index, rest)) = name.strip_prefix("input_blocks.").and_then(numbered) {
            let (level, layer) = (index.checked_sub(1)? / self.stride, (index - 1) % self.stride);
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
        let (level, layer) = (index / self.stride, index % self.stride);
        let (inner, rest) = numbered(rest)?;
        match inner {
            0 => swap_prefix(rest, RESNET, false).map(|rest| format!("up_blocks.{level}.resnets.{layer}.{rest}")),
            _ if rest.starts_with("conv.") => Some(format!("up_blocks.{level}.upsamplers.0.{rest}")),
            _ => Some(format!("up_blocks.{level}.attentions.{layer}.{rest}")),
        }
    }

    fn vae_from_ldm(&self, name: &str) -> Option<String> {
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
            let level = self.vae_levels.checked_sub(level + 1)?;
            match rest.strip_prefix("block.") {
                Some(rest) => format!("up_blocks.{level}.resnets.{rest}"),
                None => format!("up_blocks.{level}.upsamplers.0.{}", rest.strip_prefix("upsample.")?),
            }
        } else {
            rest.to_owned()
        };
        Some(format!("{coder}.{}", rest.replace("nin_shortcut.", "conv_shortcut.")))
    }

    /// The LDM name of a component's diffusers name.
    pub fn original(&self, component: Component, name: &str) -> Option<String> {
        match component {
            Component::TEXT_ENCODER => Some(format!("{TEXT}{name}")),
            Component::UNET => self.unet_to_ldm(name).map(|name| format!("{UNET}{name}")),
            Component::VAE => self.vae_to_ldm(name).map(|name| format!("{VAE}{name}")),
            _ => None,
        }
    }

    fn unet_to_ldm(&self, name: &str) -> Option<String> {
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
        let first = level * self.stride;
        match (kind, down.is_some()) {
            ("resnets", true) => {
                Some(format!("input_blocks.{}.0.{}", 1 + first + layer, swap_prefix(rest, RESNET, true)?))
            }
            ("attentions", true) => Some(format!("input_blocks.{}.1.{rest}", 1 + first + layer)),
            ("downsamplers", true) => {
                Some(format!("input_blocks.{}.0.op.{}", first + self.stride, rest.strip_prefix("conv.")?))
            }
            ("resnets", false) => {
                Some(format!("output_blocks.{}.0.{}", first + layer, swap_prefix(rest, RESNET, true)?))
            }
            ("attentions", false) => Some(format!("output_blocks.{}.1.{rest}", first + layer)),
            ("upsamplers", false) => {
                let inner = if self.up_attention.contains(&level) { 2 } else { 1 };
                Some(format!("output_blocks.{}.{inner}.{rest}", first + self.stride - 1))
            }
            _ => None,
        }
    }

    fn vae_to_ldm(&self, name: &str) -> Option<String> {
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
            let level = self.vae_levels.checked_sub(level + 1)?;
            match rest.strip_prefix("resnets.") {
                Some(rest) => format!("up.{level}.block.{rest}"),
                None => format!("up.{level}.upsample.{}", rest.strip_prefix("upsamplers.0.")?),
            }
        } else {
            rest.to_owned()
        };
        Some(format!("{coder}.{}", rest.replace("conv_shortcut.", "nin_shortcut.")))
    }
}

/// Tensors of an LDM file that are no weights of the model in use: EMA copies, the schedule's buffers, positions.
pub(super) fn is_ignored(name: &str) -> bool {
    name.starts_with("model_ema.")
        || name.ends_with("position_ids")
        || !name.contains('.')
        || name.starts_with("first_stage_model.loss.")
        || name.starts_with("control_model.")
}

/// Today's name of a tensor in a diffusers folder; `None` for one that is no weight.
pub(super) fn from_diffusers(component: Component, name: &str) -> Option<String> {
    if name.ends_with("position_ids") {
        return None;
    }
    Some(match component {
        Component::TEXT_ENCODER => with_text_model(name),
        Component::VAE => OLD_ATTENTION.iter().fold(name.to_owned(), |name, (old, new)| name.replace(old, new)),
        _ => name.to_owned(),
    })
}

/// The shape that a weight has in diffusers: LDM keeps the autoencoder's attention as 1×1 convolutions.
pub(super) fn canonical_shape(canonical: &str, stored: &[usize]) -> Vec<usize> {
    let vae_attention = canonical.contains("coder.mid_block.attentions.") && canonical.ends_with(".weight");
    match stored {
        &[outputs, inputs, 1, 1] if vae_attention => vec![outputs, inputs],
        _ => stored.to_vec(),
    }
}

/// The text encoder's name with the level that some writers leave out.
fn with_text_model(name: &str) -> String {
    if name.starts_with("text_model.") { name.to_owned() } else { format!("text_model.{name}") }
}

/// `12.rest` as 12 and `rest`.
fn numbered(text: &str) -> Option<(usize, &str)> {
    let (number, rest) = text.split_once('.')?;
    // A hostile name must not overflow the arithmetic on indices.
    Some((number.parse::<u16>().ok()?.into(), rest))
}

/// Replaces the first matching prefix of a table, from its left column to its right one or back.
fn swap_prefix(name: &str, table: &[(&str, &str)], back: bool) -> Option<String> {
    table.iter().find_map(|&(ldm, diffusers)| {
        let (from, to) = if back { (diffusers, ldm) } else { (ldm, diffusers) };
        name.strip_prefix(from).map(|rest| format!("{to}{rest}"))
    })
}

#[cfg(test)]
mod tests {
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
        let names: Vec<_> =
            pairs.iter().map(|(_, ldm, _)| *ldm).chain(["model.diffusion_model.input_blocks.3.0.op.weight"]).collect();
        let forward = LdmNames::of_ldm(&names);
        let back = LdmNames { up_attention: BTreeSet::from([1, 2, 3]), ..forward.clone() };
        for (component, ldm, diffusers) in pairs {
            assert_eq!(forward.canonical(ldm), Some((component, diffusers.to_owned())), "{ldm}");
            assert_eq!(back.original(component, diffusers).as_deref(), Some(ldm));
        }
    }

    #[test]
    fn names_that_are_no_weights_are_left_out() {
        let names = LdmNames::of_ldm(&[""]);
        for name in [
            "model_ema.diffusion_modelinput_blocks00weight",
            "alphas_cumprod",
            "cond_stage_model.transformer.text_model.embeddings.position_ids",
            "model.diffusion_model.input_blocks.99999999999999999999.0.weight",
            "model.diffusion_model.output_blocks.",
        ] {
            assert_eq!(names.canonical(name), None, "{name}");
        }
    }

    #[test]
    fn older_spellings_are_todays() {
        let text = LdmNames::of_ldm(&[""]).canonical("cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias");
        assert_eq!(text, Some((Component::TEXT_ENCODER, "text_model.encoder.layers.0.mlp.fc1.bias".into())));
        assert_eq!(
            from_diffusers(Component::VAE, "decoder.mid_block.attentions.0.proj_attn.weight").unwrap(),
            "decoder.mid_block.attentions.0.to_out.0.weight"
        );
        assert_eq!(canonical_shape("decoder.mid_block.attentions.0.to_q.weight", &[64, 64, 1, 1]), [64, 64]);
        assert_eq!(canonical_shape("decoder.conv_in.weight", &[64, 4, 1, 1]), [64, 4, 1, 1]);
    }
}
