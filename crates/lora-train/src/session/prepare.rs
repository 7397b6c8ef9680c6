//! Preparing a run: everything that can go wrong before the first step goes wrong here.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use lora_core::target::{Patterns, TargetLayer};
use lora_core::{Component, DType};
use lora_data::PromptLine;
use lora_data::cache::DiskCache;
use lora_data::source::Source;
use lora_io::adapter;
use lora_models::weights::{Frozen, Held, TrainedWeights};
use lora_torch::graph::Recorder;
use lora_torch::staging::Staging;
use lora_torch::tch::Device;
use lora_torch::{LossScaler, dry, memory};

use super::encoded::{self, Examples};
use super::materials::Materials;
use super::out_of_memory::remedies;
use super::{Feed, Origin, Session, Trained, TrainedAdapter, resume, trained};
use crate::base::{Base, Network, Opening, Subject, Tensors};
use crate::bytes::show;
use crate::config::{StepPlan, TrainConfig, TrainMode};
use crate::full::TrainedNetworks;
use crate::initial::{Initial, Trains};
use crate::meter::MemoryPart;
use crate::parameters::ParameterList;
use crate::plan::Phase;
use crate::plugins::Plugins;
use crate::ranks::Ranks;
use crate::schedule::Schedule;
use crate::state::{Progress, Settings};
use crate::trainable::{AdapterOptions, Biases, TrainableAdapter, TrainedTokens, adaptable, chosen};
use crate::{Error, Result};

/// How far preparing has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Preparing {
    /// Giving captions to pictures without one: done, of.
    Labels(usize, usize),
    /// Reading the base model's part of this name.
    Loading(&'static str),
    /// Encoding examples: done, of.
    Examples(usize, usize),
    /// Encoding captions: done, of.
    Captions(usize, usize),
}

impl fmt::Display for Preparing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Preparing::Labels(done, of) => write!(f, "while giving captions ({done} of {of} done)"),
            Preparing::Loading(part) => write!(f, "while loading the {part}"),
            Preparing::Examples(done, of) => write!(f, "while encoding examples ({done} of {of} done)"),
            Preparing::Captions(done, of) => write!(f, "while encoding captions ({done} of {of} done)"),
        }
    }
}

/// Observes how a run is prepared.
pub(crate) trait Watch {
    /// What is done now.
    fn now(&mut self, preparing: Preparing);
    /// A phase is over.
    fn done(&mut self, phase: Phase);
}

