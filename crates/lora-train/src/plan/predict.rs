//! From a configuration to the peak of each phase of its run: the run itself, by [`Session`], on the device without memory and
//! on data that stand in for the real ones. Nothing of networks, adapters, optimisers or their order is said here.

use std::sync::Arc;

use lora_core::DType;
use lora_data::DatasetOptions;
use lora_data::bucket::Framing;
use lora_data::source::Source;
use lora_io::checkpoint::Checkpoint;
use lora_torch::device::CUBLAS_WORKSPACE_BYTES;
use lora_torch::dry::{DryRun, Platform};
use lora_torch::tch::{Kind, Tensor};

use crate::Result;
use crate::base::Data;
use crate::config::{Resume, RunLength, TrainConfig};
use crate::meter::{MemoryPart, Usage};
use crate::plugins::Plugins;
use crate::ranks::bytes_sent;
use crate::session::{Materials, Preparing, Session, Watch, can_record};

/// A part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Phase {
    /// The network that encodes examples is loaded; they are encoded, where that is done before training.
    Examples,
    /// Those that encode captions are loaded; captions are encoded, where they do not change.
    Captions,
    /// What trains is loaded.
    Loading,
    /// Steps.
    Training,
    /// Samples are made.
    Samples,
    /// The loss on other items.
    Validation,
}

/// The peak of one phase.
#[derive(Debug, Clone, serde::Serialize)]
#[non_exhaustive]
pub struct PhasePeak {
    /// The phase.
    pub phase: Phase,
    /// The network that was loaded last.
    #[serde(skip)]
    pub network: &'static str,
    /// Bytes by part at the moment when most were held.
    pub parts: Usage,
    /// Bytes beside tensors: what the allocator holds without using it, the driver's context or the process itself.
    pub overhead: u64,
}

impl PhasePeak {
    /// The phase's name in reports.
    pub fn name(&self) -> String {
        match self.phase {
            Phase::Examples => "encode examples".into(),
            Phase::Captions => "encode captions".into(),
            Phase::Loading => format!("load the {}", self.network),
            Phase::Training => "train".into(),
            Phase::Samples => "make samples".into(),
            Phase::Validation => "validate".into(),
        }
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        self.parts.total() + self.overhead
    }
}

/// The peaks of a run.
#[derive(Debug, Clone, serde::Serialize)]
#[non_exhaustive]
pub struct Peaks {
    /// Phases in their order.
    pub phases: Vec<PhasePeak>,
    /// Where steps are recorded as CUDA graphs.
    pub recordings: Option<Recordings>,
    /// What ranks send each other, where several train together; the peaks are of each of them.
    pub exchanged: Option<Exchanged>,
}

/// What ranks send each other.
#[derive(Debug, Clone, Copy, serde::Serialize)]
#[non_exhaustive]
pub struct Exchanged {
    /// How many there are.
    pub ranks: usize,
    /// Bytes that each sends for a step, and receives.
    pub bytes: u64,
}

/// What recorded steps keep for themselves. It is no part of the peaks: where there is no room, they make it.
#[derive(Debug, Clone, Copy, serde::Serialize)]
#[non_exhaustive]
pub struct Recordings {
    /// Bytes of a step, as they are part of the training's peak.
    pub bytes: u64,
    /// Bytes in all when something else comes on top of them: samples, validation, the first visit of a further shape of
    /// items.
    pub most: u64,
}

