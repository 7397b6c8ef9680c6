//! What happens in a run, as values: each is made once, where it happens, and reaches every callback
//! ([`Callback::on_event`](crate::callback::Callback::on_event)). Progress bars, files of metrics, reports and other
//! programs read these and nothing else.

mod lines;
mod pace;

pub use lines::{EventLines, VERSION};
pub(crate) use pace::Pace;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_data::figure::grid::GridPicture;
use serde::{Serialize, Serializer};

use crate::run::Best;
use crate::session::{Preparing, StepReport};

/// Something that happened in a run. In JSON the field `event` has the name of the variant, as `started`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// The run is being prepared.
    Preparing(Stage),
    /// Everything is prepared; the first step comes next.
    Started(Box<Started>),
    /// A step is done.
    Step(Box<Step>),
    /// The held-out loss was looked at.
    Validation {
        /// Steps done.
        step: usize,
        /// The loss.
        loss: f64,
        /// The loss of the first look of the run.
        first: f64,
    },
    /// Samples were made.
    Samples(Samples),
    /// A file was written that another program or a later run reads.
    Saved(Saved),
    /// Something that may be wrong with the data or the run, told once.
    Finding(Finding),
    /// Memory ran out in the middle of a step, which was then run again in another way with the same draws.
    OutOfMemory {
        /// The step.
        step: usize,
        /// What is done from now on.
        remedy: String,
        /// The keys of the configuration that do so from the start.
        permanent: String,
        /// Both, with what was in use, as a sentence.
        message: String,
    },
    /// The run holds between two steps.
    Paused {
        /// Steps done.
        step: usize,
    },
    /// It goes on.
    Resumed {
        /// Steps done.
        step: usize,
    },
    /// The answer to a command.
    Command {
        /// The command as it was given.
        command: String,
        /// Whether it was done.
        done: bool,
        /// What came of it: where it was not done, why.
        message: String,
    },
    /// The run is over, complete or stopped; everything is saved.
    Finished(Finished),
    /// An error ended the run.
    Failed {
        /// What went wrong and what helps.
        message: String,
        /// Whether the configuration is to blame rather than the run.
        usage: bool,
    },
}

/// How far preparing has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Stage {
    /// What is done, as `encoding captions`.
    pub stage: String,
    /// How many items are done, where they are counted.
    pub done: Option<usize>,
    /// Of how many.
    pub of: Option<usize>,
}

impl From<Preparing> for Stage {
    fn from(preparing: Preparing) -> Self {
        let (stage, count) = match preparing {
            Preparing::Labels(done, of) => ("giving captions".to_owned(), Some((done, of))),
            Preparing::Loading(part) => (format!("loading the {part}"), None),
            Preparing::Examples(done, of) => ("encoding examples".to_owned(), Some((done, of))),
            Preparing::Captions(done, of) => ("encoding captions".to_owned(), Some((done, of))),
        };
        Self { stage, done: count.map(|(done, _)| done), of: count.map(|(_, of)| of) }
    }
}

/// What a run is, before its first step.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[non_exhaustive]
pub struct Started {
    /// This program, as `lora 0.1.0`.
    pub program: String,
    /// `output_name`.
    pub name: String,
    /// `output_dir`.
    #[serde(serialize_with = "shown")]
    pub folder: PathBuf,
    /// Steps of the run.
    pub steps: usize,
    /// Steps that were done before: 0 in a run that begins anew.
    pub done: usize,
    /// What it learns from per second is counted in, as `img`.
    pub unit: &'static str,
    /// Where it trains.
    pub device: String,
    /// Number type of the base and of activations.
    pub precision: String,
    /// Numbers to train.
    pub parameters: usize,
    /// Bytes of memory at the peak, as a plan predicts them; none where a plan cannot be made, as on macOS.
    pub planned_peak: Option<u64>,
    /// The summary for people, in lines.
    pub summary: String,
    /// The settings of the run by key, as its state records them.
    pub config: BTreeMap<String, String>,
}

