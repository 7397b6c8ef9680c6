//! A prepared run, driven step by step: what the loop is made of, and what another program embeds.
//!
//! Each item's noise, timestep and dropout derive from (seed, epoch, item, repeat), never from the order of calls, so
//! that micro-batch size, resuming and device do not change what is drawn.

mod encoded;
mod graphs;
mod materials;
mod out_of_memory;
mod preflight;
mod prepare;
mod resume;
mod sample;
mod save;
mod summary;
mod validation;

pub(crate) use graphs::can_record;
pub(crate) use materials::Materials;
pub(crate) use preflight::check as preflight;
pub use prepare::Preparing;
pub(crate) use prepare::Watch;
pub use resume::ResumedFrom;
pub use summary::Summary;
pub use validation::Validation;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use lora_core::random::Stream;
use lora_core::target::TargetLayer;
use lora_core::variant::Dropout;
use lora_core::{Component, DType};
use lora_data::caption::Done;
use lora_data::sampler::{EpochSampler, Visit};
use lora_data::source::Source;
use lora_io::checkpoint::Checkpoint;
use lora_models::layers::Pass;
use lora_torch::graph::{Recorder, Scope};
use lora_torch::memory::{self, DeviceMemory, Limit};
use lora_torch::tch::{Device, Kind, Tensor, no_grad_guard};
use lora_torch::tensor::from_f32;
use lora_torch::{LossScaler, dry, foreach};

use crate::base::{Base, Data, Encoded, Inputs, Item, Network, Tensors, shallow};
use crate::config::{StepPlan, TrainConfig};
use crate::event::{About, Event, Finding};
use crate::full::TrainedNetworks;
use crate::meter::MemoryPart;
use crate::parameters::{Parameter, ParameterList};
use crate::schedule::Schedule;
use crate::state::{Looks, Progress, Settings};
use crate::trainable::TrainableAdapter;
use crate::{Error, Result};
use encoded::Examples;
use graphs::{Recording, StepGraphs};

/// Steps in a row that may be skipped for non-finite gradients before the run ends.
const MAX_SKIPPED_IN_A_ROW: usize = 30;

/// A run that is ready to train.
#[derive(Debug)]
pub struct Session {
    config: TrainConfig,
    device: Device,
    precision: DType,
    origin: Origin,
    base: Box<dyn Base>,
    /// What of the base's keys helps where memory runs out.
    remedies: &'static str,
    feed: Feed,
    trained: Trained,
    parameters: ParameterList,
    scaler: LossScaler,
    lr_schedule: Schedule,
    plan: StepPlan,
    progress: Progress,
    settings: Settings,
    recorder: Option<Arc<Recorder>>,
    /// Holds the allocator to `vram_budget` for as long as the session lives.
    _limit: Option<Limit>,
    /// Where passes are recorded; none with draws of their own, and where that failed.
    graphs: Option<StepGraphs>,
    /// What was done when memory ran out, in order.
    tried: Vec<String>,
    /// The optimiser failed in the middle of a step: the trained numbers are whole, but between two steps.
    torn: bool,
    notes: Vec<String>,
    /// What happened and was not taken yet.
    told: Vec<Event>,
}

/// The files that a run begins from.
#[derive(Debug)]
struct Origin {
    checkpoint: Arc<Checkpoint>,
    /// The short hash of the WebUI and the SHA-256 of the base, where it is one file.
    base_hashes: Option<(String, String)>,
    /// The name and hash of the adapter that it goes on from.
    init_from: Option<(String, String)>,
    resumed: Option<ResumedFrom>,
}

/// Where the items of steps come from, and what is kept of them.
#[derive(Debug)]
struct Feed {
    data: Data,
    source: Arc<dyn Source>,
    sampler: EpochSampler,
    examples: Examples,
    /// What networks made of captions, by network and caption.
    kept: BTreeMap<Component, BTreeMap<String, Tensors>>,
    /// Items of the data that are not trained on, where the configuration holds some out.
    held_out: Option<Box<dyn Source>>,
}

/// What the trained numbers are.
#[derive(Debug)]
enum Trained {
    Adapter(TrainedAdapter),
    Whole(TrainedNetworks),
}

