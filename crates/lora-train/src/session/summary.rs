//! What people get wrong most, told before the first step.

use std::fmt;

use lora_core::DType;
use lora_data::source::Overview;
use lora_torch::tch::Device;

use super::{Session, Trained};
use crate::base::levels::histogram;
use crate::config::StepPlan;
use crate::event::{About, Event, Finding, Started};

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
    /// Those of them that are about the data.
    pub of_data: Vec<String>,
}

impl Session {
    /// What the run is, as its first event says.
    pub(crate) fn started(&self, summary: &Summary) -> Started {
        let config = &self.config;
        Started {
            program: concat!("lora ", env!("CARGO_PKG_VERSION")).to_owned(),
            name: config.output_name.clone(),
            folder: config.output_dir.clone(),
            steps: self.plan.steps,
            done: self.progress.step,
            unit: self.feed.data.unit,
            device: summary.device.clone(),
            precision: summary.precision.to_string(),
            parameters: summary.parameters,
            planned_peak: None,
            summary: summary.to_string(),
            config: self.settings.all().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        }
    }

    /// What to read before the first step.
    pub fn summary(&self) -> Summary {
        let limit = self.config.max_token_length;
        let mut data = self.feed.source.overview();
        let of_data = std::mem::take(&mut data.notes);
        let notes = self.notes.iter().chain(&of_data).cloned().collect();
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
            of_data,
        }
    }
}

impl Summary {
    /// What it finds wrong with the data, as events.
    pub(crate) fn findings(&self, step: usize) -> impl Iterator<Item = Event> + '_ {
        let cut = (self.cut_captions > 0).then(|| {
            ("cut_captions", format!("{} caption(s) are longer than max_token_length and are cut", self.cut_captions))
        });
        let left_out = (self.data.left_out > 0)
            .then(|| ("left_out", format!("{} of the {} were left out", self.data.left_out, self.data.noun)));
        let noticed = self.of_data.iter().map(|note| ("note", note.clone()));
        let all = cut.into_iter().chain(left_out).chain(noticed);
        all.map(move |(kind, message)| Event::Finding(Finding::new(step, About::Data, kind, message)))
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
