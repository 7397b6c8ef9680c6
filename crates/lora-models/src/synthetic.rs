//! Whole checkpoints with made-up weights ([`SyntheticWeights`]): small models of the real architecture for tests,
//! benches and demonstrations, or full-size ones to measure with.

mod anima;
mod flux;
mod flux2;
mod folder;
mod qwen_image;
mod sd3;
mod z_image;

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Component, DType, HostTensor};
use lora_io::checkpoint::{CheckpointSource, write_single_file};
use lora_io::family::{Family, sd1, sd2, sdxl};
use lora_torch::tch::{Device, Kind, Tensor};

pub use self::anima::SyntheticAnima;
pub use self::flux::{SyntheticChroma, SyntheticFlux};
pub use self::flux2::SyntheticFlux2;
pub use self::qwen_image::SyntheticQwenImage;
pub use self::sd3::SyntheticSd3;
pub use self::z_image::SyntheticZImage;
use crate::Result;
use crate::networks::{ClipConfig, ClipTextEncoder, Decoder, DecoderConfig, Unet, UnetConfig, Vae, VaeConfig};
pub use crate::weights::NamedShape;
use crate::weights::{ShapesOnly, SyntheticWeights, WeightSource, Weights};

/// The sizes of a checkpoint.
#[derive(Debug, Clone)]
pub struct SyntheticModel {
    /// Whose names its files have.
    pub family: &'static Family,
    /// The text encoder's.
    pub text_encoder: ClipConfig,
    /// The second text encoder's, of a family that has two.
    pub text_encoder_2: Option<ClipConfig>,
    /// The U-Net's.
    pub unet: UnetConfig,
    /// The autoencoder's.
    pub vae: VaeConfig,
}

impl SyntheticModel {
    /// A model of a few million parameters, most of them the vocabulary's: 3 text layers of width 128, a U-Net of
    /// 32 to 64 channels.
    pub fn tiny() -> Self {
        Self::of_sizes(128, 3, vec![32, 64, 64, 64], vec![32, 32, 64, 64])
    }

    /// A model as small of Stable Diffusion 2.1's kind: 3 text layers of width 96, a U-Net of 32 to 96 channels in heads
    /// of 32 each.
    pub fn tiny_sd2() -> Self {
        Self::of_sizes(96, 3, vec![32, 64, 96, 96], vec![32, 32, 64, 64]).with_heads_of(32)
    }

    /// Stable Diffusion 1.5's sizes: 1.07 billion parameters.
    pub fn full() -> Self {
        Self::of_sizes(768, 12, vec![320, 640, 1280, 1280], vec![128, 256, 512, 512])
    }

    /// Stable Diffusion 2.1's sizes: 1.29 billion parameters.
    pub fn full_sd2() -> Self {
        Self::of_sizes(1024, 23, vec![320, 640, 1280, 1280], vec![128, 256, 512, 512]).with_heads_of(64)
    }

    /// A model as small of Stable Diffusion XL's kind: text encoders of 2 layers of width 96 and 4 of width 128, a U-Net of three
    /// levels of 32 to 96 channels in heads of 32 each.
    pub fn tiny_sdxl() -> Self {
        Self::of_sizes(96, 2, vec![32, 64, 96], vec![32, 32, 64, 64])
            .with_heads_of(32)
            .with_two_encoders((128, 4), [1, 2])
    }

    /// Stable Diffusion XL's sizes: 3.47 billion parameters.
    pub fn full_sdxl() -> Self {
        let one = Self::of_sizes(768, 12, vec![320, 640, 1280], vec![128, 256, 512, 512]);
        one.with_heads_of(64).with_two_encoders((1280, 32), [2, 10])
    }

