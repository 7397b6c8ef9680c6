//! A prepared run, driven step by step: what the loop is made of, and what another program embeds.
//!
//! Each item's noise, timestep and dropout derive from (seed, epoch, item, repeat), never from the order of calls, so
//! that micro-batch size, resuming and device do not change what is drawn.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use lora_core::random::Stream;
use lora_core::target::{TargetLayer, Targets};
use lora_core::{Component, DType};
use lora_data::RgbPicture;
use lora_data::dataset::{ImageDataset, ScanOptions};
use lora_data::processor::PictureProcessor;
use lora_data::sampler::{EpochSampler, Visit};
use lora_data::tokenizer::ClipTokenizer;
use lora_io::adapter::kohya;
use lora_io::checkpoint::Checkpoint;
use lora_io::metadata::TrainingRecord;
use lora_models::layers::{Adaptable, Pass};
use lora_models::stable_diffusion::{
    ClipTextEncoder, NoiseSchedule, Prediction, Sampler, Unet, load_text_encoder, load_unet, noise_schedule,
};
use lora_torch::gradients::AdamW;
use lora_torch::memory::{self, DeviceMemory};
use lora_torch::tch::{Device, Kind, Tensor, no_grad_guard};
use lora_torch::tensor::{from_f32, kind_of};
use lora_torch::{LossScaler, device};

use crate::config::{StepPlan, TrainConfig};
use crate::encode::{self, Encoder};
use crate::plugins::Plugins;
use crate::schedule::Schedule;
use crate::trainable::{AdapterOptions, TrainableAdapter};
use crate::{Error, Result};

/// Steps in a row that may be skipped for non-finite gradients before the run ends.
const MAX_SKIPPED_IN_A_ROW: usize = 30;

/// A run that is ready to train.
#[derive(Debug)]
pub struct Session {
    config: TrainConfig,
    device: Device,
    precision: DType,
    checkpoint: Checkpoint,
    dataset: ImageDataset,
    processors: Vec<Arc<dyn PictureProcessor>>,
    tokenizer: ClipTokenizer,
    schedule: NoiseSchedule,
    unet: Unet,
    /// Present while it trains; a frozen one leaves the device once captions are encoded.
    text_encoder: Option<ClipTextEncoder>,
    text_states: BTreeMap<String, Tensor>,
    /// Present where latents are not cached.
    encoder: Option<Encoder>,
    /// One sample per picture, scaled, on the host: `[4, height, width]`.
    latents: Vec<Tensor>,
    adapter: TrainableAdapter,
    targets: Vec<TargetLayer>,
    candidates: usize,
    scaler: LossScaler,
    lr_schedule: Schedule,
    sampler: EpochSampler,
    plan: StepPlan,
    step: usize,
    skipped: usize,
    skipped_in_a_row: usize,
    notes: Vec<String>,
    base_hashes: Option<(String, String)>,
    init_from: Option<(String, String)>,
}

/// What a step came to.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: usize,
    /// Steps of the run.
    pub steps: usize,
    /// The epoch, from 1.
    pub epoch: u64,
    /// Mean loss of the step's pictures.
    pub loss: f64,
    /// Learning rate of the U-Net's adapter (of the text encoder's where that alone trains).
    pub learning_rate: f64,
    /// L2 norm of all gradients before clipping; `None` where the step was skipped.
    pub gradient_norm: Option<f64>,
    /// Whether the step was skipped because a gradient was not finite.
    pub skipped: bool,
    /// Steps skipped so far.
    pub skipped_steps: usize,
    /// The loss scale.
    pub loss_scale: f64,
    /// Pictures of the step.
    pub pictures: usize,
    /// Seconds that the step took.
    pub seconds: f64,
    /// Bytes of device memory at the peak so far; resident host memory on the CPU.
    pub memory: u64,
}

