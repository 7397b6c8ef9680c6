//! Models of Z-Image's kind with made-up weights.

use lora_core::Component;
use serde_json::{Value, json};

use super::folder::{Part, asked, flux_vae, qwen3, written_by_parts};
use crate::Result;
use crate::networks::{VaeConfig, ZImage, ZImageConfig};
use crate::weights::SyntheticWeights;

/// The sizes of a model of Z-Image's kind: a transformer, a Qwen3 language model that reads captions, FLUX.1's autoencoder.
#[derive(Debug, Clone)]
pub struct SyntheticZImage {
    /// The `config.json` of its text encoder.
    pub text_encoder: Value,
    /// The transformer's.
    pub transformer: ZImageConfig,
    /// The autoencoder's.
    pub vae: VaeConfig,
}

impl SyntheticZImage {
    /// A model of a million parameters: 2 layers of 64 numbers in 2 heads, a text encoder of 3 layers of 32, 640 words.
    pub fn tiny() -> Self {
        let transformer = ZImageConfig {
            latent_channels: 16,
            width: 64,
            heads: 2,
            inner: 170,
            layers: 2,
            refiners: 2,
            caption: 32,
            time_inner: 1024,
            time: 64,
            axes: vec![8, 12, 12],
            theta: 256.0,
            epsilon: 1e-5,
        };
        Self::new(transformer, [640, 64, 3, 4, 2, 16], vec![32; 4])
    }

    /// Z-Image's sizes: 10.3 billion parameters.
    pub fn full() -> Self {
        let transformer = ZImageConfig {
            latent_channels: 16,
            width: 3840,
            heads: 30,
            inner: 10240,
            layers: 30,
            refiners: 2,
            caption: 2560,
            time_inner: 1024,
            time: 256,
            axes: vec![32, 48, 48],
            theta: 256.0,
            epsilon: 1e-5,
        };
        Self::new(transformer, [151_936, 9728, 36, 32, 8, 128], vec![128, 256, 512, 512])
    }

    fn new(transformer: ZImageConfig, text: [usize; 6], channels: Vec<usize>) -> Self {
        Self { text_encoder: qwen3(transformer.caption, text), vae: flux_vae(channels), transformer }
    }

    fn parts(&self) -> Result<[Part; 3]> {
        let Self { text_encoder, transformer, vae } = self;
        let own = Part {
            component: Component::TRANSFORMER,
            config: json!({
                "_class_name": "ZImageTransformer2DModel", "axes_dims": transformer.axes,
                "rope_theta": transformer.theta, "norm_eps": transformer.epsilon,
            }),
            weights: asked(&SyntheticWeights::new("transformer"), |weights| {
                ZImage::new(weights, transformer.clone()).map(drop)
            })?,
        };
        Ok([Part::text_encoder(text_encoder)?, own, Part::vae(vae)?])
    }
}

written_by_parts!(SyntheticZImage);
