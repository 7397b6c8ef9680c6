//! What networks encode once of examples and captions: computed before the first step and kept in host memory, and in files where
//! there is a `cache_dir`; or made at each visit of examples that threads load ahead. What is encoded how is the base's
//! business.

use std::collections::BTreeMap;
use std::fmt;
use std::iter::Peekable;
use std::sync::Arc;

use lora_core::Component;
use lora_core::random::Stream;
use lora_data::cache::{self, DiskCache, Key};
use lora_data::prefetch::{ahead, cores};
use lora_data::sampler::{EpochSampler, Visit};
use lora_data::source::Example;
use lora_data::source::Source;
use lora_torch::dry;
use lora_torch::tch::Device;
use lora_torch::tensor::{from_host, to_host};

use super::{Preparing, Watch};
use crate::base::{Base, Encoded, Tensors, shallow};
use crate::config::TrainConfig;
use crate::{Error, Result};

/// What a visit's example loads to, ahead of its step.
type Loaded = (Visit, Result<Example, lora_data::Error>);

/// Examples of a run.
pub(super) enum Examples {
    /// What the network made of each item, on the host.
    Kept(Component, Vec<Tensors>),
    /// Loaded at each visit, in the order of the visits to come; encoded by the network, where there is one.
    Fresh(Option<Component>, Peekable<Box<dyn Iterator<Item = Loaded> + Send>>),
}

impl fmt::Debug for Examples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kept(network, all) => write!(f, "Kept({network}, {})", all.len()),
            Self::Fresh(network, _) => write!(f, "Fresh({network:?})"),
        }
    }
}

impl Examples {
    /// Made at each visit; those of the visits to come are loaded meanwhile.
    pub(super) fn fresh(
        network: Option<Component>,
        source: &Arc<dyn Source>,
        sampler: &EpochSampler,
        config: &TrainConfig,
    ) -> Self {
        let (source, seed) = (Arc::clone(source), config.seed);
        let mut order = sampler.clone();
        let visits = std::iter::from_fn(move || Some(order.next_batch())).flatten();
        // Two micro-batches, and something to do for every core.
        let window = 2 * config.batch_size.max(cores());
        let load = move |visit: Visit| (visit, source.example(visit.index, &visit.draws(seed)));
        let loaded: Box<dyn Iterator<Item = Loaded> + Send> = Box::new(ahead(visits, cores(), window, load));
        Self::Fresh(network, loaded.peekable())
    }

    /// Whether they were encoded before training.
    pub(super) fn are_kept(&self) -> bool {
        matches!(self, Self::Kept(..))
    }

    /// The network that encodes at each visit.
    pub(super) fn encoder(&self) -> Option<Component> {
        match self {
            Self::Fresh(network, _) => *network,
            Self::Kept(..) => None,
        }
    }

    /// The example of a visit, for a network to encode or as it is.
    pub(super) fn load(&mut self, visit: &Visit, draw: &Stream, source: &dyn Source) -> Result<Option<Example>> {
        let Self::Fresh(_, loaded) = self else { return Ok(None) };
        // A visit that is looked at again, out of order, is loaded for itself.
        Ok(Some(match loaded.next_if(|(next, _)| next == visit) {
            Some((_, example)) => example?,
            None => source.example(visit.index, draw)?,
        }))
    }

    /// What was kept of an item.
    pub(super) fn kept(&self, item: usize) -> Option<(Component, Tensors)> {
        match self {
            Self::Kept(network, all) => all.get(item).map(|tensors| (*network, shallow(tensors))),
            Self::Fresh(..) => None,
        }
    }
}

/// What a thread makes of an item before it is encoded.
enum Found {
    /// It was encoded by an earlier run.
    Known(cache::Tensors),
    /// To be encoded, and kept under the key where there is a cache.
    New(Example, Option<Key>),
}