/// An adapter with the layers that it is on, and how many there are in all.
#[derive(Debug)]
struct TrainedAdapter {
    adapter: TrainableAdapter,
    targets: Vec<TargetLayer>,
    candidates: usize,
}

/// What the forward and backward passes of a step gave.
#[derive(Debug, Clone)]
struct StepGradients {
    loss: f64,
    /// What the base tells beside the loss.
    figures: BTreeMap<&'static str, f64>,
    /// `None` where one was not finite.
    gradient_norm: Option<f64>,
}

/// The result of a step.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
#[non_exhaustive]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: usize,
    /// Steps of the run.
    pub steps: usize,
    /// The epoch, from 1.
    pub epoch: u64,
    /// Mean loss of the step's items.
    pub loss: f64,
    /// Means of what the base tells beside the loss ([`Base::figures`]).
    #[serde(flatten)]
    pub figures: BTreeMap<&'static str, f64>,
    /// Learning rate of the network that steps are made of (of the one before it where that alone trains).
    pub learning_rate: f64,
    /// Learning rates of all networks that train, by the network's name.
    pub learning_rates: BTreeMap<String, f64>,
    /// L2 norm of all gradients before clipping; `None` where the step was skipped.
    pub gradient_norm: Option<f64>,
    /// Whether the step was skipped because a gradient was not finite.
    pub skipped: bool,
    /// Steps skipped so far.
    pub skipped_steps: usize,
    /// The loss scale.
    pub loss_scale: f64,
    /// Items of the step.
    pub items: usize,
    /// How much there was to learn of the items: pictures, trained tokens.
    pub measure: f64,
    /// Most items at once: less than asked for where memory ran out.
    pub micro_batch: usize,
    /// Seconds that the step took.
    pub seconds: f64,
    /// Bytes of device memory at the peak so far; resident host memory on the CPU.
    pub memory: u64,
}

impl Session {
    /// The configuration of the run.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// What is trained on.
    pub fn data(&self) -> Data {
        self.feed.data
    }

    /// The arithmetic of the run.
    pub fn plan(&self) -> &StepPlan {
        &self.plan
    }

    /// Steps done.
    pub fn steps_done(&self) -> usize {
        self.progress.step
    }

    /// The trained adapter; `None` where whole networks are trained.
    pub fn adapter(&self) -> Option<&TrainableAdapter> {
        match &self.trained {
            Trained::Adapter(trained) => Some(&trained.adapter),
            Trained::Whole(_) => None,
        }
    }

    /// The adapted layers; none where whole networks are trained.
    pub fn targets(&self) -> &[TargetLayer] {
        match &self.trained {
            Trained::Adapter(trained) => &trained.targets,
            Trained::Whole(_) => &[],
        }
    }

    /// The trained numbers.
    pub fn parameters(&self) -> &ParameterList {
        &self.parameters
    }

    /// How many shapes of micro-batches are recorded as CUDA graphs: the others run kernel by kernel.
    pub fn recorded_shapes(&self) -> usize {
        self.graphs.as_ref().map_or(0, StepGraphs::len)
    }

    /// What looks at the held-out loss have shown so far ([`Session::take_look`]).
    pub fn looks(&self) -> Looks {
        self.progress.looks
    }

    /// Takes a held-out loss after the last step into account; whether it is the lowest so far.
    pub fn take_look(&mut self, loss: f64) -> bool {
        self.progress.looks.take(self.progress.step, loss, self.config.early_stopping_threshold)
    }

    /// Tells that something happened. All callbacks of [`crate::train`] hear of it; a program with a loop of its own takes it
    /// by [`Session::take_events`].
    pub fn tell(&mut self, event: Event) {
        self.told.push(event);
    }

