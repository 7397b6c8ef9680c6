//! Preparing a run: everything that can go wrong before the first step goes wrong here.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use lora_core::target::{TargetLayer, Targets};
use lora_core::{Adapter, Component, DType};
use lora_data::bucket::Framing;
use lora_data::sampler::EpochSampler;
use lora_data::tokenizer::ClipTokenizer;
use lora_data::{Pictures, Source};
use lora_io::adapter;
use lora_models::diffusion::noise_schedule;
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{load_text_encoder, load_unet};
use lora_models::weights::{Frozen, Held, TrainedWeights};
use lora_torch::graph::Recorder;
use lora_torch::staging::Staging;
use lora_torch::tch::no_grad_guard;
use lora_torch::tensor::kind_of;
use lora_torch::{LossScaler, dry, memory};

use super::latents::{self, LatentSource};
use super::materials::Materials;
use super::survive::REMEDIES;
use super::{AUTOENCODER, Session, TEXT_ENCODER, Trained, TrainedAdapter, UNET, resume};
use crate::config::{StepPlan, TrainConfig, TrainMode};
use crate::encode::{self, Encoder, TextEncoding};
use crate::parameters::ParameterList;
use crate::plan::{Part, Phase};
use crate::plugins::Plugins;
use crate::schedule::Schedule;
use crate::state::{Economy, Settings};
use crate::trainable::{AdapterOptions, TrainableAdapter};
use crate::whole::WholeNetworks;
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

impl fmt::Display for Preparing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Preparing::Loading(part) => write!(f, "while loading the {part}"),
            Preparing::Latents(done, of) => write!(f, "while encoding pictures ({done} of {of} done)"),
            Preparing::Captions(done, of) => write!(f, "while encoding captions ({done} of {of} done)"),
        }
    }
}

/// Who is told how preparing goes.
pub(crate) trait Watch {
    /// What is done now.
    fn now(&mut self, preparing: Preparing);
    /// A phase is over.
    fn done(&mut self, phase: Phase);
}

/// One who wants to know what is done now.
struct Told<'t>(&'t mut dyn FnMut(Preparing));

impl Watch for Told<'_> {
    fn now(&mut self, preparing: Preparing) {
        (self.0)(preparing);
    }

    fn done(&mut self, _phase: Phase) {}
}

impl Session {
    /// Prepares a run: checks the output folder, scans the dataset, loads the base, encodes what is cached and hangs the
    /// adapter on its layers. `progress` is told how far it is.
    pub fn prepare(config: TrainConfig, plugins: &Plugins, progress: &mut dyn FnMut(Preparing)) -> Result<Self> {
        let mut stage = None;
        let mut watched = |now: Preparing| {
            stage = Some(now);
            progress(now);
        };
        let result =
            lora_torch::caught(|| Self::assemble(Materials::open(config, plugins)?, plugins, &mut Told(&mut watched)));
        result.map_err(|error| match stage {
            Some(stage) if error.is_out_of_memory() => Error::OutOfMemory {
                place: stage.to_string(),
                reason: error.to_string(),
                tried: Vec::new(),
                remedies: REMEDIES,
            },
            _ => error,
        })
    }