/// Passes on what is done now, and nothing else.
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
    ///
    /// # Errors
    /// [`Error::Config`] with everything that is wrong with keys, [`Error::Base`] for a base that is not trained,
    /// [`Error::Data`] for data that cannot be used, [`Error::OtherRun`] for a state that is not this run's,
    /// [`Error::OutOfMemory`] with the stage that it ran out in.
    pub fn prepare(config: TrainConfig, plugins: &Plugins, progress: &mut dyn FnMut(Preparing)) -> Result<Self> {
        let ranks = Ranks::join(&config)?;
        Self::prepare_among(ranks, config, plugins, progress)
    }

    /// The same as one of ranks that have found each other.
    pub(crate) fn prepare_among(
        ranks: Ranks,
        config: TrainConfig,
        plugins: &Plugins,
        progress: &mut dyn FnMut(Preparing),
    ) -> Result<Self> {
        let mut stage = None;
        let mut watched = |now: Preparing| {
            stage = Some(now);
            progress(now);
        };
        let mut of_base = "a smaller batch_size";
        let others = ranks.clone();
        let result = lora_torch::caught(|| {
            let materials = Materials::open(config, plugins, ranks)?;
            of_base = plugins.bases.registration(&materials.checkpoint)?.remedies;
            Self::assemble(materials, plugins, &mut Told(&mut watched))
        });
        let result = result.map_err(|error| match stage {
            Some(stage) if error.is_out_of_memory() => Error::OutOfMemory {
                place: stage.to_string(),
                reason: error.to_string(),
                tried: Vec::new(),
                remedies: remedies(of_base),
            },
            _ => error,
        });
        result.inspect_err(|error| others.fail(error))
    }

    /// From materials to a session: networks are loaded one after the other, what they encode once is encoded, those that are done
    /// leave, and the adapter is hung on the others' layers. The one order of a run, on a real device or, for a plan, on the one
    /// without memory.
    pub(crate) fn assemble(materials: Materials, plugins: &Plugins, watch: &mut dyn Watch) -> Result<Self> {
        let _scope = materials.recorder.as_deref().map(Recorder::enter).transpose()?;
        let (config, device, precision) = (&materials.config, materials.device, materials.precision);
        let mut notes = materials.notes;
        let opening = Opening::new(config, &materials.checkpoint, device, precision);
        let registration = plugins.bases.registration(&materials.checkpoint)?;
        let mut base = plugins.bases.open(&opening)?;
        notes.extend(base.notes());
        let networks = base.networks().to_vec();
        // What passes through the ring are the weights of the network that steps are made of, above all.
        let mut loader = {
            let _label = networks.last().map(|network| MemoryPart::Weights(network.title).label());
            Loader::new(config, device)?
        };

        // Before anything else, and before it is known which examples are usable.
        let encoder = networks.iter().find(|network| network.encodes == Some(Subject::Examples));
        let disk = materials.disk.as_ref();
        let mut source = materials.source;
        let kept = loader.encode_examples(&mut *base, encoder, &mut source, disk, &materials.ranks, watch)?;
        if kept.is_some() && !source.variations_are_all() {
            let most = (0..source.count()).map(|item| source.variations(item)).max().unwrap_or(1);
            notes.push(format!(
                "latents are cached: of each picture {most} variation(s) of what is random; image_variations keeps more, cache_latents = false draws anew at each visit"
            ));
        }
        if config.gives("image_variations") && !source.is_random() {
            notes.push("image_variations changes nothing without a random processor, as flip".into());
        }
        let mut sampler = source.sampler(config.seed);
        let mut settings = Settings::new(config, &registration.groups().collect::<Vec<_>>(), &*source, precision);
        if let Some(state) = &materials.state {
            let hashes = materials.base_hashes.as_ref();
            settings.set_base(resume::base_identity(hashes, &materials.checkpoint, config)?);
            resume::agree(state, &settings, true)?;
            sampler.restore(state.header().position);
        }
        let began_with = materials.state.as_ref().map_or(materials.ranks.count(), |state| state.header().ranks);
        let plan = StepPlan::of_batches(
            sampler.epoch_length(),
            sampler.batches_per_epoch(),
            config.batch_size,
            config.gradient_accumulation_steps * began_with,
            config.length,
        );
        let examples = match kept {
            Some((network, all)) => Examples::Kept(network, all),
            None => Examples::fresh(
                encoder.map(|network| network.component),
                &source,
                &sampler,
                config,
                (plan.accumulation, materials.ranks.share()),
            ),
        };
        memory::empty_cache(device)?;
        if encoder.is_some() {
            watch.done(Phase::Examples);
        }

        let kept = loader.encode_captions(&mut *base, &*source, disk, &materials.ranks, watch)?;
        if networks.iter().any(|network| network.encodes == Some(Subject::Captions)) {
            watch.done(Phase::Captions);
        }

        for network in networks.iter().filter(|network| network.encodes.is_none()) {
            loader.load(&mut *base, network, true, watch)?;
        }
        let mut parameters = ParameterList::new(materials.optimiser, config.ema_decay);
        let (trained, init_from) = match config.train {
            TrainMode::Full => (Trained::Whole(loader.whole(&*base, &mut parameters)?), None),
            TrainMode::Adapter => {
                let _label = MemoryPart::Adapter.label();
                let (adapter, from) = attach(&mut *base, config, plugins, &mut parameters, &mut notes)?;
                if !dry::is_dry(device) {
                    let (trained, family) = (adapter.adapter.export()?, materials.checkpoint.family());
                    match family.image {
                        true => adapter::kohya::check(&trained, Some(family))?,
                        false => adapter::peft::check(&trained)?,
                    }
                }
                (Trained::Adapter(adapter), from)
            }
        };
        watch.done(Phase::Loading);

        let lr_schedule = Schedule::new(config, plan.steps);
        if lr_schedule.warmup() >= plan.steps {
            notes.push(format!(
                "the warm-up of {} steps is as long as the run of {}",
                lr_schedule.warmup(),
                plan.steps
            ));
        }
        let scaler = if precision == DType::F16 { LossScaler::dynamic() } else { LossScaler::fixed() };
        memory::reset_peak(device)?;
        let data = registration.data_of(config);
        let mut session = Self {
            base,
            device,
            precision,
            config: materials.config,
            origin: Origin {
                checkpoint: materials.checkpoint,
                base_hashes: materials.base_hashes,
                init_from,
                resumed: None,
            },
            remedies: registration.remedies,
            feed: Feed { data, source, sampler, examples, kept, held_out: materials.held_out },
            trained,
            parameters,
            scaler,
            lr_schedule,
            plan,
            progress: Progress::default(),
            settings,
            recorder: materials.recorder,
            _limit: materials.limit,
            _claim: materials.claim,
            graphs: materials.graphs,
            ranks: materials.ranks,
            tried: Vec::new(),
            told: Vec::new(),
            torn: false,
            notes,
        };
        if let Some(state) = &materials.state {
            session.take_up(state)?;
        }
        session.meet_the_others()?;
        Ok(session)
    }
}

