//! The memory of a run before it begins: the peak by part of each phase, what would make it fit a budget, and what to do
//! with memory that is left. Only headers of files are read.
//!
//! `predict` makes the run on a device without memory and counts; `remedies` says what can be changed. What to do when memory runs
//! out all the same is not this module's.

mod predict;
mod remedies;
mod report;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use lora_torch::dry::Platform;
use lora_torch::memory::Limit;
use lora_torch::tch::Device;
use lora_torch::{device, memory};

pub use crate::meter::{MemoryPart, Usage};
pub use predict::{Exchanged, Peaks, Phase, PhasePeak, Recordings};
pub use remedies::ChangedKey;

use crate::bytes::show;
pub(crate) use predict::precision_on;
use predict::{Machine, predict};
use remedies::{Change, ladder, settings, wishes};

use crate::config::TrainConfig;
use crate::plugins::Plugins;
use crate::session::preflight;
use crate::{Error, Result};

/// What a process holds on a card beside tensors: the driver's context and loaded kernels. An estimate; it depends on the
/// card and the driver, 0.3 to 0.5 GiB on those in use.
const CUDA_CONTEXT: u64 = 400 << 20;

/// What libtorch's caching allocator holds beyond what tensors take at the peak, as a share of it. An estimate.
const CUDA_SLACK: f64 = 0.05;

/// The share of free memory that `auto` leaves alone: predictions err, and others use the device too.
const AUTO_MARGIN: f64 = 0.05;

/// The memory of a run.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Plan {
    /// The device that it is for.
    pub device: String,
    /// Bytes that may be used, where the configuration says so.
    pub budget: Option<u64>,
    /// The peaks of the configuration as it is.
    pub as_configured: Peaks,
    /// What is changed to fit the budget, in order; none where it fits or there is no budget.
    pub remedies: Vec<Remedy>,
    /// The peaks with all remedies.
    pub planned: Peaks,
    /// What each remedy comes to alone, where there is no budget; those that save nothing are left out.
    pub alternatives: Vec<Remedy>,
    /// What could be had for the memory that is left, each alone.
    pub spend: Vec<Remedy>,
    #[serde(skip)]
    config: TrainConfig,
}

/// A change, and what it does.
#[derive(Debug, Clone, serde::Serialize)]
#[non_exhaustive]
pub struct Remedy {
    /// Keys that it sets.
    pub settings: Vec<ChangedKey>,
    /// Bytes at the peak without it.
    pub peak_before: u64,
    /// Bytes at the peak with it.
    pub peak_after: u64,
    /// What it costs, or what it is good for.
    pub cost: String,
}

impl Plan {
    /// The configuration with all remedies.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }
}