/// Encodes every example once. Unusable ones are left out, or end the run where the configuration is strict.
pub(super) fn examples(
    base: &mut dyn Base,
    network: Component,
    config: &TrainConfig,
    source: &mut Arc<dyn Source>,
    disk: Option<&Arc<DiskCache>>,
    device: Device,
    watch: &mut dyn Watch,
) -> Result<Vec<Tensors>> {
    let identity = disk.map(|_| base.encoding_identity(network)).transpose()?.unwrap_or_default();
    let (count, seed) = (source.count(), config.seed);
    let random = move |item: usize| Stream::new(seed).at("cache").with(item as u64);
    let (own, cache) = (Arc::clone(source), disk.cloned());
    let find = move |item: usize| -> Result<Found, lora_data::Error> {
        let Some(cache) = &cache else { return Ok(Found::New(own.example(item, &random(item))?, None)) };
        let parts = own.key_parts(item, &random(item), cache)?;
        let parts: Vec<&str> = ["latents", &identity].into_iter().chain(parts.iter().map(String::as_str)).collect();
        let key = cache.key(&parts);
        Ok(match cache.get(&key) {
            Some(tensors) => Found::Known(tensors),
            None => Found::New(own.example(item, &random(item))?, Some(key)),
        })
    };
    let (mut encoded, mut unusable) = (Vec::with_capacity(count), Vec::new());
    for (item, found) in ahead(0..count, cores(), 4 * cores(), find).enumerate() {
        let tensors = match found {
            Ok(Found::Known(tensors)) => from_disk(&tensors, device)?,
            Ok(Found::New(example, key)) => {
                let tensors = base.encode(network, Encoded::Example(&example, source.path(item)))?;
                if let (Some(disk), Some(key)) = (disk, key) {
                    disk.put(&key, &to_disk(&tensors)?)?;
                }
                to_memory(&tensors, device)?
            }
            Err(error @ lora_data::Error::Picture { .. }) if !config.strict => {
                unusable.push((item, error));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        encoded.push(base.draw(network, &tensors, &random(item))?);
        watch.now(Preparing::Examples(item + 1, count));
    }
    leave_out(source, unusable)?;
    Ok(encoded)
}

/// Loads every example once, so that a broken one is met now and not hours into the run.
pub(super) fn check(config: &TrainConfig, source: &mut Arc<dyn Source>) -> Result<()> {
    let (own, random) = (Arc::clone(source), Stream::new(config.seed).at("check"));
    let checked = ahead(0..source.count(), cores(), 4 * cores(), move |item| own.example(item, &random).map(drop));
    let mut unusable = Vec::new();
    for (item, result) in checked.enumerate() {
        match result {
            Ok(()) => {}
            Err(error @ lora_data::Error::Picture { .. }) if !config.strict => unusable.push((item, error)),
            Err(error) => return Err(error.into()),
        }
    }
    leave_out(source, unusable)
}

/// Leaves out of a source what turned out unusable; an error where nothing is left.
fn leave_out(source: &mut Arc<dyn Source>, mut unusable: Vec<(usize, lora_data::Error)>) -> Result<()> {
    if unusable.len() == source.count() && !unusable.is_empty() {
        let (item, first) = unusable.swap_remove(0);
        let reason = format!("none could be decoded; the first: {}", first.reason());
        return Err(lora_data::Error::Picture { path: source.path(item).to_owned(), reason }.into());
    }
    // The threads are gone with their iterator.
    Arc::get_mut(source).ok_or(Error::InUse { what: "the dataset" })?.leave_out(unusable);
    Ok(())
}

/// Encodes captions, each once.
pub(super) fn captions(
    base: &mut dyn Base,
    network: Component,
    captions: &[String],
    disk: Option<&Arc<DiskCache>>,
    device: Device,
    watch: &mut dyn Watch,
) -> Result<BTreeMap<String, Tensors>> {
    let identity = disk.map(|_| base.encoding_identity(network)).transpose()?.unwrap_or_default();
    let mut all = BTreeMap::new();
    for (index, caption) in captions.iter().enumerate() {
        let key = disk.map(|disk| (disk, disk.key(&["text", &identity, caption])));
        let known = key.as_ref().and_then(|(disk, key)| disk.get(key));
        let tensors = match known {
            Some(tensors) => from_disk(&tensors, device)?,
            None => {
                let tensors = base.encode(network, Encoded::Caption(caption))?;
                if let Some((disk, key)) = key {
                    disk.put(&key, &to_disk(&tensors)?)?;
                }
                to_memory(&tensors, device)?
            }
        };
        all.insert(caption.clone(), tensors);
        watch.now(Preparing::Captions(index + 1, captions.len()));
    }
    Ok(all)
}

/// Where encodings wait: in host memory.
pub(super) fn to_memory(tensors: &Tensors, device: Device) -> Result<Tensors> {
    let host = dry::host_of(device);
    tensors.iter().map(|(name, tensor)| Ok((name.clone(), tensor.f_to_device(host)?))).collect()
}

fn to_disk(tensors: &Tensors) -> Result<cache::Tensors> {
    tensors.iter().map(|(name, tensor)| Ok((name.clone(), to_host(tensor)?))).collect()
}

fn from_disk(tensors: &cache::Tensors, device: Device) -> Result<Tensors> {
    let host = dry::host_of(device);
    tensors.iter().map(|(name, tensor)| Ok((name.clone(), from_host(tensor, host)?))).collect()
}
