//! Networks out of an open checkpoint. Each is loaded by itself, so that a trainer can let go of one before the next
//! comes.

use lora_core::Component;
use lora_io::checkpoint::Checkpoint;
use lora_io::family::anima;
use lora_torch::tch::{Device, Kind};

use super::{
    ClipConfig, ClipTextEncoder, Cosmos, CosmosConfig, Decoder, DecoderConfig, Flux, Flux2, Flux2Config, FluxConfig,
    QwenImage, QwenImageConfig, Sd3, Sd3Config, T5Config, T5Encoder, TextConditioner, TextConditionerConfig, Unet,
    UnetConfig, Vae, VaeConfig, ZImage, ZImageConfig,
};
use crate::Result;
use crate::weights::{Held, Weights};

/// The text encoder.
///
/// # Errors
/// Where the checkpoint has no such component, its weights do not make up the network, and where memory runs out.
pub fn load_text_encoder(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<ClipTextEncoder> {
    let component = checkpoint.component(Component::TEXT_ENCODER)?;
    ClipTextEncoder::new(&Weights::new(component, kind, device).held(held), ClipConfig::detect(component)?)
}

/// The U-Net.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_unet(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<Unet> {
    let component = checkpoint.component(Component::UNET)?;
    Unet::new(&Weights::new(component, kind, device).held(held), UnetConfig::detect(component)?)
}

/// The autoencoder.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_vae(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<Vae> {
    let component = checkpoint.component(Component::VAE)?;
    Vae::new(&Weights::new(component, kind, device).held(held), VaeConfig::detect(checkpoint)?)
}

/// The language model.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_decoder(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<Decoder> {
    let component = checkpoint.component(Component::LANGUAGE_MODEL)?;
    Decoder::load(&Weights::new(component, kind, device).held(held), DecoderConfig::detect(component)?)
}

/// Z-Image's transformer.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_z_image(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<ZImage> {
    let component = checkpoint.component(Component::TRANSFORMER)?;
    ZImage::new(&Weights::new(component, kind, device).held(held), ZImageConfig::detect(component)?)
}

/// FLUX.1's transformer, or Chroma's.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_flux(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<Flux> {
    let component = checkpoint.component(Component::TRANSFORMER)?;
    Flux::new(&Weights::new(component, kind, device).held(held), FluxConfig::detect(component)?)
}

/// FLUX.2's transformer.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_flux2(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<Flux2> {
    let component = checkpoint.component(Component::TRANSFORMER)?;
    Flux2::new(&Weights::new(component, kind, device).held(held), Flux2Config::detect(component)?)
}

/// Qwen-Image's transformer.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_qwen_image(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<QwenImage> {
    let component = checkpoint.component(Component::TRANSFORMER)?;
    QwenImage::new(&Weights::new(component, kind, device).held(held), QwenImageConfig::detect(component)?)
}

/// Cosmos-Predict2's transformer, Anima's.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_cosmos(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<Cosmos> {
    let component = checkpoint.component(Component::TRANSFORMER)?;
    Cosmos::new(&Weights::new(component, kind, device).held(held), CosmosConfig::detect(component)?)
}

/// Anima's text conditioner.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_text_conditioner(
    checkpoint: &Checkpoint,
    kind: Kind,
    device: Device,
    held: Held,
) -> Result<TextConditioner> {
    let component = checkpoint.component(anima::TEXT_CONDITIONER)?;
    TextConditioner::new(&Weights::new(component, kind, device).held(held), TextConditionerConfig::detect(component)?)
}

/// Stable Diffusion 3's transformer.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_sd3(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<Sd3> {
    let component = checkpoint.component(Component::TRANSFORMER)?;
    Sd3::new(&Weights::new(component, kind, device).held(held), Sd3Config::detect(component)?)
}

/// A T5 encoder, as the text encoder that it is of the base.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_t5(
    checkpoint: &Checkpoint,
    component: Component,
    kind: Kind,
    device: Device,
    held: Held,
) -> Result<T5Encoder> {
    let weights = checkpoint.component(component)?;
    let encoder = T5Encoder::new(&Weights::new(weights, kind, device).held(held), T5Config::detect(weights)?)?;
    Ok(encoder.of(component))
}

/// A language model that reads captions: without a head, and without the layers behind the states that are read: `read`
/// says of a model of so many layers how many are before each of these. A file without a `config.json` is Qwen3's, or with biases Qwen2.5's,
/// whose sizes its shapes show.
///
/// # Errors
/// As of [`load_text_encoder`].
pub fn load_caption_decoder(
    checkpoint: &Checkpoint,
    component: Component,
    read: impl FnOnce(usize) -> Vec<usize>,
    kind: Kind,
    device: Device,
    held: Held,
) -> Result<Decoder> {
    let weights = checkpoint.component(component)?;
    let mut config = match weights.config() {
        Some(_) => DecoderConfig::detect(weights)?,
        None => DecoderConfig::of_qwen(weights)?,
    };
    // Nothing reads its answers; so the head is the embedding's table, which is there once.
    config.tied = true;
    // One layer stays behind them: states behind the last one are normed.
    let depth = read(config.layers.len()).into_iter().max().unwrap_or(0) + 1;
    config.layers.truncate(depth);
    Decoder::load(&Weights::new(weights, kind, device).held(held), config)
}
