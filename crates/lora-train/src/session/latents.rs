//! Where a visit's latents come from: encoded once before the first step, or at each visit from pictures that are decoded
//! ahead on all cores.

use std::fmt;
use std::iter::Peekable;
use std::sync::Arc;

use lora_core::random::Stream;
use lora_core::{Component, DType, HostTensor};
use lora_data::cache::{DiskCache, Key, Tensors};
use lora_data::prefetch::{ahead, cores};
use lora_data::sampler::{EpochSampler, Visit};
use lora_data::{Pictures, Sample, Source};
use lora_io::checkpoint::Checkpoint;
use lora_models::networks::LatentDistribution;
use lora_torch::dry;
use lora_torch::tch::{Device, Tensor};
use lora_torch::tensor::{from_host, to_host};

use super::{Preparing, Watch};
use crate::config::TrainConfig;
use crate::encode::{self, Encoder, latent_mask, sample_latents};
use crate::{Error, Result};

/// A picture's latents, `[4, height, width]` scaled, and its mask, `[1, height, width]`.
type Encoded = (Tensor, Option<Tensor>);

/// What a visit decodes to, ahead of its step.
type Decoded = (Visit, Result<Sample, lora_data::Error>);

/// Latents of a run.
#[derive(Debug)]
pub(super) enum LatentSource {
    /// One sample per picture, on the host.
    Cached(Vec<Encoded>),
    /// Encoded at each visit.
    Fresh(Box<Fresh>),
}

/// What encoding at each visit needs.
pub(super) struct Fresh {
    /// Gone where it has to make room; it comes back for the next picture.
    encoder: Option<Encoder>,
    precision: DType,
    device: Device,
    in_tiles: bool,
    /// Samples in the order of the visits to come.
    decoded: Peekable<Box<dyn Iterator<Item = Decoded> + Send>>,
}

impl fmt::Debug for Fresh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fresh").field("encoder", &self.encoder).finish_non_exhaustive()
    }
}

impl LatentSource {
    /// Latents made at each visit; pictures of the visits to come are decoded meanwhile.
    pub(super) fn fresh(
        encoder: Encoder,
        precision: DType,
        pictures: &Arc<Pictures>,
        sampler: &EpochSampler,
        config: &TrainConfig,
    ) -> Self {
        let device = encoder.device();
        let (pictures, seed) = (Arc::clone(pictures), config.seed);
        let mut order = sampler.clone();
        let visits = std::iter::from_fn(move || Some(order.next_batch())).flatten();
        // Two micro-batches, and something to do for every core.
        let window = 2 * config.batch_size.max(cores());
        let load = move |visit: Visit| (visit, pictures.load(visit.index, &visit.draws(seed)));
        let decoded: Box<dyn Iterator<Item = Decoded> + Send> = Box::new(ahead(visits, cores(), window, load));
        Self::Fresh(Box::new(Fresh {
            encoder: Some(encoder),
            precision,
            device,
            in_tiles: config.vae_tiling,
            decoded: decoded.peekable(),
        }))
    }

    /// Whether an autoencoder is on the device between steps.
    pub(super) fn has_encoder(&self) -> bool {
        matches!(self, Self::Fresh(_))
    }

    /// Takes the autoencoder off the device until the next picture.
    pub(super) fn encoder_leaves(&mut self) {
        if let Self::Fresh(fresh) = self {
            fresh.encoder = None;
        }
    }

    /// The latents of a visit.
    pub(super) fn of(
        &mut self,
        visit: &Visit,
        draw: &Stream,
        checkpoint: &Checkpoint,
        pictures: &Pictures,
    ) -> Result<Encoded> {
        let fresh = match self {
            Self::Cached(all) => {
                let (latents, mask) = &all[visit.index];
                return Ok((latents.shallow_clone(), mask.as_ref().map(Tensor::shallow_clone)));
            }
            Self::Fresh(fresh) => fresh,
        };
        // A visit that is looked at again, out of order, is decoded for itself.
        let sample = match fresh.decoded.next_if(|(next, _)| next == visit) {
            Some((_, sample)) => sample,
            None => pictures.load(visit.index, draw),
        }?;
        let path = pictures.path(visit.index);
        let encoder = match &mut fresh.encoder {
            Some(encoder) => encoder,
            gone => gone.insert(Encoder::load(checkpoint, fresh.precision, fresh.device)?.in_tiles(fresh.in_tiles)),
        };
        let distribution = encoder.encode(checkpoint, path, &sample.picture)?;
        let latents = sample_latents(&distribution, encoder.scaling_factor(), &draw.at("latent"))?;
        let mask = sample.mask.map(|mask| latent_mask(&mask, encoder.factor())).transpose()?;
        Ok((latents, mask))
    }
}

/// What a thread makes of a picture before it is encoded.
enum Loaded {
    /// It was encoded by an earlier run.
    Known(Tensors),
    /// To be encoded, and kept under the key where there is a cache.
    New(Sample, Option<Key>),
}