impl Peaks {
    /// Bytes at the highest of all peaks.
    pub fn peak(&self) -> u64 {
        self.phases.iter().map(PhasePeak::total).max().unwrap_or(0)
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

/// The peaks of a run.
pub(super) fn predict(
    config: &TrainConfig,
    checkpoint: &Arc<Checkpoint>,
    machine: &Machine,
    plugins: &Plugins,
) -> Result<Peaks> {
    let run = DryRun::begin(machine.platform)?;
    let mut peaks = PeakWatch { run: &run, machine, network: "", phases: Vec::new() };
    let trained = lora_torch::caught(|| follow(config, checkpoint, plugins, &mut peaks))?;
    let recorded = !machine.platform.is_cpu() && can_record(config);
    let phases = peaks.phases;
    let recordings = recorded.then(|| recordings(&phases, machine)).flatten();
    let ranks = config.place.as_ref().map(|place| place.ranks).filter(|&ranks| ranks > 1);
    let exchanged = ranks.map(|ranks| Exchanged { ranks, bytes: bytes_sent(trained, ranks as u64) });
    Ok(Peaks { phases, recordings, exchanged })
}

/// All phases of a run, each once; how many numbers it trains.
fn follow(
    config: &TrainConfig,
    checkpoint: &Arc<Checkpoint>,
    plugins: &Plugins,
    peaks: &mut PeakWatch<'_>,
) -> Result<u64> {
    let device = peaks.run.device();
    // The backward pass, in a thread of its own, has a handle of its own.
    let workspace = || Tensor::f_zeros([CUBLAS_WORKSPACE_BYTES as i64], (Kind::Uint8, device));
    let _workspaces = match peaks.machine.platform {
        Platform::Cuda => Some((workspace()?, workspace()?)),
        Platform::Cpu { .. } => None,
    };
    let data = plugins.bases.registration(checkpoint)?.data_of(config);
    let (config, source) = stand_ins(config, peaks.machine.platform, data)?;
    let prompts = config.samples.prompts.clone();
    let materials = Materials::dry(config, Arc::clone(checkpoint), source, device, plugins)?;
    let mut session = Session::assemble(materials, plugins, peaks)?;
    // The largest picture takes the most.
    if let Some(prompt) = prompts.iter().rev().max_by_key(|prompt| session.config().samples.area(prompt)) {
        session.sample(std::slice::from_ref(prompt))?;
        peaks.done(Phase::Samples);
    }
    if let Some(validation) = session.load_held_out()? {
        session.validation_loss(&validation)?;
        peaks.done(Phase::Validation);
    }
    while session.step()?.is_some() {}
    peaks.done(Phase::Training);
    Ok(session.parameters().elements() as u64)
}

/// A configuration whose run takes one step of each kind that the given one's steps have, and data for it.
fn stand_ins(config: &TrainConfig, platform: Platform, data: Data) -> Result<(TrainConfig, Box<dyn Source>)> {
    let mut config = config.clone();
    // From the second micro-batch on the gradients of the first are there from the beginning; where steps are recorded, they
    // always are.
    let recorded = !platform.is_cpu() && can_record(&config);
    config.gradient_accumulation_steps = if recorded { 1 } else { config.gradient_accumulation_steps.min(2) };
    let mut datasets: Vec<DatasetOptions> = Vec::new();
    for dataset in &config.datasets {
        let (batch_size, resolution) = (dataset.batch_size, dataset.framing.resolution());
        if datasets.iter().all(|known| (known.batch_size, known.framing.resolution()) != (batch_size, resolution)) {
            // All buckets have about the area of the resolution.
            datasets.push(DatasetOptions { framing: Framing::Fixed(resolution), ..dataset.clone() });
        }
    }
    config.datasets = datasets;
    config.length = RunLength::Epochs(1);
    (config.resume, config.cache_dir) = (Resume::No, None);
    (config.vram_budget, config.auto) = (None, false);
    config.samples.steps = config.samples.steps.min(2);
    let source = (data.stand_ins)(&config, config.gradient_accumulation_steps)?;
    Ok((config, source))
}

fn recordings(phases: &[PhasePeak], machine: &Machine) -> Option<Recordings> {
    let training = phases.iter().find(|peak| peak.phase == Phase::Training)?;
    let step = training.parts.of(MemoryPart::Saved) + training.parts.of(MemoryPart::Working);
    let bytes = step + (step as f64 * machine.share) as u64;
    let beside = [Phase::Training, Phase::Samples, Phase::Validation];
    let beside = phases.iter().filter(|peak| beside.contains(&peak.phase)).map(PhasePeak::total);
    Some(Recordings { bytes, most: bytes + beside.max()? })
}

/// Takes down the peak of each phase.
struct PeakWatch<'r> {
    run: &'r DryRun,
    machine: &'r Machine,
    /// The network that was loaded last.
    network: &'static str,
    phases: Vec<PhasePeak>,
}

impl Watch for PeakWatch<'_> {
    fn now(&mut self, preparing: Preparing) {
        if let Preparing::Loading(network) = preparing {
            self.network = network;
        }
    }

    fn done(&mut self, phase: Phase) {
        let parts = Usage::of_peak(&self.run.peak());
        let overhead = self.machine.fixed + (parts.total() as f64 * self.machine.share) as u64;
        self.phases.push(PhasePeak { phase, network: self.network, parts, overhead });
        self.run.reset_peak();
    }
}

/// The number type of arithmetic for a configured precision: fp16 is for GPUs.
pub(crate) fn precision_on(platform: Platform, configured: DType) -> DType {
    match (configured, platform) {
        (DType::F16, Platform::Cpu { .. }) => DType::F32,
        _ => configured,
    }
}

#[cfg(test)]
mod tests {
    use lora_models::synthetic::SyntheticModel;

    use super::*;
    use crate::base::PICTURES;
    use crate::config::Format;

    /// What a run does when memory runs out, at Stable Diffusion 1.5's size on a GPU that is not there: the step is taken back,
    /// made smaller and run again, until it fits.
    #[test]
    fn a_step_that_does_not_fit_is_made_smaller_at_full_size() {
        let folder = tempfile::tempdir().unwrap();
        SyntheticModel::full().write_headers(folder.path()).unwrap();
        let text = format!(
            "base_model: {}\ntrain_data_dir: none\noutput_dir: none\nprecision: fp16\nlora_rank: 8\nbatch_size: 4\n",
            folder.path().display()
        );
        let config = TrainConfig::from_text::<&str>(&text, Format::Yaml, &[]).unwrap();
        let plugins = Plugins::default();
        let checkpoint = Arc::new(plugins.bases.configured(&config).unwrap());
        let machine = Machine { platform: Platform::Cuda, fixed: 0, share: 0.0 };
        let peak = predict(&config, &checkpoint, &machine, &plugins).unwrap().peak();

        // The rest of a step is left less and less.
        for (share, pictures, tried) in [(1.0, 4, 0), (0.8, 2, 1), (0.35, 1, 2)] {
            let run = DryRun::begin(machine.platform).unwrap();
            let mut peaks = PeakWatch { run: &run, machine: &machine, network: "", phases: Vec::new() };
            let (config, source) = stand_ins(&config, machine.platform, PICTURES).unwrap();
            let materials = Materials::dry(config, Arc::clone(&checkpoint), source, run.device(), &plugins).unwrap();
            let mut session = Session::assemble(materials, &plugins, &mut peaks).unwrap();
            let limit = run.live() + ((peak - run.live()) as f64 * share) as u64;
            run.limit(limit);
            let report = session.step().unwrap().unwrap();
            assert!(report.items == 4 && report.micro_batch <= pictures, "{share}: {report:?}");
            assert!(session.remedies_tried() >= tried, "{share}: {}", session.remedies_tried());
            assert!(run.peak().total() <= limit, "{share}");
        }
    }
}
