//! Networks, one file or folder each: a network knows its sizes, its weights under diffusers' and transformers' names, and its
//! forward pass. What is done with their answers is not here: noise schedules and samplers are in [`crate::diffusion`],
//! losses are the trainer's.

mod approximator;
mod axial_rotary;
mod blocks;
mod clip;
mod config;
mod cosmos;
pub mod decoder;
mod flux;
mod flux2;
mod joint;
mod load;
mod position_table;
mod qwen_image;
mod sd3;
mod t5;
mod text_conditioner;
mod tiles;
mod transformer;
mod unet;
mod vae;
mod wan_vae;
mod z_image;

pub use approximator::ApproximatorConfig;
pub use axial_rotary::{AxialRotary, AxialTables};
pub use clip::{ClipConfig, ClipTextEncoder, Penultimate};
pub use cosmos::{Cosmos, CosmosConditions, CosmosConfig};
pub use decoder::{Decoder, DecoderConfig};
pub use flux::{Flux, FluxConditioning, FluxConditions, FluxConfig};
pub use flux2::{Flux2, Flux2Conditions, Flux2Config};
pub use load::{
    load_caption_decoder, load_cosmos, load_decoder, load_flux, load_flux2, load_qwen_image, load_sd3, load_t5,
    load_text_conditioner, load_text_encoder, load_unet, load_vae, load_z_image,
};
pub use qwen_image::{QwenImage, QwenImageConditions, QwenImageConfig};
pub use sd3::{Sd3, Sd3Conditions, Sd3Config};
pub use t5::{T5Config, T5Encoder};
pub use text_conditioner::{TextConditioner, TextConditionerConfig};
pub use unet::{Conditions, Unet, UnetConfig};
pub use vae::{LatentDistribution, LatentStatistics, Vae, VaeConfig};
pub(crate) use wan_vae::{DEVIATIONS, MEANS};
pub use z_image::{ZImage, ZImageCaptions, ZImageConfig};
