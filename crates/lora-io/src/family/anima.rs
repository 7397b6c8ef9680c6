//! Anima: Cosmos-Predict2's transformer, a Qwen3 language model that reads captions, a text conditioner (`llm_adapter`) that
//! makes of its states what the transformer reads, Qwen-Image's autoencoder. Single files hold the transformer and the
//! conditioner. Adapters name the layers of the original tree, as sd-scripts and ComfyUI do.

use lora_core::Component;

use super::adapter::Signs;
use super::sd3::{LACKING, TRANSFORMER};
use super::tree::anima::{ANIMA, Conditioner, WORDS};
use super::tree::{Canonical, Depths, LanguageEncoder};
use super::{ComponentNames, Family, KohyaNames, Labels, Names, qwen_image, sd3};

/// What makes of a caption's states and T5's tokens the states that the transformer reads.
pub const TEXT_CONDITIONER: Component = Component::constant("text_conditioner");

/// Numbers of the states that the published transformer reads.
const CONTEXT: usize = 1024;

/// The family.
pub static FAMILY: Family = Family {
    name: "anima",
    title: "Anima",
    image: true,
    // Cosmos-Predict2 has the first alone.
    tells: |base| {
        base.contains("blocks.0.adaln_modulation_self_attn.1.") && base.contains("llm_adapter.blocks.0.")
            || base.begins("text_conditioner/blocks.0.") && base.begins("transformer/time_embed.t_embedder.")
    },
    components: &[
        ComponentNames {
            component: Component::TEXT_ENCODER,
            folder: Some(Names { place: "text_encoder", tree: &LanguageEncoder }),
            single_file: Some(Names { place: "text_encoders.qwen3_06b.transformer.", tree: &LanguageEncoder }),
            ..LACKING
        },
        qwen_image::VAE,
        ComponentNames {
            single_file: Some(Names { place: "", tree: &ANIMA }),
            kohya: Some(KohyaNames { prefix: "lora_unet", tree: Some((&ANIMA, DEPTHS)) }),
            required: true,
            ..TRANSFORMER
        },
        ComponentNames {
            component: TEXT_CONDITIONER,
            folder: Some(Names { place: "text_conditioner", tree: &Canonical }),
            single_file: Some(Names { place: "", tree: &Conditioner }),
            kohya: Some(KohyaNames { prefix: "lora_unet_llm_adapter", tree: None }),
            required: true,
        },
    ],
    words: &[WORDS],
    signs: Signs {
        alone: |module| {
            let reads_text = |path: &str| path.ends_with(".attn2.to_k") || path.ends_with(".attn2.to_v");
            module.path.component == TEXT_CONDITIONER
                || module.of_transformer().is_some_and(|path| {
                    path.starts_with("blocks.")
                        || path.starts_with("transformer_blocks.") && reads_text(path) && module.inputs == Some(CONTEXT)
                })
        },
        metadata: &[("ss_base_model_version", "anima"), ("modelspec.architecture", "anima")],
        // Some of its blocks' canonical names are those of Stable Diffusion 3's second attention.
        named_as: Some(&sd3::FAMILY),
        ..Signs::NONE
    },
    labels: Some(Labels {
        version: ["anima", "anima"],
        architecture: ["anima-preview", "anima-preview"],
        implementation: "https://huggingface.co/circlestone-labs/Anima",
        second_version: false,
    }),
    layers: Vec::new,
    block_factors: None,
};

/// Of the published model; nothing in its names depends on them.
const DEPTHS: Depths = Depths { stride: 3, up_attention: 0, levels: 0, layers: 28 };
