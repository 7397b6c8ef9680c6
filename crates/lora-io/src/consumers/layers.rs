//! The layers of Stable Diffusion models and their names in the layouts. No shapes: an adapter's names decide whether
//! it is found, and that is all that is asked here.

use lora_core::Component;

use crate::checkpoint::{Family, LdmNames};

/// Which trainers reach a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Linear layers and 1×1 convolutions of transformers: what sd-scripts adapts by itself.
    Target,
    /// Layers of residual and sampling blocks: adapted when a rank for convolutions is given.
    Conv,
    /// Norms, embeddings and the ends of the network: LyCORIS' full preset.
    Other,
}

/// A layer of a base model.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    /// The part of the model.
    pub(super) component: Component,
    /// The dotted path in diffusers' or transformers' module tree.
    pub(super) path: String,
    /// The dotted path in the original U-Net.
    pub(super) ldm: Option<String>,
    /// Which trainers reach it.
    pub(super) kind: Kind,
}

impl Layer {
    /// Whether it is a projection of an attention.
    pub(super) fn is_attention(&self) -> bool {
        [".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj"]
            .iter()
            .any(|end| self.path.ends_with(end))
    }

    /// The prefix of its native kohya name, without the underscore after it.
    pub(super) fn prefix(&self, base: Family) -> &'static str {
        match (self.component, base) {
            (Component::TEXT_ENCODER, Family::StableDiffusionXl) => "lora_te1",
            (Component::TEXT_ENCODER, _) => "lora_te",
            (Component::TEXT_ENCODER_2, _) => "lora_te2",
            _ => "lora_unet",
        }
    }

    /// Its name in the kohya layout: LDM's tree for SDXL's U-Net, diffusers' for the others.
    pub(super) fn kohya(&self, base: Family) -> String {
        let path = match (&self.ldm, base) {
            (Some(ldm), Family::StableDiffusionXl) => ldm,
            _ => &self.path,
        };
        underscored(self.prefix(base), path)
    }
}

/// A path as kohya's layout has it: prefix and path joined, dots turned into underscores.
pub(super) fn underscored(prefix: &str, path: &str) -> String {
    format!("{prefix}_{}", path.replace('.', "_"))
}

/// The layers of a Stable Diffusion 1, 2 or XL model; none for other families.
pub(super) fn layers(base: Family) -> Vec<Layer> {
    let mut layers = Vec::new();
    // Transformer blocks of each attention on the way down (the way up is its mirror), and the width of each level.
    let (depths, widths): (&[usize], &[usize]) = match base {
        Family::StableDiffusion1 | Family::StableDiffusion2 => (&[1, 1, 1, 0], &[320, 640, 1280, 1280]),
        Family::StableDiffusionXl => (&[0, 2, 10], &[320, 640, 1280]),
        _ => return layers,
    };
    let unet = unet(depths, widths, base == Family::StableDiffusionXl);
    let names: Vec<&str> = unet.iter().map(|(path, _)| path.as_str()).collect();
    let ldm = LdmNames::of_diffusers(&names, &[]);
    for (path, kind) in &unet {
        let ldm = match path.strip_prefix("add_embedding.linear_") {
            Some(index) => Some(format!("label_emb.0.{}", if index == "1" { 0 } else { 2 })),
            None => original(&ldm, path),
        };
        layers.push(Layer { component: Component::UNET, path: path.clone(), ldm, kind: *kind });
    }
    let encoders: &[(Component, usize)] = match base {
        // The 24th layer of SD2's encoder is never used and has no names.
        Family::StableDiffusion2 => &[(Component::TEXT_ENCODER, 23)],
        Family::StableDiffusionXl => &[(Component::TEXT_ENCODER, 12), (Component::TEXT_ENCODER_2, 32)],
        _ => &[(Component::TEXT_ENCODER, 12)],
    };
    for &(component, depth) in encoders {
        layers.extend(text_encoder(depth).into_iter().map(|(path, kind)| Layer { component, path, ldm: None, kind }));
    }
    layers
}

fn original(names: &LdmNames, path: &str) -> Option<String> {
    let name = names.original(Component::UNET, &format!("{path}.weight"))?;
    Some(name.strip_prefix("model.diffusion_model.")?.strip_suffix(".weight")?.to_owned())
}

/// A U-Net of two residual blocks a level (three on the way up) in diffusers' names.
fn unet(depths: &[usize], widths: &[usize], added: bool) -> Vec<(String, Kind)> {
    let levels = depths.len();
    let mut list = Vec::new();
    for name in ["conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"] {
        list.push((name.to_owned(), Kind::Other));
    }
    if added {
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
    use super::*;
    use crate::hash;

    fn checksum(base: Family, conv: bool) -> (usize, String) {
        let wanted = |layer: &&Layer| layer.kind == Kind::Target || conv && layer.kind == Kind::Conv;
        let mut names: Vec<String> = layers(base).iter().filter(wanted).map(|layer| layer.kohya(base)).collect();
        names.sort();
        (names.len(), hash::sha256(names.join("\n").as_bytes()))
    }

    #[test]
    fn the_name_lists_are_sd_scripts() {
        // Checksums of lists from an independent enumerator, which diffusers' converter takes with no key left over.
        for (base, conv, count, digest) in [
            (Family::StableDiffusion1, false, 264, "3b0b58f74c4028ff0a5fc6dced3aca89994271e636ccb8378589702b85067cc4"),
            (Family::StableDiffusion1, true, 350, "44edcda39c26243367a6d85165b42ad157964a5a7c4a8e22d6d6f97b71ee6549"),
            (Family::StableDiffusion2, false, 330, "1d7e05c4353d4a57668635cc65c95d13ec2e32bf5a67499791ae3228d536476f"),
            (Family::StableDiffusionXl, false, 986, "1063b91c0a4164d0d184003241903ddb45ea2789384d465a17bbc942e6c871ff"),
            (Family::StableDiffusionXl, true, 1052, "231dc80db7c1b20b12efab0fb99c7afe268c7a1f392eff7107847e4b2f94d651"),
        ] {
            assert_eq!(checksum(base, conv), (count, digest.to_owned()), "{base}, conv {conv}");
        }
    }

    #[test]
    fn the_ends_have_original_names_too() {
        let all = layers(Family::StableDiffusionXl);
        let ldm = |path: &str| all.iter().find(|layer| layer.path == path).unwrap().ldm.clone().unwrap();
        assert_eq!(ldm("add_embedding.linear_2"), "label_emb.0.2");
        assert_eq!(ldm("time_embedding.linear_1"), "time_embed.0");
        assert_eq!(ldm("conv_out"), "out.2");
        assert_eq!(ldm("up_blocks.0.upsamplers.0.conv"), "output_blocks.2.2.conv");
        assert!(layers(Family::Flux).is_empty());
    }
}
