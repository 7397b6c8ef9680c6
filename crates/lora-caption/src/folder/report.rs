//! What a run has done.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_data::report::html::SheetCard;
use serde::{Serialize, Serializer};

use crate::Problem;

/// A picture with its new caption.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Captioned {
    /// The picture.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// Its caption.
    pub caption: String,
}

/// A picture without a new caption, or a folder that could not be read. What it had before is as it was.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Failure {
    /// The file or folder.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// Why.
    #[serde(flatten)]
    pub problem: Problem,
}

impl Failure {
    /// Whether the tagger or the server is to blame, rather than the file.
    pub(super) fn tells_of_source(&self) -> bool {
        !matches!(self.problem, Problem::Unreadable(_) | Problem::Caption(_))
    }
}

/// What a run has done.
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Pictures of the folder, those that cannot be read among them.
    pub pictures: usize,
    /// Pictures that had a caption already, or got one in the interrupted run that this one goes on from.
    pub kept: usize,
    /// Pictures that have got one, in their order.
    pub captioned: Vec<Captioned>,
    /// Pictures that have got none.
    pub failed: Vec<Failure>,
    /// Whether the run was stopped before its end.
    pub stopped: bool,
    /// How many captions have a tag, the most frequent first; of taggers only.
    #[serde(serialize_with = "ranked")]
    pub tags: BTreeMap<String, usize>,
    /// What else there is to know.
    pub notes: Vec<String>,
    /// Pictures for a contact sheet, where they were asked for.
    #[serde(skip)]
    pub cards: Vec<SheetCard>,
}

impl Report {
    /// Failures by kind.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for failure in &self.failed {
            *counts.entry(failure.problem.name()).or_default() += 1;
        }
        counts
    }

    /// Tags with how many captions have them, the most frequent first.
    pub fn ranked_tags(&self) -> Vec<(&str, usize)> {
        let mut ranked: Vec<_> = self.tags.iter().map(|(tag, &count)| (tag.as_str(), count)).collect();
        ranked.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)));
        ranked
    }

    pub(super) fn fail(&mut self, path: &Path, problem: Problem) {
        self.failed.push(Failure { path: path.to_owned(), problem });
    }

    /// Counts the tags of a caption.
    pub(super) fn count(&mut self, caption: &str, separator: &str) {
        for tag in caption.split(separator).map(str::trim).filter(|tag| !tag.is_empty()) {
            *self.tags.entry(tag.to_owned()).or_default() += 1;
        }
    }
}

fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

fn ranked<S: Serializer>(tags: &BTreeMap<String, usize>, serializer: S) -> Result<S::Ok, S::Error> {
    let mut ranked: Vec<_> = tags.iter().collect();
    ranked.sort_by(|a, b| b.1.cmp(a.1).then_with(|| a.0.cmp(b.0)));
    serializer.collect_map(ranked)
}
