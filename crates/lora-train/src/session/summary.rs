//! What people get wrong most, told before the first step.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use lora_core::DType;
use lora_data::Source;
use lora_data::dataset::CaptionSource;
use lora_data::finding::FindingKind;
use lora_torch::tch::Device;

use super::{Session, Trained};
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
    /// What was decided or noticed while preparing.
    pub notes: Vec<String>,
}

impl Session {
    /// What to read before the first step.
    pub fn summary(&self) -> Summary {
        let limit = self.config.max_token_length;
        let items = self.pictures.items();
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let mut notes = self.notes.clone();
        let skipped: Vec<_> = self.pictures.lost().collect();
        if let Some(first) = skipped.first() {
            let (path, reason) = (name(&first.path), &first.detail);
            notes.push(format!("skipped {} picture(s), the first {path}: {reason}", skipped.len()));
        }
        let multi_line = items.iter().filter(|item| !item.more_lines.is_empty()).count();
        if multi_line > 0 && !self.pictures.datasets().any(|dataset| dataset.captions.wildcards) {
            notes.push(format!("{multi_line} caption file(s) have more than one line; the first is used"));
        }
        let of_kind = |kind: FindingKind| -> Vec<String> {
            let findings = self.pictures.findings().iter();
            findings.filter(|finding| finding.kind == kind).map(|finding| name(&finding.path)).collect()
        };
        let ignored = of_kind(FindingKind::FolderIgnored);
        if !ignored.is_empty() {
            notes.push(format!("folders that are not read: {}", ignored.join(", ")));
        }
        let numbers = self.pictures.findings().iter().filter(|finding| finding.kind == FindingKind::FolderNumber);
        notes.extend(numbers.map(|finding| format!("{}: {}", finding.path.display(), finding.detail)));
        for (kind, what) in [
            (FindingKind::OrphanCaption, "caption(s) without a picture"),
            (FindingKind::DuplicateStem, "picture(s) that share their caption with another of the same name"),
            (FindingKind::MissingMask, "picture(s) without a file in mask_dir"),
        ] {
            if let (count @ 1.., Some(first)) = (of_kind(kind).len(), of_kind(kind).first()) {
                notes.push(format!("{count} {what}, the first {first}; `lora dataset` lists them"));
            }
        }
        let masked = items.iter().filter(|item| item.mask.is_some()).count();
        if masked > 0 && !self.config.masked_loss {
            notes.push(format!("{masked} picture(s) have a mask, which is not used; masked_loss = true uses it"));
        }
        let mut captions: BTreeMap<CaptionSource, usize> = BTreeMap::new();
        items.iter().for_each(|item| *captions.entry(item.caption_source).or_default() += 1);
        // As each is read: with trigger word, prefix and suffix.
        let tokens = |item: usize| self.base.caption_length(&self.pictures.plain_caption(item));
        Summary {
            pictures: (items.len(), skipped.len()),
            captions: captions.into_iter().map(|(source, count)| (source.name(), count)).collect(),
            examples: items.iter().take(3).map(|item| (name(&item.file.path), item.caption.clone())).collect(),
            cut_captions: (0..items.len()).filter(|&item| tokens(item).is_some_and(|tokens| tokens > limit)).count(),
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
        match self.modules {
            Some((modules, candidates)) => {
                writeln!(f, "adapter:   {modules} of {candidates} layers, {} numbers to train", self.parameters)?;
            }
            None => writeln!(f, "training:  whole networks, {} numbers to train", self.parameters)?,
        }
        writeln!(f, "device:    {} in {}", self.device, self.precision)?;
        write!(f, "steps:     {}", self.plan)?;
        for note in &self.notes {
            write!(f, "\nnote:      {note}")?;
        }
        Ok(())
    }
}
