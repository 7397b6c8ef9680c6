//! Models of the kind of FLUX.2's smaller relatives, called klein, with made-up weights.

use lora_core::Component;
use serde_json::{Value, json};

use super::folder::{Part, asked, flux_vae, qwen3, written_by_parts};
use crate::Result;
use crate::networks::{Flux2, Flux2Config, LatentStatistics, VaeConfig};
use crate::weights::SyntheticWeights;

/// The sizes of a model of FLUX.2 klein's kind: a transformer, a Qwen3 language model that reads captions, an autoencoder of 32
/// channels.
#[derive(Debug, Clone)]
pub struct SyntheticFlux2 {
    /// The `config.json` of its text encoder.
    pub text_encoder: Value,
    /// The transformer's.
    pub transformer: Flux2Config,
    /// The autoencoder's. The statistics of its latents are those of the files that are written.
    pub vae: VaeConfig,
}

impl SyntheticFlux2 {
    /// A model of a million parameters: 1 double and 2 single blocks of 64 numbers in 2 heads, a text encoder of 28 layers of 32,
    /// 640 words.
    pub fn tiny() -> Self {
        Self::new(64, 2, [1, 2], (32, [640, 48, 28, 2, 1, 16]), vec![32; 4])
    }

    /// FLUX.2 klein 4B's sizes: 8 billion parameters.
    pub fn klein_4b() -> Self {
        Self::new(3072, 24, [5, 20], (2560, [151_936, 9728, 36, 32, 8, 128]), vec![128, 256, 512, 512])
    }

    /// FLUX.2 klein 9B's sizes: 17 billion parameters.
    pub fn klein_9b() -> Self {
        Self::new(4096, 32, [8, 24], (4096, [151_936, 12_288, 36, 32, 8, 128]), vec![128, 256, 512, 512])
    }

    fn new(
        width: usize,
        heads: usize,
        [double_blocks, single_blocks]: [usize; 2],
        (text, sizes): (usize, [usize; 6]),
        channels: Vec<usize>,
    ) -> Self {
        let transformer = Flux2Config {
            latent_channels: 32,
            width,
            heads,
            inner: 3 * width,
            context: 3 * text,
            double_blocks,
            single_blocks,
            guidance: false,
            axes: vec![width / heads / 4; 4],
        };
        let statistics = LatentStatistics { side: 2, means: vec![0.0; 128], deviations: vec![1.0; 128] };
        let vae = VaeConfig {
            latent_channels: 32,
            scaling_factor: 1.0,
            shift_factor: 0.0,
            statistics: Some(statistics),
            quant_convs: true,
            ..flux_vae(channels)
        };
        Self { text_encoder: qwen3(text, sizes), transformer, vae }
    }

    fn parts(&self) -> Result<[Part; 3]> {
        let Self { text_encoder, transformer, vae } = self;
        let own = Part {
            component: Component::TRANSFORMER,
            config: json!({ "_class_name": "Flux2Transformer2DModel", "axes_dims_rope": transformer.axes }),
            weights: asked(&SyntheticWeights::new("transformer"), |weights| {
                Flux2::new(weights, transformer.clone()).map(drop)
            })?,
        };
        Ok([Part::text_encoder(text_encoder)?, own, Part::vae(vae)?])
    }
}

written_by_parts!(SyntheticFlux2);
