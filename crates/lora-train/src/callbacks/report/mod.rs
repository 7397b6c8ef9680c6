//! `report.html`: the run on one page, written at each save and at the end.

mod page;

use std::io::{Cursor, Write};
use std::path::PathBuf;
use std::time::Instant;

use image::imageops::{FilterType, resize};
use image::{ImageFormat, RgbImage};
use lora_data::figure::grid::GridPicture;
use lora_data::figure::loss_curve::Point;

use crate::Result;
use crate::callback::{Callback, Control};
use crate::callbacks::history;
use crate::config::TrainConfig;
use crate::event::{Event, Finished, Holds, Samples, Started, Step};
use crate::session::Session;
use page::{RunPage, SampleCell, StepOf};

/// The longer side of a sample's picture on the page.
const SIDE: u32 = 320;

/// Keeps what the page shows.
#[derive(Debug)]
pub(crate) struct Report {
    folder: PathBuf,
    begun: Instant,
    page: RunPage,
}

impl Report {
    /// For a run.
    pub(crate) fn new(config: &TrainConfig) -> Self {
        Self { folder: config.output_dir.clone(), begun: Instant::now(), page: RunPage::default() }
    }

    /// Takes in what happened; whether the page is to be written.
    fn take(&mut self, event: &Event) -> bool {
        let page = &mut self.page;
        match event {
            Event::Started(started) => page.started = Some(Started::clone(started)),
            Event::Step(step) => page.steps.push(of_step(step)),
            Event::Validation { step, loss, .. } => page.looks.push((*step, *loss)),
            Event::Samples(samples) => {
                page.prompts.clone_from(&samples.prompts);
                page.samples.push((samples.label.clone(), cells(samples)));
            }
            Event::Finding(finding) => page.findings.push(finding.clone()),
            Event::OutOfMemory { message, .. } => page.out_of_memory.push(message.clone()),
            Event::Saved(saved) => {
                // Each has the place of the one of its name.
                page.saved.retain(|earlier| earlier.path != saved.path);
                page.saved.push(saved.clone());
                return saved.holds == Holds::Weights;
            }
            Event::Finished(Finished { stopped, .. }) => {
                let reason = stopped.as_ref().map(|reason| format!("stopped ({reason})"));
                page.end = Some(reason.unwrap_or_else(|| "complete".into()));
                return true;
            }
            Event::Failed { message, .. } => {
                page.end = Some(format!("failed: {message}"));
                return true;
            }
            _ => {}
        }
        false
    }

    /// Writes the page, whole or not at all. A full disk must not end a run whose result still fits.
    fn write(&mut self) {
        self.page.seconds = self.begun.elapsed().as_secs_f64();
        let html = self.page.html();
        if html.is_empty() {
            return;
        }
        let written = lora_io::atomic::write(self.folder.join("report.html"), |file| file.write_all(html.as_bytes()));
        if let Err(error) = written {
            tracing::warn!("{error}; training goes on without the report");
        }
    }
}

fn of_step(Step { report, .. }: &Step) -> StepOf {
    StepOf {
        point: Point { step: report.step as u64, loss: report.loss, learning_rate: report.learning_rate },
        gradient_norm: report.gradient_norm.unwrap_or(f64::NAN),
        memory: report.memory,
        seconds: report.seconds,
    }
}

fn cells(samples: &Samples) -> Vec<SampleCell> {
    let pictures = samples.pictures.iter().map(|picture| SampleCell::Picture(small(picture)));
    pictures.chain(samples.texts.iter().cloned().map(SampleCell::Text)).collect()
}

/// A small JPEG of a picture; empty where its bytes do not fit its size.
fn small(picture: &GridPicture) -> Vec<u8> {
    let (width, height) = (picture.width as u32, picture.height as u32);
    let Some(pixels) = RgbImage::from_raw(width, height, picture.rgb.clone()) else { return Vec::new() };
    let longer = width.max(height).max(1);
    let scaled = |side: u32| (u64::from(side) * u64::from(SIDE) / u64::from(longer)).max(1) as u32;
    let pixels = match longer > SIDE {
        true => resize(&pixels, scaled(width), scaled(height), FilterType::CatmullRom),
        false => pixels,
    };
    let mut bytes = Cursor::new(Vec::new());
    // An empty picture is no JPEG.
    let _ = pixels.write_to(&mut bytes, ImageFormat::Jpeg);
    bytes.into_inner()
}

impl Callback for Report {
    /// A run that goes on shows its earlier steps too.
    fn on_start(&mut self, session: &mut Session) -> Result<Control> {
        if let Some(resumed) = session.resumed() {
            let own = &session.config().output_dir;
            let step = |line: &history::Line| StepOf {
                point: Point {
                    step: line.step as u64,
                    loss: line.loss.unwrap_or(f64::NAN),
                    learning_rate: line.learning_rate,
                },
                gradient_norm: line.gradient_norm.unwrap_or(f64::NAN),
                memory: line.memory,
                seconds: line.seconds,
            };
            self.page.steps = history::metrics(own, resumed).iter().map(step).collect();
            self.page.looks = history::looks(own, resumed);
        }
        Ok(Control::Continue)
    }

    fn on_event(&mut self, event: &Event) {
        if self.take(event) {
            self.write();
        }
    }
}
