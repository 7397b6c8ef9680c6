//! Chroma: FLUX.1's blocks under one network that shifts and scales them all, T5, FLUX.1's autoencoder. Names are FLUX.1's;
//! so are those of adapters, which say by their metadata alone what they were made for.

use lora_core::Component;

use super::adapter::Signs;
use super::sd3::{LACKING, TRANSFORMER, VAE};
use super::tree::T5;
use super::tree::flux::{FLUX, WORDS};
use super::tree::ldm::LdmVae;
use super::{ComponentNames, Family, KohyaNames, Labels, Names, flux};

/// The family.
pub static FAMILY: Family = Family {
    name: "chroma",
    title: "Chroma",
    image: true,
    tells: |base| base.contains("distilled_guidance_layer.in_proj.") && !base.contains("distilled_guidance_layer.0."),
    components: &[
        ComponentNames {
            component: Component::TEXT_ENCODER,
            folder: Some(Names { place: "text_encoder", tree: &T5 }),
            single_file: Some(Names { place: "text_encoders.t5xxl.transformer.", tree: &T5 }),
            ..LACKING
        },
        ComponentNames { single_file: Some(Names { place: "vae.", tree: &LdmVae }), ..VAE },
        ComponentNames {
            single_file: Some(Names { place: "", tree: &FLUX }),
            kohya: Some(KohyaNames { prefix: "lora_unet", tree: Some((&FLUX, flux::DEPTHS)) }),
            required: true,
            ..TRANSFORMER
        },
    ],
    words: &[WORDS],
    signs: Signs {
        metadata: &[("ss_base_model_version", "chroma"), ("modelspec.architecture", "chroma")],
        named_as: Some(&flux::FAMILY),
        ..Signs::NONE
    },
    labels: Some(Labels {
        version: ["chroma", "chroma"],
        architecture: ["chroma", "chroma"],
        implementation: "https://huggingface.co/lodestones/Chroma",
        second_version: false,
    }),
    layers: Vec::new,
    block_factors: None,
};
