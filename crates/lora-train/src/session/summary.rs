//! What people get wrong most, told before the first step.

use std::fmt;

use lora_core::DType;
use lora_data::source::Overview;
use lora_torch::tch::Device;

use super::{Session, Trained};
use crate::base::levels::histogram;
use crate::config::StepPlan;

/// What people get wrong most, to be read before the first step.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Summary {
    /// The data.
    pub data: Overview,
    /// Captions longer than the limit.
    pub cut_captions: usize,
    /// Adapted layers, and all that could carry an adapter; `None` where whole networks are trained.
    pub modules: Option<(usize, usize)>,
    /// Numbers to train.
    pub parameters: usize,
    /// Number type of the base and of activations.
    pub precision: DType,
    /// Where it trains.
    pub device: String,
    /// How the steps come about.
    pub plan: StepPlan,
    /// How the timesteps that the run will draw are spread, as bars of text; `None` for a base that adds no noise.
    pub timesteps: Option<String>,
    /// What was decided or noticed while preparing.
    pub notes: Vec<String>,
}

impl Session {
    /// What to read before the first step.
    pub fn summary(&self) -> Summary {
        let limit = self.config.max_token_length;
        let mut data = self.feed.source.overview();
        let notes = self.notes.iter().cloned().chain(std::mem::take(&mut data.notes)).collect();
        // As each is read: with trigger word, prefix and suffix.
        let tokens = |item: usize| self.base.caption_length(&self.feed.source.plain_caption(item));
        let levels = self.noise_levels();
        Summary {
            timesteps: (!levels.is_empty()).then(|| histogram(&levels)),
            data,
            cut_captions: (0..self.feed.source.count())
                .filter(|&item| tokens(item).is_some_and(|tokens| tokens > limit))
                .count(),
            modules: match &self.trained {
                Trained::Adapter(trained) => Some((trained.adapter.modules(), trained.candidates)),
                Trained::Whole(_) => None,
            },
            parameters: self.parameters.elements(),
            precision: self.precision,
            device: match self.device {
                Device::Cuda(index) => format!("cuda:{index}"),
                _ => "cpu".into(),
            },
            plan: self.plan,
            notes,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.data)?;
        if self.cut_captions > 0 {
            writeln!(f, "           {} caption(s) are longer than max_token_length and are cut", self.cut_captions)?;
        }
        match self.modules {
            Some((modules, candidates)) => {
                writeln!(f, "adapter:   {modules} of {candidates} layers, {} numbers to train", self.parameters)?;
            }
            None => writeln!(f, "training:  whole networks, {} numbers to train", self.parameters)?,
        }
        writeln!(f, "device:    {} in {}", self.device, self.precision)?;
        write!(f, "steps:     {}", self.plan)?;
        if let Some(timesteps) = &self.timesteps {
            write!(f, "\n{timesteps}")?;
        }
        for note in &self.notes {
            write!(f, "\nnote:      {note}")?;
        }
        Ok(())
    }
}
