//! Stable Diffusion 3 and 3.5: a diffusion transformer, two CLIP text encoders and T5, an autoencoder. Opened from
//! diffusers' folders; adapters keep their files' names.

use lora_core::Component;

use super::adapter::Signs;
use super::tree::Canonical;
use super::tree::clip::Clip;
use super::tree::ldm::DiffusersVae;
use super::{ComponentNames, Family, KohyaNames, Names, sd1};

/// The family.
pub static FAMILY: Family = Family {
    name: "sd3",
    title: "Stable Diffusion 3",
    image: true,
    tells: |base| base.contains("joint_blocks.") || base.begins("transformer/pos_embed.pos_embed"),
    components: &[
        ComponentNames {
            component: Component::TEXT_ENCODER,
            folder: sd1::TEXT_FOLDER,
            kohya: Some(KohyaNames { prefix: "lora_te1", tree: None }),
            ..LACKING
        },
        ComponentNames {
            component: Component::TEXT_ENCODER_2,
            folder: Some(Names { place: "text_encoder_2", tree: &Clip }),
            kohya: Some(KohyaNames { prefix: "lora_te2", tree: None }),
            ..LACKING
        },
        ComponentNames {
            component: Component::TEXT_ENCODER_3,
            folder: Some(Names { place: "text_encoder_3", tree: &Canonical }),
            ..LACKING
        },
        ComponentNames { required: true, ..TRANSFORMER },
        ComponentNames { required: true, ..VAE },
    ],
    words: &[],
    signs: Signs {
        alone: |module| {
            ["joint_blocks", "joint_transformer_blocks"].iter().any(|part| module.name.contains(part))
                || module.name.starts_with("lora_te3_")
        },
        ..Signs::NONE
    },
    labels: None,
    layers: Vec::new,
    block_factors: None,
};

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
