//! Training by several processes, called ranks, on a device each: which part of a step is whose, what is added up, what they
//! agree on, and what must be equal in all of them. Only rank 0 writes files.
//!
//! How ranks find each other and sum tensors is in `lora_torch::group`; where a launcher says which of them this process is, in
//! `launch`; what travels of a step, in `fused`.

mod fused;
mod launch;

use std::sync::Arc;
use std::time::Duration;

use lora_io::hash::sha256;
use lora_torch::device::{self, CudaStatus};
use lora_torch::group::Group;
pub use lora_torch::group::Place;
use lora_torch::tch::{Device, Tensor};
use lora_torch::tensor::to_bytes;

pub use launch::place;

use crate::config::TrainConfig;
use crate::parameters::ParameterList;
use crate::state::Settings;
use crate::{Error, Result};

/// How long others wait for what only one rank does before training, such as giving captions: as long as it takes.
const NO_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// How long those that are left after another ended wait for each other, to tell which of them saves.
const ROLL_CALL: Duration = Duration::from_secs(5);

/// This process among those that train together.
#[derive(Debug, Clone)]
pub(crate) enum Ranks {
    /// It trains alone.
    Alone,
    /// A dry run stands for one of several: it needs the memory that a rank does.
    Planned,
    /// It has joined others.
    Joined(Arc<Group>),
}

/// A rank's part of what is done by all together: every so many-th, from its own number on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    rank: usize,
    ranks: usize,
}

impl Share {
    /// Its part of a list.
    pub(crate) fn of<T>(self, all: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
        all.into_iter().skip(self.rank).step_by(self.ranks)
    }
}

/// What a rank wants to do before the next step; what most of them does not matter, the highest decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wish {
    GoOn,
    Hold,
    Stop,
}

impl Ranks {
    /// Joins the others, where the configuration's place says that there are any.
    ///
    /// # Errors
    /// Where they do not come in time, and where the device is not there.
    pub(crate) fn join(config: &TrainConfig) -> Result<Self> {
        let Some(place) = config.place.as_ref().filter(|place| place.ranks > 1) else { return Ok(Self::Alone) };
        let device = device(config)?;
        if device == Device::Cpu && std::env::var_os("OMP_NUM_THREADS").is_none() {
            // Each would take all cores of the machine otherwise.
            let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            let own = (cores / place.local_ranks.max(1)).max(1);
            lora_torch::tch::set_num_threads(i32::try_from(own).unwrap_or(1));
        }
        let group = Group::join(place, device, Duration::from_secs(config.ddp_timeout as u64))?;
        Ok(Self::Joined(Arc::new(group)))
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.group().map_or(1, |group| group.place().ranks)
    }

    /// Whether this one writes the files.
    pub(crate) fn leads(&self) -> bool {
        self.rank() == 0
    }

    pub(crate) fn rank(&self) -> usize {
        self.group().map_or(0, |group| group.place().rank)
    }

    fn group(&self) -> Option<&Group> {
        match self {
            Self::Joined(group) => Some(group),
            Self::Alone | Self::Planned => None,
        }
    }

    /// Which part of everything is this one's.
    pub(crate) fn share(&self) -> Share {
        Share { rank: self.rank(), ranks: self.count() }
    }

    /// Adds up the gradients of all ranks in each of them, and what is beside them, `[numbers]` in f32.
    ///
    /// # Errors
    /// Where another rank ended, and where memory runs out.
    pub(crate) fn add_up(&self, parameters: &ParameterList, beside: Tensor) -> Result<Tensor> {
        if matches!(self, Self::Alone) {
            return Ok(beside);
        }
        let fused = fused::gather(parameters, &beside)?;
        if let Some(group) = self.group() {
            // From here on no rank can take the step again by itself.
            group.sum(&fused).map_err(|error| self.lost(error))?;
        }
        fused::scatter(parameters, &fused, beside.numel())
    }

    /// Bytes that each rank sends for a step, by the ring in which sums go round.
    pub(crate) fn bytes_sent(&self, parameters: &ParameterList) -> u64 {
        bytes_sent(parameters.elements() as u64, self.count() as u64)
    }

