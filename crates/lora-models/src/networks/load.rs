//! Networks out of an open checkpoint: sizes off the tensors, head counts and the like from a diffusers folder's
//! configs where there are any. Each component is loaded by itself, so that a trainer can let go of one before the next.

use lora_core::Component;
use lora_io::checkpoint::Checkpoint;
use lora_torch::tch::{Device, Kind};

use super::{ClipConfig, ClipTextEncoder, Unet, UnetConfig, Vae, VaeConfig};
use crate::Result;
use crate::weights::{Held, Weights};

/// The text encoder's sizes.
pub fn text_encoder_config(checkpoint: &Checkpoint) -> Result<ClipConfig> {
    let component = checkpoint.component(Component::TEXT_ENCODER)?;
    let config = component.config();
    let heads = config.and_then(|config| config["num_attention_heads"].as_u64()).map(|heads| heads as usize);
    let act = config.and_then(|config| config["hidden_act"].as_str());
    ClipConfig::detect(component, heads, act)
}

/// The text encoder.
pub fn load_text_encoder(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<ClipTextEncoder> {
    let weights = Weights::new(checkpoint.component(Component::TEXT_ENCODER)?, kind, device).held(held);
    ClipTextEncoder::new(&weights, text_encoder_config(checkpoint)?)
}

/// The U-Net's sizes.
pub fn unet_config(checkpoint: &Checkpoint) -> Result<UnetConfig> {
    let component = checkpoint.component(Component::UNET)?;
    let config = component.config();
    // Newer configs have the count under its right name; `attention_head_dim` means the count in SD 1.x all the same.
    let heads = config.and_then(|config| {
        let value = ["num_attention_heads", "attention_head_dim"]
            .iter()
            .map(|key| &config[*key])
            .find(|value| !value.is_null())?;
        match value {
            serde_json::Value::Array(each) => {
                each.iter().map(|heads| heads.as_u64().map(|heads| heads as usize)).collect()
            }
            one => one.as_u64().map(|heads| vec![heads as usize]),
        }
    });
    let groups = config.and_then(|config| config["norm_num_groups"].as_u64()).map(|groups| groups as usize);
    UnetConfig::detect(component, heads.as_deref(), groups)
}

/// The U-Net.
pub fn load_unet(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<Unet> {
    let weights = Weights::new(checkpoint.component(Component::UNET)?, kind, device).held(held);
    Unet::new(&weights, unet_config(checkpoint)?)
}

/// The autoencoder's sizes.
pub fn vae_config(checkpoint: &Checkpoint) -> Result<VaeConfig> {
    let component = checkpoint.component(Component::VAE)?;
    let config = component.config();
    let groups = config.and_then(|config| config["norm_num_groups"].as_u64()).map(|groups| groups as usize);
    let scaling = config.and_then(|config| config["scaling_factor"].as_f64());
    VaeConfig::detect(component, groups, scaling)
}

/// The autoencoder.
pub fn load_vae(checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<Vae> {
    Vae::new(&Weights::new(checkpoint.component(Component::VAE)?, kind, device).held(held), vae_config(checkpoint)?)
}
