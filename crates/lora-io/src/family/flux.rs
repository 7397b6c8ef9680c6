//! FLUX.1: a diffusion transformer of double and single blocks, CLIP's text encoder and T5, an autoencoder. Of single
//! files most hold one of these each; some hold all. Adapters in kohya's layout name the transformer's modules in the
//! original tree, where queries, keys and values are one layer.

use lora_core::Component;

use super::adapter::Signs;
use super::sd3::{LACKING, TRANSFORMER, VAE};
use super::tree::clip::{self, Clip};
use super::tree::flux::{FLUX, WORDS};
use super::tree::ldm::LdmVae;
use super::tree::{Depths, T5};
use super::{ComponentNames, Family, KohyaNames, Labels, Names, sd1};

/// The family.
pub static FAMILY: Family = Family {
    name: "flux",
    title: "FLUX.1",
    image: true,
    // Chroma has FLUX.1's blocks without what shifts and scales them.
    tells: |base| {
        (base.contains("double_blocks.") && !base.contains("distilled_guidance_layer."))
            || base.begins("transformer/single_transformer_blocks.")
            || base.begins("single_transformer_blocks.")
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
            folder: Some(Names { place: "text_encoder_2", tree: &T5 }),
            single_file: Some(Names { place: "text_encoders.t5xxl.transformer.", tree: &T5 }),
            ..LACKING
        },
        ComponentNames { single_file: Some(Names { place: "vae.", tree: &LdmVae }), ..VAE },
        ComponentNames {
            // Most files hold it alone, without a prefix; the others come first.
            single_file: Some(Names { place: "", tree: &FLUX }),
            kohya: Some(KohyaNames { prefix: "lora_unet", tree: Some((&FLUX, DEPTHS)) }),
            required: true,
            ..TRANSFORMER
        },
    ],
    words: &[WORDS, clip::WORDS],
    signs: Signs {
        alone: |module| {
            let starts = ["double_blocks.", "single_blocks.", "single_transformer_blocks."];
            module.of_transformer().is_some_and(|path| starts.iter().any(|start| path.starts_with(start)))
        },
        // Of files on double blocks alone: their last one, where no higher one shows Qwen-Image.
        spelt: |module| module.attention("transformer_blocks.", 3072) == Some(18),
        metadata: &[("ss_base_model_version", "flux1"), ("modelspec.architecture", "flux-1-")],
        ..Signs::NONE
    },
    labels: Some(Labels {
        version: ["flux1", "flux1"],
        architecture: ["flux-1-dev", "flux-1-dev"],
        implementation: "https://github.com/black-forest-labs/flux",
        second_version: false,
    }),
    layers: Vec::new,
    block_factors: None,
};

/// Of the published model; nothing in its names depends on them.
pub(super) const DEPTHS: Depths = Depths { stride: 3, up_attention: 0, levels: 0, layers: 19 };