    /// From materials to a session: networks are loaded one after the other, what they encode once is encoded, those that are done
    /// leave, and the adapter is hung on the others' layers. The one order of a run, on a real device or, for a plan, on the one
    /// without memory.
    pub(crate) fn assemble(materials: Materials, plugins: &Plugins, watch: &mut dyn Watch) -> Result<Self> {
        let Materials { config, optimiser, mut pictures, disk, checkpoint, device, precision, state, .. } = materials;
        let (mut notes, base_hashes) = (materials.notes, materials.base_hashes);
        let _scope = materials.recorder.as_deref().map(Recorder::enter).transpose()?;
        let kind = kind_of(precision);
        let schedule = noise_schedule(&checkpoint)?;
        let text = TextEncoding {
            tokenizer: ClipTokenizer::new(config.text_cleaning),
            chunks: config.caption_chunks(),
            clip_skip: config.clip_skip,
            weighted: config.weighted_captions,
        };

        // The autoencoder comes and goes before anything else is on the device.
        watch.now(Preparing::Loading(AUTOENCODER));
        let mut encoder = Encoder::load(&checkpoint, precision, device)?.in_tiles(config.vae_tiling);
        let mut encoded = None;
        if config.cache_latents {
            let disk = disk.as_ref();
            let (left, all) = latents::cache(&config, &checkpoint, &mut encoder, pictures, disk, device, watch)?;
            (pictures, encoded) = (left, Some(all));
            if pictures.is_random() {
                let note =
                    "latents are cached, so random processors act once; cache_latents = false lets them act anew";
                notes.push(note.into());
            }
        } else {
            pictures = latents::check(&config, pictures)?;
        }
        notes.extend(enlarged_note(&pictures));
        let pictures = Arc::new(pictures);
        let mut sampler = pictures.sampler(config.seed);
        let mut settings = Settings::new(&config, &*pictures, precision);
        if let Some(state) = &state {
            settings.set_base(resume::base_identity(base_hashes.as_ref(), &checkpoint)?);
            resume::agree(state, &settings, true)?;
            sampler.restore(state.header().position);
        }
        let latents = match encoded {
            Some(all) => {
                // It must make room before anything else comes.
                drop(encoder);
                LatentSource::Cached(all)
            }
            None => LatentSource::fresh(encoder, precision, &pictures, &sampler, &config),
        };
        memory::empty_cache(device)?;
        watch.done(Phase::Pictures);

        let storage = config.base_storage;
        let full = config.train == TrainMode::Full;
        let (unet_weights, text_weights) = (TrainedWeights::default(), TrainedWeights::default());
        let staging = config.offload_base.then(|| Staging::new(device)).transpose()?;
        let held = |trains: bool, weights: &TrainedWeights, stays: bool| match full && trains {
            true => Held::Trained(weights.clone()),
            // What leaves before training would only be in the way of what passes through.
            false => Held::Frozen(Frozen { storage, staging: staging.clone().filter(|_| stays) }),
        };
        let keep_encoder = config.train_text_encoder || !pictures.captions_are_fixed();
        watch.now(Preparing::Loading(TEXT_ENCODER));
        let text_encoder = {
            let _label = Part::Weights(TEXT_ENCODER).label();
            let held = held(config.train_text_encoder, &text_weights, keep_encoder);
            load_text_encoder(&checkpoint, kind, device, held)?
        };
        if config.clip_skip > text_encoder.config().layers {
            return Err(lora_models::Error::Input {
                what: "clip_skip",
                expected: format!("1 to {}", text_encoder.config().layers),
                found: config.clip_skip.to_string(),
            }
            .into());
        }
        let mut text_states = BTreeMap::new();
        if !keep_encoder {
            let mut captions: Vec<String> = (0..pictures.count()).map(|index| pictures.plain_caption(index)).collect();
            captions.push(String::new());
            captions.push(config.samples.negative_prompt.clone());
            captions.extend(config.samples.prompts.iter().cloned());
            captions.sort();
            captions.dedup();
            let _guard = no_grad_guard();
            let identity = match disk {
                Some(_) => format!(
                    "{} {kind:?} {storage:?} {device:?}",
                    checkpoint.component(Component::TEXT_ENCODER)?.sha256()?
                ),
                None => String::new(),
            };
            let disk = disk.as_deref().map(|disk| (disk, identity.as_str()));
            for (index, caption) in captions.iter().enumerate() {
                let states = latents::text_states(disk, caption, &text, || {
                    let states = text.states(&text_encoder, &[caption], device, &Pass::default())?;
                    match encode::is_finite(&states)? {
                        true => Ok(states),
                        false => Err(Error::NotFinite {
                            stage: "the text encoder",
                            place: format!(" for the caption {caption:?}"),
                            remedy: "use precision = \"bf16\" or \"fp32\"",
                        }),
                    }
                })?;
                text_states.insert(caption.clone(), states.f_to_device(dry::host_of(device))?);
                watch.now(Preparing::Captions(index + 1, captions.len()));
            }
        }

        // A text encoder that is done makes room before the U-Net comes.
        let mut text_encoder = keep_encoder.then_some(text_encoder);
        memory::empty_cache(device)?;
        watch.done(Phase::Captions);

        watch.now(Preparing::Loading(UNET));
        let mut unet = {
            let _label = Part::Weights(UNET).label();
            load_unet(&checkpoint, kind, device, held(config.train_unet, &unet_weights, true))?
        };
        let mut init_from = None;
        let mut networks: Vec<&mut dyn Adaptable> = Vec::new();
        if config.train_unet {
            networks.push(&mut unet);
        }
        if let Some(text_encoder) = text_encoder.as_mut().filter(|_| config.train_text_encoder) {
            networks.push(text_encoder);
        }
        let mut parameters = ParameterList::new(optimiser, config.ema_decay);
        let trained = if full {
            let mut whole = WholeNetworks::default();
            whole.add(Component::UNET, &unet_weights, &mut parameters)?;
            whole.add(Component::TEXT_ENCODER, &text_weights, &mut parameters)?;
            Trained::Whole(whole)
        } else {
            let _label = Part::Adapter.label();
            let (adapter, from) = attach(networks, &config, plugins, &mut parameters)?;
            if !dry::is_dry(device) {
                adapter::kohya::check(&adapter.adapter.export()?)?;
            }
            init_from = from;
            Trained::Adapter(adapter)
        };
        watch.done(Phase::Loading);

        if pictures.datasets().any(|dataset| matches!(dataset.framing, Framing::Buckets(_))) {
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
        let scaler = if precision == DType::F16 { LossScaler::dynamic() } else { LossScaler::fixed() };
        memory::reset_peak(device)?;
        let mut session = Self {
            text_encoder,
            init_from,
            config,
            device,
            precision,
            checkpoint,
            pictures,
            text,
            schedule,
            unet,
            text_states,
            latents,
            trained,
            parameters,
            scaler,
            lr_schedule,
            sampler,
            plan,
            step: 0,
            skipped: 0,
            skipped_in_a_row: 0,
            settings,
            resumed: None,
            economy: Economy::default(),
            recorder: materials.recorder,
            _limit: materials.limit,
            graphs: materials.graphs,
            tried: Vec::new(),
            torn: false,
            notes,
            base_hashes,
        };
        if let Some(state) = &state {
            session.take_up(state)?;
        }
        Ok(session)
    }
}

/// Hangs the adapter on the networks' targeted layers; with it the name and hash of the file that it goes on from.
fn attach(
    mut networks: Vec<&mut dyn Adaptable>,
    config: &TrainConfig,
    plugins: &Plugins,
    parameters: &mut ParameterList,
) -> Result<(TrainedAdapter, Option<(String, String)>)> {
    let layers: Vec<_> = networks.iter_mut().flat_map(|network| network.adaptable_layers()).collect();
    let targets = Targets::parse(&config.target_modules)?.select(&layers)?;
    let from = config.init_from.as_ref().map(|path| load_initial(path, config, &layers, &targets)).transpose()?;
    let options = AdapterOptions::of(config, &targets)?;
    let mut adapter = TrainableAdapter::default();
    let initial = from.as_ref().map(|(adapter, _)| adapter);
    for network in networks {
        adapter.attach(network, &targets, &plugins.variants, &options, initial, parameters)?;
    }
    Ok((TrainedAdapter { adapter, targets, candidates: layers.len() }, from.map(|(_, provenance)| provenance)))
}

/// How many pictures are enlarged, and which the most.
fn enlarged_note(pictures: &Pictures) -> Option<String> {
    let scale = |index: usize| pictures.plan(index).scale(pictures.items()[index].size);
    let enlarged: Vec<usize> = (0..pictures.items().len()).filter(|&index| scale(index) > 1.0).collect();
    let most = enlarged.iter().copied().max_by(|&a, &b| scale(a).total_cmp(&scale(b)))?;
    let name = pictures.items()[most].file.path.file_name().map(|name| name.to_string_lossy().into_owned());
    Some(format!(
        "{} picture(s) are smaller than the size that they are trained at and were enlarged, {} the most, {:.1} times",
        enlarged.len(),
        name.unwrap_or_default(),
        scale(most)
    ))
}

/// Which buckets are in use.
fn buckets_note(sampler: &EpochSampler) -> String {
    let buckets = sampler.visits_by_shape();
    let list: Vec<_> = buckets.iter().map(|(shape, visits)| format!("{shape}: {visits}")).collect();
    format!("{} bucket(s), visits an epoch: {}", buckets.len(), list.join(", "))
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