    /// What the ranks do: what the one that wants most wants.
    ///
    /// # Errors
    /// Where another rank ended.
    pub(crate) fn agree(&self, wish: Wish) -> Result<Wish> {
        let Some(group) = self.group() else { return Ok(wish) };
        let wishes = [i64::from(wish == Wish::Hold), i64::from(wish == Wish::Stop)];
        // In host memory: a device is not waited for.
        let wishes = Tensor::from_slice(&wishes);
        group.sum(&wishes).map_err(|error| self.lost(error))?;
        let wished = |index| Ok::<_, Error>(wishes.f_int64_value(&[index])? > 0);
        Ok(match (wished(0)?, wished(1)?) {
            (_, true) => Wish::Stop,
            (true, false) => Wish::Hold,
            (false, false) => Wish::GoOn,
        })
    }

    /// Waits until all have done what came before, however long it takes.
    ///
    /// # Errors
    /// Where another rank ended.
    pub(crate) fn wait(&self, name: &str) -> Result<()> {
        self.group().map_or(Ok(()), |group| group.wait_for_all(name, NO_LIMIT)).map_err(|error| self.lost(error))
    }

    /// Makes sure that all ranks make the same run: its settings and, once they are there, the numbers that it begins with.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`], the same in all of them, naming the keys; where another rank ended.
    pub(crate) fn compare(&self, settings: &Settings, begun: Option<(usize, &ParameterList)>) -> Result<()> {
        let Some(group) = self.group() else { return Ok(()) };
        let mut own = settings.clone();
        let mut put = |key: &str, value: String| own.fixed.insert(key.to_owned(), value);
        put("program", concat!("lora ", env!("CARGO_PKG_VERSION")).into());
        if let Some((step, parameters)) = begun {
            put("steps done", step.to_string());
            put("trained numbers", digest(parameters)?);
        }
        let bytes = serde_json::to_vec(&own).map_err(|error| Error::Ranks(error.to_string()))?;
        let said = group.exchange("settings", &bytes).map_err(|error| self.lost(error))?;
        let read = |bytes: &Vec<u8>| serde_json::from_slice::<Settings>(bytes);
        let said = said.iter().map(read).collect::<Result<Vec<_>, _>>();
        let said = said.map_err(|error| Error::Ranks(format!("another rank runs another program: {error}")))?;
        for (rank, other) in said.iter().enumerate() {
            let differences = said[0].differences(other).into_iter().chain(said[0].changes(other));
            let list: Vec<String> = differences
                .map(|difference| {
                    format!("{} is {} there and {} on rank 0", difference.key, difference.was, difference.is)
                })
                .collect();
            if !list.is_empty() {
                return Err(Error::RanksDiffer { rank, list: list.join("; ") });
            }
        }
        Ok(())
    }

    /// Tells the others why this rank ends.
    pub(crate) fn fail(&self, error: &Error) {
        if let Some(group) = self.group() {
            group.fail(&error.to_string());
        }
    }

    /// Whether this rank saves what was learnt after an error: rank 0, or the first that is left where that one ended.
    pub(crate) fn saves_the_rest(&self) -> bool {
        let Some(group) = self.group() else { return true };
        // All that are left come here, rank 0 too, for the others to know that it is there.
        group.roll_call(ROLL_CALL).first().is_none_or(|&first| first == self.rank())
    }

    /// The error of a collective that failed.
    fn lost(&self, error: lora_torch::Error) -> Error {
        match error {
            lora_torch::Error::Group(reason) => Error::Ranks(reason),
            other => other.into(),
        }
    }
}

/// The device of a configuration: of several ranks on a machine, each has one of its own.
///
/// # Errors
/// As of [`device::resolve`].
pub(crate) fn device(config: &TrainConfig) -> Result<Device> {
    let device = device::resolve(&config.device)?;
    let place = config.place.as_ref().filter(|place| place.ranks > 1);
    Ok(match (device, place, config.device.as_str()) {
        // Launchers that show each rank its own card alone call it number 0.
        (Device::Cuda(_), Some(place), "auto" | "cuda") if matches!(device::cuda(), CudaStatus::Available(2..)) => {
            device::resolve(&format!("cuda:{}", place.local_rank))?
        }
        _ => device,
    })
}

/// Bytes that each of some ranks sends to add up so many numbers: each piece goes round the ring but for one place, as a sum and
/// then as the result.
pub(crate) fn bytes_sent(numbers: u64, ranks: u64) -> u64 {
    2 * (ranks - 1) * 4 * numbers / ranks.max(1)
}

/// A digest of all trained numbers.
fn digest(parameters: &ParameterList) -> Result<String> {
    let mut digests = String::new();
    for (name, tensor) in parameters.state()? {
        digests += &format!("{name} {}\n", sha256(&to_bytes(&tensor)?));
    }
    Ok(sha256(digests.as_bytes()))
}
