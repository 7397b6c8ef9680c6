//! A diffusers folder of components with made-up weights, or with none; and components that several kinds of model have.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Component, DType, HostTensor};
use lora_io::safetensors::write;
use lora_torch::tch::{Device, Kind};
use serde_json::{Value, json};

use super::{LanguageWeights, NamedShape, write_header};
use crate::Result;
use crate::layers::head_width;
use crate::networks::{
    ClipConfig, ClipTextEncoder, DEVIATIONS, Decoder, DecoderConfig, LatentStatistics, MEANS, T5Config, T5Encoder, Vae,
    VaeConfig,
};
use crate::weights::{ShapesOnly, SyntheticWeights, WeightSource, Weights};

/// A component: its `config.json`, and names and shapes of its weights.
pub(super) struct Part {
    pub(super) component: Component,
    pub(super) config: Value,
    pub(super) weights: Vec<NamedShape>,
}

/// A model of parts writes them as a diffusers folder: `write` and `write_headers`, by its `parts`.
macro_rules! written_by_parts {
    ($model:ty) => {
        impl $model {
            /// Writes a diffusers folder in `dtype`, without a tokenizer.
            ///
            /// # Errors
            /// Where the file system refuses, or the model cannot be built.
            pub fn write(&self, folder: &std::path::Path, dtype: lora_core::DType) -> $crate::Result<()> {
                self.parts()?.into_iter().try_for_each(|part| part.write(folder, dtype))
            }

            /// Writes a diffusers folder in 16-bit numbers whose files have headers and no weights, as
            /// [`SyntheticModel::write_headers`](super::SyntheticModel::write_headers) does; without a tokenizer.
            ///
            /// # Errors
            /// As of `write`.
            pub fn write_headers(&self, folder: &std::path::Path) -> $crate::Result<()> {
                self.parts()?.into_iter().try_for_each(|part| part.write_header(folder))
            }
        }
    };
}
pub(super) use written_by_parts;

/// Names and shapes of the weights that a network asks a source for.
pub(super) fn asked(
    source: &dyn WeightSource,
    build: impl FnOnce(&Weights<'_>) -> Result<()>,
) -> Result<Vec<NamedShape>> {
    let shapes = ShapesOnly::new(source);
    build(&Weights::new(&shapes, Kind::Float, Device::Cpu))?;
    Ok(shapes.asked())
}

/// The `config.json` of a Qwen3 model of these sizes.
pub(super) fn qwen3(width: usize, [vocabulary, inner, layers, heads, kv_heads, head]: [usize; 6]) -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000, "tie_word_embeddings": true,
    })
}

/// The sizes of a T5 encoder, with feed-forwards of twice its width.
pub(super) fn t5(width: usize, layers: usize, heads: usize, head: usize) -> T5Config {
    let (intermediate, inner) = (2 * width, heads * head);
    T5Config { vocabulary: 32_128, width, inner, heads, intermediate, layers, buckets: 32, max_distance: 128 }
}

/// The sizes of a CLIP text encoder.
pub(super) fn clip(width: usize, layers: usize) -> ClipConfig {
    ClipConfig {
        vocabulary: 49_408,
        width,
        intermediate: 4 * width,
        layers,
        heads: width / head_width(&[width]),
        exact_gelu: false,
        projection: None,
    }
}

/// The sizes of FLUX.1's autoencoder with so many channels at its levels.
pub(super) fn flux_vae(channels: Vec<usize>) -> VaeConfig {
    VaeConfig {
        latent_channels: 16,
        channels,
        layers_per_block: 2,
        norm_groups: 32,
        scaling_factor: 0.3611,
        shift_factor: 0.1159,
        statistics: None,
        quant_convs: false,
        overflows_in_half: false,
        causal: false,
    }
}

/// The sizes of Wan's autoencoder, Qwen-Image's, with so many channels at its levels.
pub(super) fn wan_vae(channels: Vec<usize>) -> VaeConfig {
    VaeConfig {
        norm_groups: 1,
        scaling_factor: 1.0,
        shift_factor: 0.0,
        statistics: Some(LatentStatistics { side: 1, means: MEANS.to_vec(), deviations: DEVIATIONS.to_vec() }),
        quant_convs: true,
        causal: true,
        ..flux_vae(channels)
    }
}