/// Plans a run. Its budget is `vram_budget`, or with `auto` what is free on the device; a budget that no remedy reaches is an
/// error that names the smallest possible peak.
///
/// A configuration for a GPU is planned on any machine; `device = "auto"` means the best device of this one.
///
/// # Errors
/// [`Error::Budget`] with the smallest peak where no remedy fits the budget; what opening the base gives;
/// [`Error::Config`] for keys that cannot go with this base.
pub fn plan(config: &TrainConfig, plugins: &Plugins) -> Result<Plan> {
    let device = device_of(config)?;
    let machine = Machine::of(device, memory::host_memory().map_or(0, |memory| memory.resident));
    let budget = match config.vram_budget {
        None if config.auto => Some(free(device, &machine, config)?),
        budget => budget,
    };
    let checkpoint = Arc::new(plugins.bases.configured(config)?);
    preflight(config, &checkpoint, precision_on(machine.platform, config.precision), plugins)?;
    // The search comes back to configurations that it has seen.
    let known = RefCell::new(BTreeMap::new());
    let peaks = |config: &TrainConfig| -> Result<Peaks> {
        let key = format!("{config:?}");
        if let Some(prediction) = known.borrow().get(&key) {
            return Ok(Peaks::clone(prediction));
        }
        let prediction = predict(config, &checkpoint, &machine, plugins)?;
        known.borrow_mut().insert(key, prediction.clone());
        Ok(prediction)
    };
    let as_configured = peaks(config)?;

    let registration = plugins.bases.registration(&checkpoint)?;
    let ladder = ladder(config, &machine, registration);
    let mut alternatives = Vec::new();
    // Where there is a budget, remedies are searched for together.
    for change in ladder.iter().flatten().filter(|_| budget.is_none()) {
        if let Some(other) = change.applied(config) {
            let remedy = remedy(*change, config, &other, (&as_configured, &peaks(&other)?), &machine);
            alternatives.extend((remedy.peak_after < remedy.peak_before).then_some(remedy));
        }
    }

    let chosen = match budget {
        Some(budget) if as_configured.peak() > budget => {
            search(config, &ladder, budget, registration.remedies, &peaks)?
        }
        _ => Vec::new(),
    };
    let (mut now, mut planned, mut remedies) = (config.clone(), as_configured.clone(), Vec::new());
    for change in chosen {
        let Some(next) = change.applied(&now) else { continue };
        let prediction = peaks(&next)?;
        remedies.push(remedy(change, &now, &next, (&planned, &prediction), &machine));
        (now, planned) = (next, prediction);
    }

    let mut spend = Vec::new();
    if let Some(budget) = budget {
        // What was just taken away is not offered again.
        for change in wishes(&now).into_iter().filter(|_| remedies.is_empty()) {
            for change in change {
                let Some(other) = change.applied(&now) else { continue };
                let prediction = peaks(&other)?;
                if prediction.peak() <= budget {
                    spend.push(remedy(change, &now, &other, (&planned, &prediction), &machine));
                    break;
                }
            }
        }
    }
    let device = match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    };
    Ok(Plan { device, budget, as_configured, remedies, planned, alternatives, spend, config: now })
}

/// The device that a configuration is planned for.
fn device_of(config: &TrainConfig) -> Result<Device> {
    Ok(match config.device.as_str() {
        "auto" => device::resolve("auto")?,
        "cpu" => Device::Cpu,
        other => Device::Cuda(other.strip_prefix("cuda:").and_then(|index| index.parse().ok()).unwrap_or(0)),
    })
}

impl Machine {
    /// On the CPU the program and libtorch themselves, as they were, take `held` bytes.
    fn of(device: Device, held: u64) -> Self {
        match device {
            Device::Cuda(_) => Self { platform: Platform::Cuda, fixed: CUDA_CONTEXT, share: CUDA_SLACK },
            _ => Self { platform: Platform::cpu(), fixed: held, share: 0.0 },
        }
    }
}

/// The peak of a configuration as it is, beside `held` bytes of the process; `None` where a dry run cannot be made of it, which
/// says nothing of the run.
pub(crate) fn predicted_peak(config: &TrainConfig, plugins: &Plugins, held: u64) -> Option<u64> {
    let peak = || -> Result<u64> {
        let checkpoint = Arc::new(plugins.bases.configured(config)?);
        Ok(predict(config, &checkpoint, &Machine::of(device_of(config)?, held), plugins)?.peak())
    };
    peak().inspect_err(|error| tracing::debug!("no plan of the run: {error}")).ok()
}

/// A configuration with its plan applied, where it asks for one, and what there is to say about it.
pub(crate) fn applied(config: TrainConfig, plugins: &Plugins) -> Result<(TrainConfig, Vec<String>)> {
    if config.vram_budget.is_none() && !config.auto {
        return Ok((config, Vec::new()));
    }
    let plan = plan(&config, plugins)?;
    let budget = plan.budget.map(show).unwrap_or_default();
    let mut notes: Vec<String> = plan.remedies.iter().map(|remedy| format!("to fit {budget}: {remedy}")).collect();
    notes.push(format!("predicted peak {} of {budget}", show(plan.planned.peak())));
    Ok((plan.config, notes))
}

