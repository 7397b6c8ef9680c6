//! What the headers of a base model say: the sizes of its networks, names and shapes of their weights, and the layers that
//! can carry an adapter. No weight is read.

use lora_core::Component;
use lora_core::target::TargetLayer;
use lora_io::checkpoint::Checkpoint;
use lora_models::layers::Adaptable;
use lora_models::networks::{ClipConfig, ClipTextEncoder, Unet, UnetConfig, Vae, VaeConfig};
use lora_models::weights::{NamedShape, ShapesOnly, Weights};
use lora_torch::tch::{Device, Kind};

use crate::Result;

/// The networks of a base model.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) unet: UnetConfig,
    pub(super) unet_shapes: Shapes,
    pub(super) text: ClipConfig,
    pub(super) text_shapes: Shapes,
    pub(super) vae: VaeConfig,
    pub(super) vae_shapes: Shapes,
}

/// A network's weights.
#[derive(Debug)]
pub(super) struct Shapes {
    /// All of them.
    pub(super) weights: Vec<NamedShape>,
    /// Layers that can carry an adapter.
    pub(super) layers: Vec<TargetLayer>,
}

impl Base {
    /// The networks are built of tensors without elements, so that names and shapes are checked as ever.
    pub(super) fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let unet = UnetConfig::detect(checkpoint.component(Component::UNET)?)?;
        let text = ClipConfig::detect(checkpoint.component(Component::TEXT_ENCODER)?)?;
        let vae = VaeConfig::detect(checkpoint.component(Component::VAE)?)?;
        let shapes = |component: Component, build: &dyn Fn(&Weights<'_>) -> lora_models::Result<Vec<TargetLayer>>| {
            let source = ShapesOnly::new(checkpoint.component(component)?);
            let layers = build(&Weights::new(&source, Kind::Float, Device::Cpu))?;
            Ok::<_, crate::Error>(Shapes { weights: source.asked(), layers })
        };
        Ok(Self {
            unet_shapes: shapes(Component::UNET, &|weights| Unet::new(weights, unet.clone())?.adaptable_layers())?,
            text_shapes: shapes(Component::TEXT_ENCODER, &|weights| {
                ClipTextEncoder::new(weights, text)?.adaptable_layers()
            })?,
            vae_shapes: shapes(Component::VAE, &|weights| Vae::new(weights, vae.clone()).map(|_| Vec::new()))?,
            unet,
            text,
            vae,
        })
    }

    /// A network that can carry adapters.
    pub(super) fn shapes(&self, component: Component) -> &Shapes {
        match component {
            Component::TEXT_ENCODER => &self.text_shapes,
            _ => &self.unet_shapes,
        }
    }
}
