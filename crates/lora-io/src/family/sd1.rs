//! Stable Diffusion 1.x: a U-Net, one CLIP text encoder, an autoencoder. The pieces that later families of U-Nets share
//! with it stand here.

use lora_core::Component;

use super::adapter::Signs;
use super::layers::{self, TextEncoder, Unet};
use super::tree::Canonical;
use super::tree::clip::{self, Clip};
use super::tree::ldm::{self, DiffusersVae, LdmUnet, LdmVae};
use super::{ComponentNames, Family, KohyaNames, Labels, Names};

/// The family.
pub static FAMILY: Family = Family {
    name: "sd1",
    title: "Stable Diffusion 1.x",
    image: true,
    tells: |base| {
        // SD 2's folder has the same names; its transformers are entered by matrices, these by convolutions.
        base.begins("cond_stage_model.transformer.")
            || base.begins("unet/") && base.axes("unet/", ".proj_in.weight") != Some(2)
    },
    components: &[
        ComponentNames {
            component: Component::TEXT_ENCODER,
            folder: TEXT_FOLDER,
            single_file: Some(Names { place: "cond_stage_model.transformer.", tree: &Clip }),
            kohya: Some(KohyaNames { prefix: "lora_te", tree: None }),
            required: true,
        },
        UNET,
        VAE,
    ],
    words: WORDS,
    signs: Signs {
        context: Some(768),
        metadata: &[("ss_base_model_version", "sd_v1"), ("modelspec.architecture", "stable-diffusion-v1")],
        ..Signs::NONE
    },
    labels: Some(Labels {
        version: ["sd_v1", "sd_v1_v"],
        architecture: ["stable-diffusion-v1", "stable-diffusion-v1"],
        implementation: "diffusers",
        second_version: false,
    }),
    layers: || layers::list(&PUBLISHED_UNET, &[TextEncoder { component: Component::TEXT_ENCODER, layers: 12 }]),
    block_factors: Some(25),
};

/// The published U-Net, which SD 2's resembles in all that names show.
pub(super) const PUBLISHED_UNET: Unet =
    Unet { depths: &[1, 1, 1, 0], widths: &[320, 640, 1280, 1280], conditioned_on_size: false };

pub(super) const WORDS: &[&[&str]] = &[ldm::WORDS, clip::WORDS];

pub(super) const TEXT_FOLDER: Option<Names> = Some(Names { place: "text_encoder", tree: &Clip });

pub(super) const UNET: ComponentNames = ComponentNames {
    component: Component::UNET,
    folder: Some(Names { place: "unet", tree: &Canonical }),
    single_file: Some(Names { place: "model.diffusion_model.", tree: &LdmUnet }),
    kohya: Some(KohyaNames { prefix: "lora_unet", tree: None }),
    required: true,
};

pub(super) const VAE: ComponentNames = ComponentNames {
    component: Component::VAE,
    folder: Some(Names { place: "vae", tree: &DiffusersVae }),
    single_file: Some(Names { place: "first_stage_model.", tree: &LdmVae }),
    kohya: None,
    required: true,
};