impl Session {
    /// Makes sure that all ranks begin with the same, and notes how they share a step.
    fn meet_the_others(&mut self) -> Result<()> {
        if self.ranks.count() == 1 {
            return Ok(());
        }
        if self.settings.base().is_none() {
            let Origin { checkpoint, base_hashes, .. } = &self.origin;
            self.settings.set_base(resume::base_identity(base_hashes.as_ref(), checkpoint, &self.config)?);
        }
        self.ranks.compare(&self.settings, Some((self.progress.step, &self.parameters)))?;
        let (ranks, shared) = (self.ranks.count(), self.plan.accumulation);
        self.notes.push(format!(
            "{ranks} ranks share the {shared} micro-batch(es) of a step, and exchange {} of gradients for it",
            show(self.ranks.bytes_sent(&self.parameters))
        ));
        if shared % ranks != 0 {
            self.notes
                .push(format!("{shared} micro-batches do not go evenly into {ranks} ranks: some wait for others"));
        }
        Ok(())
    }
}

/// What a network made of each example.
type KeptExamples = (Component, Vec<Vec<Tensors>>);

/// Loads networks as a configuration has them held, and keeps the weights that train.
struct Loader<'c> {
    config: &'c TrainConfig,
    device: Device,
    staging: Option<Staging>,
    trained: BTreeMap<Component, TrainedWeights>,
}

impl<'c> Loader<'c> {
    fn new(config: &'c TrainConfig, device: Device) -> Result<Self> {
        let staging = config.offload_base.then(|| Staging::new(device)).transpose()?;
        Ok(Self { config, device, staging, trained: BTreeMap::new() })
    }

    /// Loads a network; `stays`: it is there while steps are taken.
    fn load(&mut self, base: &mut dyn Base, network: &Network, stays: bool, watch: &mut dyn Watch) -> Result<()> {
        watch.now(Preparing::Loading(network.title));
        let held = match self.config.train == TrainMode::Full && network.trains {
            true => Held::Trained(self.trained.entry(network.component).or_default().clone()),
            // What leaves before training would only be in the way of what passes through.
            false => Held::Frozen(Frozen {
                staging: self.staging.clone().filter(|_| stays),
                ..Frozen::stored(self.config.base_storage)
            }),
        };
        let _label = MemoryPart::Weights(network.title).label();
        base.load(network.component, held)
    }

    /// What the network that encodes examples makes of them, where that is kept, and the examples that are usable. It leaves the
    /// device where everything is encoded.
    fn encode_examples(
        &mut self,
        base: &mut dyn Base,
        encoder: Option<&Network>,
        source: &mut Arc<dyn Source>,
        disk: Option<&Arc<DiskCache>>,
        ranks: &Ranks,
        watch: &mut dyn Watch,
    ) -> Result<Option<KeptExamples>> {
        let keeps = self.config.cache_latents;
        if let Some(encoder) = encoder {
            self.load(base, encoder, !keeps, watch)?;
        }
        let Some(network) = encoder.map(|network| network.component).filter(|_| keeps) else {
            encoded::check(self.config, source)?;
            return Ok(None);
        };
        let all = encoded::examples(base, network, self.config, source, (disk, ranks), self.device, watch)?;
        base.unload(network);
        Ok(Some((network, all)))
    }

    /// What networks make of captions that do not change, by network and caption. Those that are done leave the device.
    fn encode_captions(
        &mut self,
        base: &mut dyn Base,
        source: &dyn Source,
        disk: Option<&Arc<DiskCache>>,
        ranks: &Ranks,
        watch: &mut dyn Watch,
    ) -> Result<BTreeMap<Component, BTreeMap<String, Tensors>>> {
        let mut kept = BTreeMap::new();
        for network in base.networks().to_vec() {
            if network.encodes != Some(Subject::Captions) {
                continue;
            }
            let stays = network.trains || !source.captions_are_fixed();
            self.load(base, &network, stays, watch)?;
            if !stays {
                let (component, captions) = (network.component, captions_of(self.config, source, base));
                kept.insert(
                    component,
                    encoded::captions(base, component, &captions, (disk, ranks), self.device, watch)?,
                );
                // It makes room before the next one comes.
                base.unload(component);
            }
            memory::empty_cache(self.device)?;
        }
        Ok(kept)
    }

