//! Training from a configuration file, in the fewest lines: `cargo run --release --example train config.toml`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lora_train::config::TrainConfig;
use lora_train::{Plugins, train};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("expected the path of a configuration file")?;
    let config = TrainConfig::from_file(path, &[] as &[&str])?;
    let stop = Arc::new(AtomicBool::new(false));
    let result = train(config, &Plugins::default(), Vec::new(), &stop, &mut |stage| println!("{stage:?}"))?;
    println!("{} after {} steps", result.lora.display(), result.steps);
    Ok(())
}
