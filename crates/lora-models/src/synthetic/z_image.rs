//! Models of Z-Image's kind with made-up weights.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Component, DType, HostTensor};
use lora_io::safetensors::write;
use lora_torch::tch::{Device, Kind};
use serde_json::{Value, json};

use super::{NamedShape, WithoutBiases, write_header};
use crate::Result;
use crate::networks::{Decoder, DecoderConfig, Vae, VaeConfig, ZImage, ZImageConfig};
use crate::weights::{ShapesOnly, SyntheticWeights, WeightSource, Weights};

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

    fn new(
        transformer: ZImageConfig,
        [vocabulary, inner, layers, heads, kv_heads, head]: [usize; 6],
        channels: Vec<usize>,
    ) -> Self {
        let text_encoder = json!({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": vocabulary,
            "hidden_size": transformer.caption, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head,
            "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000,
            "tie_word_embeddings": true,
        });
        let vae = VaeConfig {
            latent_channels: transformer.latent_channels,
            channels,
            layers_per_block: 2,
            norm_groups: 32,
            scaling_factor: 0.3611,
            shift_factor: 0.1159,
            quant_convs: false,
            overflows_in_half: false,
        };
        Self { text_encoder, transformer, vae }
    }

    /// Names and shapes of all weights, under diffusers' and transformers' names.
    ///
    /// # Errors
    /// Where the configurations of the networks do not go together.
    pub fn weight_shapes(&self) -> Result<BTreeMap<Component, Vec<NamedShape>>> {
        let synthetic = SyntheticWeights::new("z_image");
        let asked = |source: &dyn WeightSource, build: &dyn Fn(&Weights<'_>) -> Result<()>| -> Result<_> {
            let shapes = ShapesOnly::new(source);
            build(&Weights::new(&shapes, Kind::Float, Device::Cpu))?;
            Ok(shapes.asked())
        };
        let text = DecoderConfig::read(&self.text_encoder, "config.json")?;
        let text = asked(&WithoutBiases, &|weights| Decoder::load(weights, text.clone()).map(drop))?;
        let transformer = asked(&synthetic, &|weights| ZImage::new(weights, self.transformer.clone()).map(drop))?;
        let vae = asked(&synthetic, &|weights| Vae::new(weights, self.vae.clone()).map(drop))?;
        Ok([(Component::TEXT_ENCODER, text), (Component::TRANSFORMER, transformer), (Component::VAE, vae)].into())
    }

    /// The `config.json` of a component.
    fn config(&self, component: Component) -> Value {
        match component {
            Component::TEXT_ENCODER => self.text_encoder.clone(),
            Component::TRANSFORMER => json!({
                "_class_name": "ZImageTransformer2DModel", "axes_dims": self.transformer.axes,
                "rope_theta": self.transformer.theta, "norm_eps": self.transformer.epsilon,
            }),
            _ => json!({
                "_class_name": "AutoencoderKL", "norm_num_groups": self.vae.norm_groups,
                "scaling_factor": self.vae.scaling_factor, "shift_factor": self.vae.shift_factor,
            }),
        }
    }

    /// Writes a diffusers folder in `dtype`, without a tokenizer.
    ///
    /// # Errors
    /// Where the file system refuses, or the model cannot be built.
    pub fn write(&self, folder: &Path, dtype: DType) -> Result<()> {
        for (component, weights) in self.weight_shapes()? {
            let synthetic = SyntheticWeights::new(component.name());
            let value = |(name, shape): NamedShape| {
                let values = synthetic.values(&name, &shape).to_dtype(dtype);
                (name, values)
            };
            let tensors: BTreeMap<String, HostTensor> = weights.into_iter().map(value).collect();
            let at = folder.join(component.name());
            let config = self.config(component).to_string();
            let place = || -> std::io::Result<()> {
                std::fs::create_dir_all(&at)?;
                std::fs::write(at.join("config.json"), &config)
            };
            place().map_err(|source| lora_io::Error::Io { path: at.clone(), action: "write", source })?;
            write(at.join(file(component)), &tensors, &BTreeMap::new())?;
        }
        Ok(())
    }

    /// Writes a diffusers folder in 16-bit numbers whose files have headers and no weights, as
    /// [`SyntheticModel::write_headers`](super::SyntheticModel::write_headers) does; without a tokenizer.
    ///
    /// # Errors
    /// As [`SyntheticZImage::write`].
    pub fn write_headers(&self, folder: &Path) -> Result<()> {
        for (component, weights) in self.weight_shapes()? {
            let config = self.config(component).to_string();
            write_header(&folder.join(component.name()), file(component), &config, "BF16", weights)?;
        }
        Ok(())
    }
}

/// The name of a component's file.
fn file(component: Component) -> &'static str {
    match component {
        Component::TEXT_ENCODER => "model.safetensors",
        _ => "diffusion_pytorch_model.safetensors",
    }
}
