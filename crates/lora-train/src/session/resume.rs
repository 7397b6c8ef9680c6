//! The state of a run: saved at a step's end, and taken up again before the first step.

use std::path::{Path, PathBuf};

use lora_io::checkpoint::Checkpoint;
use lora_io::hash::sha256;
use lora_torch::tch::Tensor;

use super::{Session, Trained};
use crate::config::{Resume, TrainConfig};
use crate::event::{Event, Holds, Saved};
use crate::state::{Settings, StateFile, StateHeader, write_state};
use crate::{Error, Result};

/// Where a run was taken up again.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResumedFrom {
    /// The state.
    pub path: PathBuf,
    /// Steps that were done.
    pub step: usize,
}

impl Session {
    /// Where the run was taken up again, if it was.
    pub fn resumed(&self) -> Option<&ResumedFrom> {
        self.origin.resumed.as_ref()
    }

    /// Where the run's state is written.
    pub(crate) fn state_path(&self) -> PathBuf {
        state_path(&self.config.output_dir, &self.config.output_name)
    }

    /// Writes the run's whole state as it is after the last step, in the place of the one before; returns where. Where that
    /// fails the one before stays.
    ///
    /// # Errors
    /// [`Error::StateUnusable`] where the optimiser failed in the middle of a step or a weight is not finite;
    /// [`Error::StateNotWritten`] where the disk is full or the folder cannot be written.
    pub fn save_state(&mut self) -> Result<PathBuf> {
        let (path, step) = (self.state_path(), self.progress.step);
        if self.torn {
            return Err(Error::StateUnusable { step, reason: "the optimiser failed in the middle of a step" });
        }
        if !self.parameters.is_finite()? {
            return Err(Error::StateUnusable { step, reason: "the trained weights are not finite" });
        }
        if self.settings.base().is_none() {
            self.settings.set_base(base_identity(
                self.origin.base_hashes.as_ref(),
                &self.origin.checkpoint,
                &self.config,
            )?);
        }
        let mut header = StateHeader::new(self.progress, self.feed.sampler.position(), self.settings.clone());
        header.scaler = self.scaler.state();
        header.frozen = self.frozen_digest();
        header.ranks = self.plan.accumulation / self.config.gradient_accumulation_steps;
        let tensors = self.parameters.state()?;
        match write_state(&path, &header, &tensors) {
            Err(Error::File(source)) => {
                let bytes = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
                let bytes = tensors.values().map(bytes).sum();
                Err(Error::StateNotWritten { step, bytes, kept: path.exists(), source })
            }
            result => {
                result?;
                let bytes = std::fs::metadata(&path).map_or(0, |file| file.len());
                self.tell(Event::Saved(Saved { step, holds: Holds::State, path: path.clone(), bytes, sha256: None }));
                Ok(path)
            }
        }
    }

    fn frozen_digest(&self) -> Option<String> {
        match &self.trained {
            Trained::Adapter(trained) => trained.adapter.frozen_digest(),
            Trained::Whole(_) => None,
        }
    }

    /// Goes on from a state whose settings are this run's.
    pub(super) fn take_up(&mut self, state: &StateFile) -> Result<()> {
        let header = state.header();
        let refused = |reason: String| Error::State { path: state.path().to_owned(), reason };
        let frozen = self.frozen_digest();
        if frozen != header.frozen {
            let reason = format!(
                "what variant `{}` computes from the base before the first step came out differently (another init_from, or another kind of machine)",
                self.config.variant
            );
            return Err(refused(reason));
        }
        self.parameters.load_state(state.tensors()?).map_err(|error| refused(error.to_string()))?;
        self.scaler.restore(header.scaler);
        self.progress = header.progress;
        self.notes.push(format!(
            "goes on from step {} of {} ({})",
            self.progress.step,
            self.plan.steps,
            state.path().display()
        ));
        let changes = self.settings.changes(&header.settings);
        if !changes.is_empty() {
            let list: Vec<String> = changes.iter().map(ToString::to_string).collect();
            self.notes.push(format!("from step {} on: {}", self.progress.step + 1, list.join("; ")));
        }
        if self.progress.step >= self.plan.steps {
            self.notes.push("the run was complete; a larger max_train_steps or epochs makes it longer".into());
        }
        if self.progress.economy != Default::default() {
            self.notes.push("memory ran out before, so it goes on as it did then, in smaller pieces".into());
        }
        self.origin.resumed = Some(ResumedFrom { path: state.path().to_owned(), step: self.progress.step });
        Ok(())
    }
}

/// The state that a configuration asks to go on from.
pub(super) fn open(config: &TrainConfig) -> Result<Option<StateFile>> {
    let own = state_path(&config.output_dir, &config.output_name);
    let path = match &config.resume {
        Resume::No => return Ok(None),
        Resume::Auto if !own.exists() => return Ok(None),
        Resume::Auto | Resume::Yes => own,
        Resume::From(folder) if folder.is_dir() => state_path(folder, &config.output_name),
        Resume::From(file) => file.clone(),
    };
    match path.exists() {
        true => Ok(Some(StateFile::open(&path)?)),
        false => Err(Error::NoState { path }),
    }
}

/// An error where a state is another run's. Before the pictures are known for good, only the configuration is looked at.
pub(super) fn agree(state: &StateFile, settings: &Settings, all: bool) -> Result<()> {
    let earlier = &state.header().settings;
    let differences = if all { settings.differences(earlier) } else { settings.differences_of_config(earlier) };
    if !differences.is_empty() {
        let list: Vec<String> = differences.iter().map(ToString::to_string).collect();
        return Err(Error::OtherRun { path: state.path().to_owned(), list: list.join("; ") });
    }
    Ok(())
}

/// What tells base models apart: the file's hash where it is known, the components' own otherwise, the adapters that are merged
/// into it, and what the configuration says of the base.
pub(super) fn base_identity(
    hashes: Option<&(String, String)>,
    checkpoint: &Checkpoint,
    config: &TrainConfig,
) -> Result<String> {
    let digest = match hashes {
        Some((_, sha256)) => sha256.clone(),
        None => {
            let hashes =
                checkpoint.components().map(|(_, weights)| Ok(weights.sha256()?)).collect::<Result<Vec<_>>>()?;
            sha256(hashes.join(" ").as_bytes())
        }
    };
    // In front, where messages that show a difference do not cut it off.
    let fused = checkpoint.fused_digest().map(|fused| format!("fuse_adapters {fused}, "));
    let velocity = config.v_parameterization.map(|velocity| format!(", v_parameterization {velocity}"));
    Ok([fused, Some(digest), velocity].into_iter().flatten().collect())
}

fn state_path(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}-state.safetensors"))
}