/// Encodes every picture once. Unreadable ones are left out, or end the run where the configuration is strict.
pub(super) fn cache(
    config: &TrainConfig,
    checkpoint: &Checkpoint,
    encoder: &mut Encoder,
    mut pictures: Pictures,
    cache: Option<&Arc<DiskCache>>,
    device: Device,
    watch: &mut dyn Watch,
) -> Result<(Pictures, Vec<Encoded>)> {
    let identity = match cache {
        Some(_) => {
            let tiles = if config.vae_tiling { " in tiles" } else { "" };
            format!("{} {:?} {device:?}{tiles}", checkpoint.component(Component::VAE)?.sha256()?, encoder.kind())
        }
        None => String::new(),
    };
    let count = pictures.items().len();
    let (seed, factor) = (config.seed, encoder.factor());
    let random = move |index: usize| Stream::new(seed).at("cache").with(index as u64);
    let shared = Arc::new(pictures);
    let (own, disk) = (Arc::clone(&shared), cache.cloned());
    let load = move |index: usize| -> Result<Loaded, lora_data::Error> {
        let Some(disk) = &disk else { return Ok(Loaded::New(own.load(index, &random(index))?, None)) };
        let parts = own.key_parts(index, &random(index), disk)?;
        let parts: Vec<&str> = ["latents", &identity].into_iter().chain(parts.iter().map(String::as_str)).collect();
        let key = disk.key(&parts);
        Ok(match disk.get(&key) {
            Some(tensors) => Loaded::Known(tensors),
            None => Loaded::New(own.load(index, &random(index))?, Some(key)),
        })
    };
    let mut encoded = Vec::with_capacity(count);
    let mut unusable = Vec::new();
    for (index, loaded) in ahead(0..count, cores(), 4 * cores(), load).enumerate() {
        let (tensors, mask) = match loaded {
            Ok(Loaded::Known(tensors)) => (tensors, None),
            Ok(Loaded::New(sample, key)) => {
                let path = shared.path(index);
                let distribution = encoder.encode(checkpoint, path, &sample.picture)?;
                let mask = sample.mask.map(|mask| latent_mask(&mask, factor)).transpose()?;
                let mut tensors = Tensors::new();
                tensors.insert("mean".into(), to_host(&distribution.mean)?);
                tensors.insert("log_variance".into(), to_host(&distribution.log_variance)?);
                if let (Some(disk), Some(key)) = (cache, key) {
                    let mut entry = tensors.clone();
                    if let Some(mask) = &mask {
                        entry.insert("mask".into(), to_host(mask)?);
                    }
                    disk.put(&key, &entry)?;
                }
                (tensors, mask)
            }
            Err(error @ lora_data::Error::Picture { .. }) if !config.strict => {
                unusable.push((index, error));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let host = dry::host_of(device);
        encoded.push(drawn(&tensors, mask, encoder.scaling_factor(), &random(index).at("latent"), host)?);
        watch.now(Preparing::Latents(index + 1, count));
    }
    // The threads are gone with their iterator.
    pictures =
        Arc::into_inner(shared).ok_or_else(|| Error::from(lora_torch::Error::Torch("a thread is left".into())))?;
    pictures.leave_out(unusable);
    any_left(&pictures)?;
    Ok((pictures, encoded))
}

/// One sample of an entry's distribution, on the host.
fn drawn(
    tensors: &Tensors,
    mask: Option<Tensor>,
    scaling_factor: f64,
    random: &Stream,
    host: Device,
) -> Result<Encoded> {
    let tensor = |name: &str| -> Result<Tensor> {
        let values: &HostTensor = tensors.get(name).ok_or_else(|| {
            Error::from(lora_torch::Error::Torch(format!("a cache entry lacks `{name}`; remove the cache_dir")))
        })?;
        Ok(from_host(values, host)?)
    };
    let distribution = LatentDistribution { mean: tensor("mean")?, log_variance: tensor("log_variance")? };
    let mask = match mask {
        None if tensors.contains_key("mask") => Some(tensor("mask")?),
        mask => mask,
    };
    Ok((sample_latents(&distribution, scaling_factor, random)?, mask))
}

/// Decodes every picture once, so that a broken one is met now and not hours into the run.
pub(super) fn check(config: &TrainConfig, pictures: Pictures) -> Result<Pictures> {
    let shared = Arc::new(pictures);
    let (own, random) = (Arc::clone(&shared), Stream::new(config.seed).at("check"));
    let checked =
        ahead(0..shared.items().len(), cores(), 4 * cores(), move |index| own.load(index, &random).map(|_| ()));
    let mut unusable = Vec::new();
    for (index, result) in checked.enumerate() {
        match result {
            Ok(()) => {}
            Err(error @ lora_data::Error::Picture { .. }) if !config.strict => unusable.push((index, error)),
            Err(error) => return Err(error.into()),
        }
    }
    let mut pictures =
        Arc::into_inner(shared).ok_or_else(|| Error::from(lora_torch::Error::Torch("a thread is left".into())))?;
    pictures.leave_out(unusable);
    any_left(&pictures)?;
    Ok(pictures)
}

/// An error where every picture had to be left out.
fn any_left(pictures: &Pictures) -> Result<()> {
    match pictures.lost().next() {
        Some(first) if pictures.items().is_empty() => {
            let reason = format!("no picture could be decoded; the first: {}", first.detail);
            Err(lora_data::Error::Picture { path: first.path.clone(), reason }.into())
        }
        _ => Ok(()),
    }
}

/// Text states kept by earlier runs, or made anew.
pub(super) fn text_states(
    disk: Option<(&DiskCache, &str)>,
    caption: &str,
    text: &encode::TextEncoding,
    make: impl FnOnce() -> Result<Tensor>,
) -> Result<Tensor> {
    let Some((disk, identity)) = disk else { return make() };
    let settings = format!("{} {} {} {:?}", text.chunks, text.clip_skip, text.weighted, text.tokenizer);
    let key = disk.key(&["text", identity, &settings, caption]);
    if let Some(states) = disk.get(&key).and_then(|mut tensors| tensors.remove("states")) {
        return Ok(from_host(&states, Device::Cpu)?);
    }
    let states = make()?;
    disk.put(&key, &[("states".to_owned(), to_host(&states)?)].into())?;
    Ok(states)
}
