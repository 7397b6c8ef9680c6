//! Z-Image: a transformer that denoises, a Qwen3 language model that reads captions, FLUX.1's autoencoder. Single files are
//! ComfyUI's: mostly the transformer alone, with text encoder and autoencoder in files of their own. Adapters name the
//! layers of diffusers' tree behind `diffusion_model.`, which diffusers and ComfyUI read both.

use lora_core::Component;

use super::adapter::Signs;
use super::sd3::{LACKING, TRANSFORMER, VAE};
use super::tree::ldm::LdmVae;
use super::tree::z_image::{WORDS, ZImage};
use super::tree::{Depths, LanguageEncoder, Tree};
use super::{ComponentNames, Family, KohyaNames, Labels, Names};

/// The family.
pub static FAMILY: Family = Family {
    name: "z_image",
    title: "Z-Image",
    image: true,
    // Lumina 2 has neither: its captions are masked, and its modulation is a layer further.
    tells: |base| base.contains("cap_pad_token") && base.contains("layers.0.adaLN_modulation.0."),
    components: &[
        ComponentNames {
            component: Component::TEXT_ENCODER,
            folder: Some(Names { place: "text_encoder", tree: &LanguageEncoder }),
            single_file: Some(Names { place: "text_encoders.qwen3_4b.transformer.", tree: &LanguageEncoder }),
            ..LACKING
        },
        ComponentNames { single_file: Some(Names { place: "vae.", tree: &LdmVae }), ..VAE },
        ComponentNames {
            // Most files hold it alone, without a prefix; the others come first.
            single_file: Some(Names { place: "", tree: &ZImage }),
            kohya: Some(KohyaNames { prefix: "diffusion_model.", tree: None }),
            required: true,
            ..TRANSFORMER
        },
    ],
    words: &[WORDS],
    signs: Signs {
        alone: |module| {
            let name = format!("{}.weight", module.path.path);
            module.path.component == Component::TRANSFORMER && ZImage.weights(&name, &Depths::default()).is_some()
        },
        metadata: &[("ss_base_model_version", "z_image"), ("modelspec.architecture", "Z-Image")],
        ..Signs::NONE
    },
    labels: Some(Labels {
        version: ["z_image", "z_image"],
        architecture: ["Z-Image", "Z-Image"],
        implementation: "https://github.com/Tongyi-MAI/Z-Image",
        second_version: false,
    }),
    layers: Vec::new,
    block_factors: None,
};