/// Holds libtorch's allocator to a budget: the run is on a card of that size, whatever the card. Of host memory nothing is held.
pub(crate) fn enforce(budget: u64, device: Device) -> Result<Option<Limit>> {
    Ok(memory::limited(device, budget.saturating_sub(CUDA_CONTEXT))?)
}

/// The mildest changes that make the run fit: the first kinds first, each no further than needed.
fn search(
    config: &TrainConfig,
    ladder: &[Vec<Change>],
    budget: u64,
    remedies: &'static str,
    peaks: &dyn Fn(&TrainConfig) -> Result<Peaks>,
) -> Result<Vec<Change>> {
    let changes = |levels: &[usize]| -> Vec<Change> {
        ladder.iter().zip(levels).filter_map(|(kind, &level)| kind.get(level.checked_sub(1)?).copied()).collect()
    };
    let peak = |levels: &[usize]| -> Result<Option<u64>> {
        let changed = changes(levels).iter().try_fold(config.clone(), |config, change| change.applied(&config));
        changed.map(|config| Ok(peaks(&config)?.peak())).transpose()
    };
    let mut levels = vec![0; ladder.len()];
    let mut least = peak(&levels)?.unwrap_or(u64::MAX);
    for kind in 0..ladder.len() {
        for level in 1..=ladder[kind].len() {
            if least <= budget {
                break;
            }
            let mut next = levels.clone();
            next[kind] = level;
            if let Some(next_peak) = peak(&next)?.filter(|&peak| peak < least) {
                (levels, least) = (next, next_peak);
            }
        }
    }
    // Some remedies save only together with others, such as those that lower a phase which was not the highest.
    if least > budget {
        let most: Vec<usize> = ladder.iter().map(Vec::len).collect();
        if let Some(peak) = peak(&most)?.filter(|&peak| peak < least) {
            (levels, least) = (most, peak);
        }
    }
    if least > budget {
        let tried = changes(&levels).iter().try_fold(config.clone(), |config, change| change.applied(&config));
        let tried = settings(config, tried.as_ref().unwrap_or(config));
        let tried: Vec<String> = tried.iter().map(|setting| format!("{} = {}", setting.key, setting.to)).collect();
        return Err(Error::Budget {
            budget: show(budget),
            smallest: show(least),
            remedies,
            with: if tried.is_empty() { "as it is configured".into() } else { format!("with {}", tried.join(", ")) },
        });
    }
    // What turned out not to be needed goes back, what costs most first.
    for kind in (0..ladder.len()).rev() {
        for level in 0..levels[kind] {
            let mut milder = levels.clone();
            milder[kind] = level;
            if peak(&milder)?.is_some_and(|peak| peak <= budget) {
                levels = milder;
                break;
            }
        }
    }
    Ok(changes(&levels))
}

fn remedy(
    change: Change,
    before: &TrainConfig,
    after: &TrainConfig,
    (peak_before, peak_after): (&Peaks, &Peaks),
    machine: &Machine,
) -> Remedy {
    Remedy {
        settings: settings(before, after),
        peak_before: peak_before.peak(),
        peak_after: peak_after.peak(),
        cost: change.cost(machine),
    }
}

/// What `auto` may use: what is free, and what this process holds already and the prediction counts.
fn free(device: Device, machine: &Machine, config: &TrainConfig) -> Result<u64> {
    let free = match device {
        Device::Cuda(_) => {
            device::resolve(&config.device)?;
            memory::device_memory(device)?.map(|memory| memory.free)
        }
        _ => memory::host_available(),
    };
    let unknown = || Error::FreeMemoryUnknown { device: config.device.clone() };
    Ok(((free.ok_or_else(unknown)? + machine.fixed) as f64 * (1.0 - AUTO_MARGIN)) as u64)
}
