//! Whole checkpoints with made-up weights ([`SyntheticWeights`]): small models of the real architecture for tests,
//! benches and demonstrations, or full-size ones to measure with.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{DType, HostTensor};
use lora_io::checkpoint::{CheckpointSource, Part, write_single_file};
use lora_torch::tch::{Device, Kind};

use crate::Result;
use crate::networks::{ClipConfig, ClipTextEncoder, Unet, UnetConfig, Vae, VaeConfig};
pub use crate::weights::NamedShape;
use crate::weights::{ShapesOnly, SyntheticWeights, Weights};

/// The sizes of a checkpoint.
#[derive(Debug, Clone)]
pub struct SyntheticModel {
    /// The text encoder's.
    pub text_encoder: ClipConfig,
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

    /// Stable Diffusion 1.5's own sizes: 1.07 billion parameters.
    pub fn full() -> Self {
        Self::of_sizes(768, 12, vec![320, 640, 1280, 1280], vec![128, 256, 512, 512])
    }

    fn of_sizes(width: usize, layers: usize, unet: Vec<usize>, vae: Vec<usize>) -> Self {
        let text_encoder = ClipConfig {
            vocabulary: 49408,
            width,
            intermediate: 4 * width,
            layers,
            heads: width / 64,
            exact_gelu: false,
        };
        let unet = UnetConfig {
            latent_channels: 4,
            channels: unet,
            attention: vec![true, true, true, false],
            heads: vec![8; 4],
            layers_per_block: 2,
            transformer_depth: 1,
            context: width,
            norm_groups: 32,
            linear_projection: false,
        };
        let vae = VaeConfig {
            latent_channels: 4,
            channels: vae,
            layers_per_block: 2,
            norm_groups: 32,
            scaling_factor: VaeConfig::SCALING_FACTOR,
        };
        Self { text_encoder, unet, vae }
    }

    /// Writes the single-file (LDM) layout in `dtype`; one tensor in memory at a time.
    pub fn write(&self, path: impl AsRef<Path>, dtype: DType) -> Result<()> {
        write_single_file(path, &Source(self.weight_shapes()?), dtype, &BTreeMap::new())?;
        Ok(())
    }

    /// Names and shapes of all weights, under diffusers' and transformers' names.
    pub fn weight_shapes(&self) -> Result<BTreeMap<Part, Vec<NamedShape>>> {
        let mut lists = BTreeMap::new();
        for part in Part::ALL {
            let synthetic = SyntheticWeights::new(part.folder());
            let shapes = ShapesOnly::new(&synthetic);
            let weights = Weights::new(&shapes, Kind::Float, Device::Cpu);
            match part {
                Part::TextEncoder => drop(ClipTextEncoder::new(&weights, self.text_encoder)?),
                Part::Unet => drop(Unet::new(&weights, self.unet.clone())?),
                Part::Vae => drop(Vae::new(&weights, self.vae.clone())?),
            }
            lists.insert(part, shapes.asked());
        }
        Ok(lists)
    }
}

struct Source(BTreeMap<Part, Vec<NamedShape>>);

impl CheckpointSource for Source {
    fn weights(&self, part: Part) -> Vec<NamedShape> {
        self.0[&part].clone()
    }

    fn values(&self, part: Part, name: &str, shape: &[usize]) -> lora_io::Result<HostTensor> {
        Ok(SyntheticWeights::new(part.folder()).values(name, shape))
    }
}
