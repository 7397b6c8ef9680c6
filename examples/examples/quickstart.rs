//! The main job through the public API: a base model, a folder of pictures and a configuration become a LoRA.
//!
//! The base is a small model of Stable Diffusion's architecture with random weights, made here, so that nothing needs
//! to be downloaded; name your own checkpoint in the configuration to train on a real one.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lora_core::DType;
use lora_models::synthetic::SyntheticModel;
use lora_train::callback::{Callback, Control};
use lora_train::config::TrainConfig;
use lora_train::session::StepReport;
use lora_train::{Plugins, Session, train};

/// Prints a line every twenty steps.
struct Print;

impl Callback for Print {
    fn on_step(&mut self, _session: &mut Session, report: &StepReport) -> lora_train::Result<Control> {
        if report.step.is_multiple_of(20) {
            println!(
                "step {:3} of {}: loss {:.4}, {:.2} s a step",
                report.step, report.steps, report.loss, report.seconds
            );
        }
        Ok(Control::Continue)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let config = TrainConfig::from_file("examples/quickstart.toml", &std::env::args().skip(1).collect::<Vec<_>>())?;
    let output = config.output_dir.clone();
    if !Path::new(&config.base_model).exists() {
        std::fs::create_dir_all(&output)?;
        SyntheticModel::tiny().write(&config.base_model, DType::F16)?;
        println!(
            "made a small base model with RANDOM weights: the run shows that training works, not what it can draw"
        );
    }
    let stop = Arc::new(AtomicBool::new(false));
    let result = train(config, &Plugins::default(), vec![Box::new(Print)], &stop, &mut |_| {})?;
    println!("LoRA:       {}", result.lora.display());
    println!("loss curve: {}", output.join("loss.png").display());
    println!("samples:    {}", output.join("samples.png").display());
    Ok(())
}