    /// What happened since it was last asked: files that were saved, memory that ran out, what callbacks told. Steps, samples
    /// and held-out losses are not among them unless the run is [`crate::train`]'s.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.told)
    }

    /// Warns of something that may be wrong, once it is found.
    pub(crate) fn warn(&mut self, about: About, kind: &'static str, message: String) {
        tracing::warn!("{message}");
        self.tell(Event::Finding(Finding::new(self.progress.step, about, kind, message)));
    }

    /// How the names of parameters begin that nothing reads, see [`crate::base::Base::unread`].
    pub(crate) fn unread(&self) -> Vec<String> {
        self.base.unread()
    }

    /// Memory of the device; `None` on the CPU.
    ///
    /// # Errors
    /// Where the device is lost.
    pub fn device_memory(&self) -> Result<Option<DeviceMemory>> {
        Ok(memory::device_memory(self.device)?)
    }

    /// Gives the device's cached memory back.
    pub(crate) fn empty_cache(&self) -> Result<()> {
        Ok(memory::empty_cache(self.device)?)
    }

    /// Trains one step; `None` once the run is complete.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where cutting the step smaller did not help either, with all that was tried;
    /// [`Error::NotFinite`] where the loss is NaN, or too many steps in a row were skipped; [`Error::Data`] where an
    /// example cannot be read. Unless it failed in the optimiser, the session stands as before the step.
    pub fn step(&mut self) -> Result<Option<StepReport>> {
        if self.progress.step >= self.plan.steps {
            return Ok(None);
        }
        let (start, position) = (Instant::now(), self.feed.sampler.position());
        let _scope = self.scope()?;
        let batches = self.next_batches();
        let gradients = match self.survive(&batches) {
            Ok(gradients) => gradients,
            Err(error) => {
                // As if the step had not begun: a state that is saved now is that of the step before.
                self.feed.sampler.restore(position);
                if !error.is_device_lost() {
                    self.forget_gradients()?;
                }
                return Err(error);
            }
        };
        let StepGradients { loss: total, mut figures, gradient_norm } = gradients;
        let finite = gradient_norm.is_some();
        let items: usize = batches.iter().map(Vec::len).sum();

        let factor = self.lr_schedule.factor(self.progress.step);
        let (base, ratio) = (&*self.base, self.config.loraplus_lr_ratio);
        let rate = |network: Component| factor * base.learning_rate(network);
        let networks = trained(base);
        let shown = networks.first().map_or(0.0, |network| rate(network.component));
        let rates = networks.iter().map(|network| (network.component.to_string(), rate(network.component)));
        let learning_rates: BTreeMap<String, f64> = rates.collect();
        if finite {
            let of = |own: &Parameter| {
                own.rate.map_or_else(|| rate(own.component), |rate| factor * rate) * if own.is_up { ratio } else { 1.0 }
            };
            let limit = self.config.extra.number("scale_weight_norms");
            let trained = &self.trained;
            let limited = || match (limit, trained) {
                (Some(limit), Trained::Adapter(trained)) => trained.adapter.limit_norms(limit),
                _ => Ok(None),
            };
            match lora_torch::caught(|| self.parameters.step_and(of, limited)) {
                Ok(None) => {}
                Ok(Some(scaled)) => {
                    figures.insert(SCALED_LAYERS, f64::try_from(scaled)?);
                }
                Err(error) => {
                    // What it had begun cannot be taken back.
                    self.torn = true;
                    let place = format!("in the optimiser at step {}", self.progress.step + 1);
                    return Err(if error.is_out_of_memory() { self.exhausted(place, &error) } else { error });
                }
            }
            self.progress.skipped_in_a_row = 0;
        } else {
            self.progress.skipped += 1;
            self.progress.skipped_in_a_row += 1;
        }
        self.forget_gradients()?;
        self.progress.step += 1;
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW {
            return Err(Error::NotFinite {
                stage: "the gradients".into(),
                place: format!(" of {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {}", self.progress.step),
                remedy: "use precision = \"bf16\", or a lower learning_rate",
            });
        }
        // After the step: an optimiser may have chosen it there.
        let factor_of_optimiser = self.parameters.optimiser().optimiser().rate_factor();
        let memory = match self.device_memory()? {
            Some(device) => device.reserved_peak,
            None => memory::host_memory().map_or(0, |host| host.resident),
        };
        Ok(Some(StepReport {
            step: self.progress.step,
            steps: self.plan.steps,
            epoch: batches.first().and_then(|batch| batch.first()).map_or(0, |visit| visit.epoch) + 1,
            loss: total,
            figures,
            learning_rate: shown * factor_of_optimiser,
            learning_rates: learning_rates.into_iter().map(|(name, rate)| (name, rate * factor_of_optimiser)).collect(),
            gradient_norm,
            skipped: !finite,
            skipped_steps: self.progress.skipped,
            loss_scale: self.scaler.scale(),
            items,
            measure: batches.iter().flatten().map(|visit| self.feed.source.amount(visit.index)).sum(),
            micro_batch: self.micro_batch(&batches),
            seconds: start.elapsed().as_secs_f64(),
            memory,
        }))
    }

    /// The micro-batches of the next step: drawn before any of them is computed, as the loss of each is weighted by its share
    /// of all that their items measure, so that 1×8, 2×4 and 8×1 give the same update. A step does not span epochs.
    fn next_batches(&mut self) -> Vec<Vec<Visit>> {
        micro_batches(&mut self.feed.sampler, self.config.gradient_accumulation_steps)
    }

    /// The noise levels at which the visits of the steps that are left are trained, of a long run the first; none of a base that
    /// adds no noise.
    fn noise_levels(&self) -> Vec<f64> {
        let mut sampler = self.feed.sampler.clone();
        let mut levels = Vec::new();
        for _ in self.progress.step..self.plan.steps {
            for visit in micro_batches(&mut sampler, self.config.gradient_accumulation_steps).concat() {
                let shape = self.feed.source.visits(visit.index).shape;
                match self.base.noise_level(&visit.draws(self.config.seed), shape) {
                    Some(level) if levels.len() < MOST_LEVELS => levels.push(level),
                    _ => return levels,
                }
            }
        }
        levels
    }

    /// The gradients of a step, unscaled and clipped, in the parameters.
    fn gradients(&mut self, batches: &[Vec<Visit>]) -> Result<StepGradients> {
        let all: f64 = batches.iter().map(|batch| self.measure(batch)).sum();
        let most = self.progress.economy.micro_batch.unwrap_or(usize::MAX);
        let mut losses = Vec::with_capacity(batches.len());
        for batch in batches.iter().flat_map(|batch| batch.chunks(most)) {
            let share = self.measure(batch) / all;
            let (inputs, pass) = self.batch_inputs(batch, share * self.scaler.scale())?;
            let loss = self.run_passes(inputs, &pass, losses.is_empty())?;
            losses.push(loss.f_mul_scalar(share)?);
        }
        // The only look at numbers in a step, as each waits for the device. It cannot come a step late: the optimiser must not
        // see gradients that are not finite.
        let losses = Tensor::f_stack(&losses, 0)?.f_reshape([losses.len() as i64, -1])?;
        let own = losses.f_select(-1, 0)?;
        let settled = self.parameters.settle(&own, self.scaler.scale(), self.config.max_grad_norm)?;
        let figures = self.figures(&losses)?;
        if !settled.loss.is_finite() {
            self.name_the_culprit(batches)?;
        }
        let finite = settled.finite && settled.loss.is_finite();
        self.scaler.update(finite);
        Ok(StepGradients { loss: settled.loss, figures, gradient_norm: finite.then_some(settled.norm) })
    }

    /// What the base tells beside the losses of micro-batches, `[micro-batches, 1 + figures]`.
    fn figures(&self, losses: &Tensor) -> Result<BTreeMap<&'static str, f64>> {
        let names = self.base.figures();
        if names.is_empty() {
            return Ok(BTreeMap::new());
        }
        let means = Vec::<f64>::try_from(losses.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?)?;
        Ok(names.iter().copied().zip(means.into_iter().skip(1)).collect())
    }

    /// How much of a step's loss visits make up.
    fn measure(&self, visits: &[Visit]) -> f64 {
        visits.iter().map(|visit| self.feed.source.measure(visit.index)).sum()
    }

    /// The run's own stream is the current one while the answer lives.
    fn scope(&self) -> Result<Option<Scope>> {
        Ok(self.recorder.as_deref().map(Recorder::enter).transpose()?)
    }

    /// Gradients that are there no more, or where recordings write to them, zero.
    fn forget_gradients(&mut self) -> Result<()> {
        match &self.graphs {
            Some(graphs) if graphs.hold_gradients() => Ok(foreach::zero(&self.parameters.gradients())?),
            _ => self.parameters.clear_gradients(),
        }
    }

    /// The loss of a micro-batch, whose gradients are added to those that are there: none, if it is the `first` of a step.
    fn run_passes(&mut self, inputs: Inputs, pass: &Pass, first: bool) -> Result<Tensor> {
        if pass.inputs_in_host {
            return self.passes(&inputs, pass);
        }
        // Where an error leaves this function the recordings are gone: memory ran out, or the run ends.
        let Some(mut graphs) = self.graphs.take() else { return self.passes(&inputs, pass) };
        match graphs.run(inputs, first, &self.parameters, &|inputs| self.passes(inputs, pass))? {
            Recording::Goes(loss) => {
                self.graphs = Some(graphs);
                Ok(loss)
            }
            Recording::GivenUp(loss, error) => {
                tracing::warn!("training goes on without CUDA graphs: {error}");
                Ok(loss)
            }
        }
    }

    /// The mean loss of a micro-batch, whose gradients times the input `scale` are added to those of the parameters.
    fn passes(&self, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let loss = self.base.loss(inputs, pass)?;
        if dry::is_dry(self.device) {
            // What lives at the end of the forward pass does so for the backward pass.
            dry::relabel_all(MemoryPart::Working.number(), MemoryPart::Saved.number());
        }
        loss_of(&loss)?.f_mul(inputs.get("scale")?)?.f_backward()?;
        self.parameters.collect()?;
        if dry::is_dry(self.device) {
            dry::relabel(&self.parameters.gradients(), MemoryPart::Gradients.number());
        }
        Ok(loss.detach())
    }

    /// What a micro-batch's passes need of the host. `scale` is what its loss is multiplied by for the backward pass.
    fn batch_inputs(&mut self, batch: &[Visit], scale: f64) -> Result<(Inputs, Pass)> {
        let items = self.items(batch)?;
        let draws: Vec<Stream> = items.iter().map(|item| item.draw.clone()).collect();
        let pass = Pass {
            dropout: self.dropout(&draws),
            recompute: self.recomputes(),
            recompute_feed_forward: self.recomputes_feed_forward(),
            inputs_in_host: self.config.cpu_offload_checkpointing || self.progress.economy.inputs_in_host,
            without_adapters: false,
        };
        let scale = from_f32(&[scale as f32], &[], self.device)?;
        Ok((self.base.inputs(&items)?.with("scale", Some(scale)), pass))
    }

    /// The items of a micro-batch, encoded.
    fn items(&mut self, batch: &[Visit]) -> Result<Vec<Item>> {
        let mut items = Vec::with_capacity(batch.len());
        for visit in batch {
            let draw = visit.draws(self.config.seed);
            let mut encoded = BTreeMap::from_iter(self.feed.examples.kept(visit.index));
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
    fn kept_of(&self, caption: &str) -> BTreeMap<Component, Tensors> {
        let kept = self.feed.kept.iter();
        kept.filter_map(|(network, captions)| Some((*network, shallow(captions.get(caption)?)))).collect()
    }

    fn dropout(&self, draws: &[Stream]) -> Option<Dropout> {
        let config = &self.config;
        let any = config.lora_dropout + config.rank_dropout + config.module_dropout > 0.0;
        any.then(|| Dropout {
            activations: config.lora_dropout,
            ranks: config.rank_dropout,
            module: config.module_dropout,
            items: draws.iter().map(|draw| draw.at("adapter_dropout")).collect(),
        })
    }

    /// Names the stage that a NaN loss comes from.
    fn name_the_culprit(&mut self, batches: &[Vec<Visit>]) -> Result<()> {
        let _guard = no_grad_guard();
        let place = format!(" at step {}", self.progress.step + 1);
        let culprit = |stage: &str, remedy| {
            Err(Error::NotFinite { stage: stage.to_owned().into(), place: place.clone(), remedy })
        };
        if !self.parameters.is_finite()? {
            return culprit("the trained weights", "use a lower learning_rate, or max_grad_norm = 1.0");
        }
        for batch in batches {
            let items = self.items(batch)?;
            if let Some((stage, remedy)) = self.base.culprit(&items)? {
                return culprit(stage, remedy);
            }
        }
        // Only the last network is left. In fp16 the scaler skips the step and counts it; elsewhere it will not heal.
        if self.precision == DType::F16 {
            return Ok(());
        }
        let last = self.base.networks().last().map_or("network", |network| network.title);
        culprit(&format!("the {last}"), "use precision = \"fp32\", or a lower learning_rate")
    }
}

/// The figure of `scale_weight_norms`.
const SCALED_LAYERS: &str = "scaled_layers";

/// Noise levels of visits that are looked at before a run.
const MOST_LEVELS: usize = 20_000;

/// The micro-batches of a step, which does not span epochs.
fn micro_batches(sampler: &mut EpochSampler, accumulation: usize) -> Vec<Vec<Visit>> {
    let mut batches: Vec<Vec<Visit>> = Vec::new();
    for _ in 0..accumulation {
        if !batches.is_empty() && sampler.position().item >= sampler.epoch_length() {
            break;
        }
        batches.push(sampler.next_batch());
    }
    batches
}

/// The loss alone of what [`Base::loss`] gives.
fn loss_of(told: &Tensor) -> Result<Tensor> {
    Ok(if told.dim() == 0 { told.shallow_clone() } else { told.f_select(0, 0)? })
}

/// Networks that train, the one that steps are made of first.
fn trained(base: &dyn Base) -> Vec<Network> {
    base.networks().iter().rev().filter(|network| network.trains).copied().collect()
}

/// While the answer lives, what is allocated counts as the weights of a network.
fn label(base: &dyn Base, network: Component) -> dry::Labelled {
    MemoryPart::Weights(title(base, network)).label()
}

/// What people call a network of a base.
fn title(base: &dyn Base, network: Component) -> &'static str {
    base.networks().iter().find(|own| own.component == network).map_or("other", |own| own.title)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lora_models::synthetic::SyntheticModel;
    use lora_torch::fault::Fault;

    use super::*;
    use crate::config::Format;
    use crate::plugins::Plugins;

    /// A tiny base, pictures of two shapes, and a run on them with further keys.
    fn session(folder: &Path, keys: &[&str]) -> Session {
        SyntheticModel::tiny().write(folder.join("base.safetensors"), DType::F16).unwrap();
        std::fs::create_dir_all(folder.join("data")).unwrap();
        for (index, (width, height)) in [(64, 64), (128, 64), (64, 64), (128, 64), (64, 64)].into_iter().enumerate() {
            let picture = image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, index as u8]));
            picture.save(folder.join(format!("data/{index}.png"))).unwrap();
            std::fs::write(folder.join(format!("data/{index}.txt")), format!("a (shape:1.3) {index}")).unwrap();
        }
        let path = |name: &str| folder.join(name).display().to_string();
        let text = format!(
            "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\ndevice: cpu\nprecision: fp32\nmax_resolution: 64\n\
             target_modules: attention\nmax_train_steps: 40\n",
            path("base.safetensors"),
            path("data"),
            path("out")
        );
        let config = TrainConfig::from_text(&text, Format::Yaml, keys).unwrap();
        Session::prepare(config, &Plugins::default(), &mut |_| {}).unwrap()
    }

    /// What a graph computes again on the same tensors, computed again on the same tensors.
    #[test]
    fn steps_on_the_same_tensors_are_the_same_steps() {
        for keys in [
            &[
                "batch_size=2",
                "max_train_steps=8",
                "enable_bucket=true",
                "min_bucket_reso=64",
                "weighted_captions=true",
            ][..],
            &["batch_size=2", "max_train_steps=8", "prior_prompt=a thing", "prior_blank_weight=0.5"],
            &["gradient_accumulation_steps=2", "train_text_encoder=false", "min_snr_gamma=5", "max_train_steps=6"],
        ] {
            let folder = tempfile::tempdir().unwrap();
            let run = |graphs: Option<StepGraphs>| {
                let mut session = session(folder.path(), keys);
                session.graphs = graphs;
                let losses: Vec<f64> =
                    std::iter::from_fn(|| session.step().unwrap()).map(|report| report.loss).collect();
                (losses, session.recorded_shapes(), session.adapter().unwrap().export().unwrap())
            };
            let (plain, none, adapter) = run(None);
            let (same, shapes, recorded) = run(Some(StepGraphs::new(None)));
            assert_eq!((plain, none), (same, 0), "{keys:?}");
            assert!(shapes > 0, "{keys:?}");
            assert_eq!(adapter, recorded, "{keys:?}");
        }
    }

    /// What is beside training has precedence, and the recordings come back.
    #[test]
    fn samples_that_do_not_fit_beside_recordings_take_their_place() {
        let folder = tempfile::tempdir().unwrap();
        let run = |recorded: bool, fails: bool| {
            let keys = ["max_train_steps=6", "sample_resolution=64", "sample_steps=2"];
            let mut session = session(folder.path(), &keys);
            session.graphs = recorded.then(|| StepGraphs::new(None));
            let validation = session.load_validation(&folder.path().join("data")).unwrap();
            let mut shapes = Vec::new();
            for _ in 0..2 {
                session.step().unwrap();
            }
            let fault = fails.then(|| Fault::of_allocation(100));
            let pictures = session.sample(&["a".to_owned()]);
            shapes.push(session.recorded_shapes());
            drop(fault);
            session.step().unwrap();
            shapes.push(session.recorded_shapes());
            let fault = fails.then(|| Fault::of_allocation(100));
            let loss = session.validation_loss(&validation);
            shapes.push(session.recorded_shapes());
            drop(fault);
            while session.step().unwrap().is_some() {}
            (pictures, loss, shapes, session.adapter().unwrap().export().unwrap())
        };
        let (pictures, loss, none, adapter) = run(false, false);
        let (pictures, loss) = (pictures.unwrap(), loss.unwrap());
        assert_eq!(none, [0, 0, 0]);
        let (again, again_loss, kept, same) = run(true, false);
        assert_eq!((again.unwrap(), again_loss.unwrap(), same), (pictures.clone(), loss, adapter.clone()));
        assert!(kept[0] > 0 && kept[1] >= kept[0] && kept[2] == kept[1], "{kept:?}");
        let (again, again_loss, left, same) = run(true, true);
        assert_eq!((again.unwrap(), again_loss.unwrap(), same), (pictures, loss, adapter));
        assert!(left[0] == 0 && left[1] > 0 && left[2] == 0, "{left:?}");
        // Without recordings there is nothing that could make room.
        let (pictures, loss, ..) = run(false, true);
        assert!(pictures.unwrap_err().is_out_of_memory() && loss.unwrap_err().is_out_of_memory());
    }

    #[test]
    fn samples_that_are_too_large_are_decoded_in_tiles() {
        let folder = tempfile::tempdir().unwrap();
        let session =
            |keys: &[&str]| session(folder.path(), &[&["sample_resolution=320", "sample_steps=1"], keys].concat());
        let draw = |session: &mut Session| session.sample(&["a".to_owned()]).unwrap();
        let tiled = draw(&mut session(&["vae_tiling=true"]));
        let mut own = session(&[]);
        let fault = Fault::none();
        let whole = draw(&mut own);
        let largest = fault.largest();
        drop(fault);
        let fault = Fault::from_bytes(largest);
        assert_eq!(draw(&mut own), tiled);
        assert!(fault.failed() > 0 && whole != tiled);
    }

    /// What an overflow in fp16 does, on a device without fp16: the loss scale alone makes the gradients overflow.
    #[test]
    fn a_step_that_overflows_is_skipped_and_the_scale_recovers() {
        let folder = tempfile::tempdir().unwrap();
        let mut session = session(folder.path(), &[]);
        session.scaler = LossScaler::dynamic_from(f64::powi(2.0, 140), 2000);

        let before = session.adapter().unwrap().export().unwrap();
        let first = session.step().unwrap().unwrap();
        assert!(first.skipped && first.gradient_norm.is_none() && first.loss.is_finite());
        assert_eq!((first.skipped_steps, first.loss_scale), (1, f64::powi(2.0, 139)));
        assert_eq!(session.adapter().unwrap().export().unwrap(), before, "a skipped step changes nothing");

        let healed = std::iter::from_fn(|| session.step().unwrap()).find(|report| !report.skipped).unwrap();
        assert!(
            healed.skipped_steps > 5 && healed.gradient_norm.is_some_and(|norm| norm > 0.0 && norm < 1e3),
            "{healed:?}"
        );
        assert_ne!(session.adapter().unwrap().export().unwrap(), before);
    }
}