/// What people get wrong most, to be read before the first step.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Pictures that will be used, and those passed over.
    pub pictures: (usize, usize),
    /// Captions by where they come from.
    pub captions: Vec<(&'static str, usize)>,
    /// Up to three pictures and their captions.
    pub examples: Vec<(String, String)>,
    /// Captions longer than the limit.
    pub cut_captions: usize,
    /// Adapted layers, and all that could carry an adapter.
    pub modules: (usize, usize),
    /// Numbers to train.
    pub parameters: usize,
    /// Number type of the base and of activations.
    pub precision: DType,
    /// Where it trains.
    pub device: String,
    /// How the steps come about.
    pub plan: StepPlan,
    /// What was decided or noticed while preparing.
    pub notes: Vec<String>,
}

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
            true => cache_latents(&config, &checkpoint, &mut encoder, &mut dataset, &processors, &mut notes, progress)?,
            false => {
                check_pictures(&config, &mut dataset, &processors)?;
                Vec::new()
            }
        };
        let encoder = (!config.cache_latents).then_some(encoder);

        progress(Preparing::Loading("text encoder"));
        let mut text_encoder = load_text_encoder(&checkpoint, kind, device)?;
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
        if !config.train_text_encoder {
            let mut captions: Vec<String> = dataset.items().iter().map(|item| item.caption.clone()).collect();
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

        progress(Preparing::Loading("U-Net"));
        let mut unet = load_unet(&checkpoint, kind, device)?;
        let mut networks: Vec<&mut dyn Adaptable> = Vec::new();
        if config.train_unet {
            networks.push(&mut unet);
        }
        if config.train_text_encoder {
            networks.push(&mut text_encoder);
        }
        let layers: Vec<_> = networks.iter_mut().flat_map(|network| network.adaptable_layers()).collect();
        let targets = Targets::parse(&config.target_modules)?.select(&layers)?;
        let from = config.init_from.as_ref().map(|path| load_initial(path, &config, &layers, &targets)).transpose()?;
        let options = AdapterOptions {
            variant: config.variant.clone(),
            rank: config.lora_rank,
            alpha: config.lora_alpha,
            seed: config.seed,
        };
        let mut adapter = TrainableAdapter::default();
        for network in networks {
            adapter.attach(
                network,
                &targets,
                &plugins.variants,
                &options,
                from.as_ref().map(|(adapter, _)| adapter),
            )?;
        }

        let sampler = EpochSampler::new(dataset.items().iter().map(|item| item.repeats).collect(), config.seed);
        let plan =
            StepPlan::new(sampler.epoch_length(), config.batch_size, config.gradient_accumulation_steps, config.length);
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
            text_encoder: config.train_text_encoder.then_some(text_encoder),
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
            adapter,
            targets,
            scaler,
            lr_schedule,
            sampler,
            plan,
            step: 0,
            skipped: 0,
            skipped_in_a_row: 0,
            notes,
            base_hashes,
        })
    }

    /// The configuration of the run.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The arithmetic of the run.
    pub fn plan(&self) -> &StepPlan {
        &self.plan
    }

    /// Steps done.
    pub fn steps_done(&self) -> usize {
        self.step
    }

    /// The trained adapter.
    pub fn adapter(&self) -> &TrainableAdapter {
        &self.adapter
    }

    /// The adapted layers.
    pub fn targets(&self) -> &[TargetLayer] {
        &self.targets
    }

    /// Memory of the device; `None` on the CPU.
    pub fn device_memory(&self) -> Result<Option<DeviceMemory>> {
        Ok(memory::device_memory(self.device)?)
    }

    /// What to read before the first step.
    pub fn summary(&self) -> Summary {
        let limit = self.config.max_token_length;
        let items = self.dataset.items();
        let name = |path: &std::path::Path| {
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let mut notes = self.notes.clone();
        if let Some((path, reason)) = self.dataset.skipped().first() {
            notes.push(format!(
                "skipped {} picture(s), the first {}: {reason}",
                self.dataset.skipped().len(),
                name(path)
            ));
        }
        if self.dataset.multi_line_captions() > 0 {
            notes.push(format!(
                "{} caption file(s) have more than one line; the first is used",
                self.dataset.multi_line_captions()
            ));
        }
        if !self.dataset.ignored_folders().is_empty() {
            notes.push(format!("folders that are not read: {}", self.dataset.ignored_folders().join(", ")));
        }
        Summary {
            pictures: (items.len(), self.dataset.skipped().len()),
            captions: self
                .dataset
                .captions_by_source()
                .into_iter()
                .map(|(source, count)| (source.name(), count))
                .collect(),
            examples: items.iter().take(3).map(|item| (name(&item.path), item.caption.clone())).collect(),
            cut_captions: items.iter().filter(|item| self.tokenizer.encode(&item.caption).len() > limit).count(),
            modules: (self.adapter.modules(), self.candidates),
            parameters: self.adapter.parameters(),
            precision: self.precision,
            device: match self.device {
                Device::Cuda(index) => format!("cuda:{index}"),
                _ => "cpu".into(),
            },
            plan: self.plan,
            notes,
        }
    }

    /// Trains one step; `None` once the run is complete.
    pub fn step(&mut self) -> Result<Option<StepReport>> {
        if self.step >= self.plan.steps {
            return Ok(None);
        }
        let start = Instant::now();
        // A step's micro-batches are drawn first: the loss of each is weighted by its share of all their pictures, so
        // that 1×8, 2×4 and 8×1 give the same update. A step does not span epochs.
        let mut batches: Vec<Vec<Visit>> = Vec::new();
        for _ in 0..self.config.gradient_accumulation_steps {
            if !batches.is_empty() && self.sampler.position().item >= self.sampler.epoch_length() {
                break;
            }
            batches.push(self.sampler.next_batch(self.config.batch_size));
        }
        let pictures: usize = batches.iter().map(Vec::len).sum();
        let mut losses = Vec::with_capacity(batches.len());
        for batch in &batches {
            let loss = self.batch_loss(batch)?.f_mul_scalar(batch.len() as f64 / pictures as f64)?;
            loss.f_mul_scalar(self.scaler.scale())?.f_backward()?;
            losses.push(loss.detach());
        }
        // Read once a step: every look at a number waits for the device.
        let total = f64::try_from(Tensor::f_stack(&losses, 0)?.f_sum(Kind::Double)?)?;
        if !total.is_finite() {
            self.name_the_culprit(&batches)?;
        }

        let factor = self.lr_schedule.factor(self.step);
        let finite = self.scaler.unscale(&mut self.adapter.gradients())? && total.is_finite();
        let gradient_norm = match finite {
            true => Some(self.adapter.clip(self.config.max_grad_norm)?),
            false => None,
        };
        if finite {
            let config = &self.config;
            self.adapter.step(|component| AdamW {
                learning_rate: factor
                    * if component == Component::Unet { config.unet_lr } else { config.text_encoder_lr },
                betas: config.adam_betas,
                weight_decay: config.weight_decay,
                epsilon: config.adam_eps,
            })?;
            self.skipped_in_a_row = 0;
        } else {
            self.skipped += 1;
            self.skipped_in_a_row += 1;
            if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW {
                return Err(Error::NotFinite {
                    stage: "the gradients",
                    place: format!(" of {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {}", self.step + 1),
                    remedy: "use precision = \"bf16\", or a lower learning_rate",
                });
            }
        }
        self.adapter.zero_gradients();
        self.step += 1;
        let memory = match self.device_memory()? {
            Some(device) => device.reserved_peak,
            None => memory::host_memory().map_or(0, |host| host.resident),
        };
        Ok(Some(StepReport {
            step: self.step,
            steps: self.plan.steps,
            epoch: batches.first().and_then(|batch| batch.first()).map_or(0, |visit| visit.epoch) + 1,
            loss: total,
            learning_rate: factor
                * if self.config.train_unet { self.config.unet_lr } else { self.config.text_encoder_lr },
            gradient_norm,
            skipped: !finite,
            skipped_steps: self.skipped,
            loss_scale: self.scaler.scale(),
            pictures,
            seconds: start.elapsed().as_secs_f64(),
            memory,
        }))
    }

    /// The mean loss of a micro-batch, with its graph.
    fn batch_loss(&mut self, batch: &[Visit]) -> Result<Tensor> {
        let draws: Vec<Stream> = batch.iter().map(|visit| self.draws(visit)).collect();
        let latents = self.batch_latents(batch, &draws)?;
        let (count, channels, height, width) = latents.size4()?;
        let elements = (channels * height * width) as usize;
        let mut noise = Vec::with_capacity(batch.len() * elements);
        for draw in &draws {
            let mut item = draw.at("noise").normals(elements);
            if self.config.noise_offset > 0.0 {
                let offsets = draw.at("noise_offset").normals(channels as usize);
                for (plane, offset) in item.chunks_exact_mut((height * width) as usize).zip(offsets) {
                    plane.iter_mut().for_each(|value| *value += self.config.noise_offset as f32 * offset);
                }
            }
            noise.extend(item);
        }
        let noise = from_f32(&noise, &[count, channels, height, width].map(|side| side as usize), self.device)?;
        let timesteps: Vec<usize> =
            draws.iter().map(|draw| draw.at("timestep").below(NoiseSchedule::TIMESTEPS as u64) as usize).collect();
        let pass = Pass { dropout: self.dropout(&draws) };
        let context = self.batch_context(batch, &draws, &pass)?;
        denoising_loss(
            &self.unet,
            &self.schedule,
            &latents,
            &noise,
            &timesteps,
            &context,
            self.config.min_snr_gamma,
            &pass,
        )
    }

    /// Everything random about one visit of one picture.
    fn draws(&self, visit: &Visit) -> Stream {
        Stream::new(self.config.seed).at("visit").with(visit.epoch).with(visit.index as u64).with(visit.repeat as u64)
    }

    fn dropout(&self, draws: &[Stream]) -> Option<(f64, Vec<Stream>)> {
        (self.config.lora_dropout > 0.0)
            .then(|| (self.config.lora_dropout, draws.iter().map(|draw| draw.at("adapter_dropout")).collect()))
    }

    /// `[batch, 4, height, width]` f32 on the device, scaled.
    fn batch_latents(&mut self, batch: &[Visit], draws: &[Stream]) -> Result<Tensor> {
        let mut latents = Vec::with_capacity(batch.len());
        for (visit, draw) in batch.iter().zip(draws) {
            match &mut self.encoder {
                None => latents.push(self.latents[visit.index].f_to_device(self.device)?),
                Some(encoder) => {
                    let item = &self.dataset.items()[visit.index];
                    let picture = encode::load_picture(
                        item,
                        &self.processors,
                        self.config.max_resolution,
                        self.config.background,
                        draw,
                    )?;
                    latents.push(sample_latents(encoder, &self.checkpoint, &item.path, &picture, &draw.at("latent"))?);
                }
            }
        }
        Ok(Tensor::f_stack(&latents, 0)?)
    }

    /// Text states of a batch, with gradients where the text encoder trains.
    fn batch_context(&self, batch: &[Visit], draws: &[Stream], pass: &Pass) -> Result<Tensor> {
        let caption = |(visit, draw): (&Visit, &Stream)| {
            let dropped = f64::from(draw.at("caption_dropout").uniform()) < self.config.caption_dropout_rate;
            if dropped { "" } else { self.dataset.items()[visit.index].caption.as_str() }
        };
        let captions: Vec<&str> = batch.iter().zip(draws).map(caption).collect();
        match &self.text_encoder {
            Some(encoder) => {
                let chunks = self.config.caption_chunks();
                let tokens = encode::tokens(&self.tokenizer, &captions, chunks, self.device)?;
                Ok(encoder.encode(&tokens, chunks, self.config.clip_skip, pass)?)
            }
            None => {
                let states: Vec<&Tensor> = captions.iter().map(|caption| &self.text_states[*caption]).collect();
                Ok(Tensor::f_cat(&states, 0)?.f_to_device(self.device)?)
            }
        }
    }

    /// Names the stage that a NaN loss comes from.
    fn name_the_culprit(&mut self, batches: &[Vec<Visit>]) -> Result<()> {
        let _guard = no_grad_guard();
        let place = format!(" at step {}", self.step + 1);
        let culprit = |stage, remedy| Err(Error::NotFinite { stage, place: place.clone(), remedy });
        if !self.adapter.is_finite()? {
            return culprit("the LoRA's weights", "use a lower learning_rate, or max_grad_norm = 1.0");
        }
        for batch in batches {
            let draws: Vec<Stream> = batch.iter().map(|visit| self.draws(visit)).collect();
            if !encode::is_finite(&self.batch_latents(batch, &draws)?)? {
                return culprit("the VAE's latents", "the base model's autoencoder or a picture is damaged");
            }
            if !encode::is_finite(&self.batch_context(batch, &draws, &Pass::default())?)? {
                return culprit("the text encoder", "use precision = \"bf16\" or \"fp32\"");
            }
        }
        // Only the U-Net is left. In fp16 the scaler skips the step and counts it; elsewhere it will not heal.
        if self.precision == DType::F16 {
            return Ok(());
        }
        culprit("the U-Net", "use precision = \"fp32\", or a lower learning_rate")
    }

    /// Draws pictures with the adapter as it is now.
    pub fn sample(&mut self, prompts: &[String]) -> Result<Vec<RgbPicture>> {
        let _guard = no_grad_guard();
        let samples = self.config.samples.clone();
        let mut decoder = Encoder::load(&self.checkpoint, self.precision, self.device)?;
        let (width, height) = (samples.resolution.0 / 8, samples.resolution.1 / 8);
        let sampler = Sampler::new(samples.sampler, &self.schedule, samples.steps)?;
        let pass = Pass::default();
        let mut pictures = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let noise = Stream::new(samples.seed)
                .at("sample")
                .with(index as u64)
                .normals(decoder.latent_channels() * height * width);
            let noise = from_f32(&noise, &[1, decoder.latent_channels(), height, width], self.device)?;
            let context = Tensor::f_cat(&[self.states_of(&samples.negative_prompt)?, self.states_of(prompt)?], 0)?;
            let latents = sampler.sample(&noise, |latents, timestep| {
                let both =
                    self.unet.forward(&Tensor::f_cat(&[latents, latents], 0)?, &[timestep; 2], &context, &pass)?;
                let halves = both.f_chunk(2, 0)?;
                let difference = halves[1].f_sub(&halves[0])?;
                Ok(halves[0].f_add(&difference.f_mul_scalar(samples.guidance_scale)?)?)
            })?;
            pictures.extend(decoder.decode(&self.checkpoint, &latents)?);
        }
        Ok(pictures)
    }

    fn states_of(&self, caption: &str) -> Result<Tensor> {
        if let Some(states) = self.text_states.get(caption) {
            return Ok(states.f_to_device(self.device)?);
        }
        let (chunks, skip) = (self.config.caption_chunks(), self.config.clip_skip);
        match &self.text_encoder {
            Some(encoder) => encode::encode_captions(encoder, &self.tokenizer, &[caption], chunks, skip, self.device),
            // A frozen text encoder has left the device: it comes back for a caption that was not foreseen.
            None => {
                let encoder = load_text_encoder(&self.checkpoint, kind_of(self.precision), self.device)?;
                encode::encode_captions(&encoder, &self.tokenizer, &[caption], chunks, skip, self.device)
            }
        }
    }

    /// Writes the LoRA as it is now into the output folder under `name` (no extension), reads it back and checks it.
    pub fn save(&mut self, name: &str) -> Result<PathBuf> {
        if !self.adapter.is_finite()? {
            return Err(Error::NotFinite {
                stage: "the LoRA's weights",
                place: format!(" at step {}", self.step),
                remedy: "use a lower learning_rate; nothing was written",
            });
        }
        let mut adapter = self.adapter.export()?;
        adapter.metadata = self.record(name).to_metadata();
        let path = self.config.output_dir.join(format!("{name}.safetensors"));
        kohya::write(&path, &adapter, self.config.save_precision)?;
        Ok(path)
    }

    fn record(&self, name: &str) -> TrainingRecord {
        let config = &self.config;
        let mut record = TrainingRecord::default();
        record.output_name = name.to_owned();
        record.rank = config.lora_rank;
        record.alpha = config.lora_alpha;
        record.dropout = (config.lora_dropout > 0.0).then_some(config.lora_dropout);
        record.learning_rate = config.learning_rate;
        record.unet_lr = config.train_unet.then_some(config.unet_lr);
        record.text_encoder_lr = config.train_text_encoder.then_some(config.text_encoder_lr);
        record.pictures = self.plan.visits_per_epoch;
        record.batches_per_epoch = self.plan.batches_per_epoch;
        record.epochs = self.plan.epochs;
        record.epoch = self.step.div_ceil(self.plan.steps_per_epoch);
        record.steps = self.step;
        record.max_train_steps = self.plan.steps;
        record.batch_size = config.batch_size;
        record.gradient_accumulation_steps = config.gradient_accumulation_steps;
        record.mixed_precision = if self.precision == DType::F32 { "no".into() } else { self.precision.to_string() };
        record.seed = config.seed;
        record.resolution = config.max_resolution;
        record.clip_skip = (config.clip_skip > 1).then_some(config.clip_skip);
        record.max_token_length = (config.max_token_length > 75).then_some(config.max_token_length);
        record.lr_scheduler = format!("{:?}", config.lr_scheduler).to_lowercase();
        record.lr_warmup_steps = self.lr_schedule.warmup();
        record.optimizer = format!(
            "AdamW(betas=({:?}, {:?}),eps={:?},weight_decay={:?})",
            config.adam_betas.0, config.adam_betas.1, config.adam_eps, config.weight_decay
        );
        record.max_grad_norm = config.max_grad_norm;
        record.noise_offset = (config.noise_offset > 0.0).then_some(config.noise_offset);
        record.min_snr_gamma = config.min_snr_gamma;
        record.caption_dropout_rate = config.caption_dropout_rate;
        record.cache_latents = config.cache_latents;
        record.base_name =
            config.base_model.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        record.base_legacy_hash = self.base_hashes.as_ref().map(|(legacy, _)| legacy.clone());
        record.base_sha256 = self.base_hashes.as_ref().map(|(_, sha256)| sha256.clone());
        record.velocity = self.schedule.prediction() == Prediction::Velocity;
        for item in self.dataset.items() {
            record.folders.entry(item.folder.clone()).or_insert((item.repeats, 0)).1 += 1;
        }
        record.tag_frequency = self.dataset.tag_frequency();
        record.text_cleaning = config.text_cleaning.name().into();
        record.init_from = self.init_from.clone();
        record.program = concat!("lora/", env!("CARGO_PKG_VERSION")).into();
        record
    }
}

