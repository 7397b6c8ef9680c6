//! Preparing a run: everything that can go wrong before the first step goes wrong here.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lora_core::random::Stream;
use lora_core::target::{Patterns, TargetLayer, Targets};
use lora_core::{Adapter, DType};
use lora_data::bucket::{Buckets, Framing};
use lora_data::dataset::{ImageDataset, Item, ScanOptions};
use lora_data::processor::PictureProcessor;
use lora_data::sampler::EpochSampler;
use lora_data::tokenizer::ClipTokenizer;
use lora_io::adapter;
use lora_io::checkpoint::Checkpoint;
use lora_models::layers::Adaptable;
use lora_models::stable_diffusion::{load_text_encoder, load_unet, noise_schedule};
use lora_torch::tch::{Device, Tensor};
use lora_torch::tensor::kind_of;
use lora_torch::{LossScaler, device, memory};

use super::Session;
use crate::config::{StepPlan, TrainConfig};
use crate::encode::{self, Encoder};
use crate::plugins::Plugins;
use crate::schedule::Schedule;
use crate::trainable::{AdapterOptions, TrainableAdapter};
use crate::{Error, Result};

/// How far preparing has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preparing {
    /// Reading the base model's part of this name.
    Loading(&'static str),
    /// Encoding pictures: done, of.
    Latents(usize, usize),
    /// Encoding captions: done, of.
    Captions(usize, usize),
}

