//! Where the items of steps come from, and what a micro-batch's passes are handed of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_core::Component;
use lora_core::random::Stream;
use lora_core::variant::Dropout;
use lora_data::caption::Done;
use lora_data::sampler::{EpochSampler, Visit};
use lora_data::source::Source;
use lora_models::layers::Pass;
use lora_torch::memory;
use lora_torch::tensor::from_f32;

use super::Session;
use super::encoded::Examples;
use crate::Result;
use crate::base::{Data, Encoded, Inputs, Item, Tensors, shallow};

/// Where the items of steps come from, and what is kept of them.
#[derive(Debug)]
pub(super) struct Feed {
    pub(super) data: Data,
    pub(super) source: Arc<dyn Source>,
    pub(super) sampler: EpochSampler,
    pub(super) examples: Examples,
    /// What networks made of captions, by network and caption.
    pub(super) kept: BTreeMap<Component, BTreeMap<String, Tensors>>,
    /// Items of the data that are not trained on, where the configuration holds some out.
    pub(super) held_out: Option<Box<dyn Source>>,
}

impl Session {
    /// The micro-batches of the next step: drawn before any of them is computed, as the loss of each is weighted by its share
    /// of all that their items measure, so that 1×8, 2×4 and 8×1 give the same update. A step does not span epochs.
    pub(super) fn next_batches(&mut self) -> Vec<Vec<Visit>> {
        micro_batches(&mut self.feed.sampler, self.plan.accumulation)
    }

    /// The noise levels at which the visits of the steps that are left are trained, of a long run the first; none of a base that
    /// adds no noise.
    pub(super) fn noise_levels(&self) -> Vec<f64> {
        let mut sampler = self.feed.sampler.clone();
        let mut levels = Vec::new();
        for _ in self.progress.step..self.plan.steps {
            for visit in micro_batches(&mut sampler, self.plan.accumulation).concat() {
                let shape = self.feed.source.visits(visit.index).shape;
                match self.base.noise_level(&visit.draws(self.config.seed), shape) {
                    Some(level) if levels.len() < MOST_LEVELS => levels.push(level),
                    _ => return levels,
                }
            }
        }
        levels
    }

    /// How much of a step's loss visits make up.
    pub(super) fn measure(&self, visits: &[Visit]) -> f64 {
        visits.iter().map(|visit| self.feed.source.measure(visit.index)).sum()
    }

    /// What a micro-batch's passes need of the host. `scale` is what its loss is multiplied by for the backward pass.
    pub(super) fn batch_inputs(&mut self, batch: &[Visit], scale: f64) -> Result<(Inputs, Pass)> {
        let items = self.items(batch)?;
        let draws: Vec<Stream> = items.iter().map(|item| item.draw.clone()).collect();
        let pass = Pass {
            dropout: self.dropout(&draws),
            recompute: self.recomputes(),
            recompute_feed_forward: self.recomputes_feed_forward(),
            inputs_in_host: self.config.cpu_offload_checkpointing || self.progress.economy.inputs_in_host,
            without_adapters: false,
            reversed: false,
        };
        let scale = from_f32(&[scale as f32], &[], self.device)?;
        Ok((self.base.inputs(&items)?.with("scale", Some(scale)), pass))
    }

    /// The items of a micro-batch, encoded.
    pub(super) fn items(&mut self, batch: &[Visit]) -> Result<Vec<Item>> {
        let mut items = Vec::with_capacity(batch.len());
        for visit in batch {
            let draw = visit.draws(self.config.seed);
            let mut encoded = BTreeMap::from_iter(self.feed.examples.kept(visit, &*self.feed.source, self.config.seed));
            let mut example = self.feed.examples.load(visit, &draw, &*self.feed.source)?;
            if let (Some(network), Some(loaded)) = (self.feed.examples.encoder(), &example) {
                if !self.base.is_loaded(network) {
                    self.load(network)?;
                }
                let what = Encoded::Example(loaded, self.feed.source.path(visit.index));
                let tensors = self.base.encode(network, what)?;
                encoded.insert(network, self.base.draw(network, &tensors, &draw)?);
                example = None;
            }
            let done = Done { steps: self.progress.step, of: self.plan.steps };
            let caption = self.feed.source.caption_when(visit, done, &draw);
            encoded.extend(self.kept_of(&caption));
            let beside = self.base.captions(&caption).into_iter().map(|caption| {
                let kept = self.kept_of(&caption);
                (caption, kept)
            });
            let beside = beside.collect();
            let weight = self.feed.source.loss_weight(visit.index);
            items.push(Item { caption, encoded, beside, example, weight, draw });
        }
        if let Some(network) = self.feed.examples.encoder().filter(|_| self.progress.economy.encoder_leaves) {
            self.base.unload(network);
            memory::empty_cache(self.device)?;
        }
        Ok(items)
    }

    /// What networks made of a caption, where that is kept.
    pub(super) fn kept_of(&self, caption: &str) -> BTreeMap<Component, Tensors> {
        let kept = self.feed.kept.iter();
        kept.filter_map(|(network, captions)| Some((*network, shallow(captions.get(caption)?)))).collect()
    }

    pub(super) fn dropout(&self, draws: &[Stream]) -> Option<Dropout> {
        let config = &self.config;
        let any = config.lora_dropout + config.rank_dropout + config.module_dropout > 0.0;
        any.then(|| Dropout {
            activations: config.lora_dropout,
            ranks: config.rank_dropout,
            module: config.module_dropout,
            items: draws.iter().map(|draw| draw.at("adapter_dropout")).collect(),
        })
    }
}

/// Noise levels of visits that are looked at before a run.
const MOST_LEVELS: usize = 20_000;

/// The micro-batches of a step, which does not span epochs.
pub(super) fn micro_batches(sampler: &mut EpochSampler, accumulation: usize) -> Vec<Vec<Visit>> {
    let mut batches: Vec<Vec<Visit>> = Vec::new();
    for _ in 0..accumulation {
        if !batches.is_empty() && sampler.position().item >= sampler.epoch_length() {
            break;
        }
        batches.push(sampler.next_batch());
    }
    batches
}
