//! Stable Diffusion XL: a U-Net of three levels with deep transformers, CLIP's and OpenCLIP's text encoders, an
//! autoencoder. Adapters in kohya's layout name the U-Net's modules in the original tree.

use lora_core::Component;

use super::adapter::Signs;
use super::layers::{self, TextEncoder, Unet};
use super::tree::Depths;
use super::tree::clip::{Clip, OpenClip};
use super::tree::ldm::LdmUnet;
use super::{ComponentNames, Family, KohyaNames, Labels, Names, sd1};

/// The family.
pub static FAMILY: Family = Family {
    name: "sdxl",
    title: "Stable Diffusion XL",
    image: true,
    tells: |base| {
        // The refiner's only text encoder is OpenCLIP's, the second of a folder.
        let refiner = base.begins("conditioner.embedders.0.model.");
        base.begins("conditioner.embedders.") && !refiner
            || base.begins("unet/add_embedding.") && base.begins("text_encoder/")
    },
    components: &[
        ComponentNames {
            component: Component::TEXT_ENCODER,
            folder: sd1::TEXT_FOLDER,
            single_file: Some(Names { place: "conditioner.embedders.0.transformer.", tree: &Clip }),
            kohya: Some(KohyaNames { prefix: "lora_te1", tree: None }),
            required: true,
        },
        ComponentNames {
            component: Component::TEXT_ENCODER_2,
            folder: Some(Names { place: "text_encoder_2", tree: &Clip }),
            single_file: Some(Names {
                place: "conditioner.embedders.1.model.",
                tree: &OpenClip { stops_before_last: false },
            }),
            kohya: Some(KohyaNames { prefix: "lora_te2", tree: None }),
            required: true,
        },
        ComponentNames { kohya: Some(KohyaNames { prefix: "lora_unet", tree: Some((&LdmUnet, DEPTHS)) }), ..sd1::UNET },
        sd1::VAE,
    ],
    words: sd1::WORDS,
    signs: Signs {
        // Transformers of more than one block, and a second text encoder.
        alone: |module| {
            let block = module.number(Component::UNET, ".transformer_blocks.");
            block.is_some_and(|block| block > 0)
                || module.path.component == Component::TEXT_ENCODER_2
                || module.path.component == Component::UNET && module.path.path.starts_with("add_embedding.")
        },
        context: Some(2048),
        spelt: |module| module.name.starts_with("lora_te1_"),
        metadata: &[("ss_base_model_version", "sdxl"), ("modelspec.architecture", "stable-diffusion-xl")],
        named_as: None,
    },
    labels: Some(Labels {
        version: ["sdxl_base_v1-0", "sdxl_base_v1-0"],
        architecture: ["stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1-base"],
        implementation: "https://github.com/Stability-AI/generative-models",
        second_version: false,
    }),
    layers: || layers::list(&PUBLISHED_UNET, TEXT_ENCODERS),
    block_factors: Some(23),
};

const PUBLISHED_UNET: Unet = Unet { depths: &[0, 2, 10], widths: &[320, 640, 1280], conditioned_on_size: true };

const TEXT_ENCODERS: &[TextEncoder] = &[
    TextEncoder { component: Component::TEXT_ENCODER, layers: 12 },
    TextEncoder { component: Component::TEXT_ENCODER_2, layers: 32 },
];

/// The two lower levels of the way up have transformers.
const DEPTHS: Depths = Depths { stride: 3, up_attention: 0b011, levels: 4, layers: 32 };

#[cfg(test)]
mod tests {
    use super::super::tree::Tree;
    use super::*;

    #[test]
    fn the_depths_are_those_of_the_layers() {
        let layers = (FAMILY.layers)();
        let unet = layers.iter().filter(|layer| layer.path.component == Component::UNET);
        let names: Vec<&str> = unet.map(|layer| layer.path.path.as_str()).collect();
        let depths = LdmUnet.depths_of_canonical(&names);
        assert_eq!((depths.stride, depths.up_attention), (DEPTHS.stride, DEPTHS.up_attention));
    }
}
