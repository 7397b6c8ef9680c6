//! The layers of published Stable Diffusion models, in canonical names. No shapes: an adapter's names decide whether it
//! is found, and that is all that is asked here.

use lora_core::{Component, ModulePath};

/// Which trainers reach a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Linear layers and 1×1 convolutions of transformers: what sd-scripts adapts by itself.
    Target,
    /// Layers of residual and sampling blocks: adapted when a rank for convolutions is given.
    Conv,
    /// Norms, embeddings and the ends of the network: LyCORIS' full preset.
    Other,
}

/// A layer of a base model.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Where it is.
    pub path: ModulePath,
    /// Which trainers reach it.
    pub kind: Kind,
}

impl Layer {
    /// Whether it is a projection of an attention.
    pub(crate) fn is_attention(&self) -> bool {
        [".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj"]
            .iter()
            .any(|end| self.path.path.ends_with(end))
    }
}

/// The sizes of a U-Net that decide about its layers' names.
#[derive(Debug)]
pub(super) struct Unet {
    /// Transformer blocks of each attention on the way down, by level; the way up is its mirror.
    pub(super) depths: &'static [usize],
    /// Channels by level.
    pub(super) widths: &'static [usize],
    /// Whether sizes of pictures are embedded beside the time.
    pub(super) conditioned_on_size: bool,
}

/// A CLIP text encoder.
#[derive(Debug)]
pub(super) struct TextEncoder {
    /// Which of the base's.
    pub(super) component: Component,
    /// Its layers that are used.
    pub(super) layers: usize,
}

/// The layers of a U-Net and its text encoders.
pub(super) fn list(sizes: &Unet, encoders: &[TextEncoder]) -> Vec<Layer> {
    let layer = |component| move |(path, kind): (String, Kind)| Layer { path: ModulePath::new(component, path), kind };
    let mut layers: Vec<Layer> = unet(sizes).into_iter().map(layer(Component::UNET)).collect();
    for encoder in encoders {
        layers.extend(text_encoder(encoder.layers).into_iter().map(layer(encoder.component)));
    }
    layers
}

/// A U-Net of two residual blocks a level (three on the way up) in diffusers' names.
fn unet(sizes: &Unet) -> Vec<(String, Kind)> {
    let Unet { depths, widths, conditioned_on_size } = sizes;
    let levels = depths.len();
    let mut list = Vec::new();
    for name in ["conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"] {
        list.push((name.to_owned(), Kind::Other));
    }
    if *conditioned_on_size {
        list.extend([1, 2].map(|index| (format!("add_embedding.linear_{index}"), Kind::Other)));
    }
    for level in 0..levels {
        let block = format!("down_blocks.{level}");
        for layer in 0..2 {
            let widens = layer == 0 && level > 0 && widths[level] != widths[level - 1];
            resnet(&mut list, &format!("{block}.resnets.{layer}"), widens);
            attention(&mut list, &format!("{block}.attentions.{layer}"), depths[level]);
        }
        if level + 1 < levels {
            list.push((format!("{block}.downsamplers.0.conv"), Kind::Conv));
        }
    }
    resnet(&mut list, "mid_block.resnets.0", false);
    attention(&mut list, "mid_block.attentions.0", depths[levels - 1].max(1));
    resnet(&mut list, "mid_block.resnets.1", false);
    for level in 0..levels {
        let block = format!("up_blocks.{level}");
        for layer in 0..3 {
            // Every one of them also reads a skip connection, so its input is wider than its output.
            resnet(&mut list, &format!("{block}.resnets.{layer}"), true);
            attention(&mut list, &format!("{block}.attentions.{layer}"), depths[levels - 1 - level]);
        }
        if level + 1 < levels {
            list.push((format!("{block}.upsamplers.0.conv"), Kind::Conv));
        }
    }
    list
}

fn resnet(list: &mut Vec<(String, Kind)>, path: &str, shortcut: bool) {
    for name in ["conv1", "time_emb_proj", "conv2"] {
        list.push((format!("{path}.{name}"), Kind::Conv));
    }
    if shortcut {
        list.push((format!("{path}.conv_shortcut"), Kind::Conv));
    }
    list.extend(["norm1", "norm2"].map(|name| (format!("{path}.{name}"), Kind::Other)));
}

