//! The state of a run on disk: everything that it takes to go on exactly where it stood. One safetensors file, trained
//! tensors and the optimiser's by name, numbers as JSON in its header. It appears whole or not at all, in the place of the
//! one before. What a run must have in common with it is in `settings`; when it is written is the session's business.

mod settings;

pub(crate) use settings::Settings;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use lora_data::sampler::Position;
use lora_io::safetensors::{Entry, SafetensorsFile, StoredDType, TensorSource, write};
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::{from_bytes, to_bytes};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The key of the header.
const KEY: &str = "lora_state";
/// The layout of the file; a later one is refused.
const FORMAT: u32 = 1;

/// The numbers of a state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StateHeader {
    /// Layout of the file.
    pub format: u32,
    /// Program that wrote it.
    pub program: String,
    /// libtorch that it ran on.
    pub libtorch: String,
    /// How far it came.
    #[serde(flatten)]
    pub progress: Progress,
    /// Loss scale and steps since it last changed.
    pub scaler: (f64, u32),
    /// Where it stands in its data.
    pub position: Position,
    /// A digest of what an adapter holds besides its trained tensors.
    pub frozen: Option<String>,
    /// How many ranks it began with: a step has as many times the micro-batches that `gradient_accumulation_steps` says.
    #[serde(default = "alone", skip_serializing_if = "is_alone")]
    pub ranks: usize,
    /// What the run is.
    pub settings: Settings,
}

fn alone() -> usize {
    1
}

fn is_alone(ranks: &usize) -> bool {
    *ranks == 1
}

/// How far a run came, and what it met on the way that the steps to come depend on.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Steps done.
    pub step: usize,
    /// Steps skipped among them.
    pub skipped: usize,
    /// Those of them that came last in a row.
    pub skipped_in_a_row: usize,
    /// What was done when memory ran out.
    pub economy: Economy,
    /// What looks at the held-out loss have shown.
    #[serde(default)]
    pub looks: Looks,
}

/// What a run does to make do with less memory than its configuration takes; the update stays the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Economy {
    /// Most pictures of a micro-batch, where that is less than the configuration's.
    pub micro_batch: Option<usize>,
    /// The inner part of feed-forwards is computed again, whatever the configuration says.
    pub recompute_feed_forward: bool,
    /// So is all within blocks.
    pub recompute: bool,
    /// What is needed to compute them again waits in host memory.
    pub inputs_in_host: bool,
    /// The autoencoder leaves the device after each micro-batch's pictures.
    pub encoder_leaves: bool,
}

/// What looks at the held-out loss have shown so far.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Looks {
    /// The step with the lowest loss, and the loss.
    pub best: Option<(usize, f64)>,
    /// Looks in a row that were not better by as much as was asked for.
    pub in_vain: usize,
    /// The step of the last look that counted.
    pub last: usize,
}

impl Looks {
    /// Takes a look into account; whether it showed the lowest loss so far. Early stopping counts it as in vain unless it is
    /// lower than that by more than `threshold`, as in transformers.
    pub fn take(&mut self, step: usize, loss: f64, threshold: f64) -> bool {
        let lowest = self.best.map_or(f64::INFINITY, |(_, lowest)| lowest);
        self.last = step;
        self.in_vain = if loss < lowest && lowest - loss > threshold { 0 } else { self.in_vain + 1 };
        if loss < lowest {
            self.best = Some((step, loss));
        }
        loss < lowest
    }
}

impl StateHeader {
    /// Of the program and libtorch that run now.
    pub(crate) fn new(progress: Progress, position: Position, settings: Settings) -> Self {
        Self {
            format: FORMAT,
            program: concat!("lora/", env!("CARGO_PKG_VERSION")).into(),
            libtorch: lora_torch::LIBTORCH.into(),
            progress,
            scaler: (1.0, 0),
            position,
            frozen: None,
            ranks: 1,
            settings,
        }
    }
}

/// A state that is open for reading.
#[derive(Debug)]
pub(crate) struct StateFile {
    file: SafetensorsFile,
    header: StateHeader,
}

impl StateFile {
    /// Opens a file and reads its numbers.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = SafetensorsFile::open(path).map_err(|error| damaged(path, &error.to_string()))?;
        let Some(text) = file.metadata().get(KEY) else {
            return Err(damaged(path, "it holds no state of a run; a LoRA to begin from goes into init_from"));
        };
        let format = serde_json::from_str::<serde_json::Value>(text).ok().and_then(|json| json["format"].as_u64());
        if format.is_some_and(|format| format != u64::from(FORMAT)) {
            let reason = format!(
                "it has layout {}, expected {FORMAT}; go on with the version of the program that wrote it",
                format.unwrap_or_default()
            );
            return Err(damaged(path, &reason));
        }
        let header = serde_json::from_str(text).map_err(|error| damaged(path, &format!("its numbers: {error}")))?;
        Ok(Self { file, header })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Its numbers.
    pub(crate) fn header(&self) -> &StateHeader {
        &self.header
    }

    /// Its tensors, in host memory.
    pub(crate) fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for name in self.file.names() {
            let view = self.file.get(name)?;
            let kind =
                KINDS.iter().find(|(_, stored)| *stored == view.dtype()).map(|(kind, _)| *kind).ok_or_else(|| {
                    damaged(self.path(), &format!("tensor `{name}` is stored as {}, which no state is", view.dtype()))
                })?;
            tensors.insert(name.to_owned(), from_bytes(name, view.bytes(), kind, view.shape(), kind, Device::Cpu)?);
        }
        Ok(tensors)
    }
}

