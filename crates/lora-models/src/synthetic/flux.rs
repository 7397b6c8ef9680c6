//! Models of FLUX.1's kind with made-up weights.

use lora_core::Component;
use serde_json::json;

use super::folder::{Part, asked, clip, flux_vae, t5, written_by_parts};
use crate::Result;
use crate::networks::{ClipConfig, Flux, FluxConfig, T5Config, VaeConfig};
use crate::weights::SyntheticWeights;

/// The sizes of a model of FLUX.1's kind: a transformer, CLIP-L and T5, which read captions, an autoencoder of 16 channels.
#[derive(Debug, Clone)]
pub struct SyntheticFlux {
    /// CLIP's.
    pub text_encoder: ClipConfig,
    /// T5's.
    pub text_encoder_2: T5Config,
    /// The transformer's.
    pub transformer: FluxConfig,
    /// The autoencoder's.
    pub vae: VaeConfig,
}

impl SyntheticFlux {
    /// A small model, most of whose parameters are CLIP's vocabulary: 2 double and 2 single blocks of 64 numbers in 2 heads,
    /// encoders of 2 layers.
    pub fn tiny() -> Self {
        let t5 = T5Config { vocabulary: 400, ..t5(48, 2, 3, 16) };
        Self::new((40, 2), t5, Self::transformer(64, 2, [2, 2]), vec![32; 4])
    }

    /// FLUX.1 dev's sizes: 16.9 billion parameters.
    pub fn full() -> Self {
        let t5 = T5Config { intermediate: 10_240, ..t5(4096, 24, 64, 64) };
        Self::new((768, 12), t5, Self::transformer(3072, 24, [19, 38]), vec![128, 256, 512, 512])
    }

    fn transformer(width: usize, heads: usize, [double_blocks, single_blocks]: [usize; 2]) -> FluxConfig {
        let head = width / heads;
        FluxConfig {
            latent_channels: 16,
            width,
            heads,
            inner: 4 * width,
            context: 0,
            pooled: 0,
            double_blocks,
            single_blocks,
            guidance: true,
            axes: vec![head / 8, 7 * head / 16, 7 * head / 16],
        }
    }

    fn new((width, layers): (usize, usize), t5: T5Config, transformer: FluxConfig, channels: Vec<usize>) -> Self {
        let transformer = FluxConfig { context: t5.width, pooled: width, ..transformer };
        Self { text_encoder: clip(width, layers), text_encoder_2: t5, transformer, vae: flux_vae(channels) }
    }

    fn parts(&self) -> Result<Vec<Part>> {
        let synthetic = SyntheticWeights::new("flux");
        let Self { text_encoder, text_encoder_2, transformer, vae } = self;
        Ok(vec![
            Part::clip(Component::TEXT_ENCODER, *text_encoder)?,
            Part::t5(Component::TEXT_ENCODER_2, *text_encoder_2)?,
            Part {
                component: Component::TRANSFORMER,
                config: json!({ "_class_name": "FluxTransformer2DModel", "axes_dims_rope": transformer.axes }),
                weights: asked(&synthetic, |weights| Flux::new(weights, transformer.clone()).map(drop))?,
            },
            Part::vae(vae)?,
        ])
    }
}

written_by_parts!(SyntheticFlux);
