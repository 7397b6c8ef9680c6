//! FLUX.2 and its smaller relatives called klein: a diffusion transformer of double and single blocks, a language model that
//! reads captions, an autoencoder of 32 channels.

use lora_core::Component;

use super::adapter::Signs;
use super::sd3::{LACKING, TRANSFORMER};
use super::tree::flux2::{DiffusersFlux2Vae, FLUX2, Flux2Vae, WORDS};
use super::tree::{Depths, LanguageEncoder, flux};
use super::{ComponentNames, Family, KohyaNames, Labels, Names};

/// The family.
pub static FAMILY: Family = Family {
    name: "flux2",
    title: "FLUX.2",
    image: true,
    tells: |base| base.contains("double_stream_modulation_img."),
    components: &[
        ComponentNames {
            component: Component::TEXT_ENCODER,
            folder: Some(Names { place: "text_encoder", tree: &LanguageEncoder }),
            single_file: Some(Names { place: "text_encoders.qwen3_4b.transformer.", tree: &LanguageEncoder }),
            ..LACKING
        },
        ComponentNames {
            component: Component::VAE,
            folder: Some(Names { place: "vae", tree: &DiffusersFlux2Vae }),
            single_file: Some(Names { place: "vae.", tree: &Flux2Vae }),
            ..LACKING
        },
        ComponentNames {
            single_file: Some(Names { place: "", tree: &FLUX2 }),
            kohya: Some(KohyaNames { prefix: "lora_unet", tree: Some((&FLUX2, DEPTHS)) }),
            required: true,
            ..TRANSFORMER
        },
    ],
    words: &[WORDS, flux::WORDS],
    signs: Signs {
        alone: |module| {
            let Some(path) = module.of_transformer() else { return false };
            let parts = ["stream_modulation", "to_qkv_mlp_proj", ".ff.linear_", ".ff_context.linear_"];
            let block = |path: &str| path.starts_with("single_transformer_blocks.") && path.ends_with(".attn.to_out");
            // Names that FLUX.1 has too, of layers as wide as these are: feed-forwards are gated and three times as wide.
            parts.iter().any(|part| path.contains(part))
                || block(path)
                || path.ends_with(".linear1") && module.widens(9, 1)
                || path.ends_with(".linear2") && module.widens(1, 4)
                || path.ends_with("_mlp.0") && module.widens(6, 1)
                || path.ends_with("_mlp.2") && module.widens(1, 3)
        },
        metadata: &[("ss_base_model_version", "flux_2"), ("modelspec.architecture", "Flux.2")],
        ..Signs::NONE
    },
    labels: Some(Labels {
        version: ["flux_2_klein_4b", "flux_2_klein_4b"],
        architecture: ["Flux.2-klein-4b", "Flux.2-klein-4b"],
        implementation: "https://github.com/black-forest-labs/flux2",
        second_version: false,
    }),
    layers: Vec::new,
    block_factors: None,
};

/// Of the published model; nothing in its names depends on them.
const DEPTHS: Depths = Depths { stride: 3, up_attention: 0, levels: 0, layers: 8 };
