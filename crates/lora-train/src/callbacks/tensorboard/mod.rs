//! The run as TensorBoard shows it: losses, learning rates, norms, memory, samples.

mod file;

use std::fs::File;
use std::io::{self, Cursor};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use image::{ImageFormat, RgbImage};
use lora_data::figure::grid::GridPicture;

use crate::Result;
use crate::callback::{Callback, Control};
use crate::config::TrainConfig;
use crate::event::{Event, Samples, Step};
use crate::session::Session;
use file::EventFile;

/// Writes a file of events below `logging_dir`. A part of the run that is done again takes the place of what earlier files
/// say of it.
#[derive(Debug)]
pub(crate) struct TensorBoard {
    folder: PathBuf,
    file: Option<EventFile<File>>,
}

impl TensorBoard {
    /// For a run.
    pub(crate) fn new(config: &TrainConfig) -> Self {
        Self { folder: config.logging_dir.join(&config.output_name), file: None }
    }

    /// A new file of this moment; another run may have begun one in the same second.
    fn open(&self) -> io::Result<File> {
        std::fs::create_dir_all(&self.folder)?;
        let mut second = now() as u64;
        loop {
            let path = self.folder.join(format!("events.out.tfevents.{second:010}.lora"));
            match File::options().write(true).create_new(true).open(path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => second += 1,
                file => return file,
            }
        }
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn write(file: &mut EventFile<File>, event: &Event) -> io::Result<()> {
    match event {
        Event::Step(step) => write_step(file, step),
        Event::Validation { step, loss, .. } => file.scalars(now(), *step as u64, [("loss/validation", *loss)]),
        Event::Samples(samples) => write_samples(file, samples),
        _ => Ok(()),
    }
}

fn write_step(file: &mut EventFile<File>, Step { report, mean_loss, .. }: &Step) -> io::Result<()> {
    let gib = report.memory as f64 / f64::from(1 << 30);
    let own = [
        ("loss/current", Some(report.loss)),
        ("loss/average", *mean_loss),
        ("norm/gradient", report.gradient_norm),
        ("memory/GiB", Some(gib)),
    ];
    let rates: Vec<(String, f64)> =
        report.learning_rates.iter().map(|(name, rate)| (format!("lr/{name}"), *rate)).collect();
    let values = own.into_iter().filter_map(|(tag, value)| Some((tag, value?)));
    let values = values.chain(rates.iter().map(|(tag, rate)| (tag.as_str(), *rate)));
    let figures = report.figures.iter().map(|(tag, value)| (*tag, *value));
    file.scalars(now(), report.step as u64, values.chain(figures))
}

fn write_samples(file: &mut EventFile<File>, samples: &Samples) -> io::Result<()> {
    let (time, step) = (now(), samples.step as u64);
    let about = |index: usize| samples.prompts.get(index).map_or("", String::as_str);
    for (index, picture) in samples.pictures.iter().enumerate() {
        let size = (picture.width, picture.height);
        file.image(time, step, &format!("samples/{}", index + 1), about(index), size, &png(picture)?)?;
    }
    for (index, text) in samples.texts.iter().enumerate() {
        file.text(time, step, &format!("samples/{}", index + 1), about(index), text)?;
    }
    Ok(())
}

fn png(picture: &GridPicture) -> io::Result<Vec<u8>> {
    let pixels = RgbImage::from_raw(picture.width as u32, picture.height as u32, picture.rgb.clone());
    let mut bytes = Cursor::new(Vec::new());
    pixels.unwrap_or_default().write_to(&mut bytes, ImageFormat::Png).map_err(io::Error::other)?;
    Ok(bytes.into_inner())
}

impl Callback for TensorBoard {
    fn on_start(&mut self, session: &mut Session) -> Result<Control> {
        let first = session.resumed().map_or(0, |resumed| resumed.step as u64 + 1);
        let file = self.open().and_then(|file| EventFile::new(file, now(), first));
        let refused = |source| lora_io::Error::Io { path: self.folder.clone(), action: "write into", source };
        self.file = Some(file.map_err(refused)?);
        Ok(Control::Continue)
    }

    fn on_event(&mut self, event: &Event) {
        if let Some(file) = &mut self.file
            && let Err(error) = write(file, event)
        {
            tracing::warn!("TensorBoard's file cannot be written ({error}); training goes on without it");
            self.file = None;
        }
    }
}
