//! A concept slider learned from captions alone, and what its strength does: pictures from −1 to 1 in one strip, and how red they
//! are.
//!
//! `cargo run --release --example slider [-- key=value …]`
//!
//! Told for each prompt and strength is the mean over pixels of red less green, of 255, over pictures of eight seeds.

use std::path::{Path, PathBuf};
use std::time::Instant;

use lora_core::Strength;
use lora_data::figure::grid::{self, GridPicture, GridRow};
use lora_data::{PromptLine, RgbPicture};
use lora_examples::Answer;
use lora_train::config::TrainConfig;
use lora_train::inference::{AppliedAdapter, PictureModel, PictureModelOptions, PictureRequest};
use lora_train::{Plugins, Session};

const STRENGTHS: [f64; 5] = [-1.0, -0.5, 0.0, 0.5, 1.0];

/// What it was trained for, and what it was not.
const PROMPTS: [&str; 4] = ["apple, fruit", "pear, fruit", "house, building", "cat face, animal"];

const SEEDS: usize = 8;

fn main() -> Answer<()> {
    lora_train::yield_to_busy_programs();
    let further: Vec<String> = std::env::args().skip(1).collect();
    let config = TrainConfig::from_file("examples/slider.toml", &further)?;
    let (base, folder) = (config.base_model.clone(), config.output_dir.clone());
    let mut session = Session::prepare(config, &Plugins::default(), &mut |_| {})?;
    let (start, steps) = (Instant::now(), session.plan().steps);
    let mut losses = Vec::new();
    while let Some(step) = session.step()? {
        losses.push(step.loss);
    }
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len().max(1) as f64;
    let part = losses.len().div_ceil(10);
    println!(
        "{:.2} s a step; loss {:.4} over the first tenth, {:.4} over the last",
        start.elapsed().as_secs_f64() / steps.max(1) as f64,
        mean(&losses[..part]),
        mean(&losses[losses.len() - part..])
    );
    let slider = session.save("slider")?;
    drop(session);

    println!("| prompt | {} |", STRENGTHS.map(|strength| strength.to_string()).join(" | "));
    println!("|---|{}", "---|".repeat(STRENGTHS.len()));
    let mut model = PictureModel::open(&PictureModelOptions::new(base), &Plugins::default())?;
    let mut rows = Vec::new();
    for prompt in PROMPTS {
        let (mut strip, mut red) = (Vec::new(), Vec::new());
        for strength in STRENGTHS {
            let pictures = draw(&mut model, &slider, prompt, strength)?;
            red.push(format!("{:.1}", pictures.iter().map(redness).sum::<f64>() / pictures.len() as f64));
            strip.push(GridPicture::from(&pictures[0]));
        }
        println!("| {prompt} | {} |", red.join(" | "));
        rows.push(GridRow { label: prompt.to_owned(), pictures: strip });
    }
    let names = STRENGTHS.map(|strength| strength.to_string());
    grid::write(&folder.join("strengths.png"), &rows, &names)?;
    Ok(())
}

fn draw(model: &mut PictureModel, slider: &Path, prompt: &str, strength: f64) -> Answer<Vec<RgbPicture>> {
    let request = |seed: usize| PictureRequest {
        prompt: PromptLine::parse(&format!("{prompt} --w 64 --h 64 --s 20 --l 4 --d {seed}")),
        adapters: vec![AppliedAdapter { path: PathBuf::from(slider), strength: Strength::from(strength) }],
    };
    let requests: Vec<PictureRequest> = (1..=SEEDS).map(request).collect();
    Ok(model.draw(&requests, &mut |_, _| {})?)
}

/// The mean over pixels of red less green.
fn redness(picture: &RgbPicture) -> f64 {
    let each = picture.data().chunks(3).map(|pixel| f64::from(pixel[0]) - f64::from(pixel[1]));
    each.sum::<f64>() / (picture.width() * picture.height()) as f64
}
