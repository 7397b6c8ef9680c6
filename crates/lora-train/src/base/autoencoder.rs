//! The autoencoder of a diffusion model at work: pictures into latents and back. Where memory or precision does not suffice it
//! works in tiles, in f32 or in host memory. Its network is in `lora_models::networks`.

use std::path::Path;

use lora_core::random::Stream;
use lora_core::{Component, DType};
use lora_data::{Mask, RgbPicture};
use lora_io::checkpoint::Checkpoint;
use lora_models::networks::{LatentDistribution, Vae, VaeConfig, load_vae};
use lora_models::weights::Held;
use lora_torch::dry;
use lora_torch::tch::{Device, Kind, Tensor, no_grad_guard};
use lora_torch::tensor::{from_f32, kind_of, upload};

use super::{Item, Sample, is_finite};
use crate::meter::MemoryPart;
use crate::{Error, Result};

/// The autoencoder with what it needs to fall back to f32: some overflow in fp16.
#[derive(Debug)]
pub(crate) struct Autoencoder {
    vae: Vae,
    device: Device,
    in_tiles: bool,
}

impl Autoencoder {
    /// What people call it.
    pub(crate) const TITLE: &str = "autoencoder";

    /// Loads the autoencoder. On the CPU it computes in f32 whatever the precision of training, and so it does where fp16 is
    /// known to be too little for it.
    pub(crate) fn load(checkpoint: &Checkpoint, precision: DType, device: Device) -> Result<Self> {
        let too_little = precision == DType::F16 && VaeConfig::detect(checkpoint)?.overflows_in_half;
        let kind = if dry::platform(device).is_cpu() || too_little { Kind::Float } else { kind_of(precision) };
        let _label = MemoryPart::Weights(Self::TITLE).label();
        Ok(Self { vae: load_vae(checkpoint, kind, device, Held::default())?, device, in_tiles: false })
    }

    /// Whether pictures of more than [`Vae::TILE`] latents a side are worked on in tiles.
    pub(crate) fn in_tiles(mut self, in_tiles: bool) -> Self {
        self.in_tiles = in_tiles;
        self
    }

    /// The number type that it computes in.
    pub(crate) fn kind(&self) -> Kind {
        self.vae.kind()
    }

    /// Pixels per latent in each direction.
    pub(crate) fn factor(&self) -> usize {
        self.vae.config().factor()
    }

    /// The latent distribution of one picture, `[1, channels, height, width]` f32, on the device. Where fp16 overflows, the
    /// autoencoder is loaded again in f32, once.
    pub(crate) fn encode(
        &mut self,
        checkpoint: &Checkpoint,
        path: &Path,
        picture: &RgbPicture,
    ) -> Result<LatentDistribution> {
        match lora_torch::caught(|| self.encode_here(checkpoint, path, picture)) {
            Err(error) if error.is_out_of_memory() && self.moves_to_host(checkpoint, &error)? => {
                self.encode_here(checkpoint, path, picture)
            }
            result => result,
        }
    }

    /// Where the device has too little memory, the autoencoder goes on in host memory, in f32: slower, and nothing else
    /// changes. `false`: it is there already.
    fn moves_to_host(&mut self, checkpoint: &Checkpoint, error: &Error) -> Result<bool> {
        if self.device == dry::host_of(self.device) {
            return Ok(false);
        }
        tracing::warn!("{error}: the autoencoder goes on on the CPU, which takes longer");
        (self.vae, self.device) = (load_vae(checkpoint, Kind::Float, Device::Cpu, Held::default())?, Device::Cpu);
        Ok(true)
    }