impl Session {
    /// Prepares a run: checks the output folder, scans the dataset, loads the base, encodes what is cached and hangs the
    /// adapter on its layers. `progress` is told how far it is.
    pub fn prepare(config: TrainConfig, plugins: &Plugins, progress: &mut dyn FnMut(Preparing)) -> Result<Self> {
        let processors = plugins.processors.chain(&config.processors)?;
        plugins.variants.get(&config.variant)?;
        plugins.callbacks(&config.callbacks)?;
        lora_io::atomic::check_writable(&config.output_dir)?;
        let mut dataset =
            ImageDataset::scan(&config.train_data_dir, ScanOptions { repeats: config.repeats, strict: config.strict })?;
        let framing = match config.buckets {
            None => Framing::Fixed(config.max_resolution),
            Some(options) => Framing::Buckets(Buckets::new(options)?),
        };
        let checkpoint = Checkpoint::open(&config.base_model)?;
        let device = device::resolve(&config.device)?;
        let mut notes = Vec::new();
        let precision = match (config.precision, device) {
            (DType::F16, Device::Cpu) => {
                notes.push("precision fp16 is for GPUs; on the CPU this run trains in fp32".into());
                DType::F32
            }
            (precision, _) => precision,
        };
        let kind = kind_of(precision);
        if !checkpoint.unused().is_empty() {
            let example = &checkpoint.unused()[0];
            notes.push(format!("{} tensors of the base are not used, {example} among them", checkpoint.unused().len()));
        }
        let schedule = noise_schedule(&checkpoint)?;
        let tokenizer = ClipTokenizer::new(config.text_cleaning);

        // The autoencoder comes and goes before anything else is on the device.
        progress(Preparing::Loading("autoencoder"));
        let mut encoder = Encoder::load(&checkpoint, precision, device)?;
        let latents = match config.cache_latents {
            true => cache_latents(
                &config,
                &framing,
                &checkpoint,
                &mut encoder,
                &mut dataset,
                &processors,
                &mut notes,
                progress,
            )?,
            false => {
                check_pictures(&config, &framing, &mut dataset, &processors)?;
                Vec::new()
            }
        };
        if config.cache_latents && processors.iter().any(|processor| processor.is_random()) {
            notes.push(
                "latents are cached, so random processors act once; cache_latents = false lets them act anew".into(),
            );
        }
        let encoder = (!config.cache_latents).then_some(encoder);
        memory::empty_cache(device)?;

        progress(Preparing::Loading("text encoder"));
        let text_encoder = load_text_encoder(&checkpoint, kind, device)?;
        if config.clip_skip > text_encoder.config().layers {
            return Err(lora_models::Error::Input {
                what: "clip_skip",
                expected: format!("1 to {}", text_encoder.config().layers),
                found: config.clip_skip.to_string(),
            }
            .into());
        }
        let chunks = config.caption_chunks();
        let mut text_states = BTreeMap::new();
        let keep_encoder = config.train_text_encoder || !config.captions.is_fixed();
        if !keep_encoder {
            let fixed = |item: &Item| config.captions.kept(&item.lines(), &Stream::new(0));
            let mut captions: Vec<String> = dataset.items().iter().map(fixed).collect();
            captions.push(String::new());
            captions.push(config.samples.negative_prompt.clone());
            captions.extend(config.samples.prompts.iter().cloned());
            captions.sort();
            captions.dedup();
            for (index, caption) in captions.iter().enumerate() {
                let states =
                    encode::encode_captions(&text_encoder, &tokenizer, &[caption], chunks, config.clip_skip, device)?;
                if !encode::is_finite(&states)? {
                    return Err(Error::NotFinite {
                        stage: "the text encoder",
                        place: format!(" for the caption {caption:?}"),
                        remedy: "use precision = \"bf16\" or \"fp32\"",
                    });
                }
                text_states.insert(caption.clone(), states.f_to_device(Device::Cpu)?);
                progress(Preparing::Captions(index + 1, captions.len()));
            }
        }

        // A text encoder that is done makes room before the U-Net comes.
        let mut text_encoder = keep_encoder.then_some(text_encoder);
        memory::empty_cache(device)?;

        progress(Preparing::Loading("U-Net"));
        let mut unet = load_unet(&checkpoint, kind, device)?;
        let mut networks: Vec<&mut dyn Adaptable> = Vec::new();
        if config.train_unet {
            networks.push(&mut unet);
        }
        if let Some(text_encoder) = text_encoder.as_mut().filter(|_| config.train_text_encoder) {
            networks.push(text_encoder);
        }
        let layers: Vec<_> = networks.iter_mut().flat_map(|network| network.adaptable_layers()).collect();
        let targets = Targets::parse(&config.target_modules)?.select(&layers)?;
        let from = config.init_from.as_ref().map(|path| load_initial(path, &config, &layers, &targets)).transpose()?;
        let options = AdapterOptions {
            variant: config.variant.clone(),
            rank: config.lora_rank,
            alpha: config.lora_alpha,
            options: config.variant_options.clone(),
            rank_stabilised: config.use_rslora,
            ranks: Patterns::parse(&config.rank_pattern, &targets)?,
            alphas: Patterns::parse(&config.alpha_pattern, &targets)?,
            seed: config.seed,
        };
        let mut trained = TrainableAdapter::default();
        for network in networks {
            trained.attach(
                network,
                &targets,
                &plugins.variants,
                &options,
                from.as_ref().map(|(adapter, _)| adapter),
            )?;
        }

        adapter::kohya::check(&trained.export()?)?;

        let visits = dataset.items().iter().map(|item| Ok((item.repeats, encode::plan(&framing, item)?.target)));
        let sampler = EpochSampler::new(visits.collect::<Result<Vec<_>>>()?, config.batch_size, config.seed);
        if config.buckets.is_some() {
            notes.push(buckets_note(&sampler));
        }
        let plan = StepPlan::of_batches(
            sampler.epoch_length(),
            sampler.batches_per_epoch(),
            config.batch_size,
            config.gradient_accumulation_steps,
            config.length,
        );
        let lr_schedule = Schedule::new(config.lr_scheduler, config.lr_warmup, plan.steps);
        if lr_schedule.warmup() >= plan.steps {
            notes.push(format!(
                "the warm-up of {} steps is as long as the run of {}",
                lr_schedule.warmup(),
                plan.steps
            ));
        }
        // Reading a file of gigabytes twice is worth it only for a single file: folders have no such hash.
        let base_hashes = match config.base_model.is_file() {
            true => {
                Some((lora_io::hash::auto_v1(&config.base_model)?, lora_io::hash::file_sha256(&config.base_model)?))
            }
            false => None,
        };
        let scaler = if precision == DType::F16 { LossScaler::dynamic() } else { LossScaler::fixed() };
        memory::reset_peak(device)?;
        Ok(Self {
            text_encoder,
            init_from: from.map(|(_, provenance)| provenance),
            candidates: layers.len(),
            config,
            device,
            precision,
            checkpoint,
            dataset,
            processors,
            tokenizer,
            schedule,
            unet,
            text_states,
            encoder,
            latents,
            adapter: trained,
            targets,
            scaler,
            lr_schedule,
            framing,
            sampler,
            plan,
            step: 0,
            skipped: 0,
            skipped_in_a_row: 0,
            notes,
            base_hashes,
        })
    }
}

