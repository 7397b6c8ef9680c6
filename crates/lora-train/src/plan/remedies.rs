//! What can be changed about a run so that it needs less memory, or makes use of more, and what each change costs.

use lora_core::DType;
use lora_data::bucket::{BucketOptions, Buckets, Framing};
use lora_torch::dry::Platform;
use lora_torch::frozen::Storage;

use super::predict::{Machine, precision_on};
use crate::base::Registration;
use crate::config::{TrainConfig, TrainMode};

/// One change of a configuration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Change {
    /// Micro-batches smaller by this factor, and so many times more of them.
    SmallerBatch(usize),
    /// The inner part of feed-forwards is computed again.
    RecomputeFeedForward,
    /// Blocks are computed again in the backward pass.
    Recompute,
    /// Both.
    RecomputeAll,
    /// Pictures are encoded before training.
    CacheLatents,
    /// Another number type.
    Precision(DType),
    /// So many eighths of each side of pictures.
    Resolution(usize),
    /// The autoencoder works on tiles of pictures.
    Tiles,
    /// Frozen weights in fewer bytes.
    Storage(Storage),
    /// The optimiser's averages in 8 bits.
    Optimiser8bit,
    /// What recomputing needs waits in host memory.
    InputsInHost,
    /// Frozen weights come from host memory.
    OffloadBase,
    /// Everything keeps its activations.
    Keep,
    /// All but the inner part of feed-forwards does.
    KeepMost,
    /// Micro-batches larger by this factor, and so many times fewer of them.
    LargerBatch(usize),
    /// More items a step.
    MoreItems(usize),
    /// A rank larger by this factor, at an equal scale.
    Rank(usize),
}

/// Kinds of remedies, the first to be tried first, each mildest first. A kind that does not apply is empty.
pub(super) fn ladder(config: &TrainConfig, machine: &Machine, registration: &Registration) -> Vec<Vec<Change>> {
    let full = config.train == TrainMode::Full;
    let own: Vec<_> = registration.groups().collect();
    let has = |key: &str| config.has_key(key, &own);
    let divisors = (2..=config.batch_size)
        .filter(|&by| config.datasets.iter().map(|dataset| dataset.batch_size).all(|size| size.is_multiple_of(by)))
        .filter(|&by| config.batch_size.is_multiple_of(by));
    let arithmetic = precision_on(machine.platform, config.precision);
    let half = match machine.platform {
        Platform::Cuda => DType::F16,
        Platform::Cpu { .. } => DType::BF16,
    };
    let storages = match (config.base_storage, arithmetic) {
        _ if full => vec![],
        (Some(Storage::Nf4), _) => vec![],
        (Some(Storage::Int8 | Storage::Float8), _) => vec![Storage::Nf4],
        (None, DType::F32) => vec![Storage::Half, Storage::Int8, Storage::Nf4],
        _ => vec![Storage::Int8, Storage::Nf4],
    };
    let recomputation = match (config.gradient_checkpointing, config.recompute_feed_forward) {
        (false, false) => vec![Change::RecomputeFeedForward, Change::Recompute, Change::RecomputeAll],
        (false, true) => vec![Change::RecomputeAll],
        (true, false) => vec![Change::RecomputeFeedForward],
        (true, true) => vec![],
    };
    let on_device = machine.platform == Platform::Cuda;
    let resolutions = if config.allow_lower_resolution && has("max_resolution") { vec![7, 6] } else { vec![] };
    vec![
        divisors.map(Change::SmallerBatch).collect(),
        recomputation,
        (has("cache_latents") && !config.cache_latents).then_some(Change::CacheLatents).into_iter().collect(),
        (arithmetic == DType::F32).then_some(Change::Precision(half)).into_iter().collect(),
        resolutions.into_iter().map(Change::Resolution).collect(),
        (has("vae_tiling") && !config.vae_tiling).then_some(Change::Tiles).into_iter().collect(),
        storages.into_iter().map(Change::Storage).collect(),
        (config.optimizer == "adamw").then_some(Change::Optimiser8bit).into_iter().collect(),
        (on_device && !config.cpu_offload_checkpointing).then_some(Change::InputsInHost).into_iter().collect(),
        (on_device && !full && !config.offload_base).then_some(Change::OffloadBase).into_iter().collect(),
    ]
}

