//! Qwen-Image: a diffusion transformer of double blocks, a Qwen2.5-VL language model that reads captions, an
//! autoencoder of three-dimensional convolutions. Adapters name the layers of diffusers' tree, which is the original's
//! too.

use lora_core::Component;

use super::adapter::Signs;
use super::sd3::{LACKING, TRANSFORMER};
use super::tree::qwen_image::{QWEN_IMAGE, WORDS, WanVae};
use super::tree::{Canonical, LanguageEncoder, flux};
use super::{ComponentNames, Family, KohyaNames, Labels, Names};

/// The family.
pub static FAMILY: Family = Family {
    name: "qwen_image",
    title: "Qwen-Image",
    image: true,
    tells: |base| base.contains("txt_norm.weight") && base.contains("transformer_blocks.0.img_mod.1."),
    components: &[
        ComponentNames {
            component: Component::TEXT_ENCODER,
            folder: Some(Names { place: "text_encoder", tree: &LanguageEncoder }),
            single_file: Some(Names { place: "text_encoders.qwen25_7b.transformer.", tree: &LanguageEncoder }),
            ..LACKING
        },
        VAE,
        ComponentNames {
            single_file: Some(Names { place: "", tree: &QWEN_IMAGE }),
            kohya: Some(KohyaNames { prefix: "lora_unet", tree: None }),
            required: true,
            ..TRANSFORMER
        },
    ],
    words: &[WORDS, flux::WORDS],
    signs: Signs {
        alone: |module| {
            let parts = [".img_mlp.net.", ".txt_mlp.net.", ".img_mod.1", ".txt_mod.1"];
            let named = module.of_transformer().is_some_and(|path| {
                path.starts_with("transformer_blocks.") && parts.iter().any(|part| path.contains(part))
            });
            // FLUX.1's attention has the same names and width; it has 19 such blocks, this 60.
            named || module.attention("transformer_blocks.", 3072).is_some_and(|block| block >= 19)
        },
        metadata: &[("ss_base_model_version", "qwen_image"), ("modelspec.architecture", "Qwen-Image")],
        ..Signs::NONE
    },
    labels: Some(Labels {
        version: ["qwen_image", "qwen_image"],
        architecture: ["Qwen-Image", "Qwen-Image"],
        implementation: "https://github.com/QwenLM/Qwen-Image",
        second_version: false,
    }),
    layers: Vec::new,
    block_factors: None,
};

/// Wan's autoencoder.
pub(super) const VAE: ComponentNames = ComponentNames {
    component: Component::VAE,
    folder: Some(Names { place: "vae", tree: &Canonical }),
    single_file: Some(Names { place: "vae.", tree: &WanVae }),
    ..LACKING
};