/// A step, and how fast the run goes.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Step {
    /// What the step came to.
    #[serde(flatten)]
    pub report: StepReport,
    /// Running mean of the loss, over about twenty steps.
    pub mean_loss: Option<f64>,
    /// What was learnt from per second since the run started or was taken up again, without pauses.
    pub rate: f64,
    /// What that counts, as `img`.
    pub unit: &'static str,
    /// Seconds until the last step at this rate.
    pub seconds_left: f64,
}

/// Samples of the configuration's prompts at one moment.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Samples {
    /// Steps done.
    pub step: usize,
    /// What the moment is called, as `before` or `step 100`.
    pub label: String,
    /// The file with all samples so far: a grid of pictures, or a page of texts.
    #[serde(serialize_with = "shown")]
    pub file: PathBuf,
    /// The prompts.
    pub prompts: Vec<String>,
    /// Texts, by prompt; none where samples are pictures.
    pub texts: Vec<String>,
    /// Pictures, by prompt, which JSON leaves out; none where samples are texts.
    #[serde(skip)]
    pub pictures: Arc<Vec<GridPicture>>,
}

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Saved {
    /// Steps done.
    pub step: usize,
    /// What it holds.
    pub holds: Holds,
    /// The file, or the folder of an adapter in PEFT's layout.
    #[serde(serialize_with = "shown")]
    pub path: PathBuf,
    /// Bytes of the file, in a folder of the weights.
    pub bytes: u64,
    /// Its SHA-256, 64 digits; none of a state, which is soon another.
    pub sha256: Option<String>,
}

/// What a file that a run wrote holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Holds {
    /// What was trained: an adapter, or a whole checkpoint.
    Weights,
    /// The state of the run, to go on from.
    State,
}

/// Something that may be wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// Steps done.
    pub step: usize,
    /// What it is about.
    pub about: About,
    /// Its kind, as `divergence`.
    pub kind: &'static str,
    /// What was seen, in numbers, and what helps.
    pub message: String,
}

impl Finding {
    /// A finding after so many steps.
    pub fn new(step: usize, about: About, kind: &'static str, message: impl Into<String>) -> Self {
        Self { step, about, kind, message: message.into() }
    }
}

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum About {
    /// The data.
    Data,
    /// How the run learns.
    Health,
    /// The machine.
    Machine,
}

/// What a run left.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Finished {
    /// Steps done.
    pub step: usize,
    /// What was trained.
    #[serde(serialize_with = "shown")]
    pub path: PathBuf,
    /// Why it stopped before its end, if it did.
    pub stopped: Option<String>,
    /// Where the held-out loss was lowest, if it was looked at while training.
    pub best: Option<Best>,
    /// Seconds since it started, with preparing and pauses.
    pub seconds: f64,
}

/// A path as people read it: one that is not UTF-8 must not end the stream.
pub(crate) fn shown<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_an_object_with_its_name() {
        let json = |event: &Event| serde_json::to_value(event).unwrap();
        let paused = json(&Event::Paused { step: 3 });
        assert_eq!(paused, serde_json::json!({ "event": "paused", "step": 3 }));
        let stage = json(&Event::Preparing(Preparing::Captions(2, 5).into()));
        assert_eq!(
            stage,
            serde_json::json!({ "event": "preparing", "stage": "encoding captions", "done": 2, "of": 5 })
        );
        let finding = json(&Event::Finding(Finding::new(7, About::Health, "spike", "a\nb")));
        assert_eq!((&finding["about"], &finding["kind"]), (&"health".into(), &"spike".into()));
        let look = json(&Event::Validation { step: 1, loss: f64::NAN, first: 1.0 });
        assert!(look["loss"].is_null(), "JSON has no NaN");
    }

    #[cfg(unix)]
    #[test]
    fn a_path_that_is_not_utf8_is_shown_all_the_same() {
        use std::os::unix::ffi::OsStrExt;
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(b"out/\xff.safetensors"));
        let saved = Saved { step: 1, holds: Holds::Weights, path, bytes: 1, sha256: None };
        let json = serde_json::to_string(&Event::Saved(saved)).unwrap();
        assert!(json.contains("out/\u{fffd}.safetensors"), "{json}");
    }
}