impl Part {
    /// A CLIP text encoder.
    pub(super) fn clip(component: Component, sizes: ClipConfig) -> Result<Self> {
        let mut config = json!({
            "num_attention_heads": sizes.heads, "hidden_act": if sizes.exact_gelu { "gelu" } else { "quick_gelu" },
        });
        if let Some(projection) = sizes.projection {
            config["architectures"] = json!(["CLIPTextModelWithProjection"]);
            config["projection_dim"] = projection.into();
        }
        let source = SyntheticWeights::new(component.name());
        let weights = asked(&source, |weights| ClipTextEncoder::new(weights, sizes).map(drop))?;
        Ok(Self { component, config, weights })
    }

    /// A T5 encoder.
    pub(super) fn t5(component: Component, sizes: T5Config) -> Result<Self> {
        let source = SyntheticWeights::new(component.name());
        let weights = asked(&source, |weights| T5Encoder::new(weights, sizes).map(drop))?;
        Ok(Self { component, config: json!({ "relative_attention_max_distance": sizes.max_distance }), weights })
    }

    /// A language model that reads captions.
    pub(super) fn text_encoder(config: &Value) -> Result<Self> {
        let read = DecoderConfig::read(config, "config.json")?;
        let source = LanguageWeights { query_biases: read.architecture.starts_with("qwen2") };
        let weights = asked(&source, |weights| Decoder::load(weights, read).map(drop))?;
        Ok(Self { component: Component::TEXT_ENCODER, config: config.clone(), weights })
    }

    /// An autoencoder.
    pub(super) fn vae(config: &VaeConfig) -> Result<Self> {
        let build = |weights: &Weights<'_>| Vae::new(weights, config.clone()).map(drop);
        let mut weights = asked(&SyntheticWeights::new("vae"), build)?;
        let mut said = json!({
            "_class_name": "AutoencoderKL", "norm_num_groups": config.norm_groups,
            "scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor,
        });
        if let Some(statistics) = config.statistics.as_ref().filter(|_| config.causal) {
            let LatentStatistics { means, deviations, .. } = statistics;
            said = json!({ "_class_name": "AutoencoderKLQwenImage", "latents_mean": means, "latents_std": deviations });
        } else if let Some(statistics) = &config.statistics {
            let names = ["bn.running_mean", "bn.running_var"];
            weights.extend(names.map(|name| (name.to_owned(), vec![statistics.means.len()])));
            said = json!({ "_class_name": "AutoencoderKLFlux2", "norm_num_groups": config.norm_groups });
        }
        Ok(Self { component: Component::VAE, config: said, weights })
    }

    /// The name of its file.
    fn file(&self) -> &'static str {
        if self.component.is_text_encoder() { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" }
    }

    /// Writes it in `dtype`.
    pub(super) fn write(self, folder: &Path, dtype: DType) -> Result<()> {
        let at = folder.join(self.component.name());
        let place = || -> std::io::Result<()> {
            std::fs::create_dir_all(&at)?;
            std::fs::write(at.join("config.json"), self.config.to_string())
        };
        place().map_err(|source| lora_io::Error::Io { path: at.clone(), action: "write", source })?;
        let (file, synthetic) = (self.file(), SyntheticWeights::new(self.component.name()));
        let value = |(name, shape): NamedShape| {
            let values = synthetic.values(&name, &shape).to_dtype(dtype);
            (name, values)
        };
        let tensors: BTreeMap<String, HostTensor> = self.weights.into_iter().map(value).collect();
        Ok(write(at.join(file), &tensors, &BTreeMap::new()).map(drop)?)
    }

    /// Writes its header in 16-bit numbers, and no weights.
    pub(super) fn write_header(self, folder: &Path) -> Result<()> {
        let (at, file) = (folder.join(self.component.name()), self.file());
        write_header(&at, file, &self.config.to_string(), "BF16", self.weights)
    }
}
