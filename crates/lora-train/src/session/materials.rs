//! What a run is made of and what is known of it before the first network is loaded: the configuration as it was
//! planned, the data, the base's files, the device. What is made of that is `prepare`'s business.

use std::sync::Arc;

use lora_core::DType;
use lora_data::PromptLine;
use lora_data::cache::DiskCache;
use lora_data::source::Source;
use lora_io::checkpoint::Checkpoint;
use lora_torch::graph::Recorder;
use lora_torch::memory::Limit;
use lora_torch::tch::Device;
use lora_torch::tensor::kind_of;
use lora_torch::{device, dry};

use super::claim::Claim;
use super::graphs::{self, StepGraphs};
use super::preflight;
use super::resume;
use crate::base::DataOpening;
use crate::config::{LrScheduler, TrainConfig, TrainMode};
use crate::optimiser::OptimiserState;
use crate::plan;
use crate::plugins::Plugins;
use crate::ranks::{self, Ranks};
use crate::state::{Settings, StateFile};
use crate::{Error, Result};

/// What a run is made of.
#[derive(Debug)]
pub(crate) struct Materials {
    pub(super) config: TrainConfig,
    pub(super) optimiser: OptimiserState,
    pub(super) source: Arc<dyn Source>,
    /// Items that are not trained on.
    pub(super) held_out: Option<Box<dyn Source>>,
    pub(super) disk: Option<Arc<DiskCache>>,
    pub(super) checkpoint: Arc<Checkpoint>,
    /// Hashes of a base in one file: as older programs make it, and SHA-256.
    pub(super) base_hashes: Option<(String, String)>,
    pub(super) device: Device,
    pub(super) precision: DType,
    /// The state that the run goes on from.
    pub(super) state: Option<StateFile>,
    /// Holds the allocator to `vram_budget`.
    pub(super) limit: Option<Limit>,
    /// Of the folder that the run writes into.
    pub(super) claim: Option<Claim>,
    pub(super) recorder: Option<Arc<Recorder>>,
    /// Where steps are recorded.
    pub(super) graphs: Option<StepGraphs>,
    pub(super) ranks: Ranks,
    pub(super) notes: Vec<String>,
}

impl Materials {
    /// Of a run that is to happen: everything that can go wrong before the base is loaded goes wrong here.
    pub(super) fn open(config: TrainConfig, plugins: &Plugins, ranks: Ranks) -> Result<Self> {
        for dataset in &config.datasets {
            plugins.processors.chain(&dataset.processors)?;
        }
        plugins.variants.get(&config.variant)?;
        plugins.callbacks(&config.callbacks)?;
        let (optimiser, mut notes) = optimiser(&config, plugins)?;
        let mut claim = None;
        if ranks.leads() {
            lora_io::atomic::check_writable(&config.output_dir)?;
            claim = Some(Claim::of(&config.output_dir)?);
            lora_io::atomic::clear_partial(&config.output_dir);
        }
        let (config, planned) = plan::applied(config, plugins)?;
        notes.extend(planned);
        notes.extend(config.idle_keys());
        notes.extend(config.samples.prompts.iter().filter_map(|prompt| unread(prompt)));
        let disk = config.cache_dir.as_ref().map(DiskCache::open).transpose()?.map(Arc::new);
        let checkpoint = Arc::new(plugins.bases.configured(&config)?);
        let registration = plugins.bases.registration(&checkpoint)?;
        registration.check(&config)?;
        let device = ranks::device(&config)?;
        let precision = precision(&config, device, &mut notes);
        device::check_kind(device, kind_of(precision))?;
        notes.extend(preflight::check(&config, &checkpoint, precision, plugins)?);
        notes.extend(other_use(&checkpoint));
        let opening = DataOpening::new(&config, &plugins.processors, &checkpoint, disk.as_ref());
        let data = registration.data_of(&config);
        let mut source = (data.open)(&opening)?;
        let held_out = config.validation_split.map(|split| source.hold_out(split, config.seed)).transpose()?;
        if let Some(held_out) = &held_out {
            let noun = data.noun;
            notes.push(format!("{} of the data (a {noun} each) are held out, not trained on", held_out.count()));
        }
        let source: Arc<dyn Source> = source.into();
        let limit = config.vram_budget.map(|budget| plan::enforce(budget, device));
        let limit = limit.transpose().unwrap_or_else(|error| {
            notes.push(format!("vram_budget is kept to as far as it was planned, but nothing enforces it: {error}"));
            None
        });
        let recorder = graphs::recorder(&config, device);
        let _scope = recorder.as_deref().map(Recorder::enter).transpose()?;
        // A state that is another run's is refused before anything takes time.
        let state = resume::open(&config)?;
        let settings = Settings::new(&config, &registration.groups().collect::<Vec<_>>(), &*source, precision);
        if let Some(state) = &state {
            resume::agree(state, &settings, false)?;
        }
        ranks.compare(&settings, None)?;
        notes.extend(checkpoint.fused_notes().iter().cloned());
        if let Some(example) = checkpoint.unused().first() {
            notes.push(format!("{} tensors of the base are not used, {example} among them", checkpoint.unused().len()));
        }
        // Reading a file of gigabytes twice is worth it only for a single file: folders have no such hash.
        let base_hashes = match config.base_model.is_file() {
            true => {
                Some((lora_io::hash::auto_v1(&config.base_model)?, lora_io::hash::file_sha256(&config.base_model)?))
            }
            false => None,
        };
        let graphs = recorder.as_ref().map(|recorder| StepGraphs::new(Some(Arc::clone(recorder))));
        Ok(Self {
            config,
            optimiser,
            source,
            held_out,
            disk,
            checkpoint,
            base_hashes,
            device,
            precision,
            state,
            limit: limit.flatten(),
            claim,
            recorder,
            graphs,
            ranks,
            notes,
        })
    }

