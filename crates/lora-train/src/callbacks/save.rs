//! The LoRA every so many steps, epochs or minutes, and the state of the run.

use std::path::PathBuf;

use super::clock::Clock;
use crate::callback::{Answer, Callback, Control};
use crate::command::Command;
use crate::config::TrainConfig;
use crate::session::{Session, StepReport};
use crate::{Error, Result};

/// Saves `name-step000100.safetensors` along the way; the last one is the run's own.
#[derive(Debug)]
pub(crate) struct SaveCheckpoints {
    steps: Option<usize>,
    epochs: Option<usize>,
    clock: Clock,
    most: Option<usize>,
}

impl SaveCheckpoints {
    /// Saves what is trained after so many steps, and forgets earlier saves beyond the limit. A full disk must not end a run
    /// whose result may still fit: what it says is answered.
    fn save(&self, session: &mut Session, step: usize) -> Result<Answer> {
        let name = name_of(&session.config().output_name, step);
        let path = match session.save(&name) {
            Ok(path) => path,
            Err(Error::File(error)) => return Ok(Err(error.to_string())),
            Err(error) => return Err(error),
        };
        tracing::info!("saved {}", path.display());
        if let Some(Err(error)) = self.most.map(|most| forget(session, step, most)) {
            tracing::warn!("an earlier save cannot be deleted: {error}");
        }
        Ok(Ok(format!("saved {}", path.display())))
    }

    /// For a run.
    pub(crate) fn new(config: &TrainConfig) -> Self {
        let (steps, epochs) = (config.save_every_n_steps, config.save_every_n_epochs);
        Self { steps, epochs, clock: Clock::of_minutes(config.save_every_minutes), most: config.save_total_limit }
    }
}

/// What the save after so many steps is called.
fn name_of(output_name: &str, step: usize) -> String {
    format!("{output_name}-step{step:06}")
}

/// Deletes the earliest saves up to a step beyond the last `most`: of a run's own names, and of folders the files that a save
/// has, so that what somebody put there stays.
fn forget(session: &Session, step: usize, most: usize) -> std::io::Result<()> {
    let own = &session.config().output_name;
    let steps = std::fs::read_dir(&session.config().output_dir)?.flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let number = name.strip_prefix(&format!("{own}-step"))?.trim_end_matches(".safetensors").parse().ok()?;
        let path = session.save_path(&name_of(own, number));
        (number <= step && path.file_name()?.to_str()? == name).then_some((number, path))
    });
    let mut saves: Vec<(usize, PathBuf)> = steps.collect();
    saves.sort();
    saves.truncate(saves.len().saturating_sub(most));
    for (_, path) in saves {
        if path.is_dir() {
            let files = ["README.md", "adapter_config.json", "adapter_model.safetensors"];
            for file in files.iter().map(|file| path.join(file)).filter(|file| file.exists()) {
                std::fs::remove_file(file)?;
            }
            std::fs::remove_dir(&path)?;
        } else {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}

impl Callback for SaveCheckpoints {
    fn on_start(&mut self, _session: &mut Session) -> Result<Control> {
        self.clock.restart();
        Ok(Control::Continue)
    }

    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        let every = |interval: Option<usize>| interval.is_some_and(|interval| report.step.is_multiple_of(interval));
        let epochs = self.epochs.map(|epochs| epochs * session.plan().steps_per_epoch);
        let due = self.clock.is_due();
        if (every(self.steps) || every(epochs) || due)
            && report.step < report.steps
            && let Err(error) = self.save(session, report.step)?
        {
            tracing::warn!("{error}; training goes on without this save");
        }
        Ok(Control::Continue)
    }

    fn on_command(&mut self, session: &mut Session, command: &Command) -> Result<Option<Answer>> {
        match command {
            Command::Save if session.steps_done() == 0 => Ok(Some(Err("no step is done yet".into()))),
            Command::Save => self.save(session, session.steps_done()).map(Some),
            _ => Ok(None),
        }
    }
}

/// Saves the run's state every so many steps, each in the place of the one before.
#[derive(Debug)]
pub(crate) struct SaveStates {
    every: Option<usize>,
}

impl SaveStates {
    /// For a run.
    pub(crate) fn new(config: &TrainConfig) -> Self {
        Self { every: config.save_state_every_n_steps }
    }
}

impl Callback for SaveStates {
    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        if self.every.is_some_and(|every| report.step.is_multiple_of(every)) {
            match session.save_state() {
                Ok(path) => tracing::debug!("saved the state of step {} in {}", report.step, path.display()),
                // The next may fit again.
                Err(error @ Error::StateNotWritten { .. }) => tracing::warn!("{error}. Training goes on"),
                Err(error) => return Err(error),
            }
        }
        Ok(Control::Continue)
    }

    fn on_command(&mut self, session: &mut Session, command: &Command) -> Result<Option<Answer>> {
        if *command != Command::Save || !session.config().save_state {
            return Ok(None);
        }
        match session.save_state() {
            Ok(path) => Ok(Some(Ok(format!("saved {}", path.display())))),
            Err(error @ Error::StateNotWritten { .. }) => Ok(Some(Err(error.to_string()))),
            Err(error) => Err(error),
        }
    }
}
