//! Where examples come from: what a run asks of a dataset, whatever its items are. [`crate::Pictures`],
//! [`crate::texts::Texts`] and [`crate::sliders::Sliders`] answer. In which order items are visited is [`crate::sampler`]'s
//! business; what is computed from an example belongs to the base model that is trained.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use lora_core::random::Stream;
use lora_io::metadata::TrainingRecord;

use crate::cache::DiskCache;
use crate::caption::Done;
use crate::finding::Finding;
use crate::sampler::{EpochSampler, Visit, Visits};
use crate::sliders::Contrast;
use crate::texts::TokenRow;
use crate::{Error, Result, Sample};

/// What decides which items may share a batch: only those of equal shape do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Shape {
    /// Width and height that a picture is trained at, in pixels.
    Picture(usize, usize),
    /// Number of tokens that a text is trained at.
    Tokens(usize),
    /// Items have a length that is not known yet, and share batches whatever it is: who lays a batch out pads it.
    Unmeasured,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shape::Picture(width, height) => write!(f, "{width}×{height}"),
            Shape::Tokens(length) => write!(f, "{length} tokens"),
            Shape::Unmeasured => f.write_str("any length"),
        }
    }
}

/// What training sees of an item, but for its caption.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Example {
    /// A picture at the size that it is trained at, with its mask.
    Picture(Sample),
    /// A row of tokens.
    Tokens(TokenRow),
    /// Prompts without a picture, of a slider.
    Contrast(Contrast),
}

/// What makes the data of a run what they are: names and values, which a resumed run must share.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// What the options say.
    pub options: Vec<(String, String)>,
    /// What the items themselves say: known for good only once the unusable ones are left out.
    pub items: Vec<(String, String)>,
}

/// What people get wrong most about data, to be read before the first step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Overview {
    /// What an item is called, in the plural.
    pub noun: &'static str,
    /// Items that are used.
    pub items: usize,
    /// Items that were left out.
    pub left_out: usize,
    /// What else there is to see, by its subject; a subject may have several lines.
    pub lines: Vec<(&'static str, Vec<String>)>,
    /// What was noticed.
    pub notes: Vec<String>,
}

impl fmt::Display for Overview {
    /// A line for each subject and its further ones below; notes are not among them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let left_out = if self.left_out > 0 { format!(" ({} skipped)", self.left_out) } else { String::new() };
        write!(f, "{:<10} {}{left_out}", format!("{}:", self.noun), self.items)?;
        for (subject, lines) in &self.lines {
            let mut label = format!("{subject}:");
            for line in lines {
                write!(f, "\n{label:<10} {line}")?;
                label.clear();
            }
        }
        Ok(())
    }
}

/// What is kept from training, to be looked at beside it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HeldOut {
    /// So many records or pictures.
    Records(usize),
    /// This share of all, between 0 and 1.
    Share(f64),
}

impl HeldOut {
    /// Which of so many are held out, chosen by the seed.
    ///
    /// # Errors
    /// [`Error::Option`] where that is none of them, or all.
    pub fn choose(self, of: usize, seed: u64) -> Result<BTreeSet<usize>> {
        let count = match self {
            Self::Records(count) => count,
            Self::Share(share) => ((of as f64 * share).round() as usize).max(1),
        };
        if count == 0 || count >= of {
            return Err(self.refused(format!("there are {of} records, and both parts need one")));
        }
        let mut all: Vec<usize> = (0..of).collect();
        Stream::new(seed).at("validation split").shuffle(&mut all);
        Ok(all.into_iter().take(count).collect())
    }

    fn refused(self, reason: String) -> Error {
        let value = match self {
            Self::Records(count) => count.to_string(),
            Self::Share(share) => share.to_string(),
        };
        Error::Option { key: "validation_split", value, reason }
    }
}

/// A dataset, or several as one. Items are numbered from 0.
///
/// All that is random comes from the `draw` that a method is given, which belongs to the visit: order, threads and resuming
/// change nothing.
pub trait Source: fmt::Debug + Send + Sync {
    /// Number of items.
    fn count(&self) -> usize;

