//! What bases are trained on: how the data of a run are opened, and what stands in for them in a plan. What an item is, and how
//! it is read, is `lora_data`'s business.

use std::fmt;
use std::sync::Arc;

use lora_data::Pictures;
use lora_data::cache::DiskCache;
use lora_data::processor::ProcessorRegistry;
use lora_data::sliders::Sliders;
use lora_data::source::Source;
use lora_io::checkpoint::Checkpoint;

use crate::Result;
use crate::config::TrainConfig;
use crate::config::keys::{Group, pictures};

/// What a run gives to the function that opens its data.
#[derive(Debug)]
#[non_exhaustive]
pub struct DataOpening<'o> {
    /// The configuration of the run.
    pub config: &'o TrainConfig,
    /// Picture processors by name.
    pub processors: &'o ProcessorRegistry,
    /// The base's files: texts are split by its tokenizer.
    pub checkpoint: &'o Checkpoint,
    /// The cache on disk of encoded items, where the run has one.
    pub disk: Option<&'o Arc<DiskCache>>,
}

impl<'o> DataOpening<'o> {
    pub(crate) fn new(
        config: &'o TrainConfig,
        processors: &'o ProcessorRegistry,
        checkpoint: &'o Checkpoint,
        disk: Option<&'o Arc<DiskCache>>,
    ) -> Self {
        Self { config, processors, checkpoint, disk }
    }
}

/// A kind of data.
#[derive(Clone, Copy)]
pub struct Data {
    /// What people call an item, `picture`.
    pub noun: &'static str,
    /// What [`Source::amount`] counts, in the plural, short enough for a rate: `img`.
    pub unit: &'static str,
    /// Configuration keys that only such data have.
    pub keys: &'static [&'static Group],
    /// Opens the data that a configuration names.
    pub open: fn(&DataOpening<'_>) -> Result<Box<dyn Source>>,
    /// Data of no file, as large as those of the configuration can be: of each dataset one item, with as many visits as make
    /// this many micro-batches. A plan runs on them before anybody has looked at the real ones.
    pub stand_ins: fn(&TrainConfig, usize) -> Result<Box<dyn Source>>,
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Data({})", self.noun)
    }
}

/// Pictures with captions.
pub const PICTURES: Data = Data {
    noun: "picture",
    unit: "img",
    keys: pictures::KEYS,
    open: |opening| {
        let mut datasets = opening.config.datasets.clone();
        if !opening.config.cache_latents {
            // What is drawn at each visit is not kept, and makes no other run of one.
            datasets.iter_mut().for_each(|dataset| dataset.variations = Some(1));
        }
        Ok(Box::new(Pictures::open(datasets, opening.processors)?))
    },
    stand_ins: |config, batches| {
        let visits = |dataset: &lora_data::DatasetOptions| (dataset.clone(), dataset.batch_size * batches);
        Ok(Box::new(Pictures::stand_ins(config.datasets.iter().map(visits).collect())))
    },
};

/// Prompts of sliders, in the place of pictures.
pub(crate) const SLIDERS: Data = Data {
    noun: "prompt pair",
    unit: "pair",
    keys: pictures::KEYS,
    open: |opening| Ok(Box::new(sliders(opening.config, opening.config.gradient_accumulation_steps))),
    stand_ins: |config, batches| Ok(Box::new(sliders(config, batches).largest())),
};

/// The items of a configuration's sliders, each of which comes so often an epoch as to make this many micro-batches.
fn sliders(config: &TrainConfig, batches: usize) -> Sliders {
    let size = config.batch_size;
    Sliders::new(&config.sliders, &config.slider_sizes(), size, size.saturating_mul(batches))
}
