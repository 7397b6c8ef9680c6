//! A language model through the public API: SmolLM2-135M-Instruct and 482 entries of The Devil's Dictionary become a LoRA
//! that answers in its voice. The configuration is `examples/quickstart-text.toml`; `make quickstart-text` fetches the base
//! once and runs this.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lora_examples::held_out_losses;
use lora_train::callback::{Callback, Control};
use lora_train::config::TrainConfig;
use lora_train::{Plugins, Session, StepReport, train};

/// Prints what is learned from, and a line every ten steps.
struct Print;

impl Callback for Print {
    fn on_start(&mut self, session: &mut Session) -> lora_train::Result<Control> {
        println!("{}", session.summary());
        Ok(Control::Continue)
    }

    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> lora_train::Result<Control> {
        if report.step.is_multiple_of(10) {
            println!(
                "step {:3} of {}: loss {:.4}, {:.0} {}/s, {:.2} GiB, {:.0} s left",
                report.step,
                report.steps,
                report.loss,
                report.measure / report.seconds,
                session.data().unit,
                report.memory as f64 / f64::from(1 << 30),
                (report.steps - report.step) as f64 * report.seconds
            );
        }
        Ok(Control::Continue)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    lora_train::yield_to_busy_programs();
    let overrides: Vec<String> = std::env::args().skip(1).collect();
    let config = TrainConfig::from_file("examples/quickstart-text.toml", &overrides)?;
    let output = config.output_dir.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let result = train(config, &Plugins::default(), vec![Box::new(Print)], &stop, &mut |_| {})?;
    if let Some((before, after)) = held_out_losses(&output.join("validation.jsonl"))? {
        println!("perplexity of held-out answers: {:.1} before, {:.1} after", before.exp(), after.exp());
    }
    println!("adapter:    {} (PEFT's folder)", result.lora.display());
    println!("loss curve: {}", output.join("loss.png").display());
    println!("answers:    {} (before and after)", output.join("samples.md").display());
    print!("\n{}", std::fs::read_to_string(output.join("samples.md")).unwrap_or_default());
    Ok(())
}