    /// Of a dry run: no file but the base's headers is read, and none is written.
    pub(crate) fn dry(
        config: TrainConfig,
        checkpoint: Arc<Checkpoint>,
        source: Box<dyn Source>,
        device: Device,
        plugins: &Plugins,
    ) -> Result<Self> {
        let (optimiser, mut notes) = optimiser(&config, plugins)?;
        let precision = precision(&config, device, &mut notes);
        let recorded = !dry::platform(device).is_cpu() && graphs::can_record(&config);
        // What stands in for the data stands in for what is held out of them.
        let held_out = config.validation_split.map(|_| source.of_another(&config.output_dir)).transpose()?;
        Ok(Self {
            optimiser,
            source: source.into(),
            held_out,
            disk: None,
            checkpoint,
            base_hashes: None,
            device,
            precision,
            state: None,
            limit: None,
            claim: None,
            recorder: None,
            graphs: recorded.then(|| StepGraphs::new(None)),
            ranks: if config.place.as_ref().is_some_and(|place| place.ranks > 1) {
                Ranks::Planned
            } else {
                Ranks::Alone
            },
            notes,
            config,
        })
    }
}

/// What to know of a sample's prompt in which something that looks like an option stays.
fn unread(prompt: &str) -> Option<String> {
    let line = PromptLine::parse(prompt);
    let options: Vec<String> = line.unread().map(|name| format!("--{name}")).collect();
    let told = || {
        let options = options.join(", ");
        format!(
            "the sample prompt `{prompt}`: {options} is no option here, or lacks its value, and stays in the prompt"
        )
    };
    (!options.is_empty()).then(told)
}

/// The number type of arithmetic.
fn precision(config: &TrainConfig, device: Device, notes: &mut Vec<String>) -> DType {
    let platform = dry::platform(device);
    let precision = plan::precision_on(platform, config.precision);
    if precision != config.precision {
        notes.push("precision fp16 is for GPUs; on the CPU this run trains in fp32".into());
    }
    if config.offload_base && platform.is_cpu() {
        notes.push("offload_base is for GPUs; on the CPU it costs time and saves nothing".into());
    }
    precision
}

/// What a diffusers folder is made for beyond what it is trained for here.
fn other_use(checkpoint: &Checkpoint) -> Option<String> {
    let pipeline = checkpoint.index()?.get("_class_name")?.as_str()?;
    let begins_with_a_picture = ["Edit", "Kontext", "Inpaint", "Img2Img", "Pix2Pix", "Fill"];
    begins_with_a_picture.iter().any(|own| pipeline.contains(own)).then(|| {
        format!(
            "the base is for {pipeline}, which begins with a picture; here it is trained to draw from captions alone, which may cost it some of that"
        )
    })
}

/// The optimiser of a configuration, and what to know of it.
fn optimiser(config: &TrainConfig, plugins: &Plugins) -> Result<(OptimiserState, Vec<String>)> {
    let chosen = plugins.optimisers.make(&config.optimizer, config.learning_rate, &config.optimizer_args)?;
    if config.extra.number("scale_weight_norms").is_some() {
        let message = match config.train {
            TrainMode::Full => Some("limits updates of an adapter; take it out, or train = lora".to_owned()),
            TrainMode::Adapter if chosen.optimiser.evaluates_elsewhere() => {
                Some(format!("{} saves others than the weights that are scaled; take another", config.optimizer))
            }
            TrainMode::Adapter => None,
        };
        if let Some(message) = message {
            return Err(config.refused([("scale_weight_norms", message)]).into());
        }
    }
    let mut notes = chosen.optimiser.notes(config.learning_rate);
    if chosen.optimiser.evaluates_elsewhere() {
        if config.ema_decay > 0.0 {
            return Err(Error::OptimiserArgument {
                optimiser: config.optimizer.clone(),
                argument: "ema_decay".into(),
                reason: "it averages the weights itself; take ema_decay out".into(),
            });
        }
        if config.lr_scheduler != LrScheduler::Constant {
            notes.push(format!(
                "{} needs no schedule of the learning rate and learns best with lr_scheduler = \"constant\"",
                config.optimizer
            ));
        }
    }
    Ok((OptimiserState::new(chosen), notes))
}
