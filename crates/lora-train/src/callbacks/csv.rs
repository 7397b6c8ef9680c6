//! One line per step in `metrics.csv`, with columns that do not depend on the run.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use crate::Result;
use crate::callback::{Callback, Control};
use crate::callbacks::history;
use crate::config::TrainConfig;
use crate::event::{Event, Step};
use crate::session::Session;

const FILE: &str = "metrics.csv";
/// The first line. A number that there is not, or that is not finite, leaves its column empty.
const HEADER: &str = "step,epoch,loss,learning_rate,gradient_norm,skipped,loss_scale,items,seconds,memory";

/// Writes `metrics.csv` as the run goes.
#[derive(Debug)]
pub(crate) struct MetricsCsv {
    folder: PathBuf,
    file: Option<File>,
}

impl MetricsCsv {
    /// For a run.
    pub(crate) fn new(config: &TrainConfig) -> Self {
        Self { folder: config.output_dir.clone(), file: None }
    }
}

/// The line of a step.
fn row(Step { report, .. }: &Step) -> String {
    let number =
        |value: Option<f64>| value.filter(|value| value.is_finite()).map_or_else(String::new, |v| v.to_string());
    [
        report.step.to_string(),
        report.epoch.to_string(),
        number(Some(report.loss)),
        number(Some(report.learning_rate)),
        number(report.gradient_norm),
        report.skipped.to_string(),
        number(Some(report.loss_scale)),
        report.items.to_string(),
        number(Some(report.seconds)),
        report.memory.to_string(),
    ]
    .join(",")
}

/// The step of a line of the file; 0 of the header, none of what this program did not write.
fn step_of(line: &str) -> Option<usize> {
    match line {
        HEADER => Some(0),
        row if row.split(',').count() == HEADER.split(',').count() => row.split(',').next()?.parse().ok(),
        _ => None,
    }
}

impl Callback for MetricsCsv {
    fn on_start(&mut self, session: &mut Session) -> Result<Control> {
        let (mut file, lines) = match session.resumed() {
            Some(resumed) => {
                let belongs = |line: &str| step_of(line).filter(|&step| step <= resumed.step);
                history::go_on(&self.folder, FILE, resumed, belongs)?
            }
            None => (history::begin(&self.folder, FILE)?, Vec::new()),
        };
        if lines.is_empty() {
            let path = self.folder.join(FILE);
            writeln!(file, "{HEADER}").map_err(|source| lora_io::Error::Io { path, action: "write", source })?;
        }
        self.file = Some(file);
        Ok(Control::Continue)
    }

    fn on_event(&mut self, event: &Event) {
        if let (Event::Step(step), Some(file)) = (event, &mut self.file)
            && let Err(error) = writeln!(file, "{}", row(step))
        {
            tracing::warn!("metrics.csv cannot be written ({error}); training goes on without it");
            self.file = None;
        }
    }
}