    /// How often an item comes in an epoch, and with which others it may share a batch.
    fn visits(&self, item: usize) -> Visits;

    /// The file that an item is from, for messages.
    fn path(&self, item: usize) -> &Path;

    /// Loads an item: the costly part of a visit, which threads do ahead.
    ///
    /// # Errors
    /// Where the item cannot be read, which [`Source::leave_out`] may then be told.
    fn example(&self, item: usize, draw: &Stream) -> Result<Example>;

    /// Whether an item's example differs from visit to visit.
    fn is_random(&self) -> bool {
        false
    }

    /// How many variations of an item are kept where its example is made once, before training.
    fn variations(&self, _item: usize) -> usize {
        1
    }

    /// Whether the variations that are kept are all there are.
    fn variations_are_all(&self) -> bool {
        !self.is_random()
    }

    /// One of several variations of an item, from 0. By default they differ by their draws alone.
    ///
    /// # Errors
    /// As of [`Source::example`].
    fn variation(&self, item: usize, _variation: usize, draw: &Stream) -> Result<Example> {
        self.example(item, draw)
    }

    /// The caption of a visit, empty where items have none. Reads no file.
    fn caption(&self, _visit: &Visit, _draw: &Stream) -> String {
        String::new()
    }

    /// The same when a run is so far, for a source whose captions grow over a run.
    fn caption_when(&self, visit: &Visit, _done: Done, draw: &Stream) -> String {
        self.caption(visit, draw)
    }

    /// The caption of an item without what is drawn at each visit.
    fn plain_caption(&self, _item: usize) -> String {
        String::new()
    }

    /// Whether captions are the same at every visit that has one.
    fn captions_are_fixed(&self) -> bool {
        true
    }

    /// How much an item counts in the loss.
    fn loss_weight(&self, _item: usize) -> f64 {
        1.0
    }

    /// How much of a step's loss an item makes up: a picture counts 1, a text the number of its trained tokens, a row of
    /// preference pairs their number. The loss of a step is the mean over all that its items measure, however they are split
    /// into micro-batches.
    fn measure(&self, _item: usize) -> f64 {
        1.0
    }

    /// How much there is to learn of an item, in the unit of which a run shows how many it does in a second.
    fn amount(&self, item: usize) -> f64 {
        self.measure(item)
    }

    /// All that an item's example depends on, or one of its variations, as parts of a cache entry's key.
    ///
    /// # Errors
    /// Where a file of the item cannot be read.
    fn key_parts(&self, item: usize, variation: Option<usize>, draw: &Stream, cache: &DiskCache)
    -> Result<Vec<String>>;

    /// What a resumed run must have in common with this one.
    fn identity(&self) -> Identity;

    /// What was found when the items were read.
    fn findings(&self) -> &[Finding];

    /// Leaves items out that turned out unusable; the reasons go into the findings. Those that stay are numbered anew.
    fn leave_out(&mut self, unusable: Vec<(usize, Error)>);

    /// Items of another place, treated as these are but for what is random: for validation.
    ///
    /// # Errors
    /// Where there are none, or one cannot be used.
    fn of_another(&self, path: &Path) -> Result<Box<dyn Source>>;

    /// Takes some items out, chosen by the seed, and gives them: for validation. Both parts have at least one.
    ///
    /// # Errors
    /// [`Error::Option`] where there are not so many, or items cannot be taken out.
    fn hold_out(&mut self, held_out: HeldOut, seed: u64) -> Result<Box<dyn Source>> {
        let _ = seed;
        Err(held_out.refused("these data cannot be split; name a validation_data_dir".into()))
    }

    /// What to read before the first step.
    fn overview(&self) -> Overview;

    /// What the file of an adapter says of the data that it was trained on.
    fn record(&self, _record: &mut TrainingRecord) {}

    /// The order of all items.
    fn sampler(&self, seed: u64) -> EpochSampler {
        EpochSampler::new((0..self.count()).map(|item| self.visits(item)), seed)
    }
}