    fn encode_here(
        &mut self,
        checkpoint: &Checkpoint,
        path: &Path,
        picture: &RgbPicture,
    ) -> Result<LatentDistribution> {
        let _guard = no_grad_guard();
        let pixels = from_f32(&picture.to_planar(), &[1, 3, picture.height(), picture.width()], self.device)?;
        let latents = match self.in_tiles {
            true => self.vae.encode_in_tiles(&pixels, Vae::TILE)?,
            false => self.vae.encode(&pixels)?,
        };
        if is_finite(&latents.mean)? && is_finite(&latents.log_variance)? {
            return Ok(latents);
        }
        if self.vae.kind() != Kind::Float {
            tracing::warn!("the autoencoder overflows in half precision ({}); it goes on in fp32", path.display());
            self.vae = load_vae(checkpoint, Kind::Float, self.device, Held::default())?;
            return self.encode_here(checkpoint, path, picture);
        }
        Err(Error::NotFinite {
            stage: "the VAE".into(),
            place: format!(" for {}", path.display()),
            remedy: "the base model's autoencoder is damaged; take the base from another source",
        })
    }

    /// Samples of latents `[1, channels, height, width]` each, in their order; beside recorded steps only where the autoencoder is, as
    /// recordings make room before it leaves the device.
    pub(crate) fn samples(
        &mut self,
        checkpoint: &Checkpoint,
        all: Vec<Tensor>,
        beside_recordings: bool,
    ) -> Result<Vec<Sample>> {
        let mut samples = Vec::with_capacity(all.len());
        for latents in all {
            let pictures = match beside_recordings {
                false => self.decode(checkpoint, &latents)?,
                true => self.decode_here(checkpoint, &latents)?,
            };
            samples.extend(pictures.into_iter().map(Sample::Picture));
        }
        Ok(samples)
    }

    /// Pictures of latents `[batch, channels, height, width]` as networks see them. Where memory runs out, in tiles, then on the CPU.
    pub(crate) fn decode(&mut self, checkpoint: &Checkpoint, latents: &Tensor) -> Result<Vec<RgbPicture>> {
        match lora_torch::caught(|| self.decode_here(checkpoint, latents)) {
            // Unlike latents, which training sees, pictures may differ a little.
            Err(error) if error.is_out_of_memory() && !self.in_tiles => {
                tracing::warn!("{error}: samples are decoded in tiles, as vae_tiling = true does from the start");
                self.in_tiles = true;
                self.decode(checkpoint, latents)
            }
            Err(error) if error.is_out_of_memory() && self.moves_to_host(checkpoint, &error)? => {
                self.decode_here(checkpoint, latents)
            }
            result => result,
        }
    }

    /// The same where the autoencoder is, whether there is memory or not.
    pub(crate) fn decode_here(&mut self, checkpoint: &Checkpoint, latents: &Tensor) -> Result<Vec<RgbPicture>> {
        let _guard = no_grad_guard();
        let latents = latents.f_to_device(self.device)?.f_to_kind(Kind::Float)?;
        let scaled = self.vae.config().denormalised(&latents)?;
        let pixels = match self.in_tiles {
            true => self.vae.decode_in_tiles(&scaled, Vae::TILE)?,
            false => self.vae.decode(&scaled)?,
        };
        if !is_finite(&pixels)? && self.vae.kind() != Kind::Float {
            self.vae = load_vae(checkpoint, Kind::Float, self.device, Held::default())?;
            return self.decode_here(checkpoint, &latents);
        }
        let (batch, _, height, width) = pixels.size4()?;
        let pixels = pixels.f_to_device(Device::Cpu)?.f_contiguous()?;
        let picture = |index: i64| {
            let planes: Vec<f32> = Vec::try_from(pixels.get(index).f_flatten(0, -1)?)?;
            RgbPicture::from_planar(width as usize, height as usize, &planes)
                .ok_or_else(|| Error::DecodedPicture { shape: pixels.size() })
        };
        (0..batch).map(picture).collect()
    }
}

