//! One line per step in `metrics.jsonl`, and the loss curve as a picture at the end.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use lora_data::figure::loss_curve::{self, Point};

use crate::Result;
use crate::callback::{Callback, Control};
use crate::callbacks::history::{self, Line, METRICS};
use crate::config::TrainConfig;
use crate::session::{Session, StepReport};

/// Writes `metrics.jsonl` as the run goes and `loss.png` at its end.
#[derive(Debug)]
pub(crate) struct Metrics {
    folder: PathBuf,
    title: String,
    file: Option<File>,
    points: Vec<Point>,
    failed: bool,
}

impl Metrics {
    /// For a run.
    pub(crate) fn new(config: &TrainConfig) -> Self {
        let title = format!("{}: loss", config.output_name);
        Self { folder: config.output_dir.clone(), title, file: None, points: Vec::new(), failed: false }
    }
}

impl Callback for Metrics {
    fn on_start(&mut self, session: &mut Session) -> Result<Control> {
        self.file = Some(match session.resumed() {
            Some(resumed) => {
                // What was done after the state was saved is done again.
                let belongs = |line: &Line| line.step <= resumed.step;
                let (file, lines) = history::go_on(&self.folder, METRICS, resumed, history::json(belongs))?;
                self.points = lines.iter().map(point).collect();
                file
            }
            None => history::begin(&self.folder, METRICS)?,
        });
        Ok(Control::Continue)
    }

    fn on_step(&mut self, _session: &mut Session, report: &StepReport) -> Result<Control> {
        self.points.push(Point { step: report.step as u64, loss: report.loss, learning_rate: report.learning_rate });
        if let Some(file) = &mut self.file {
            let mut line = serde_json::to_string(report).unwrap_or_default();
            line.push('\n');
            // A full disk must not end a run whose result still fits: say so once and go on.
            if let Err(error) = file.write_all(line.as_bytes())
                && !std::mem::replace(&mut self.failed, true)
            {
                tracing::warn!("metrics.jsonl cannot be written ({error}); training goes on without it");
            }
        }
        Ok(Control::Continue)
    }

    fn on_end(&mut self, _session: &mut Session) -> Result<()> {
        let picture = loss_curve::draw(&self.points, &self.title);
        lora_io::atomic::write(self.folder.join("loss.png"), |file| {
            picture.write_to(file, image::ImageFormat::Png).map_err(std::io::Error::other)
        })?;
        Ok(())
    }
}

fn point(line: &Line) -> Point {
    let loss = line.loss.unwrap_or(f64::NAN);
    Point { step: line.step as u64, loss, learning_rate: line.learning_rate }
}