/// Encodes every picture once; unreadable ones are skipped, or end the run where the configuration is strict.
#[allow(clippy::too_many_arguments, reason = "the parts of one call of `prepare`")]
fn cache_latents(
    config: &TrainConfig,
    framing: &Framing,
    checkpoint: &Checkpoint,
    encoder: &mut Encoder,
    dataset: &mut ImageDataset,
    processors: &[Arc<dyn PictureProcessor>],
    notes: &mut Vec<String>,
    progress: &mut dyn FnMut(Preparing),
) -> Result<Vec<Tensor>> {
    let items = dataset.items().to_vec();
    let (mut latents, mut enlarged) = (Vec::with_capacity(items.len()), 0);
    for (index, item) in items.iter().enumerate() {
        let random = Stream::new(config.seed).at("cache").with(index as u64);
        match encode::load_picture(item, processors, framing, config.background, &random) {
            Ok(picture) => {
                enlarged += usize::from(encode::plan(framing, item)?.scale(item.size) > 1.0);
                let sample = encode::sample_latents(encoder, checkpoint, &item.path, &picture, &random.at("latent"))?;
                latents.push(sample.f_to_device(Device::Cpu)?);
            }
            Err(error @ lora_data::Error::Picture { .. }) if !config.strict => {
                dataset.skip(&item.path, error.to_string())
            }
            Err(error) => return Err(error.into()),
        }
        progress(Preparing::Latents(index + 1, items.len()));
    }
    if enlarged > 0 {
        notes.push(format!(
            "{enlarged} picture(s) are smaller than the size that they are trained at and were enlarged"
        ));
    }
    any_left(dataset)?;
    Ok(latents)
}

/// Which buckets are in use.
fn buckets_note(sampler: &EpochSampler) -> String {
    let buckets = sampler.visits_by_bucket();
    let list: Vec<_> = buckets.iter().map(|((width, height), visits)| format!("{width}×{height}: {visits}")).collect();
    format!("{} bucket(s), visits an epoch: {}", buckets.len(), list.join(", "))
}

/// Decodes every picture once, so that a broken one is met now and not hours into the run.
fn check_pictures(
    config: &TrainConfig,
    framing: &Framing,
    dataset: &mut ImageDataset,
    processors: &[Arc<dyn PictureProcessor>],
) -> Result<()> {
    for item in dataset.items().to_vec() {
        let random = Stream::new(config.seed).at("check");
        match encode::load_picture(&item, processors, framing, config.background, &random) {
            Ok(_) => {}
            Err(error @ lora_data::Error::Picture { .. }) if !config.strict => {
                dataset.skip(&item.path, error.to_string())
            }
            Err(error) => return Err(error.into()),
        }
    }
    any_left(dataset)
}

/// An error where every picture had to be skipped.
fn any_left(dataset: &ImageDataset) -> Result<()> {
    match dataset.skipped().first() {
        Some((path, reason)) if dataset.items().is_empty() => {
            let reason = format!("no picture could be decoded; the first: {reason}");
            Err(lora_data::Error::Picture { path: path.clone(), reason }.into())
        }
        _ => Ok(()),
    }
}

/// The adapter to go on from, with its file name and hash: the same layers and rank as the configuration's.
fn load_initial(
    path: &Path,
    config: &TrainConfig,
    layers: &[TargetLayer],
    targets: &[TargetLayer],
) -> Result<(Adapter, (String, String))> {
    let mut adapter = adapter::read(path)?.adapter;
    adapter::fit(path, &mut adapter, layers)?;
    let differs = |reason: String| Err(Error::InitFrom { path: path.to_owned(), reason });
    if let Some((module, other)) = adapter.modules.iter().find(|(_, module)| module.rank != config.lora_rank) {
        return differs(format!(
            "{module} has rank {}, the configuration says lora_rank = {}; make them equal",
            other.rank, config.lora_rank
        ));
    }
    if let Some((module, other)) = adapter.modules.iter().find(|(_, module)| module.alpha != config.lora_alpha) {
        return differs(format!(
            "{module} has alpha {}, the configuration says lora_alpha = {}; make them equal",
            other.alpha, config.lora_alpha
        ));
    }
    let missing: Vec<_> = targets.iter().filter(|target| !adapter.modules.contains_key(&target.path)).collect();
    if adapter.modules.len() != targets.len() || !missing.is_empty() {
        return differs(format!(
            "it adapts {} layers, target_modules names {}{}; use the same targets",
            adapter.modules.len(),
            targets.len(),
            missing
                .first()
                .map_or_else(String::new, |target| format!(" ({} among them is not in the file)", target.path))
        ));
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let hash = adapter.metadata.get("sshs_model_hash").cloned().unwrap_or_default();
    Ok((adapter, (name, hash)))
}