    /// The weights of whole networks, taken into the list of what is trained.
    fn whole(&self, base: &dyn Base, parameters: &mut ParameterList) -> Result<TrainedNetworks> {
        let mut whole = TrainedNetworks::default();
        for network in trained(base) {
            if let Some(weights) = self.trained.get(&network.component) {
                whole.add(network.component, weights, parameters)?;
            }
        }
        Ok(whole)
    }
}

/// All captions of a run whose captions do not change: of the items, of dropped captions, of samples, of the base's own.
fn captions_of(config: &TrainConfig, source: &dyn Source, base: &dyn Base) -> Vec<String> {
    let mut captions: Vec<String> = (0..source.count()).map(|item| source.plain_caption(item)).collect();
    captions.push(String::new());
    let beside: Vec<String> = captions.iter().flat_map(|caption| base.captions(caption)).collect();
    captions.extend(beside);
    captions.push(config.samples.negative_prompt.clone());
    for prompt in config.samples.prompts.iter().map(|prompt| PromptLine::parse(prompt)) {
        captions.push(prompt.text);
        captions.extend(prompt.negative);
    }
    captions.sort();
    captions.dedup();
    captions
}

/// Hangs the adapter on the networks' targeted layers; with it the name and hash of the file that it goes on from, and what to
/// know of that.
fn attach(
    base: &mut dyn Base,
    config: &TrainConfig,
    plugins: &Plugins,
    parameters: &mut ParameterList,
    notes: &mut Vec<String>,
) -> Result<(TrainedAdapter, Option<(String, String)>)> {
    let networks = trained(base);
    let mut layers = Vec::new();
    for network in &networks {
        if let Some(network) = base.adaptable(network.component) {
            layers.extend(network.adaptable_layers()?);
        }
    }
    let (targets, saved) = chosen(config, &layers)?;
    let tokens = TrainedTokens::of(config, &layers, &[&*targets, &*saved].concat())
        .map_err(|message| config.refused([("trainable_token_indices", message)]))?;
    let from = initial(config, plugins, &*base, (&layers, &targets, &saved), tokens.as_ref())?;
    let options = AdapterOptions::of(config, &targets)?;
    let mut adapter = TrainableAdapter::default();
    let initial = from.as_ref().map(|from| &from.adapter);
    for network in &networks {
        if let Some(network) = base.adaptable(network.component) {
            adapter.attach(network, &targets, &plugins.variants, &options, initial, parameters)?;
            let whole = AdapterOptions::whole(config.seed);
            adapter.attach(network, &saved, &plugins.variants, &whole, initial, parameters)?;
            if let Some(tokens) = tokens.as_ref().filter(|tokens| tokens.embedding.component == network.component()) {
                adapter.attach_tokens(network, tokens, &plugins.variants, initial, parameters)?;
            }
            if Biases::of(config) == Biases::All {
                adapter.attach_biases(network, &plugins.variants, initial, parameters)?;
            }
        }
    }
    parameters.set_rates(&adapter.rates(&targets, &Patterns::parse(&config.learning_rate_pattern, &targets)?));
    notes.extend(from.as_ref().and_then(|from| from.note(adapter.begun(), &targets)));
    Ok((TrainedAdapter { adapter, targets, candidates: adaptable(&layers).len() }, from.map(|from| from.provenance)))
}

/// The adapter that a run begins with, held against all layers of what trains, those that carry adapters and those that are
/// trained whole.
pub(super) fn initial(
    config: &TrainConfig,
    plugins: &Plugins,
    base: &dyn Base,
    (layers, targets, saved): (&[TargetLayer], &[TargetLayer], &[TargetLayer]),
    tokens: Option<&TrainedTokens>,
) -> Result<Option<Initial>> {
    let Some(path) = &config.init_from else { return Ok(None) };
    let components: Vec<_> = trained(base).iter().map(|network| network.component).collect();
    let table = layers.iter().filter(|layer| tokens.is_some_and(|own| own.embedding == layer.path));
    let others: Vec<_> = saved.iter().chain(table).cloned().collect();
    let trains = Trains { components: &components, layers, targets, others: &others };
    Initial::read(path, config, plugins, &trains).map(Some)
}