/// Mean over the batch of each item's weighted mean squared error between the U-Net's answer and its target, in f32.
#[allow(clippy::too_many_arguments, reason = "the formula's own")]
pub fn denoising_loss(
    unet: &Unet,
    schedule: &NoiseSchedule,
    latents: &Tensor,
    noise: &Tensor,
    timesteps: &[usize],
    context: &Tensor,
    min_snr_gamma: Option<f64>,
    pass: &Pass,
) -> Result<Tensor> {
    let noised = schedule.add_noise(latents, noise, timesteps)?;
    let target = schedule.target(latents, noise, timesteps)?;
    let times: Vec<f64> = timesteps.iter().map(|&timestep| timestep as f64).collect();
    let answer = unet.forward(&noised, &times, context, pass)?;
    let each = answer.f_sub(&target)?.f_square()?.f_flatten(1, -1)?.f_mean_dim(-1, false, Kind::Float)?;
    let each = match min_snr_gamma {
        Some(gamma) => {
            let weights: Vec<f32> = timesteps.iter().map(|&t| schedule.min_snr_weight(t, gamma) as f32).collect();
            each.f_mul(&from_f32(&weights, &[weights.len()], latents.device())?)?
        }
        None => each,
    };
    Ok(each.f_mean(Kind::Float)?)
}

