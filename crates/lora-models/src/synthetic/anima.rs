//! Models of Anima's kind with made-up weights.

use lora_core::Component;
use lora_io::family::anima::TEXT_CONDITIONER;
use serde_json::{Value, json};

use super::folder::{Part, asked, qwen3, wan_vae, written_by_parts};
use crate::Result;
use crate::networks::{Cosmos, CosmosConfig, TextConditioner, TextConditionerConfig, VaeConfig};
use crate::weights::SyntheticWeights;

/// The sizes of a model of Anima's kind: a transformer, Qwen3, which reads captions, a text conditioner between them, Wan's
/// autoencoder.
#[derive(Debug, Clone)]
pub struct SyntheticAnima {
    /// The `config.json` of its text encoder.
    pub text_encoder: Value,
    /// The text conditioner's.
    pub text_conditioner: TextConditionerConfig,
    /// The transformer's.
    pub transformer: CosmosConfig,
    /// The autoencoder's.
    pub vae: VaeConfig,
}

impl SyntheticAnima {
    /// A model of a few hundred thousand parameters: 2 blocks of 64 numbers in 2 heads, a text encoder of 2 layers of 32, a
    /// conditioner of 2 blocks.
    pub fn tiny() -> Self {
        let conditioner = TextConditionerConfig {
            vocabulary: 400,
            source: 32,
            target: 32,
            width: 32,
            heads: 2,
            inner: 64,
            blocks: 2,
        };
        Self::new([64, 2, 2, 24], qwen3(32, [640, 64, 2, 2, 1, 16]), conditioner, vec![8, 16, 32, 32])
    }

    /// Anima's sizes: 2.8 billion parameters.
    pub fn full() -> Self {
        let conditioner = TextConditionerConfig {
            vocabulary: 32_128,
            source: 1024,
            target: 1024,
            width: 1024,
            heads: 16,
            inner: 4096,
            blocks: 6,
        };
        let text_encoder = qwen3(1024, [151_936, 3072, 28, 16, 8, 128]);
        Self::new([2048, 16, 28, 256], text_encoder, conditioner, vec![96, 192, 384, 384])
    }

    fn new(
        [width, heads, blocks, modulation]: [usize; 4],
        text_encoder: Value,
        text_conditioner: TextConditionerConfig,
        channels: Vec<usize>,
    ) -> Self {
        let transformer = CosmosConfig {
            latent_channels: 16,
            width,
            heads,
            inner: 4 * width,
            context: text_conditioner.target,
            modulation,
            blocks,
            rope_scale: CosmosConfig::ROPE_SCALE,
        };
        Self { text_encoder, text_conditioner, transformer, vae: wan_vae(channels) }
    }

    fn parts(&self) -> Result<[Part; 4]> {
        let Self { text_encoder, text_conditioner, transformer, vae } = self;
        let own = Part {
            component: Component::TRANSFORMER,
            config: json!({ "_class_name": "CosmosTransformer3DModel", "rope_scale": transformer.rope_scale }),
            weights: asked(&SyntheticWeights::new("transformer"), |weights| {
                Cosmos::new(weights, transformer.clone()).map(drop)
            })?,
        };
        let conditioner = Part {
            component: TEXT_CONDITIONER,
            config: json!({ "_class_name": "AnimaTextConditioner" }),
            weights: asked(&SyntheticWeights::new(TEXT_CONDITIONER.name()), |weights| {
                TextConditioner::new(weights, *text_conditioner).map(drop)
            })?,
        };
        Ok([Part::text_encoder(text_encoder)?, conditioner, own, Part::vae(vae)?])
    }
}

written_by_parts!(SyntheticAnima);
