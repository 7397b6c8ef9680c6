//! Bytes by what they are for, at the peak of each phase of a run. They are counted by `lora_torch::dry`; the labels that they
//! have there are given here.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use lora_torch::dry::{self, LABELS, Labelled, Peak};

/// What memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum MemoryPart {
    /// Weights of a network, by the network's name, as they are stored; trained ones too, where all weights train.
    Weights(&'static str),
    /// The adapter's tensors.
    Adapter,
    /// Gradients of what is trained.
    Gradients,
    /// State of the optimiser, and running averages.
    Optimiser,
    /// Activations that the backward pass needs.
    Saved,
    /// Everything that comes and goes: activations on their way, gradients of activations, workspaces, whole weights of layers
    /// stored in fewer bytes.
    Working,
}

/// Labels of the parts that every run has; those of weights follow. What has no label of its own is working memory.
const FIXED: [MemoryPart; 5] =
    [MemoryPart::Working, MemoryPart::Adapter, MemoryPart::Gradients, MemoryPart::Optimiser, MemoryPart::Saved];

/// Networks that have a label, in the order in which they were first met.
static NETWORKS: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

impl MemoryPart {
    /// Its name in reports.
    pub fn name(self) -> String {
        match self {
            MemoryPart::Weights(network) => format!("{network} weights"),
            MemoryPart::Adapter => "adapter weights".into(),
            MemoryPart::Gradients => "adapter gradients".into(),
            MemoryPart::Optimiser => "optimiser state".into(),
            MemoryPart::Saved => "saved activations".into(),
            MemoryPart::Working => "working memory".into(),
        }
    }

    /// Its key in JSON.
    fn key(self) -> String {
        match self {
            MemoryPart::Weights(network) => network.to_lowercase().replace('-', "").replace(' ', "_"),
            MemoryPart::Adapter => "adapter".into(),
            MemoryPart::Gradients => "gradients".into(),
            MemoryPart::Optimiser => "optimiser".into(),
            MemoryPart::Saved => "saved".into(),
            MemoryPart::Working => "working".into(),
        }
    }

    /// What is allocated while the answer lives counts as this part.
    pub(crate) fn label(self) -> Labelled {
        dry::label(self.number())
    }

    /// The label. Networks beyond those that there are labels for count as working memory.
    pub(crate) fn number(self) -> u8 {
        let index = match self {
            MemoryPart::Weights(network) => {
                let mut networks = NETWORKS.lock().unwrap_or_else(PoisonError::into_inner);
                let known = networks.iter().position(|known| *known == network);
                let index = known.unwrap_or_else(|| {
                    networks.push(network);
                    networks.len() - 1
                });
                Some(FIXED.len() + index).filter(|&label| label < LABELS)
            }
            fixed => FIXED.iter().position(|part| *part == fixed),
        };
        index.and_then(|index| u8::try_from(index).ok()).unwrap_or(0)
    }
}

/// Bytes by part at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Usage(BTreeMap<MemoryPart, u64>);

impl Usage {
    /// As they were counted.
    pub(super) fn of_peak(peak: &Peak) -> Self {
        let networks = NETWORKS.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let parts = FIXED.into_iter().chain(networks.into_iter().map(MemoryPart::Weights)).zip(0..);
        let counted = parts.map(|(part, label)| (part, peak.of(label)));
        Self(counted.filter(|&(_, bytes)| bytes > 0).collect())
    }

    /// Parts that there is something of, with their bytes.
    pub fn parts(&self) -> impl Iterator<Item = (MemoryPart, u64)> {
        self.0.iter().map(|(&part, &bytes)| (part, bytes))
    }

    /// Bytes of a part.
    pub fn of(&self, part: MemoryPart) -> u64 {
        self.0.get(&part).copied().unwrap_or(0)
    }

    /// Bytes of the weights of all networks.
    pub fn weights(&self) -> u64 {
        self.parts().filter(|(part, _)| matches!(part, MemoryPart::Weights(_))).map(|(_, bytes)| bytes).sum()
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

impl serde::Serialize for Usage {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.parts().map(|(part, bytes)| (part.key(), bytes)))
    }
}

#[cfg(test)]
mod tests {
    use lora_torch::dry::{DryRun, Platform};
    use lora_torch::tch::{Kind, Tensor};

    use super::*;

    #[test]
    fn bytes_are_of_the_part_that_they_were_allocated_for() {
        let run = DryRun::begin(Platform::Cuda).unwrap();
        run.reset_peak();
        let take = |count: i64| Tensor::zeros([count], (Kind::Uint8, run.device()));
        let weights = {
            let _label = MemoryPart::Weights("U-Net").label();
            take(1000)
        };
        let _saved = {
            let _label = MemoryPart::Saved.label();
            take(1)
        };
        let usage = Usage::of_peak(&run.peak());
        assert_eq!(
            (usage.of(MemoryPart::Weights("U-Net")), usage.of(MemoryPart::Saved), usage.weights()),
            (1024, 512, 1024)
        );
        assert_eq!(serde_json::to_value(&usage).unwrap(), serde_json::json!({ "unet": 1024, "saved": 512 }));
        assert_eq!(MemoryPart::Weights("text encoder").name(), "text encoder weights");
        drop(weights);
    }
}