/// Encodes every picture once; unreadable ones are skipped, or end the run where the configuration is strict.
fn cache_latents(
    config: &TrainConfig,
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
        match encode::load_picture(item, processors, config.max_resolution, config.background, &random) {
            Ok(picture) => {
                enlarged += usize::from(item.size.0 < config.max_resolution.0 || item.size.1 < config.max_resolution.1);
                let sample = sample_latents(encoder, checkpoint, &item.path, &picture, &random.at("latent"))?;
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
        let (width, height) = config.max_resolution;
        notes.push(format!("{enlarged} picture(s) are smaller than {width}×{height} and were enlarged"));
    }
    any_left(dataset)?;
    Ok(latents)
}

/// Decodes every picture once, so that a broken one is met now and not hours into the run.
fn check_pictures(
    config: &TrainConfig,
    dataset: &mut ImageDataset,
    processors: &[Arc<dyn PictureProcessor>],
) -> Result<()> {
    for item in dataset.items().to_vec() {
        let random = Stream::new(config.seed).at("check");
        match encode::load_picture(&item, processors, config.max_resolution, config.background, &random) {
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

/// One sample of a picture's latent distribution, scaled: `[4, height, width]`.
fn sample_latents(
    encoder: &mut Encoder,
    checkpoint: &Checkpoint,
    path: &std::path::Path,
    picture: &RgbPicture,
    random: &Stream,
) -> Result<Tensor> {
    let distribution = encoder.encode(checkpoint, path, picture)?;
    let shape: Vec<usize> = distribution.mean.size().iter().map(|&side| side as usize).collect();
    let noise = from_f32(&random.clone().normals(shape.iter().product()), &shape, distribution.mean.device())?;
    Ok(distribution.sample(&noise)?.f_mul_scalar(encoder.scaling_factor())?.f_squeeze_dim(0)?)
}

/// The adapter to go on from, with its file name and hash: the same layers and rank as the configuration's.
fn load_initial(
    path: &std::path::Path,
    config: &TrainConfig,
    layers: &[TargetLayer],
    targets: &[TargetLayer],
) -> Result<(lora_core::Adapter, (String, String))> {
    let adapter = kohya::read(path, layers)?;
    let differs = |reason: String| Err(Error::InitFrom { path: path.to_owned(), reason });
    if let Some((module, other)) = adapter.modules.iter().find(|(_, module)| module.rank != config.lora_rank) {
        return differs(format!(
            "{module} has rank {}, the configuration says lora_rank = {}; make them equal",
            other.rank, config.lora_rank
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
