//! Stable Diffusion 1.x (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022): the
//! text encoder, the autoencoder, the U-Net, the noise schedule and the samplers. Layers are named as in diffusers and
//! transformers.

mod blocks;
mod clip;
mod load;
mod sampler;
mod schedule;
mod tiles;
mod transformer;
mod unet;
mod vae;

pub use clip::{ClipConfig, ClipTextEncoder};
pub use load::{load_text_encoder, load_unet, load_vae, noise_schedule, text_encoder_config, unet_config, vae_config};
pub use sampler::{Sampler, SamplerKind};
pub use schedule::{NoiseSchedule, Prediction};
pub use tiles::tiles_along;
pub use unet::{Unet, UnetConfig};
pub use vae::{LatentDistribution, Vae, VaeConfig};