/// Latents of items as the autoencoder encoded them, `[batch, channels, height, width]` f32 on the device, normalised, and how
/// much each place counts, `[batch, 1, height, width]`, where any item has a mask.
///
/// # Errors
/// [`Error::MissingEncoding`] where an item has no latents; where memory runs out.
pub(super) fn latents_of(items: &[Item], device: Device) -> Result<(Tensor, Option<Tensor>)> {
    let network = Component::VAE;
    let of = |item: &Item| -> Result<(Tensor, Option<Tensor>)> {
        let missing = Error::MissingEncoding { network, name: "latents" };
        let encoded = item.encoded.get(&network);
        let latents = encoded.and_then(|encoded| encoded.get("latents")).ok_or(missing)?;
        let mask = encoded.and_then(|encoded| encoded.get("mask")).map(Tensor::shallow_clone);
        Ok((upload(latents, device)?, mask))
    };
    let (latents, masks): (Vec<_>, Vec<_>) = items.iter().map(of).collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let latents = Tensor::f_stack(&latents, 0)?;
    if masks.iter().all(Option::is_none) {
        return Ok((latents, None));
    }
    let (_, _, height, width) = latents.size4()?;
    let full = Tensor::f_ones([1, height, width], (Kind::Float, Device::Cpu))?;
    let masks: Vec<&Tensor> = masks.iter().map(|mask| mask.as_ref().unwrap_or(&full)).collect();
    Ok((latents, Some(upload(&Tensor::f_stack(&masks, 0)?, device)?)))
}

/// One sample of a latent distribution, normalised: `[channels, height, width]`.
pub(crate) fn sample_latents(distribution: &LatentDistribution, vae: &VaeConfig, random: &Stream) -> Result<Tensor> {
    let shape: Vec<usize> = distribution.mean.size().iter().map(|&side| side as usize).collect();
    let noise = from_f32(&random.clone().normals(shape.iter().product()), &shape, distribution.mean.device())?;
    Ok(vae.normalised(&distribution.sample(&noise)?)?.f_squeeze_dim(0)?)
}

/// The weights of a mask's latents, `[1, height, width]` on the host.
pub(crate) fn latent_mask(mask: &Mask, factor: usize) -> Result<Tensor> {
    Ok(from_f32(&mask.reduced(factor), &[1, mask.height() / factor, mask.width() / factor], Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lora_core::HostTensor;
    use lora_io::safetensors::{SafetensorsFile, write};
    use lora_models::synthetic::SyntheticModel;

    use super::*;

    /// An autoencoder whose first layer overflows in fp16, as some published ones do, on a device that computes in fp16.
    #[test]
    fn an_autoencoder_that_overflows_in_fp16_goes_on_in_fp32() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base.safetensors");
        SyntheticModel::tiny().write(&path, DType::F32).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        let mut tensors: BTreeMap<_, _> =
            file.names().map(|name| (name.to_owned(), file.get(name).unwrap().to_host().unwrap())).collect();
        let name = "first_stage_model.encoder.conv_in.weight";
        let larger = tensors[name].to_f32().iter().map(|value| value * 1e5).collect();
        tensors.insert(name.into(), HostTensor::from_f32(tensors[name].shape(), larger).unwrap());
        let large = folder.path().join("large.safetensors");
        write(&large, &tensors, &BTreeMap::new()).unwrap();

        let checkpoint = Checkpoint::open(&large).unwrap();
        let mut encoder = Autoencoder {
            vae: load_vae(&checkpoint, Kind::Half, Device::Cpu, Held::default()).unwrap(),
            device: Device::Cpu,
            in_tiles: false,
        };
        let picture = RgbPicture::new(16, 16, (0..=255).cycle().take(768).collect()).unwrap();
        let latents = encoder.encode(&checkpoint, Path::new("a.png"), &picture).unwrap();
        assert_eq!(encoder.vae.kind(), Kind::Float);
        assert!(is_finite(&latents.mean).unwrap() && is_finite(&latents.log_variance).unwrap());

        // One that does not overflow stays in fp16.
        let checkpoint = Checkpoint::open(&path).unwrap();
        let mut encoder = Autoencoder {
            vae: load_vae(&checkpoint, Kind::Half, Device::Cpu, Held::default()).unwrap(),
            device: Device::Cpu,
            in_tiles: false,
        };
        encoder.encode(&checkpoint, Path::new("a.png"), &picture).unwrap();
        assert_eq!(encoder.vae.kind(), Kind::Half);
    }
}
