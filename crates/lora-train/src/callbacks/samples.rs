//! Samples before, during and after training: pictures in one grid, where rows are steps and columns prompts; texts in
//! one page, by prompt and step.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use lora_data::figure::grid::{self, GridPicture, GridRow};

use super::clock::Clock;
use crate::Result;
use crate::base::Sample;
use crate::callback::{Answer, Callback, Control};
use crate::command::Command;
use crate::config::TrainConfig;
use crate::event::{self, Event};
use crate::session::{Session, StepReport};

/// Makes samples of the configuration's prompts and keeps `samples.png`, or `samples.md` of texts, up to date.
#[derive(Debug)]
pub(crate) struct Samples {
    folder: PathBuf,
    prompts: Vec<String>,
    every: Option<usize>,
    clock: Clock,
    rows: Vec<GridRow>,
    /// What was answered at each label, prompt by prompt.
    answers: Vec<(String, Vec<String>)>,
}

impl Samples {
    /// For a run; without prompts it makes nothing.
    pub(crate) fn new(config: &TrainConfig) -> Self {
        Self {
            folder: config.output_dir.clone(),
            prompts: config.samples.prompts.clone(),
            every: config.samples.every_n_steps,
            clock: Clock::of_minutes(config.sample_every_minutes),
            rows: Vec::new(),
            answers: Vec::new(),
        }
    }

    /// Makes them, where there are prompts; whether there was room.
    fn make(&mut self, session: &mut Session, label: String) -> Result<bool> {
        if self.prompts.is_empty() {
            return Ok(true);
        }
        let samples = match session.sample(&self.prompts) {
            // Samples are worth less than the run.
            Err(error) if error.is_out_of_memory() => {
                session.empty_cache()?;
                tracing::warn!("no samples are made for \"{label}\": {error}; smaller samples take less memory");
                return Ok(false);
            }
            samples => samples?,
        };
        let (mut pictures, mut texts) = (Vec::new(), Vec::new());
        for sample in samples {
            match sample {
                Sample::Picture(picture) => pictures.push(GridPicture::from(&picture)),
                Sample::Text(text) => texts.push(text),
            }
        }
        if !texts.is_empty() {
            for (prompt, text) in self.prompts.iter().zip(&texts) {
                tracing::info!("{label}: \"{prompt}\" → {text}");
            }
            self.answers.push((label.clone(), texts.clone()));
            lora_io::atomic::write(self.folder.join("samples.md"), |file| file.write_all(self.page().as_bytes()))?;
        }
        if !pictures.is_empty() {
            let pictures = pictures.iter().map(GridPicture::reduced).collect();
            self.rows.push(GridRow { label: label.clone(), pictures });
            grid::write(&self.folder.join("samples.png"), &self.rows, &self.prompts)?;
        }
        let file = self.folder.join(if pictures.is_empty() { "samples.md" } else { "samples.png" });
        let (step, prompts, pictures) = (session.steps_done(), self.prompts.clone(), Arc::new(pictures));
        session.tell(Event::Samples(event::Samples { step, label, file, prompts, texts, pictures }));
        Ok(true)
    }

    /// The answers so far, by prompt.
    fn page(&self) -> String {
        let mut page = String::new();
        for (index, prompt) in self.prompts.iter().enumerate() {
            page.push_str(&format!("## {prompt}\n\n"));
            for (label, answers) in &self.answers {
                let answer = answers.get(index).map_or("", |answer| answer.trim());
                page.push_str(&format!("**{label}**\n\n> {}\n\n", answer.replace('\n', "\n> ")));
            }
        }
        page
    }

    /// What was sampled before a state belongs to the steps before: it is kept under another name.
    fn keep(&self, file: &str, step: usize) -> Result<()> {
        let (path, name) = (self.folder.join(file), file.replacen("samples", &format!("samples-to-step{step:06}"), 1));
        let kept = self.folder.join(name);
        if path.exists() && !kept.exists() {
            let moved = |source| lora_io::Error::Io { path: kept.clone(), action: "move the samples to", source };
            std::fs::rename(&path, &kept).map_err(moved)?;
        }
        Ok(())
    }
}

impl Callback for Samples {
    fn on_start(&mut self, session: &mut Session) -> Result<Control> {
        let label = match session.resumed() {
            Some(resumed) => {
                let step = resumed.step;
                if !self.prompts.is_empty() {
                    self.keep("samples.png", step)?;
                    self.keep("samples.md", step)?;
                }
                format!("step {step}")
            }
            None => "before".into(),
        };
        self.make(session, label)?;
        self.clock.restart();
        Ok(Control::Continue)
    }

    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        let due = self.clock.is_due() || self.every.is_some_and(|every| report.step.is_multiple_of(every));
        if due && report.step < report.steps {
            self.make(session, format!("step {}", report.step))?;
        }
        Ok(Control::Continue)
    }

    fn on_command(&mut self, session: &mut Session, command: &Command) -> Result<Option<Answer>> {
        if *command != Command::Sample {
            return Ok(None);
        }
        if self.prompts.is_empty() {
            return Ok(Some(Err("there are no sample_prompts".into())));
        }
        let made = self.make(session, format!("step {}", session.steps_done()))?;
        Ok(Some(made.then(|| "samples are made".to_owned()).ok_or_else(|| "there is no room for samples".to_owned())))
    }

    fn on_end(&mut self, session: &mut Session) -> Result<()> {
        self.make(session, format!("step {}", session.steps_done())).map(|_| ())
    }
}
