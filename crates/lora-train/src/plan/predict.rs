//! From a configuration and a base's header to the peak of each phase of a run. The run's own order is followed: what
//! [`crate::session`] loads, keeps and drops is loaded, kept and dropped here, on a tape without elements.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use lora_core::target::{TargetLayer, Targets};
use lora_core::variant::Variant;
use lora_core::{Component, DType};
use lora_data::bucket::Framing;
use lora_models::networks::Vae;
use lora_models::weights::SMALL;
use lora_torch::TchBackend;
use lora_torch::device::CUBLAS_WORKSPACE_BYTES;
use lora_torch::frozen::Storage;
use lora_torch::staging::{packed_bytes, ring_bytes};
use lora_torch::tch::Kind;
use lora_torch::tensor::kind_of;

use super::base::{Base, Shapes};
use super::layers::{DropoutMasks, Factors, LayerAdapter, Layers, Trained};
use super::meter::{Block, Part, Usage};
use super::tape::{Platform, Tape, Value};
use super::{text, unet, vae};
use crate::Result;
use crate::config::{TrainConfig, TrainMode};
use crate::optimiser::Optimiser;
use crate::plugins::Plugins;
use crate::session::can_record;
use crate::trainable::AdapterOptions;

/// Timesteps that validation looks at in one batch.
const VALIDATION_BATCH: usize = 16;

/// Numbers that are brought into few bytes, or made whole of four bits, at once.
pub(super) const CHUNK: u64 = 1 << 20;

/// A part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The autoencoder is loaded; pictures are encoded, where that is done before training.
    Pictures,
    /// The text encoder is loaded; captions are encoded, where they do not change.
    Captions,
    /// The U-Net is loaded.
    Loading,
    /// Steps.
    Training,
    /// Pictures are drawn.
    Samples,
    /// The loss on other pictures.
    Validation,
}

impl Phase {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Pictures => "encode pictures",
            Phase::Captions => "encode captions",
            Phase::Loading => "load the U-Net",
            Phase::Training => "train",
            Phase::Samples => "draw samples",
            Phase::Validation => "validate",
        }
    }
}

/// The peak of one phase.
#[derive(Debug, Clone, serde::Serialize)]
pub struct PhasePeak {
    /// The phase.
    pub phase: Phase,
    /// Bytes by part at the moment when most were held.
    pub parts: Usage,
    /// Bytes beside tensors: what the allocator holds without using it, the driver's context or the process itself.
    pub overhead: u64,
}

impl PhasePeak {
    /// All bytes.
    pub fn total(&self) -> u64 {
        self.parts.total() + self.overhead
    }
}

/// The peaks of a run.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Prediction {
    /// Phases in their order.
    pub phases: Vec<PhasePeak>,
    /// Where steps are recorded as CUDA graphs.
    pub recordings: Option<Recordings>,
}

/// What recorded steps keep for themselves. It is no part of the peaks: where there is no room, they make it.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Recordings {
    /// Bytes of a step, as they are part of the training's peak.
    pub bytes: u64,
    /// Bytes in all when something else comes on top of them: samples, validation, the first visit of a further shape of
    /// pictures.
    pub most: u64,
}

impl Prediction {
    /// Bytes at the highest of all peaks.
    pub fn peak(&self) -> u64 {
        self.phases.iter().map(PhasePeak::total).max().unwrap_or(0)
    }

    /// The phase that needs most.
    pub fn highest(&self) -> Option<&PhasePeak> {
        self.phases.iter().max_by_key(|phase| phase.total())
    }
}

/// Where a run happens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Machine {
    pub(super) platform: Platform,
    /// Bytes beside tensors, whatever they are.
    pub(super) fixed: u64,
    /// The allocator's own share of what tensors take.
    pub(super) share: f64,
}

impl Machine {
    /// What arithmetic is done in for a configured precision: fp16 is for GPUs.
    pub(super) fn precision(&self, configured: DType) -> DType {
        match (configured, self.platform) {
            (DType::F16, Platform::Cpu { .. }) => DType::F32,
            _ => configured,
        }
    }
}

