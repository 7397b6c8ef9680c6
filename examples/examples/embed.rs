//! Another program drives training itself, step by step: it decides when to look, when to stop and when to save.

use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Session};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    lora_train::yield_to_busy_programs();
    let text = std::fs::read_to_string("examples/quickstart.toml")?;
    let config = TrainConfig::from_text(&text, Format::Toml, &["output_name=embedded"])?;
    let mut session = Session::prepare(config, &Plugins::default(), &mut |_| {})?;
    println!("{} numbers to train in {} layers", session.parameters().elements(), session.targets().len());

    let mut best = f64::INFINITY;
    while let Some(report) = session.step()? {
        best = best.min(report.loss);
        // The program's own rule: it stops at the first ten steps here, as a game would between two frames.
        if report.step == 10 {
            break;
        }
    }
    let samples = session.sample(&["red apple, fruit".to_owned()])?;
    println!("best loss {best:.4}; made {:?}; saved {}", samples[0], session.save("embedded")?.display());
    Ok(())
}
