//! The main job through the public API: a base model, a folder of pictures and a configuration become a LoRA.
//!
//! The base is the small model of `assets/emoji-64`, which draws things in colour; the pictures of `assets/quickstart` are
//! in black ink, a style it has never seen. Two minutes later it draws in black ink what is not among them.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lora_examples::held_out_losses;
use lora_train::callback::{Callback, Control};
use lora_train::config::TrainConfig;
use lora_train::{Plugins, Session, StepReport, train};

/// Prints a line every twenty steps.
struct Print;

impl Callback for Print {
    fn on_step(&mut self, _session: &mut Session, report: &StepReport) -> lora_train::Result<Control> {
        if report.step.is_multiple_of(20) {
            let left = (report.steps - report.step) as f64 * report.seconds;
            println!(
                "step {:3} of {}: loss {:.4}, {:.2} s a step, {left:.0} s left",
                report.step, report.steps, report.loss, report.seconds
            );
        }
        Ok(Control::Continue)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    lora_train::yield_to_busy_programs();
    let config = TrainConfig::from_file("examples/quickstart.toml", &std::env::args().skip(1).collect::<Vec<_>>())?;
    let output = config.output_dir.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let result = train(config, &Plugins::default(), vec![Box::new(Print)], &stop, &mut |_| {})?;
    if let Some((before, after)) = held_out_losses(&output.join("validation.jsonl"))? {
        let change = 100.0 * (after / before - 1.0);
        println!("loss on held-out pictures: {before:.4} before, {after:.4} after ({change:+.1} %)");
    }
    println!("LoRA:       {}", result.lora.display());
    println!("loss curve: {}", output.join("loss.png").display());
    println!("samples:    {} (before, during and after)", output.join("samples.png").display());
    Ok(())
}
