//! Models of Qwen-Image's kind with made-up weights.

use lora_core::Component;
use serde_json::{Value, json};

use super::folder::{Part, asked, wan_vae, written_by_parts};
use crate::Result;
use crate::networks::{QwenImage, QwenImageConfig, VaeConfig};
use crate::weights::SyntheticWeights;

/// The sizes of a model of Qwen-Image's kind: a transformer, Qwen2.5-VL's language model that reads captions, Wan's autoencoder.
#[derive(Debug, Clone)]
pub struct SyntheticQwenImage {
    /// The `config.json` of its text encoder.
    pub text_encoder: Value,
    /// The transformer's.
    pub transformer: QwenImageConfig,
    /// The autoencoder's.
    pub vae: VaeConfig,
}

impl SyntheticQwenImage {
    /// A model of half a million parameters: 2 blocks of 64 numbers in 2 heads, a text encoder of 2 layers of 32, 640 words.
    pub fn tiny() -> Self {
        Self::new(64, 2, 2, (32, [640, 64, 2, 2, 1]), vec![8, 16, 32, 32])
    }

    /// Qwen-Image's sizes: 27.6 billion parameters.
    pub fn full() -> Self {
        Self::new(3072, 24, 60, (3584, [152_064, 18_944, 28, 28, 4]), vec![96, 192, 384, 384])
    }

    fn new(
        width: usize,
        heads: usize,
        blocks: usize,
        (context, [vocabulary, inner, layers, text_heads, kv_heads]): (usize, [usize; 5]),
        channels: Vec<usize>,
    ) -> Self {
        let head = width / heads;
        let transformer = QwenImageConfig {
            latent_channels: 16,
            width,
            heads,
            inner: 4 * width,
            context,
            blocks,
            axes: vec![head / 8, 7 * head / 16, 7 * head / 16],
        };
        let text_encoder = json!({
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
            "text_config": {
                "model_type": "qwen2_5_vl_text", "vocab_size": vocabulary, "hidden_size": context,
                "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": text_heads,
                "num_key_value_heads": kv_heads, "max_position_embeddings": 128_000, "rms_norm_eps": 1e-6,
                "rope_theta": 1_000_000, "rope_scaling": { "type": "mrope", "mrope_section": [16, 24, 24] },
                "use_sliding_window": false, "tie_word_embeddings": true,
            },
        });
        Self { text_encoder, transformer, vae: wan_vae(channels) }
    }

    fn parts(&self) -> Result<[Part; 3]> {
        let Self { text_encoder, transformer, vae } = self;
        let own = Part {
            component: Component::TRANSFORMER,
            config: json!({ "_class_name": "QwenImageTransformer2DModel", "axes_dims_rope": transformer.axes }),
            weights: asked(&SyntheticWeights::new("transformer"), |weights| {
                QwenImage::new(weights, transformer.clone()).map(drop)
            })?,
        };
        Ok([Part::text_encoder(text_encoder)?, own, Part::vae(vae)?])
    }
}

written_by_parts!(SyntheticQwenImage);