fn attention(list: &mut Vec<(String, Kind)>, path: &str, depth: usize) {
    if depth == 0 {
        return;
    }
    list.push((format!("{path}.norm"), Kind::Other));
    list.extend(["proj_in", "proj_out"].map(|name| (format!("{path}.{name}"), Kind::Target)));
    for block in 0..depth {
        let block = format!("{path}.transformer_blocks.{block}");
        for attention in ["attn1", "attn2"] {
            for name in ["to_q", "to_k", "to_v", "to_out.0"] {
                list.push((format!("{block}.{attention}.{name}"), Kind::Target));
            }
        }
        list.extend(["ff.net.0.proj", "ff.net.2"].map(|name| (format!("{block}.{name}"), Kind::Target)));
        list.extend(["norm1", "norm2", "norm3"].map(|name| (format!("{block}.{name}"), Kind::Other)));
    }
}

fn text_encoder(depth: usize) -> Vec<(String, Kind)> {
    let targets = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1"];
    let mut list = Vec::new();
    for layer in 0..depth {
        let layer = format!("text_model.encoder.layers.{layer}");
        for name in targets.into_iter().chain(["mlp.fc2"]) {
            list.push((format!("{layer}.{name}"), Kind::Target));
        }
        list.extend(["layer_norm1", "layer_norm2"].map(|name| (format!("{layer}.{name}"), Kind::Other)));
    }
    for name in ["embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm"] {
        list.push((format!("text_model.{name}"), Kind::Other));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::super::{Family, flux, sd1, sd2, sdxl};
    use super::*;
    use crate::hash;

    fn checksum(base: &Family, conv: bool) -> (usize, String) {
        let wanted = |layer: &&Layer| layer.kind == Kind::Target || conv && layer.kind == Kind::Conv;
        let layers = (base.layers)();
        let mut names: Vec<String> =
            layers.iter().filter(wanted).map(|layer| base.kohya(&layer.path).unwrap()).collect();
        names.sort();
        (names.len(), hash::sha256(names.join("\n").as_bytes()))
    }

    #[test]
    fn the_name_lists_are_sd_scripts() {
        // Checksums of lists from an independent enumerator, which diffusers' converter takes with no key left over.
        for (base, conv, count, digest) in [
            (&sd1::FAMILY, false, 264, "3b0b58f74c4028ff0a5fc6dced3aca89994271e636ccb8378589702b85067cc4"),
            (&sd1::FAMILY, true, 350, "44edcda39c26243367a6d85165b42ad157964a5a7c4a8e22d6d6f97b71ee6549"),
            (&sd2::FAMILY, false, 330, "1d7e05c4353d4a57668635cc65c95d13ec2e32bf5a67499791ae3228d536476f"),
            (&sdxl::FAMILY, false, 986, "1063b91c0a4164d0d184003241903ddb45ea2789384d465a17bbc942e6c871ff"),
            (&sdxl::FAMILY, true, 1052, "231dc80db7c1b20b12efab0fb99c7afe268c7a1f392eff7107847e4b2f94d651"),
        ] {
            assert_eq!(checksum(base, conv), (count, digest.to_owned()), "{base}, conv {conv}");
        }
    }

    #[test]
    fn the_ends_have_original_names_too() {
        for (path, name) in [
            ("add_embedding.linear_2", "lora_unet_label_emb_0_2"),
            ("time_embedding.linear_1", "lora_unet_time_embed_0"),
            ("conv_out", "lora_unet_out_2"),
            ("up_blocks.0.upsamplers.0.conv", "lora_unet_output_blocks_2_2_conv"),
        ] {
            let path = ModulePath::new(Component::UNET, path);
            assert!((sdxl::FAMILY.layers)().iter().any(|layer| layer.path == path));
            assert_eq!(sdxl::FAMILY.kohya(&path).as_deref(), Some(name));
        }
        assert!((flux::FAMILY.layers)().is_empty());
    }
}
