//! Pictures of a base with adapters, from a program of one's own: the base beside a LoRA at two strengths, in one grid.
//!
//!     cargo run --release -p lora-examples --example draw -- BASE LORA "a cat"

use std::path::{Path, PathBuf};

use lora_core::Strength;
use lora_data::PromptLine;
use lora_data::figure::grid::{self, GridPicture, GridRow};
use lora_train::inference::{AppliedAdapter, PictureModel, PictureModelOptions, PictureRequest};
use lora_train::{Error, Plugins};

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let (Some(base), Some(lora), Some(prompt)) = (arguments.next(), arguments.next(), arguments.next()) else {
        eprintln!("usage: draw BASE LORA PROMPT");
        std::process::exit(2);
    };
    let lora = PathBuf::from(lora);
    let mut model = PictureModel::open(&PictureModelOptions::new(base), &Plugins::default())?;
    let strengths = [0.0, 0.5, 1.0];
    let requests = strengths.map(|strength| PictureRequest {
        // Size, seed and steps of this picture, as prompt files have them.
        prompt: PromptLine::parse(&format!("{prompt} --d 1 --s 20")),
        adapters: vec![AppliedAdapter { path: lora.clone(), strength: Strength::from(strength) }],
    });
    let pictures = model.draw(&requests, &mut |index, _| println!("drawn at strength {}", strengths[index]))?;
    let rows = strengths.iter().zip(&pictures);
    let rows: Vec<_> = rows
        .map(|(strength, picture)| GridRow {
            label: format!("x {strength}"),
            pictures: vec![GridPicture::from(picture)],
        })
        .collect();
    Ok(grid::write(Path::new("draw.png"), &rows, &[prompt])?)
}
