//! Models of Stable Diffusion 3.5's kind with made-up weights.

use lora_core::Component;
use serde_json::json;

use super::folder::{Part, asked, clip, flux_vae, t5, written_by_parts};
use crate::Result;
use crate::networks::{ClipConfig, Sd3, Sd3Config, T5Config, VaeConfig};
use crate::weights::SyntheticWeights;

/// The sizes of a model of Stable Diffusion 3.5's kind: a transformer, CLIP-L, OpenCLIP's bigG and T5, which read captions, an
/// autoencoder of 16 channels.
#[derive(Debug, Clone)]
pub struct SyntheticSd3 {
    /// CLIP-L's.
    pub text_encoder: ClipConfig,
    /// bigG's.
    pub text_encoder_2: ClipConfig,
    /// T5's.
    pub text_encoder_3: T5Config,
    /// The transformer's.
    pub transformer: Sd3Config,
    /// The autoencoder's.
    pub vae: VaeConfig,
}

impl SyntheticSd3 {
    /// A small model, most of whose parameters are CLIP's vocabularies: 2 blocks of 64 numbers in 2 heads, encoders of 2 layers.
    pub fn tiny() -> Self {
        let t5 = T5Config { vocabulary: 400, ..t5(96, 2, 3, 16) };
        Self::new([(40, 2), (48, 2)], t5, Self::transformer(64, 2, 2, 1, 12), vec![32; 4])
    }

    /// Stable Diffusion 3.5 medium's sizes: 7.9 billion parameters, 4.8 of them T5's.
    pub fn full() -> Self {
        let t5 = T5Config { intermediate: 10_240, ..t5(4096, 24, 64, 64) };
        let transformer = Self::transformer(1536, 24, 24, 13, 384);
        Self::new([(768, 12), (1280, 32)], t5, transformer, vec![128, 256, 512, 512])
    }

    fn transformer(width: usize, heads: usize, blocks: usize, dual_blocks: usize, positions: usize) -> Sd3Config {
        Sd3Config {
            latent_channels: 16,
            width,
            heads,
            inner: 4 * width,
            context: 0,
            pooled: 0,
            blocks,
            dual_blocks,
            positions,
            norms: true,
        }
    }

    fn new([first, second]: [(usize, usize); 2], t5: T5Config, transformer: Sd3Config, channels: Vec<usize>) -> Self {
        let projected = |(width, layers)| ClipConfig { projection: Some(width), ..clip(width, layers) };
        let transformer = Sd3Config { context: t5.width, pooled: first.0 + second.0, ..transformer };
        Self {
            text_encoder: projected(first),
            text_encoder_2: ClipConfig { exact_gelu: true, ..projected(second) },
            text_encoder_3: t5,
            transformer,
            vae: VaeConfig { scaling_factor: 1.5305, shift_factor: 0.0609, ..flux_vae(channels) },
        }
    }

    fn parts(&self) -> Result<Vec<Part>> {
        let synthetic = SyntheticWeights::new("transformer");
        let Self { text_encoder, text_encoder_2, text_encoder_3, transformer, vae } = self;
        Ok(vec![
            Part::clip(Component::TEXT_ENCODER, *text_encoder)?,
            Part::clip(Component::TEXT_ENCODER_2, *text_encoder_2)?,
            Part::t5(Component::TEXT_ENCODER_3, *text_encoder_3)?,
            Part {
                component: Component::TRANSFORMER,
                config: json!({
                    "_class_name": "SD3Transformer2DModel",
                    "attention_head_dim": transformer.width / transformer.heads,
                }),
                weights: asked(&synthetic, |weights| Sd3::new(weights, transformer.clone()).map(drop))?,
            },
            Part::vae(vae)?,
        ])
    }
}

written_by_parts!(SyntheticSd3);