/// Writes a state in the place of the one before; its size in bytes.
pub(crate) fn write_state(path: &Path, header: &StateHeader, tensors: &BTreeMap<String, Tensor>) -> Result<u64> {
    let text = serde_json::to_string(header).map_err(|error| damaged(path, &error.to_string()))?;
    let entries = tensors.iter().map(|(name, tensor)| entry(path, name, tensor)).collect::<Result<_>>()?;
    let source = Source { path, tensors, entries };
    Ok(write(path, &source, &BTreeMap::from([(KEY.to_owned(), text)]))?)
}

const KINDS: [(Kind, StoredDType); 11] = [
    (Kind::Float, StoredDType::F32),
    (Kind::Double, StoredDType::F64),
    (Kind::Half, StoredDType::F16),
    (Kind::BFloat16, StoredDType::BF16),
    (Kind::Int64, StoredDType::I64),
    (Kind::Int, StoredDType::I32),
    (Kind::Int16, StoredDType::I16),
    (Kind::Int8, StoredDType::I8),
    (Kind::Uint8, StoredDType::U8),
    (Kind::Bool, StoredDType::Bool),
    (Kind::Float8e4m3fn, StoredDType::F8E4M3),
];

fn entry(path: &Path, name: &str, tensor: &Tensor) -> Result<Entry> {
    let kind = tensor.f_kind()?;
    let dtype = KINDS
        .iter()
        .find(|(own, _)| *own == kind)
        .map(|(_, stored)| *stored)
        .ok_or_else(|| damaged(path, &format!("tensor `{name}` of kind {kind:?} has no place in a file")))?;
    Ok(Entry { name: name.to_owned(), dtype, shape: tensor.size().iter().map(|&side| side as usize).collect() })
}

struct Source<'a> {
    path: &'a Path,
    tensors: &'a BTreeMap<String, Tensor>,
    entries: Vec<Entry>,
}

impl TensorSource for Source<'_> {
    fn entries(&self) -> Vec<Entry> {
        self.entries.clone()
    }

    fn bytes(&self, entry: &Entry) -> lora_io::Result<Cow<'_, [u8]>> {
        // One at a time, so that a state on a device needs little memory of the host.
        to_bytes(&self.tensors[&entry.name]).map(Cow::Owned).map_err(|error| lora_io::Error::Tensor {
            path: self.path.to_owned(),
            tensor: entry.name.clone(),
            reason: error.to_string(),
        })
    }
}

fn damaged(path: &Path, reason: &str) -> Error {
    Error::State { path: path.to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> StateHeader {
        StateHeader::new(
            Progress { step: 7, ..Progress::default() },
            Position { epoch: 1, item: 3 },
            Settings::default(),
        )
    }

    #[test]
    fn looks_in_vain_are_counted_and_the_lowest_is_kept() {
        let mut looks = Looks::default();
        let told: Vec<(bool, usize)> = [3.0, 2.0, 1.95, 1.9, 2.5, f64::NAN, 1.0]
            .into_iter()
            .enumerate()
            .map(|(index, loss)| (looks.take(10 * (index + 1), loss, 0.08), looks.in_vain))
            .collect();
        // 1.95 is the lowest by less than the threshold, and what follows is held against it.
        let expected = [(true, 0), (true, 0), (true, 1), (true, 2), (false, 3), (false, 4), (true, 0)];
        assert_eq!((told, looks.best, looks.last), (expected.to_vec(), Some((70, 1.0)), 70));
    }

    #[test]
    fn tensors_of_every_kind_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
        for (kind, dtype) in KINDS {
            let values = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
            tensors.insert(dtype.to_string(), values.to_kind(kind));
        }
        tensors.insert("number".into(), Tensor::from(0.1f64));
        let mut before = header();
        before.scaler = (f64::powi(2.0, -14), 1999);
        write_state(&path, &before, &tensors).unwrap();
        let state = StateFile::open(&path).unwrap();
        assert_eq!(*state.header(), before);
        for (name, tensor) in state.tensors().unwrap() {
            assert_eq!((tensor.kind(), tensor.size()), (tensors[&name].kind(), tensors[&name].size()), "{name}");
            assert_eq!(to_bytes(&tensor).unwrap(), to_bytes(&tensors[&name]).unwrap(), "{name}");
        }
    }

    #[test]
    fn what_is_no_whole_state_is_refused_with_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write_state(&path, &header(), &BTreeMap::from([("a".to_owned(), Tensor::from_slice(&[1.0f32; 64]))])).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let error = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            StateFile::open(&path).unwrap_err().to_string()
        };
        for cut in [0, 5, 100, whole.len() - 1] {
            let error = error(&whole[..cut]);
            assert!(error.contains("a.safetensors") && error.contains("resume = false"), "{cut}: {error}");
        }
        let edited = |from: &str, to: &str| {
            let at = whole.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
            let mut bytes = whole.clone();
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            bytes
        };
        let later = edited("\\\"format\\\":1", "\\\"format\\\":2");
        assert!(error(&later).contains("layout 2, expected 1"));
        let other = edited("lora_state", "lora_other");
        assert!(error(&other).contains("init_from"));
    }
}