    /// Of Stable Diffusion XL's kind: a second text encoder of a width and number of layers, transformers of these depths at the lower
    /// levels, and pooled text and sizes beside the time.
    fn with_two_encoders(mut self, (width, layers): (usize, usize), depths: [usize; 2]) -> Self {
        self.family = &sdxl::FAMILY;
        // The first encoder is OpenAI's CLIP.
        self.text_encoder.exact_gelu = false;
        self.text_encoder_2 = Some(ClipConfig {
            width,
            intermediate: 4 * width,
            layers,
            heads: width * self.text_encoder.heads / self.text_encoder.width,
            exact_gelu: true,
            projection: Some(width),
            ..self.text_encoder
        });
        self.unet.transformer_depths = vec![0, depths[0], depths[1]];
        self.unet.middle_depth = depths[1];
        self.unet.context = self.text_encoder.width + width;
        self.unet.added = Some(width + 6 * 256);
        (self.vae.scaling_factor, self.vae.overflows_in_half) = (VaeConfig::SDXL_SCALING_FACTOR, true);
        self
    }

    /// Of Stable Diffusion 2's kind: heads of one width everywhere, linear projections, the exact GELU.
    fn with_heads_of(mut self, width: usize) -> Self {
        self.family = &sd2::FAMILY;
        (self.text_encoder.heads, self.text_encoder.exact_gelu) = (self.text_encoder.width / width, true);
        self.unet.heads = self.unet.channels.iter().map(|channels| channels / width).collect();
        self.unet.linear_projection = true;
        self
    }

    fn of_sizes(width: usize, layers: usize, unet: Vec<usize>, vae: Vec<usize>) -> Self {
        let text_encoder = ClipConfig {
            vocabulary: 49408,
            width,
            intermediate: 4 * width,
            layers,
            heads: width / 64,
            exact_gelu: false,
            projection: None,
        };
        let unet = UnetConfig {
            latent_channels: 4,
            channels: unet,
            transformer_depths: vec![1, 1, 1, 0],
            middle_depth: 1,
            heads: vec![8; 4],
            layers_per_block: 2,
            context: width,
            norm_groups: 32,
            linear_projection: false,
            added: None,
        };
        let vae = VaeConfig {
            latent_channels: 4,
            channels: vae,
            layers_per_block: 2,
            norm_groups: 32,
            scaling_factor: VaeConfig::SCALING_FACTOR,
            shift_factor: 0.0,
            statistics: None,
            quant_convs: true,
            overflows_in_half: false,
            causal: false,
        };
        Self { family: &sd1::FAMILY, text_encoder, text_encoder_2: None, unet, vae }
    }

    /// Writes the family's single-file layout in `dtype`; one tensor in memory at a time.
    ///
    /// # Errors
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) where the file cannot be written.
    pub fn write(&self, path: impl AsRef<Path>, dtype: DType) -> Result<()> {
        write_single_file(
            path,
            &Source { family: self.family, shapes: self.weight_shapes()? },
            dtype,
            &BTreeMap::new(),
        )?;
        Ok(())
    }

    /// Writes a diffusers folder in fp16 whose files have headers and no weights: sparse files of zeros, which take no room whatever
    /// the model's size. For plans of memory, which read headers alone.
    ///
    /// # Errors
    /// Where the file system refuses, or the model cannot be built.
    pub fn write_headers(&self, folder: &Path) -> Result<()> {
        for (component, weights) in self.weight_shapes()? {
            let text = match component {
                Component::TEXT_ENCODER => Some(self.text_encoder),
                Component::TEXT_ENCODER_2 => self.text_encoder_2,
                _ => None,
            };
            let name = if text.is_some() { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" };
            let config = match text {
                Some(ClipConfig { heads, exact_gelu, .. }) => {
                    let activation = if exact_gelu { "gelu" } else { "quick_gelu" };
                    format!("{{\"num_attention_heads\": {heads}, \"hidden_act\": \"{activation}\"}}")
                }
                None => "{}".to_owned(),
            };
            write_header(&folder.join(component.name()), name, &config, "F16", weights)?;
        }
        Ok(())
    }

    /// Names and shapes of all weights, under diffusers' and transformers' names.
    ///
    /// # Errors
    /// Where the configurations of the networks do not go together.
    pub fn weight_shapes(&self) -> Result<BTreeMap<Component, Vec<NamedShape>>> {
        let mut lists = BTreeMap::new();
        let second = self.text_encoder_2.map(|_| Component::TEXT_ENCODER_2);
        for component in [Component::TEXT_ENCODER, Component::UNET, Component::VAE].into_iter().chain(second) {
            let synthetic = SyntheticWeights::new(component.name());
            let shapes = ShapesOnly::new(&synthetic);
            let weights = Weights::new(&shapes, Kind::Float, Device::Cpu);
            match component {
                Component::TEXT_ENCODER => drop(ClipTextEncoder::new(&weights, self.text_encoder)?),
                Component::TEXT_ENCODER_2 => {
                    drop(self.text_encoder_2.map(|config| ClipTextEncoder::new(&weights, config)).transpose()?);
                }
                Component::UNET => drop(Unet::new(&weights, self.unet.clone())?),
                _ => drop(Vae::new(&weights, self.vae.clone())?),
            }
            lists.insert(component, shapes.asked());
        }
        Ok(lists)
    }
}

