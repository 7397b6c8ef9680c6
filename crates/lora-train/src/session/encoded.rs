//! What networks encode once of examples and captions: computed before the first step and kept in host memory, and in
//! files where there is a `cache_dir`; or made at each visit of examples that threads load ahead. What is encoded how
//! is the base's business.

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

use super::feed::micro_batches;
use super::{Preparing, Watch};
use crate::base::{Base, Encoded, Tensors, shallow};
use crate::config::TrainConfig;
use crate::ranks::{Ranks, Share};
use crate::{Error, Result};

/// What a visit's example loads to, ahead of its step.
type Loaded = (Visit, Result<Example, lora_data::Error>);

/// Examples of a run.
pub(super) enum Examples {
    /// What the network made of each item, of so many variations of it, on the host.
    Kept(Component, Vec<Vec<Tensors>>),
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
    /// Made at each visit; those of the visits to come are loaded meanwhile: of each step of so many micro-batches a
    /// share.
    pub(super) fn fresh(
        network: Option<Component>,
        source: &Arc<dyn Source>,
        sampler: &EpochSampler,
        config: &TrainConfig,
        (accumulation, share): (usize, Share),
    ) -> Self {
        let (source, seed) = (Arc::clone(source), config.seed);
        let mut order = sampler.clone();
        let batches = std::iter::from_fn(move || {
            Some(share.of(micro_batches(&mut order, accumulation)).flatten().collect::<Vec<_>>())
        });
        let visits = batches.flatten();
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

    /// What was kept for a visit: the variations of an item come by turns, over repeats and epochs, each item's beginning
    /// with another.
    pub(super) fn kept(&self, visit: &Visit, source: &dyn Source, seed: u64) -> Option<(Component, Tensors)> {
        let Self::Kept(network, all) = self else { return None };
        let variations = all.get(visit.index)?;
        let first = Stream::new(seed).at("first variation").with(visit.index as u64).below(variations.len() as u64);
        let earlier = visit.epoch * source.visits(visit.index).count as u64 + visit.repeat as u64;
        let turn = (first + earlier) % (variations.len() as u64).max(1);
        variations.get(turn as usize).map(|tensors| (*network, shallow(tensors)))
    }
}

/// What a thread makes of an item before it is encoded.
enum Found {
    /// It was encoded by an earlier run.
    Known(cache::Tensors),
    /// To be encoded, and kept under the key where there is a cache.
    New(Example, Option<Key>),
}

/// An example that is kept: the item, and which variation of it where there are several.
type Wanted = (usize, Option<usize>);

/// Encodes every example once, and every variation of it. Unusable ones are left out, or end the run where the
/// configuration is strict.
pub(super) fn examples(
    base: &mut dyn Base,
    network: Component,
    config: &TrainConfig,
    source: &mut Arc<dyn Source>,
    (disk, ranks): (Option<&Arc<DiskCache>>, &Ranks),
    device: Device,
    watch: &mut dyn Watch,
) -> Result<Vec<Vec<Tensors>>> {
    let identity = disk.map(|_| base.encoding_identity(network)).transpose()?.unwrap_or_default();
    let all: Vec<Wanted> = (0..source.count())
        .flat_map(|item| match source.variations(item) {
            0 | 1 => vec![(item, None)],
            several => (0..several).map(|variation| (item, Some(variation))).collect(),
        })
        .collect();
    let (count, seed) = (all.len(), config.seed);
    let random = move |(item, variation): Wanted| {
        let own = Stream::new(seed).at("cache").with(item as u64);
        match variation.unwrap_or(0) {
            0 => own,
            further => own.with(further as u64),
        }
    };
    let (own, cache) = (Arc::clone(source), disk.cloned());
    let find = Arc::new(move |wanted: Wanted| -> Result<Found, lora_data::Error> {
        let ((item, variation), random) = (wanted, random(wanted));
        let example = || match variation {
            Some(variation) => own.variation(item, variation, &random),
            None => own.example(item, &random),
        };
        let Some(cache) = &cache else { return Ok(Found::New(example()?, None)) };
        let parts = own.key_parts(item, variation, &random, cache)?;
        let parts: Vec<&str> = ["latents", &identity].into_iter().chain(parts.iter().map(String::as_str)).collect();
        let key = cache.key(&parts);
        Ok(match cache.get(&key) {
            Some(tensors) => Found::Known(tensors),
            None => Found::New(example()?, Some(key)),
        })
    });
    let found = |all: Vec<Wanted>| {
        let find = Arc::clone(&find);
        all.clone().into_iter().zip(ahead(all.into_iter(), cores(), 4 * cores(), move |wanted| find(wanted)))
    };
    let encode = |base: &mut dyn Base, (item, _): Wanted, found: Found| -> Result<Tensors> {
        match found {
            Found::Known(tensors) => from_disk(&tensors, device),
            Found::New(example, key) => {
                let tensors = base.encode(network, Encoded::Example(&example, source.path(item)))?;
                if let (Some(disk), Some(key)) = (disk, key) {
                    disk.put(&key, &to_disk(&tensors)?)?;
                }
                to_memory(&tensors, device)
            }
        }
    };
    in_shares(disk, ranks, "examples", || {
        let own: Vec<(usize, Wanted)> = ranks.share().of(all.iter().copied().enumerate()).collect();
        for ((number, _), (wanted, found)) in own.iter().zip(found(own.iter().map(|(_, wanted)| *wanted).collect())) {
            // What is wrong with one is said when all are looked at.
            found.map_or(Ok(()), |found| encode(base, wanted, found).map(drop))?;
            watch.now(Preparing::Examples(number + 1, count));
        }
        Ok(())
    })?;
    let mut encoded: BTreeMap<usize, Vec<Tensors>> = BTreeMap::new();
    let mut unusable = BTreeMap::new();
    for (number, (wanted, found)) in found(all).enumerate() {
        match found {
            Ok(found) => {
                let tensors = encode(base, wanted, found)?;
                encoded.entry(wanted.0).or_default().push(base.draw(network, &tensors, &random(wanted))?);
            }
            Err(error @ lora_data::Error::Picture { .. }) if !config.strict => {
                unusable.entry(wanted.0).or_insert(error);
            }
            Err(error) => return Err(error.into()),
        }
        watch.now(Preparing::Examples(number + 1, count));
    }
    drop(find);
    // A file that went bad between two of its variations.
    encoded.retain(|item, _| !unusable.contains_key(item));
    leave_out(source, unusable.into_iter().collect())?;
    Ok(encoded.into_values().collect())
}

/// Where ranks have a cache on disk, each encodes its share into it before all of them read the whole: where they share
/// the disk, nothing is encoded twice.
fn in_shares(
    disk: Option<&Arc<DiskCache>>,
    ranks: &Ranks,
    what: &str,
    encode: impl FnOnce() -> Result<()>,
) -> Result<()> {
    if disk.is_none() || ranks.count() == 1 {
        return Ok(());
    }
    encode()?;
    ranks.wait(what)
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
        // What is damaged may be its mask.
        let path = first.path().unwrap_or(source.path(item)).to_owned();
        return Err(lora_data::Error::Picture { path, reason }.into());
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
    (disk, ranks): (Option<&Arc<DiskCache>>, &Ranks),
    device: Device,
    watch: &mut dyn Watch,
) -> Result<BTreeMap<String, Tensors>> {
    let identity = disk.map(|_| base.encoding_identity(network)).transpose()?.unwrap_or_default();
    let mut encode = |index: usize, caption: &String| -> Result<Tensors> {
        watch.now(Preparing::Captions(index + 1, captions.len()));
        let key = disk.map(|disk| (disk, disk.key(&["text", &identity, caption])));
        if let Some(tensors) = key.as_ref().and_then(|(disk, key)| disk.get(key)) {
            return from_disk(&tensors, device);
        }
        let tensors = base.encode(network, Encoded::Caption(caption))?;
        if let Some((disk, key)) = key {
            disk.put(&key, &to_disk(&tensors)?)?;
        }
        to_memory(&tensors, device)
    };
    in_shares(disk, ranks, "captions", || {
        ranks.share().of(captions.iter().enumerate()).try_for_each(|(index, caption)| encode(index, caption).map(drop))
    })?;
    captions.iter().enumerate().map(|(index, caption)| Ok((caption.clone(), encode(index, caption)?))).collect()
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
