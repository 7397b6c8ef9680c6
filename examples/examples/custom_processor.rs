//! A picture processor of one's own, used from the configuration by its name: contrast enhancement of dark regions, as for
//! lesions in medical pictures. Needs nothing but `lora-data` to look at what it does; training takes the same registry.
//!
//! `cargo run --release --example custom_processor [FOLDER]`

use std::error::Error;
use std::sync::Arc;

use lora_data::processor::{PictureProcessor, ProcessContext};
use lora_data::report::{ReportOptions, html, inspect};
use lora_data::{Pictures, Result, Sample};
use lora_train::Plugins;
use lora_train::config::TrainConfig;

/// Stretches the brightness between two percentiles over the whole range, mask and place untouched.
#[derive(Debug)]
struct LesionContrast {
    /// Share of the darkest and of the brightest pixels that may saturate.
    clipped: f64,
}

impl PictureProcessor for LesionContrast {
    fn process(&self, sample: Sample, _context: &ProcessContext) -> Result<Sample> {
        let mut levels: Vec<u8> = sample.picture.data().to_vec();
        levels.sort_unstable();
        let at = |share: f64| f64::from(levels[((levels.len() - 1) as f64 * share) as usize]);
        let (dark, bright) = (at(self.clipped), at(1.0 - self.clipped));
        if bright - dark < 1.0 {
            return Ok(sample);
        }
        let stretched =
            |value: u8| (255.0 * (f64::from(value) - dark) / (bright - dark)).round().clamp(0.0, 255.0) as u8;
        Ok(sample.map(|pixel| pixel.map(stretched)))
    }
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "assets/quickstart".into());
    let mut plugins = Plugins::default();
    plugins.processors.register("lesion_contrast", LesionContrast { clipped: 0.01 })?;

    // The keys of a configuration; `lora_train::train(config, &plugins, …)` would train with them.
    let keys = ["max_resolution=256", "processors=[\"focus_crop\", \"lesion_contrast\"]"];
    let (datasets, _) = TrainConfig::datasets_of(None, Some(folder.as_ref()), &keys)?;
    let pictures = Arc::new(Pictures::open(datasets, &plugins.processors)?);
    let report = inspect(Arc::clone(&pictures), &ReportOptions::default(), &mut |_, _| {})?;
    std::fs::create_dir_all("out")?;
    std::fs::write("out/dataset.html", html::page(&folder, &report))?;

    let plain = TrainConfig::datasets_of(None, Some(folder.as_ref()), &keys[..1])?.0;
    let plain = Pictures::open(plain, &plugins.processors)?;
    let range = |pictures: &Pictures| -> Result<u8> {
        let sample = pictures.load(0, &lora_core::random::Stream::new(0))?;
        let levels = sample.picture.data();
        Ok(levels.iter().max().unwrap_or(&0) - levels.iter().min().unwrap_or(&0))
    };
    println!(
        "{} pictures; range of the first one's levels {} → {}",
        report.pictures.len(),
        range(&plain)?,
        range(&pictures)?
    );
    println!("what training would see: out/dataset.html");
    Ok(())
}
