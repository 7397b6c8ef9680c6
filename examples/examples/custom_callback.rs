//! A callback of your own, named in the configuration: this one stops a run whose loss no longer falls.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lora_train::callback::{Callback, Control};
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Session, StepReport, train};

/// Stops when the mean loss of `patience` steps is no lower than that of the `patience` before them.
struct EarlyStop {
    patience: usize,
    losses: Vec<f64>,
}

impl Callback for EarlyStop {
    fn on_step(&mut self, _session: &mut Session, report: &StepReport) -> lora_train::Result<Control> {
        self.losses.push(report.loss);
        if self.losses.len() < 2 * self.patience {
            return Ok(Control::Continue);
        }
        let (before, after) = self.losses.split_at(self.patience);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (before, after) = (mean(before), mean(after));
        self.losses.drain(..self.patience);
        Ok(match after < before {
            true => Control::Continue,
            false => Control::Stop(format!("the loss no longer falls ({before:.4}, then {after:.4})")),
        })
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut plugins = Plugins::default();
    plugins.register_callback("early_stop", || EarlyStop { patience: 25, losses: Vec::new() });

    let text = std::fs::read_to_string("examples/quickstart.toml")?;
    let config = TrainConfig::from_text(&text, Format::Toml, &["callbacks=[\"early_stop\"]", "sample_prompts=[]"])?;
    let stop = Arc::new(AtomicBool::new(false));
    let result = train(config, &plugins, Vec::new(), &stop, &mut |_| {})?;
    println!("{:?} after {} steps: {}", result.stopped, result.steps, result.lora.display());
    Ok(())
}