/// Writes a language model's folder in bf16, likewise of headers alone: `config` is the `config.json`. Its layers have no
/// biases.
///
/// # Errors
/// Where the architecture is not known, or the file system refuses.
pub fn write_language_headers(folder: &Path, config: &serde_json::Value) -> Result<()> {
    let source = LanguageWeights { query_biases: false };
    let shapes = ShapesOnly::new(&source);
    let weights = Weights::new(&shapes, Kind::Float, Device::Cpu);
    drop(Decoder::load(&weights, DecoderConfig::read(config, &source.name())?)?);
    write_header(folder, "model.safetensors", &config.to_string(), "BF16", shapes.asked())
}

/// A source that has every weight that it is asked for, but biases.
struct LanguageWeights {
    /// It has those of queries, keys and values.
    query_biases: bool,
}

impl WeightSource for LanguageWeights {
    fn name(&self) -> String {
        "synthetic language model".into()
    }

    fn contains(&self, name: &str) -> bool {
        let of_query = |name: &str| ["q_proj", "k_proj", "v_proj"].iter().any(|layer| name.contains(layer));
        !name.ends_with("bias") || self.query_biases && of_query(name)
    }

    fn shape(&self, _name: &str) -> Option<Vec<usize>> {
        None
    }

    fn load(&self, name: &str, shape: &[usize], kind: Kind, device: Device) -> Result<Tensor> {
        SyntheticWeights::new("language_model").load(name, shape, kind, device)
    }
}

/// A component's folder: its `config.json`, and a safetensors file of so many sparse zeros as weights of a dtype of two
/// bytes take.
fn write_header(folder: &Path, name: &str, config: &str, dtype: &str, weights: Vec<NamedShape>) -> Result<()> {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in weights {
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] }));
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    let path = folder.join(name);
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join("config.json"), config)?;
        std::fs::write(&path, &bytes)?;
        std::fs::OpenOptions::new().write(true).open(&path)?.set_len((bytes.len() + end) as u64)
    };
    Ok(write().map_err(|source| lora_io::Error::Io { path: path.clone(), action: "write", source })?)
}

struct Source {
    family: &'static Family,
    shapes: BTreeMap<Component, Vec<NamedShape>>,
}

impl CheckpointSource for Source {
    fn family(&self) -> &'static Family {
        self.family
    }

    fn components(&self) -> Vec<Component> {
        self.shapes.keys().copied().collect()
    }

    fn weights(&self, component: Component) -> Vec<NamedShape> {
        self.shapes[&component].clone()
    }

    fn values(&self, component: Component, name: &str, shape: &[usize]) -> lora_io::Result<HostTensor> {
        Ok(SyntheticWeights::new(component.name()).values(name, shape))
    }
}
