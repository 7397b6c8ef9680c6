//! Flux: a diffusion transformer of double and single blocks, CLIP's text encoder and T5, an autoencoder. Opened from
//! diffusers' folders; adapters keep their files' names.

use lora_core::Component;

use super::adapter::Signs;
use super::sd3::{LACKING, TRANSFORMER, VAE};
use super::tree::Canonical;
use super::{ComponentNames, Family, KohyaNames, Names, sd1};

/// The family.
pub static FAMILY: Family = Family {
    name: "flux",
    title: "Flux",
    image: true,
    tells: |base| base.contains("double_blocks.") || base.begins("transformer/single_transformer_blocks."),
    components: &[
        ComponentNames {
            component: Component::TEXT_ENCODER,
            folder: sd1::TEXT_FOLDER,
            kohya: Some(KohyaNames { prefix: "lora_te1", tree: None }),
            ..LACKING
        },
        ComponentNames {
            component: Component::TEXT_ENCODER_2,
            folder: Some(Names { place: "text_encoder_2", tree: &Canonical }),
            ..LACKING
        },
        ComponentNames { required: true, ..TRANSFORMER },
        ComponentNames { required: true, ..VAE },
    ],
    words: &[],
    signs: Signs {
        alone: |module| {
            let parts = ["double_blocks", "single_blocks", "single_transformer_blocks"];
            parts.iter().any(|part| module.name.contains(part))
        },
        ..Signs::NONE
    },
    labels: None,
    layers: Vec::new,
    block_factors: None,
};
