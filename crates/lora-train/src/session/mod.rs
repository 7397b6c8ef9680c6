//! A prepared run, driven step by step: what the loop is made of, and what another program embeds.
//!
//! Each item's noise, timestep and dropout derive from (seed, epoch, item, repeat), never from the order of calls, so
//! that micro-batch size, resuming and device do not change what is drawn.

mod claim;
mod encoded;
mod feed;
mod graphs;
mod materials;
mod out_of_memory;
mod preflight;
mod prepare;
mod resume;
mod sample;
mod save;
mod step;
mod summary;
mod validation;

pub(crate) use graphs::can_record;
pub(crate) use materials::Materials;
pub(crate) use preflight::check as preflight;
pub use prepare::Preparing;
pub(crate) use prepare::Watch;
pub use resume::ResumedFrom;
pub use step::StepReport;
pub use summary::Summary;
pub use validation::Validation;

use std::sync::Arc;

use lora_core::target::TargetLayer;
use lora_core::{Component, DType};
use lora_io::checkpoint::Checkpoint;
use lora_torch::graph::{Recorder, Scope};
use lora_torch::memory::{self, DeviceMemory, Limit};
use lora_torch::tch::Device;
use lora_torch::{LossScaler, dry};

use self::claim::Claim;
use crate::Result;
use crate::base::{Base, Data, Network};
use crate::config::{StepPlan, TrainConfig};
use crate::event::{About, Event, Finding};
use crate::full::TrainedNetworks;
use crate::meter::MemoryPart;
use crate::parameters::ParameterList;
use crate::ranks::{Ranks, Wish};
use crate::schedule::Schedule;
use crate::state::{Looks, Progress, Settings};
use crate::trainable::TrainableAdapter;
use feed::Feed;
use graphs::StepGraphs;

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
    _claim: Option<Claim>,
    /// Where passes are recorded; none with draws of their own, and where that failed.
    graphs: Option<StepGraphs>,
    /// This process among those that train together.
    ranks: Ranks,
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

    /// The number of this process among those that train together, and how many there are; `(0, 1)` where it trains alone.
    /// Callbacks of a program are called in each; files are written by the first.
    pub fn rank(&self) -> (usize, usize) {
        (self.ranks.rank(), self.ranks.count())
    }

    /// What joins it to the others.
    pub(crate) fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// What the ranks do before the next step; see [`Ranks::agree`].
    pub(crate) fn agree(&self, wish: Wish) -> Result<Wish> {
        self.ranks.agree(wish)
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

    /// The run's own stream is the current one while the answer lives.
    fn scope(&self) -> Result<Option<Scope>> {
        Ok(self.recorder.as_deref().map(Recorder::enter).transpose()?)
    }
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
mod tests;