/// What memory that is left over can be spent on, each alone; of changes of one kind, the largest first.
pub(super) fn wishes(config: &TrainConfig) -> Vec<Vec<Change>> {
    let accumulation = config.gradient_accumulation_steps;
    let factors = (2..=accumulation).rev().filter(|&by| accumulation.is_multiple_of(by)).map(Change::LargerBatch);
    let uniform = config.rank_pattern.is_empty() && config.alpha_pattern.is_empty();
    let has_rank =
        config.train == TrainMode::Adapter && config.init_from.is_none() && config.lora_rank < 128 && uniform;
    vec![
        match (config.gradient_checkpointing, config.recompute_feed_forward) {
            (true, _) => vec![Change::Keep, Change::KeepMost],
            (false, true) => vec![Change::Keep],
            (false, false) => vec![],
        },
        match accumulation {
            1 => vec![Change::MoreItems(2)],
            _ => factors.collect(),
        },
        has_rank.then_some(Change::Rank(2)).into_iter().collect(),
    ]
}

impl Change {
    /// The configuration with the change; `None` where it cannot have it.
    pub(super) fn applied(self, config: &TrainConfig) -> Option<TrainConfig> {
        let mut config = config.clone();
        let batches = |config: &mut TrainConfig, change: &dyn Fn(usize) -> usize| {
            config.batch_size = change(config.batch_size);
            config.datasets.iter_mut().for_each(|dataset| dataset.batch_size = change(dataset.batch_size));
        };
        match self {
            Change::SmallerBatch(by) => {
                batches(&mut config, &|size| size / by);
                config.gradient_accumulation_steps *= by;
            }
            Change::LargerBatch(by) => {
                batches(&mut config, &|size| size * by);
                config.gradient_accumulation_steps /= by;
            }
            Change::MoreItems(by) => batches(&mut config, &|size| size * by),
            Change::RecomputeFeedForward => config.recompute_feed_forward = true,
            Change::Recompute => config.gradient_checkpointing = true,
            Change::RecomputeAll => (config.gradient_checkpointing, config.recompute_feed_forward) = (true, true),
            Change::Keep | Change::KeepMost => {
                (config.gradient_checkpointing, config.cpu_offload_checkpointing) = (false, false);
                config.recompute_feed_forward = self == Change::KeepMost;
            }
            Change::CacheLatents => config.cache_latents = true,
            Change::Precision(precision) => config.precision = precision,
            Change::Tiles => config.vae_tiling = true,
            Change::Storage(storage) => config.base_storage = Some(storage),
            Change::InputsInHost if !config.gradient_checkpointing => return None,
            Change::InputsInHost => config.cpu_offload_checkpointing = true,
            Change::OffloadBase => config.offload_base = true,
            Change::Optimiser8bit => config.optimizer = "adamw8bit".into(),
            Change::Rank(by) => {
                config.lora_rank *= by;
                // The scale stays: alpha / rank, or alpha / √rank.
                config.lora_alpha *= if config.use_rslora { (by as f64).sqrt() } else { by as f64 };
            }
            Change::Resolution(eighths) => {
                let smaller = |(width, height): (usize, usize)| (side(width, eighths), side(height, eighths));
                config.max_resolution = smaller(config.max_resolution);
                config.samples.resolution = smaller(config.samples.resolution);
                config.slider_resolutions.iter_mut().for_each(|own| *own = smaller(*own));
                for dataset in &mut config.datasets {
                    dataset.framing = match &dataset.framing {
                        Framing::Fixed(size) => Framing::Fixed(smaller(*size)),
                        Framing::Buckets(buckets) => {
                            let own = *buckets.options();
                            let resolution = smaller(own.resolution);
                            let min = own.min.min(resolution.0).min(resolution.1);
                            Framing::Buckets(Buckets::new(BucketOptions { resolution, min, ..own }).ok()?)
                        }
                    };
                }
            }
        }
        Some(config)
    }

