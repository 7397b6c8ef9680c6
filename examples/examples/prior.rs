//! Whether a LoRA leaves alone what it is not about: the quickstart's black ink, learnt under a word of its own, with and
//! without prior preservation.
//!
//! `cargo run --release --example prior [-- key=value …]`
//!
//! Told are the loss on held-out pictures, which carry the word, and how colourful samples of prompts are that carry it or do
//! not: the mean over pixels of the largest less the smallest channel, of 255. The base draws in colour, the pictures have
//! none.

use lora_data::RgbPicture;
use lora_examples::Answer;
use lora_train::base::Sample;
use lora_train::config::TrainConfig;
use lora_train::{Plugins, Session};

const WORD: &str = "ink";

/// None of them is among the pictures.
const PROMPTS: [&str; 12] = [
    "bear, animal",
    "trumpet, musical instrument",
    "key, lock",
    "taxi, vehicle",
    "pretzel, food",
    "grapes, fruit",
    "parrot, bird",
    "rose, flower",
    "school bus, vehicle",
    "kiwi fruit, fruit",
    "goat, animal",
    "violin, musical instrument",
];

fn main() -> Answer<()> {
    lora_train::yield_to_busy_programs();
    let further: Vec<String> = std::env::args().skip(1).collect();
    // What the base answers to each caption without the word.
    let kept = ["prior_prompt=", "prior_prompt_weight=1"];
    println!("| run | held-out loss | colour with the word | without it | away from the base's pictures without it |");
    println!("|---|---|---|---|---|");
    for (name, keys) in [("without", &[][..]), ("with prior preservation", &kept[..])] {
        let own = [&format!("trigger_word={WORD}"), "output_dir=out/prior", "sample_prompts=[]"];
        let keys: Vec<String> =
            own.iter().chain(keys).map(|key| (*key).to_owned()).chain(further.iter().cloned()).collect();
        let mut session = Session::prepare(
            TrainConfig::from_file("examples/quickstart.toml", &keys)?,
            &Plugins::default(),
            &mut |_| {},
        )?;
        let held_out = session.load_held_out()?.ok_or("no held-out pictures")?;
        let with: Vec<String> = PROMPTS.iter().map(|prompt| format!("{WORD}, {prompt}")).collect();
        let without: Vec<String> = PROMPTS.iter().map(|prompt| (*prompt).to_owned()).collect();
        let base = draw(&mut session, &without)?;
        if keys.len() == own.len() + further.len() {
            let styled = draw(&mut session, &with)?;
            let loss = session.validation_loss(&held_out)?;
            println!("| base | {loss:.4} | {:.0} | {:.0} | 0 |", colour(&styled), colour(&base));
        }
        while session.step()?.is_some() {}
        let (styled, plain) = (draw(&mut session, &with)?, draw(&mut session, &without)?);
        let loss = session.validation_loss(&held_out)?;
        println!(
            "| {name} | {loss:.4} | {:.0} | {:.0} | {:.0} |",
            colour(&styled),
            colour(&plain),
            distance(&plain, &base)
        );
    }
    Ok(())
}

fn draw(session: &mut Session, prompts: &[String]) -> Answer<Vec<RgbPicture>> {
    Ok(session.sample(prompts)?.into_iter().filter_map(Sample::into_picture).collect())
}

/// The mean over pixels of the largest less the smallest channel.
fn colour(pictures: &[RgbPicture]) -> f64 {
    let spread = |pixel: &[u8]| f64::from(pixel.iter().max().unwrap_or(&0) - pixel.iter().min().unwrap_or(&0));
    let pixels = || pictures.iter().flat_map(|picture| picture.data().chunks(3));
    pixels().map(spread).sum::<f64>() / pixels().count().max(1) as f64
}

/// The root of the mean square between pictures.
fn distance(pictures: &[RgbPicture], others: &[RgbPicture]) -> f64 {
    let pairs = || pictures.iter().zip(others).flat_map(|(own, other)| own.data().iter().zip(other.data()));
    let squares: f64 = pairs().map(|(own, other)| (f64::from(*own) - f64::from(*other)).powi(2)).sum();
    (squares / pairs().count().max(1) as f64).sqrt()
}