/// The peaks of a run.
pub(super) fn predict(config: &TrainConfig, base: &Base, machine: &Machine, plugins: &Plugins) -> Result<Prediction> {
    let optimiser = plugins.optimisers.make(&config.optimizer, config.learning_rate, &config.optimizer_args)?.optimiser;
    let tape = Tape::new(machine.platform);
    let kind = kind_of(machine.precision(config.precision));
    let mut run = Run {
        config,
        base,
        optimiser: &*optimiser,
        tape,
        kind,
        vae_kind: kind,
        machine,
        staged: RefCell::default(),
        phases: Vec::new(),
    };
    if matches!(machine.platform, Platform::Cpu { .. }) {
        run.vae_kind = Kind::Float;
    }
    let variant = plugins.variants.get(&config.variant)?;
    run.all(&*variant)?;
    let recordings = run.recorded().then(|| run.recordings()).flatten();
    Ok(Prediction { phases: run.phases, recordings })
}

struct Run<'p> {
    config: &'p TrainConfig,
    base: &'p Base,
    optimiser: &'p dyn Optimiser,
    tape: Tape,
    kind: Kind,
    vae_kind: Kind,
    machine: &'p Machine,
    /// Bytes of weights that come from host memory.
    staged: RefCell<Vec<u64>>,
    phases: Vec<PhasePeak>,
}

/// Everything that is trained.
#[derive(Default)]
struct Parameters {
    adapters: BTreeMap<Component, BTreeMap<String, LayerAdapter>>,
    /// Weights of layers that are trained themselves.
    whole: BTreeMap<Component, BTreeMap<String, Value>>,
    /// Trained numbers that are not a layer's weight: their gradients are as large as they are.
    other: Vec<(Component, Rc<Block>)>,
    trained: Vec<Trained>,
    optimiser: Vec<Rc<Block>>,
    /// How many numbers are trained, and those of the largest tensor.
    numbers: usize,
    largest: usize,
}

