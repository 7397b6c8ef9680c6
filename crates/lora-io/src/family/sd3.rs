//! Stable Diffusion 3 and 3.5: a diffusion transformer, two CLIP text encoders and T5, an autoencoder. Adapters in kohya's
//! layout name the transformer's modules in the original tree, which sd-scripts and ComfyUI read and diffusers does not.

use lora_core::Component;

use super::adapter::Signs;
use super::tree::clip::{self, Clip};
use super::tree::ldm::{DiffusersVae, LdmVae};
use super::tree::sd3::{SD3, WORDS};
use super::tree::{Canonical, Depths, T5, flux};
use super::{ComponentNames, Family, KohyaNames, Labels, Names, sd1};

/// The family.
pub static FAMILY: Family = Family {
    name: "sd3",
    title: "Stable Diffusion 3",
    image: true,
    tells: |base| {
        let folder = ["transformer/pos_embed.pos_embed", "pos_embed.pos_embed"];
        base.contains("joint_blocks.") || folder.iter().any(|name| base.begins(name))
    },
    components: &[
        ComponentNames {
            component: Component::TEXT_ENCODER,
            folder: sd1::TEXT_FOLDER,
            single_file: Some(Names { place: "text_encoders.clip_l.transformer.", tree: &Clip }),
            kohya: Some(KohyaNames { prefix: "lora_te1", tree: None }),
            ..LACKING
        },
        ComponentNames {
            component: Component::TEXT_ENCODER_2,
            folder: Some(Names { place: "text_encoder_2", tree: &Clip }),
            single_file: Some(Names { place: "text_encoders.clip_g.transformer.", tree: &Clip }),
            kohya: Some(KohyaNames { prefix: "lora_te2", tree: None }),
            ..LACKING
        },
        ComponentNames {
            component: Component::TEXT_ENCODER_3,
            folder: Some(Names { place: "text_encoder_3", tree: &T5 }),
            single_file: Some(Names { place: "text_encoders.t5xxl.transformer.", tree: &T5 }),
            ..LACKING
        },
        ComponentNames { single_file: Some(Names { place: "first_stage_model.", tree: &LdmVae }), ..VAE },
        ComponentNames {
            single_file: Some(Names { place: "", tree: &SD3 }),
            kohya: Some(KohyaNames { prefix: "lora_unet", tree: Some((&SD3, DEPTHS)) }),
            required: true,
            ..TRANSFORMER
        },
    ],
    words: &[WORDS, flux::WORDS, clip::WORDS],
    signs: Signs {
        alone: |module| {
            // Widths of published models: 24 and 38 heads of 64.
            let widths = [1536, 2432];
            let of_blocks = |path: &str| {
                path.starts_with("joint_blocks.")
                    || path.starts_with("transformer_blocks.")
                        && (path.contains(".attn2.")
                            || path.contains(".attn.to_") && module.inputs.is_some_and(|width| widths.contains(&width)))
            };
            module.of_transformer().is_some_and(of_blocks) || module.name.starts_with("lora_te3_")
        },
        metadata: &[("ss_base_model_version", "medium"), ("modelspec.architecture", "stable-diffusion-3")],
        ..Signs::NONE
    },
    labels: Some(Labels {
        version: ["5-medium", "5-medium"],
        architecture: ["stable-diffusion-3-5-medium", "stable-diffusion-3-5-medium"],
        implementation: "diffusers",
        second_version: false,
    }),
    layers: Vec::new,
    block_factors: None,
};

/// Of the published models of medium size; an adapter shows its last block itself.
const DEPTHS: Depths = Depths { stride: 3, up_attention: 0, levels: 0, layers: 0 };

/// A component whose names in other layouts are not known here, and without which a base is whole: text encoders are
/// often published apart.
pub(super) const LACKING: ComponentNames =
    ComponentNames { component: Component::MODEL, folder: None, single_file: None, kohya: None, required: false };

/// A diffusion transformer in diffusers' folder.
pub(super) const TRANSFORMER: ComponentNames = ComponentNames {
    component: Component::TRANSFORMER,
    folder: Some(Names { place: "transformer", tree: &Canonical }),
    ..LACKING
};

/// An autoencoder in diffusers' folder.
pub(super) const VAE: ComponentNames =
    ComponentNames { component: Component::VAE, folder: Some(Names { place: "vae", tree: &DiffusersVae }), ..LACKING };
