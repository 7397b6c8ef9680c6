//! Samples before, during and after training, in one grid: rows are steps, columns prompts.

use std::path::PathBuf;

use crate::Result;
use crate::callback::{Callback, Control};
use crate::config::TrainConfig;
use crate::report::grid::{self, GridPicture, GridRow};
use crate::session::{Session, StepReport};

/// Draws the configuration's prompts and keeps `samples.png` up to date.
#[derive(Debug)]
pub struct SampleGrid {
    path: PathBuf,
    prompts: Vec<String>,
    every: Option<usize>,
    rows: Vec<GridRow>,
}

impl SampleGrid {
    /// For a run; without prompts it draws nothing.
    pub fn new(config: &TrainConfig) -> Self {
        let path = config.output_dir.join("samples.png");
        Self { path, prompts: config.samples.prompts.clone(), every: config.samples.every_n_steps, rows: Vec::new() }
    }

    fn draw(&mut self, session: &mut Session, label: String) -> Result<()> {
        if self.prompts.is_empty() {
            return Ok(());
        }
        let pictures = match session.sample(&self.prompts) {
            // Samples are worth less than the run.
            Err(error) if error.is_out_of_memory() => {
                session.empty_cache()?;
                tracing::warn!(
                    "no samples are drawn for \"{label}\": {error}; a lower sample_resolution takes less memory"
                );
                return Ok(());
            }
            pictures => pictures?,
        };
        let pictures = pictures.into_iter().map(|picture| GridPicture {
            width: picture.width(),
            height: picture.height(),
            rgb: picture.data().to_vec(),
        });
        self.rows.push(GridRow { label, pictures: pictures.collect() });
        let picture = grid::draw(&self.rows, &self.prompts);
        lora_io::atomic::write(&self.path, |file| {
            picture.write_to(file, image::ImageFormat::Png).map_err(std::io::Error::other)
        })?;
        Ok(())
    }
}

impl Callback for SampleGrid {
    fn on_start(&mut self, session: &mut Session) -> Result<Control> {
        let label = match session.resumed() {
            // The grid that was there belongs to the steps before.
            Some(resumed) => {
                let kept = self.path.with_file_name(format!("samples-to-step{:06}.png", resumed.step));
                if self.path.exists() && !kept.exists() && !self.prompts.is_empty() {
                    std::fs::rename(&self.path, &kept).map_err(|source| lora_io::Error::Io {
                        path: kept,
                        action: "move the samples to",
                        source,
                    })?;
                }
                format!("step {}", resumed.step)
            }
            None => "before".into(),
        };
        self.draw(session, label)?;
        Ok(Control::Continue)
    }

    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> Result<Control> {
        if self.every.is_some_and(|every| report.step.is_multiple_of(every)) && report.step < report.steps {
            self.draw(session, format!("step {}", report.step))?;
        }
        Ok(Control::Continue)
    }

    fn on_end(&mut self, session: &mut Session) -> Result<()> {
        self.draw(session, format!("step {}", session.steps_done()))
    }
}