impl Run<'_> {
    fn all(&mut self, variant: &dyn Variant<TchBackend>) -> Result<()> {
        let config = self.config;
        // The backward pass, in a thread of its own, has a handle of its own.
        let _workspaces = (self.machine.platform == Platform::Cuda)
            .then(|| [CUBLAS_WORKSPACE_BYTES; 2].map(|bytes| self.tape.scratch(bytes)));
        let sizes = self.sizes();

        let mut autoencoder = self.load(&self.base.vae_shapes, Part::Autoencoder, self.vae_kind, None, false);
        if config.cache_latents {
            sizes.iter().for_each(|&(_, width, height)| self.encode_picture(width, height));
            autoencoder.clear();
        }
        self.note(Phase::Pictures);

        let full = config.train == TrainMode::Full;
        let captions_change = !config.datasets.iter().all(|dataset| dataset.captions.is_fixed());
        let keep_encoder = config.train_text_encoder || captions_change;
        let mut text_weights = match full && config.train_text_encoder {
            true => Vec::new(),
            false => self.load(
                &self.base.text_shapes,
                Part::TextEncoder,
                self.kind,
                config.base_storage,
                keep_encoder && config.offload_base,
            ),
        };
        let mut parameters = Parameters::default();
        if full && config.train_text_encoder {
            self.train_whole(Component::TEXT_ENCODER, &mut parameters);
        }
        if !keep_encoder {
            let layers = self.layers(Component::TEXT_ENCODER, &mut Parameters::default());
            self.tape.recording(false, || drop(self.states(&layers, 1)));
            text_weights.clear();
        }
        self.note(Phase::Captions);

        let unet_weights = match full && config.train_unet {
            true => Vec::new(),
            false => self.load(&self.base.unet_shapes, Part::Unet, self.kind, config.base_storage, config.offload_base),
        };
        let trains = [(Component::UNET, config.train_unet), (Component::TEXT_ENCODER, config.train_text_encoder)];
        match full {
            true if config.train_unet => self.train_whole(Component::UNET, &mut parameters),
            true => {}
            false => self.attach(&trains, variant, &mut parameters)?,
        }
        self.note(Phase::Loading);
        // Taken when the first weight passes through.
        let ring = self.tape.meter().block(self.ring(), Part::Unet);

        let unet_layers = self.layers(Component::UNET, &mut parameters);
        let text_layers = keep_encoder.then(|| self.layers(Component::TEXT_ENCODER, &mut parameters));
        if !config.samples.prompts.is_empty() {
            self.draw(&unet_layers, text_layers.as_ref());
            self.note(Phase::Samples);
        }
        if config.validation_data_dir.is_some() {
            self.validate(&unet_layers, sizes.first().copied());
            self.note(Phase::Validation);
        }
        // From the second micro-batch on the gradients of the first are there from the beginning, and where steps are recorded
        // they always are.
        let micro_batches = if self.recorded() { 2 } else { config.gradient_accumulation_steps.min(2) };
        for &size in &sizes {
            let gradients: Vec<Vec<Rc<Block>>> = (0..micro_batches)
                .map(|index| self.micro_batch(&unet_layers, text_layers.as_ref(), size, &parameters, index))
                .collect();
            // The optimiser's step, with all gradients there and nothing else.
            drop(self.tape.scratch(self.optimiser.working_bytes(parameters.numbers, parameters.largest) as u64));
            drop(gradients);
            parameters.trained.iter().for_each(|own| drop(own.leaf.take()));
        }
        self.note(Phase::Training);
        drop((autoencoder, text_weights, unet_weights, ring));
        Ok(())
    }

    /// Whether steps are recorded.
    fn recorded(&self) -> bool {
        self.machine.platform == Platform::Cuda && can_record(self.config)
    }

    fn recordings(&self) -> Option<Recordings> {
        let training = self.phases.iter().find(|own| own.phase == Phase::Training)?;
        let step = training.parts.of(Part::Saved) + training.parts.of(Part::Working);
        let bytes = step + (step as f64 * self.machine.share) as u64;
        let beside = [Phase::Training, Phase::Samples, Phase::Validation];
        let beside = self.phases.iter().filter(|own| beside.contains(&own.phase)).map(PhasePeak::total);
        Some(Recordings { bytes, most: bytes + beside.max()? })
    }

    /// Notes the peak since the last call.
    fn note(&mut self, phase: Phase) {
        let parts = self.tape.meter().peak();
        let overhead = self.machine.fixed + (parts.total() as f64 * self.machine.share) as u64;
        self.phases.push(PhasePeak { phase, parts, overhead });
        self.tape.meter().reset_peak();
    }

    /// Micro-batches that differ: pictures at once, width and height.
    fn sizes(&self) -> Vec<(usize, usize, usize)> {
        let mut all: Vec<_> = self
            .config
            .datasets
            .iter()
            .map(|dataset| {
                let (width, height) = match &dataset.framing {
                    Framing::Fixed(size) => *size,
                    // All have about the area of the resolution.
                    Framing::Buckets(buckets) => buckets.options().resolution,
                };
                (dataset.batch_size, width, height)
            })
            .collect();
        all.dedup();
        all
    }

    /// Weights of a network that does not train, with what comes and goes while those of layers are stored in fewer bytes.
    /// `staged`: weights of layers end up in host memory.
    fn load(&self, shapes: &Shapes, part: Part, kind: Kind, storage: Option<Storage>, staged: bool) -> Vec<Rc<Block>> {
        let stored = self.stored(shapes, kind, storage);
        let large = if staged { self.large(shapes) } else { BTreeSet::new() };
        let meter = self.tape.meter();
        let mut blocks = Vec::new();
        // On the CPU host memory is what is counted.
        let moved = |parts: Vec<Rc<Block>>| {
            let bytes = parts.iter().map(|part| packed_bytes(part.bytes())).sum();
            self.staged.borrow_mut().push(bytes);
            (self.tape.platform() != Platform::Cuda).then(|| meter.block(bytes, part))
        };
        for (name, shape) in &shapes.weights {
            let elements = shape.iter().product::<usize>() as u64;
            let whole = elements * kind.elt_size_in_bytes() as u64;
            let layer = name.strip_suffix(".weight");
            let is_staged = layer.is_some_and(|layer| large.contains(layer));
            let Some(storage) = storage.filter(|_| layer.is_some_and(|layer| stored.contains(layer))) else {
                let block = meter.block(whole, part);
                match is_staged {
                    true => blocks.extend(moved(vec![block])),
                    false => blocks.push(block),
                }
                continue;
            };
            let _whole = self.tape.scratch(whole);
            let mut own = Vec::new();
            match storage {
                Storage::Half | Storage::BFloat16 => own.push(meter.block(2 * elements, part)),
                Storage::Float8 | Storage::Int8 => {
                    own.push(meter.block(elements, part));
                    own.push(meter.block(4 * shape[0] as u64, part));
                    // Some outputs at a time, in fp32.
                    let outputs = (CHUNK * shape[0] as u64 / elements).clamp(1, shape[0] as u64);
                    let single = 4 * outputs * elements / shape[0] as u64;
                    let copies = u64::from(kind != Kind::Float) + if storage == Storage::Int8 { 3 } else { 1 };
                    drop(self.tape.scratch(copies * single));
                }
                Storage::Nf4 => {
                    let most = 4 * elements.div_ceil(64);
                    own.push(meter.block(elements.div_ceil(2), part));
                    let _most = self.tape.scratch(most);
                    let copy = if kind == Kind::Float { 0 } else { 4 * elements.min(CHUNK) };
                    // Rows of factors on their way to 8 bits.
                    drop(self.tape.scratch(copy.max(4 * most)));
                    let sizes = [elements.div_ceil(64), 4 * elements.div_ceil(64 * 256), 4];
                    own.extend(sizes.map(|bytes| meter.block(bytes, part)));
                }
            }
            match is_staged {
                true => blocks.extend(moved(own)),
                false => blocks.append(&mut own),
            }
        }
        blocks
    }

    /// Layers whose weights are stored in another form than they compute in.
    fn stored(&self, shapes: &Shapes, kind: Kind, storage: Option<Storage>) -> BTreeSet<String> {
        let same =
            matches!((storage, kind), (Some(Storage::Half), Kind::Half) | (Some(Storage::BFloat16), Kind::BFloat16));
        if storage.is_none() || same {
            return BTreeSet::new();
        }
        self.large(shapes)
    }

    /// Layers whose weights are not small.
    fn large(&self, shapes: &Shapes) -> BTreeSet<String> {
        let large = |layer: &&TargetLayer| layer.geometry.weight_shape().iter().product::<usize>() >= SMALL;
        shapes.layers.iter().filter(large).map(|layer| layer.path.path.clone()).collect()
    }

    /// Bytes of the ring that weights from host memory pass through.
    fn ring(&self) -> u64 {
        let staged = self.staged.borrow();
        ring_bytes(staged.iter().sum(), staged.iter().copied().max().unwrap_or(0))
    }

    /// A network's layers with what is trained of them.
    fn layers(&self, component: Component, parameters: &mut Parameters) -> Rc<Layers> {
        let config = self.config;
        let whole = parameters.whole.remove(&component).unwrap_or_default();
        let stored = match (whole.is_empty(), config.base_storage) {
            (true, Some(storage)) => {
                let layers = self.stored(self.base.shapes(component), self.kind, config.base_storage);
                layers.into_iter().map(|layer| (layer, storage)).collect()
            }
            _ => BTreeMap::new(),
        };
        Rc::new(Layers {
            tape: self.tape.clone(),
            kind: self.kind,
            stored,
            adapters: parameters.adapters.remove(&component).unwrap_or_default(),
            trained: whole,
            dropout: DropoutMasks {
                activations: config.lora_dropout > 0.0,
                ranks: config.rank_dropout > 0.0,
                modules: config.module_dropout > 0.0,
            },
            staged: config.offload_base && config.train != TrainMode::Full,
            recompute: config.gradient_checkpointing,
            recompute_feed_forward: config.recompute_feed_forward,
            inputs_elsewhere: config.cpu_offload_checkpointing,
            passed: Default::default(),
        })
    }

    /// What is kept for a trained tensor: the optimiser's own, and the running average.
    fn optimise(&self, shape: &[usize], parameters: &mut Parameters) {
        let numbers = shape.iter().product::<usize>();
        parameters.numbers += numbers;
        parameters.largest = parameters.largest.max(numbers);
        let bytes = 4 * numbers as u64;
        let state = |bytes| self.tape.meter().block(bytes, Part::Optimiser);
        let axes: Vec<i64> = shape.iter().map(|&axis| axis as i64).collect();
        parameters.optimiser.extend(self.optimiser.parts(&axes).iter().map(|part| state(part.bytes() as u64)));
        if self.config.ema_decay > 0.0 {
            parameters.optimiser.push(state(bytes));
        }
    }

    /// All weights of a network as trained ones.
    fn train_whole(&self, component: Component, parameters: &mut Parameters) {
        let part = if component == Component::UNET { Part::Unet } else { Part::TextEncoder };
        let shapes = self.base.shapes(component);
        let layers: BTreeSet<&str> = shapes.layers.iter().map(|layer| layer.path.path.as_str()).collect();
        for (name, shape) in &shapes.weights {
            match name.strip_suffix(".weight").filter(|layer| layers.contains(layer)) {
                Some(layer) => {
                    let trained = Trained::new(&self.tape, shape, Kind::Float);
                    let own = parameters.whole.entry(component).or_default();
                    own.insert(layer.to_owned(), trained.value.clone().count_as(part));
                    parameters.trained.push(trained);
                }
                None => {
                    let bytes = 4 * shape.iter().product::<usize>() as u64;
                    parameters.other.push((component, self.tape.meter().block(bytes, part)));
                }
            }
        }
        for (_, shape) in &shapes.weights {
            self.optimise(shape, parameters);
        }
    }

    /// An adapter on the targeted layers.
    fn attach(
        &self,
        trains: &[(Component, bool)],
        variant: &dyn Variant<TchBackend>,
        parameters: &mut Parameters,
    ) -> Result<()> {
        let networks = trains.iter().filter(|(_, trains)| *trains).map(|&(component, _)| component);
        let layers: Vec<_> =
            networks.flat_map(|component| self.base.shapes(component).layers.iter().cloned()).collect();
        let targets = Targets::parse(&self.config.target_modules)?.select(&layers)?;
        let options = AdapterOptions::of(self.config, &targets)?;
        for target in &targets {
            let (request, alpha) = options.for_layer(target);
            let (rank, alpha) = variant.rank_and_alpha(&target.geometry, &request, alpha);
            let kind = if variant.computes_in_input_dtype(&target.geometry) { self.kind } else { Kind::Float };
            let mut values = BTreeMap::new();
            for (name, shape) in variant.shapes(&target.geometry, &request)? {
                let value = match variant.is_trained(&name) {
                    true => {
                        let trained = Trained::new(&self.tape, &shape, kind);
                        let value = trained.computed_with().clone();
                        parameters.trained.push(trained);
                        self.optimise(&shape, parameters);
                        value
                    }
                    false => self.tape.value(&shape, kind).count_as(Part::Adapter),
                };
                values.insert(name, value);
            }
            let factors = |prefix: &str, scaled: bool| {
                let value = |name: &str| values.get(&format!("{prefix}{name}")).cloned();
                Some(Factors { rank, down: value("down")?, mid: value("mid"), up: value("up")?, scaled })
            };
            let products: Vec<Factors> = match variant.name() {
                "lora" => factors("", alpha != rank as f64).into_iter().collect(),
                "pissa" | "pissa-fast" | "olora" => {
                    factors("", alpha != rank as f64).into_iter().chain(factors("initial_", true)).collect()
                }
                _ => Vec::new(),
            };
            let adapter = match products.is_empty() {
                true => LayerAdapter::Whole(values.into_values().collect()),
                false => LayerAdapter::Thin(products),
            };
            let own = parameters.adapters.entry(target.path.component).or_default();
            own.insert(target.path.path.clone(), adapter);
        }
        Ok(())
    }

    /// Text states of some captions.
    fn states(&self, layers: &Rc<Layers>, captions: usize) -> Value {
        text::encode(layers, &self.base.text, captions, self.config.caption_chunks(), self.config.clip_skip)
    }

    /// Text states as they come from host memory.
    fn kept_states(&self, captions: usize) -> Value {
        let places = self.config.caption_chunks() * 75 + 2;
        self.tape.value(&[captions, places, self.base.text.width], self.kind)
    }

    fn latents(&self, pictures: usize, width: usize, height: usize) -> Value {
        let factor = self.base.vae.factor();
        self.tape.value(&[pictures, self.base.vae.latent_channels, height / factor, width / factor], Kind::Float)
    }

    fn vae_layers(&self) -> Rc<Layers> {
        Rc::new(Layers {
            tape: self.tape.clone(),
            kind: self.vae_kind,
            stored: BTreeMap::new(),
            staged: false,
            adapters: BTreeMap::new(),
            trained: BTreeMap::new(),
            dropout: DropoutMasks::default(),
            recompute: false,
            recompute_feed_forward: false,
            inputs_elsewhere: false,
            passed: Default::default(),
        })
    }

    /// In tiles, where the configuration says so.
    fn through_autoencoder(&self, input: &Value, scales: (usize, usize), run: impl Fn(&Value) -> Value) -> Value {
        match self.config.vae_tiling {
            true => vae::in_tiles(&self.tape, input, Vae::TILE, scales, run),
            false => run(input),
        }
    }

    /// One picture through the autoencoder.
    fn encode_picture(&self, width: usize, height: usize) {
        self.tape.recording(false, || {
            let picture = self.tape.value(&[1, 3, height, width], Kind::Float);
            let encode = |pictures: &Value| vae::encode(&self.vae_layers(), &self.base.vae, pictures);
            drop(self.through_autoencoder(&picture, (self.base.vae.factor(), 1), encode));
        });
    }

    /// Forward and backward of a micro-batch; the gradients of what is not a layer's weight, from the first.
    fn micro_batch(
        &self,
        unet_layers: &Rc<Layers>,
        text_layers: Option<&Rc<Layers>>,
        (pictures, width, height): (usize, usize, usize),
        parameters: &Parameters,
        index: usize,
    ) -> Vec<Rc<Block>> {
        let tape = &self.tape;
        if !self.config.cache_latents {
            self.encode_picture(width, height);
        }
        let squares = {
            let (latents, _noise) = (self.latents(pictures, width, height), self.latents(pictures, width, height));
            let context = match text_layers {
                Some(layers) => tape.recording(self.config.train_text_encoder, || self.states(layers, pictures)),
                None => self.kept_states(pictures),
            };
            let (noised, target) = (tape.like(&latents), tape.like(&latents));
            let answer = unet::forward(unet_layers, &self.base.unet, &noised, &context);
            tape.activation(&tape.add(&answer, &target))
        };
        // Few numbers in the U-Net; in the text encoder a whole vocabulary, whose gradient comes last.
        let mut others = Vec::new();
        let mut gradients_of = |component| {
            let own = parameters.other.iter().filter(|(of, _)| index == 0 && *of == component);
            others.extend(own.map(|(_, block)| tape.meter().block(block.bytes(), Part::Gradients)));
        };
        gradients_of(Component::UNET);
        tape.backward(&squares, tape.like(&squares));
        gradients_of(Component::TEXT_ENCODER);
        Trained::collect(&parameters.trained, tape);
        others
    }

    /// Two passes at once for guidance, then the autoencoder comes and decodes, for one prompt.
    fn draw(&self, unet_layers: &Rc<Layers>, text_layers: Option<&Rc<Layers>>) {
        let tape = &self.tape;
        let (width, height) = self.config.samples.resolution;
        tape.recording(false, || {
            let latents = self.latents(1, width, height);
            {
                if let Some(layers) = text_layers {
                    drop(self.states(layers, 1));
                }
                let context = self.kept_states(2);
                let both = self.latents(2, width, height);
                drop(unet::forward(unet_layers, &self.base.unet, &both, &context));
            }
            let _weights = self.load(&self.base.vae_shapes, Part::Autoencoder, self.vae_kind, None, false);
            let decode = |latents: &Value| vae::decode(&self.vae_layers(), &self.base.vae, latents);
            drop(self.through_autoencoder(&latents, (1, self.base.vae.factor()), decode));
        });
    }

    /// One picture at all timesteps at once.
    fn validate(&self, unet_layers: &Rc<Layers>, size: Option<(usize, usize, usize)>) {
        let Some((_, width, height)) = size else { return };
        {
            let _weights = self.load(&self.base.vae_shapes, Part::Autoencoder, self.vae_kind, None, false);
            self.encode_picture(width, height);
        }
        self.tape.recording(false, || {
            let [many, _noise, noised, _target] = [0; 4].map(|_| self.latents(VALIDATION_BATCH, width, height));
            let context = self.kept_states(VALIDATION_BATCH);
            drop(unet::forward(unet_layers, &self.base.unet, &noised, &context));
            drop(many);
        });
    }
}
