//! How a dataset's pictures and captions are treated: what a configuration says of it, with the processors found by
//! their names. What is done with them is in the module above.

use std::path::PathBuf;
use std::sync::Arc;

use crate::bucket::Framing;
use crate::caption::CaptionOptions;
use crate::dataset::ScanOptions;
use crate::processor::{Fit, PictureProcessor};

/// Whether and how pixels are weighted in the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MaskOptions {
    /// Masks are used; a picture without one counts in full.
    pub enabled: bool,
    /// The picture's own transparency is its mask, where it has no other.
    pub alpha: bool,
    /// Dark counts, bright does not.
    pub inverted: bool,
    /// The least that any pixel counts, from 0 to 1.
    pub unmasked_weight: f32,
}

impl Default for MaskOptions {
    fn default() -> Self {
        Self { enabled: false, alpha: false, inverted: false, unmasked_weight: 0.0 }
    }
}

/// A dataset and how its pictures and captions are treated.
#[derive(Debug, Clone)]
pub struct DatasetOptions {
    /// Folder, archive or table.
    pub path: PathBuf,
    /// How it is scanned.
    pub scan: ScanOptions,
    /// The size that each picture is brought to.
    pub framing: Framing,
    /// Names of the processors that pictures go through.
    pub processors: Vec<String>,
    /// How many variations of a picture are kept where latents are cached and processors are random; without it all that
    /// there are, where the processors know how many ([`PictureProcessor::outcomes`]).
    pub variations: Option<usize>,
    /// How captions are treated.
    pub captions: CaptionOptions,
    /// What lies behind transparent pictures.
    pub background: [u8; 3],
    /// Pictures at once.
    pub batch_size: usize,
    /// How much its pictures count in the loss.
    pub loss_weight: f64,
    /// Weights of pixels.
    pub masks: MaskOptions,
    /// Datasets of one number share their regularisation pictures.
    pub group: usize,
}

impl DatasetOptions {
    /// Of a folder, archive or table as a configuration that says no more has it: 512 × 512 pixels, cut from the
    /// middle, on white.
    pub fn of(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            scan: ScanOptions::default(),
            framing: Framing::Fixed((512, 512)),
            processors: vec!["center_crop".to_owned()],
            variations: None,
            captions: CaptionOptions::default(),
            background: [255; 3],
            batch_size: 1,
            loss_weight: 1.0,
            masks: MaskOptions::default(),
            group: 0,
        }
    }
}

/// A dataset's settings with the processors that they name.
#[derive(Debug, Clone)]
pub(super) struct Dataset {
    pub(super) options: DatasetOptions,
    pub(super) processors: Vec<Arc<dyn PictureProcessor>>,
}

impl Dataset {
    pub(super) fn is_random(&self) -> bool {
        self.processors.iter().any(|processor| processor.is_random())
    }

    /// Whether each processor knows how many different results it has: then variations depend on no draw.
    pub(super) fn outcomes_are_known(&self) -> bool {
        self.processors.iter().all(|processor| processor.outcomes().is_some())
    }

    /// How many different results the processors have that know how many.
    fn outcomes(&self) -> usize {
        self.processors.iter().filter_map(|processor| processor.outcomes()).product()
    }

    /// How many variations of a picture are kept.
    pub(super) fn variations(&self) -> usize {
        match (self.is_random(), self.options.variations) {
            (false, _) => 1,
            (true, None) => self.outcomes(),
            // More than there are would only be kept twice.
            (true, Some(asked)) if self.outcomes_are_known() => asked.min(self.outcomes()),
            (true, Some(asked)) => asked,
        }
    }

    /// Whether the variations that are kept are all there are.
    pub(super) fn variations_are_all(&self) -> bool {
        self.outcomes_are_known() && self.variations() >= self.outcomes()
    }

    /// The same without random processors, as pictures are treated that are held out.
    pub(super) fn without_chance(&self) -> Self {
        let mut own = self.clone();
        let named = self.processors.iter().zip(&self.options.processors).filter(|(own, _)| !own.is_random());
        (own.processors, own.options.processors) = named.map(|(own, name)| (Arc::clone(own), name.clone())).unzip();
        if own.processors.len() < self.processors.len() {
            own.processors.push(Arc::new(Fit));
            own.options.processors.push("center_crop".to_owned());
        }
        own
    }
}
