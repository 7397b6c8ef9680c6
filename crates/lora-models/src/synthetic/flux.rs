//! Models of FLUX.1's and Chroma's kind with made-up weights.

use lora_core::Component;
use serde_json::json;

use super::folder::{Part, asked, clip, flux_vae, t5, written_by_parts};
use crate::Result;
use crate::networks::{ApproximatorConfig, ClipConfig, Flux, FluxConditioning, FluxConfig, T5Config, VaeConfig};
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
        Self::new((40, 2), t5, transformer(64, 2, [2, 2]), vec![32; 4])
    }

    /// FLUX.1 dev's sizes: 16.9 billion parameters.
    pub fn full() -> Self {
        let t5 = T5Config { intermediate: 10_240, ..t5(4096, 24, 64, 64) };
        Self::new((768, 12), t5, transformer(3072, 24, [19, 38]), vec![128, 256, 512, 512])
    }

    fn new((width, layers): (usize, usize), t5: T5Config, transformer: FluxConfig, channels: Vec<usize>) -> Self {
        let conditioning = FluxConditioning::Embedded { pooled: width, guidance: true };
        let transformer = FluxConfig { context: t5.width, conditioning, ..transformer };
        Self { text_encoder: clip(width, layers), text_encoder_2: t5, transformer, vae: flux_vae(channels) }
    }

    fn parts(&self) -> Result<Vec<Part>> {
        let synthetic = SyntheticWeights::new("flux");
        let Self { text_encoder, text_encoder_2, transformer, vae } = self;
        Ok(vec![
            Part::clip(Component::TEXT_ENCODER, *text_encoder)?,
            Part::t5(Component::TEXT_ENCODER_2, *text_encoder_2)?,
            blocks(&synthetic, "FluxTransformer2DModel", transformer)?,
            Part::vae(vae)?,
        ])
    }
}

written_by_parts!(SyntheticFlux);

/// The sizes of a model of Chroma's kind: a transformer, T5, which reads captions, an autoencoder of 16 channels.
#[derive(Debug, Clone)]
pub struct SyntheticChroma {
    /// T5's.
    pub text_encoder: T5Config,
    /// The transformer's.
    pub transformer: FluxConfig,
    /// The autoencoder's.
    pub vae: VaeConfig,
}

impl SyntheticChroma {
    /// A small model: 2 double and 2 single blocks of 64 numbers in 2 heads, 3 layers of 40 numbers that shift and scale them.
    pub fn tiny() -> Self {
        let t5 = T5Config { vocabulary: 400, ..t5(48, 2, 3, 16) };
        let approximator = ApproximatorConfig { channels: 32, inner: 40, layers: 3 };
        Self::new(t5, transformer(64, 2, [2, 2]), approximator, vec![32; 4])
    }

    /// Chroma's sizes: 13.7 billion parameters, 8.9 of them the transformer's.
    pub fn full() -> Self {
        let t5 = T5Config { intermediate: 10_240, ..t5(4096, 24, 64, 64) };
        let approximator = ApproximatorConfig { channels: 64, inner: 5120, layers: 5 };
        Self::new(t5, transformer(3072, 24, [19, 38]), approximator, vec![128, 256, 512, 512])
    }

    fn new(t5: T5Config, blocks: FluxConfig, approximator: ApproximatorConfig, channels: Vec<usize>) -> Self {
        let conditioning = FluxConditioning::Approximated(approximator);
        let transformer = FluxConfig { context: t5.width, conditioning, ..blocks };
        Self { text_encoder: t5, transformer, vae: flux_vae(channels) }
    }

    fn parts(&self) -> Result<Vec<Part>> {
        let synthetic = SyntheticWeights::new("chroma");
        Ok(vec![
            Part::t5(Component::TEXT_ENCODER, self.text_encoder)?,
            blocks(&synthetic, "ChromaTransformer2DModel", &self.transformer)?,
            Part::vae(&self.vae)?,
        ])
    }
}

written_by_parts!(SyntheticChroma);

/// The sizes of a transformer, but for what it reads.
fn transformer(width: usize, heads: usize, [double_blocks, single_blocks]: [usize; 2]) -> FluxConfig {
    let head = width / heads;
    FluxConfig {
        latent_channels: 16,
        width,
        heads,
        inner: 4 * width,
        context: 0,
        conditioning: FluxConditioning::Embedded { pooled: 0, guidance: false },
        double_blocks,
        single_blocks,
        axes: vec![head / 8, 7 * head / 16, 7 * head / 16],
    }
}

fn blocks(source: &SyntheticWeights, class: &str, transformer: &FluxConfig) -> Result<Part> {
    Ok(Part {
        component: Component::TRANSFORMER,
        config: json!({ "_class_name": class, "axes_dims_rope": transformer.axes }),
        weights: asked(source, |weights| Flux::new(weights, transformer.clone()).map(drop))?,
    })
}
