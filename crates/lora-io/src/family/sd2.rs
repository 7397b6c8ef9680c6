//! Stable Diffusion 2.x: SD 1's U-Net with matrices where that has 1×1 convolutions, and OpenCLIP's text encoder without
//! its last layer.

use lora_core::Component;

use super::adapter::Signs;
use super::layers::{self, TextEncoder};
use super::tree::clip::OpenClip;
use super::{ComponentNames, Family, KohyaNames, Labels, Names, sd1};

/// The family.
pub static FAMILY: Family = Family {
    name: "sd2",
    title: "Stable Diffusion 2.x",
    image: true,
    tells: |base| {
        base.begins("cond_stage_model.model.")
            || base.axes("unet/", ".proj_in.weight") == Some(2) && !base.begins("unet/add_embedding.")
    },
    components: &[
        ComponentNames {
            component: Component::TEXT_ENCODER,
            folder: sd1::TEXT_FOLDER,
            single_file: Some(Names { place: "cond_stage_model.model.", tree: &OpenClip { stops_before_last: true } }),
            kohya: Some(KohyaNames { prefix: "lora_te", tree: None }),
            required: true,
        },
        sd1::UNET,
        sd1::VAE,
    ],
    words: sd1::WORDS,
    signs: Signs {
        // SD 1's text encoder has twelve layers.
        alone: |module| {
            let layer = module.number(Component::TEXT_ENCODER, "text_model.encoder.layers.");
            layer.is_some_and(|layer| layer >= 12)
        },
        context: Some(1024),
        metadata: &[
            ("ss_base_model_version", "sd_v2"),
            ("ss_v2", "True"),
            ("modelspec.architecture", "stable-diffusion-v2"),
        ],
        ..Signs::NONE
    },
    labels: Some(Labels {
        version: ["sd_v2", "sd_v2_v"],
        architecture: ["stable-diffusion-v2-512", "stable-diffusion-v2-768-v"],
        implementation: "diffusers",
        second_version: true,
    }),
    layers: || layers::list(&sd1::PUBLISHED_UNET, &[TextEncoder { component: Component::TEXT_ENCODER, layers: 23 }]),
    block_factors: Some(25),
};