    /// What it costs, or brings where memory is spent.
    pub(super) fn cost(self, machine: &Machine) -> String {
        match self {
            Change::SmallerBatch(by) => {
                format!(
                    "same update; {by} times as many passes a step, slower where small batches leave the device idle"
                )
            }
            Change::RecomputeFeedForward => "same update; about a twentieth more time a step".into(),
            Change::Recompute | Change::RecomputeAll => "same update; about a third more time a step".into(),
            Change::CacheLatents => {
                "none, and steps become faster; random processors act once for each of image_variations".into()
            }
            Change::Precision(_) => match machine.platform {
                Platform::Cuda => "half precision's rounding, with loss scaling; steps become faster".into(),
                Platform::Cpu { .. } => {
                    "half precision's rounding; slower on processors without bf16 instructions".into()
                }
            },
            Change::Resolution(_) => "less detail is learnt; steps become faster".into(),
            Change::Tiles => "latents and samples differ a little; the autoencoder takes two thirds more time".into(),
            Change::Storage(Storage::Half | Storage::BFloat16) => {
                "frozen weights are rounded to half precision, as most files hold them; each is converted twice a step"
                    .into()
            }
            Change::Storage(Storage::Nf4) => {
                "frozen weights are rounded to 4 bits, which costs some accuracy; each is converted twice a step".into()
            }
            Change::Storage(_) => "frozen weights are rounded to 8 bits; each is converted twice a step".into(),
            Change::Optimiser8bit => "averages are rounded to 8 bits in blocks of 256; curves stay alike".into(),
            Change::InputsInHost => "same update; each block's input crosses the bus twice a step".into(),
            Change::OffloadBase => {
                "same update; each frozen weight crosses the bus in both passes, while others compute: slower where the bus is"
                    .into()
            }
            Change::Keep => "same update; less time a step: about a quarter where blocks were computed again".into(),
            Change::KeepMost => "same update; about a fifth less time a step".into(),
            Change::LargerBatch(by) => format!("same update; {by} times fewer passes a step"),
            Change::MoreItems(by) => {
                format!("{by} times as many items a step: steadier gradients, fewer steps an epoch")
            }
            Change::Rank(_) => "the adapter can learn more; a larger file, a little more time".into(),
        }
    }
}

/// A side of pictures, made smaller: a multiple of 64 where it was that large, of 8 otherwise.
fn side(side: usize, eighths: usize) -> usize {
    let unit = if side >= 256 { 64 } else { 8 };
    (side * eighths / 8 / unit * unit).max(64)
}

/// A key that a change sets.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct ChangedKey {
    /// The key.
    pub key: &'static str,
    /// Its value before.
    pub from: String,
    /// Its value after.
    pub to: String,
}

/// What differs between two configurations, among the keys that changes set.
pub(super) fn settings(before: &TrainConfig, after: &TrainConfig) -> Vec<ChangedKey> {
    let size = |(width, height): (usize, usize)| format!("\"{width},{height}\"");
    let precision = |precision: DType| match precision {
        DType::F32 => "\"fp32\"",
        DType::F16 => "\"fp16\"",
        _ => "\"bf16\"",
    };
    let storage = |storage: Option<Storage>| {
        format!("\"{}\"", storage.map_or("precision".to_owned(), |storage| storage.to_string()))
    };
    let values = |config: &TrainConfig| {
        [
            ("batch_size", config.batch_size.to_string()),
            ("gradient_accumulation_steps", config.gradient_accumulation_steps.to_string()),
            ("gradient_checkpointing", config.gradient_checkpointing.to_string()),
            ("recompute_feed_forward", config.recompute_feed_forward.to_string()),
            ("cpu_offload_checkpointing", config.cpu_offload_checkpointing.to_string()),
            ("cache_latents", config.cache_latents.to_string()),
            ("precision", precision(config.precision).to_owned()),
            ("vae_tiling", config.vae_tiling.to_string()),
            ("max_resolution", size(config.max_resolution)),
            ("slider_resolutions", {
                let sizes: Vec<_> = config.slider_resolutions.iter().map(|own| size(*own)).collect();
                format!("[{}]", sizes.join(", "))
            }),
            ("sample_resolution", size(config.samples.resolution)),
            ("base_storage", storage(config.base_storage)),
            ("offload_base", config.offload_base.to_string()),
            ("optimizer", format!("\"{}\"", config.optimizer)),
            ("lora_rank", config.lora_rank.to_string()),
            ("lora_alpha", config.lora_alpha.to_string()),
        ]
    };
    let pairs = values(before).into_iter().zip(values(after));
    pairs.filter(|((_, from), (_, to))| from != to).map(|((key, from), (_, to))| ChangedKey { key, from, to }).collect()
}
