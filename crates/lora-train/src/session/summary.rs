//! What people get wrong most, told before the first step.

use std::fmt;
use std::path::Path;

use lora_core::DType;
use lora_torch::tch::Device;

use super::Session;
use crate::config::StepPlan;

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

impl Session {
    /// What to read before the first step.
    pub fn summary(&self) -> Summary {
        let limit = self.config.max_token_length;
        let items = self.dataset.items();
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
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
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pictures, skipped) = self.pictures;
        let captions: Vec<_> = self.captions.iter().map(|(source, count)| format!("{count} from {source}")).collect();
        let skipped = if skipped > 0 { format!(" ({skipped} skipped)") } else { String::new() };
        writeln!(f, "pictures:  {pictures}{skipped}")?;
        writeln!(f, "captions:  {}", captions.join(", "))?;
        for (picture, caption) in &self.examples {
            writeln!(f, "           {picture}: {}", if caption.is_empty() { "(no caption)" } else { caption })?;
        }
        if self.cut_captions > 0 {
            writeln!(f, "           {} caption(s) are longer than max_token_length and are cut", self.cut_captions)?;
        }
        let (modules, candidates) = self.modules;
        writeln!(f, "adapter:   {modules} of {candidates} layers, {} numbers to train", self.parameters)?;
        writeln!(f, "device:    {} in {}", self.device, self.precision)?;
        write!(f, "steps:     {}", self.plan)?;
        for note in &self.notes {
            write!(f, "\nnote:      {note}")?;
        }
        Ok(())
    }
}
