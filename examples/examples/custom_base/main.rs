//! A base model of your own: a network, a family of files and a configuration key (`base`), registered as a value. It is planned,
//! trained, killed, resumed and saved as the bases are that the libraries know.
//!
//! `cargo run --release --example custom_base`

mod base;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lora_io::adapter;
use lora_train::config::{Format, TrainConfig};
use lora_train::plan::plan;
use lora_train::{Plugins, Session, train};

const CONFIG: &str = r#"
base_model = "out/custom_base/base.safetensors"
train_data_dir = "assets/quickstart"
output_dir = "out/custom_base"
target_modules = ["first", "blocks.*", "last"]
lora_rank = 4
learning_rate = 5e-3
max_resolution = 64
max_train_steps = 40
batch_size = 4
strongest_noise = 0.8
precision = "fp32"
device = "cpu"
"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    std::fs::create_dir_all("out/custom_base")?;
    base::write_untrained(Path::new("out/custom_base/base.safetensors"))?;
    let mut plugins = Plugins::default();
    plugins.register_base(base::PIXEL_DENOISER)?;
    let config = |keys: &[&str]| TrainConfig::from_text_with(CONFIG, Format::Toml, keys, &plugins);
    println!("{}", plan(&config(&[])?, &plugins)?);

    let stop = Arc::new(AtomicBool::new(false));
    let result = train(config(&["output_name=at_once"])?, &plugins, Vec::new(), &stop, &mut |_| {})?;
    let at_once = std::fs::read(&result.lora)?;

    // The same run, killed behind its state: the steps since then are lost and taken again.
    let keys = ["output_name=at_once", "resume=auto"];
    let mut killed = Session::prepare(config(&keys[..1])?, &plugins, &mut |_| {})?;
    for _ in 0..25 {
        if let Some(report) = killed.step()?.filter(|report| report.step % 5 == 0) {
            println!("step {}: loss {:.3}", report.step, report.loss);
            if report.step == 20 {
                killed.save_state()?;
            }
        }
    }
    drop(killed);
    let resumed = train(config(&keys)?, &plugins, Vec::new(), &stop, &mut |_| {})?;
    println!("resumed and at once: the same file: {}", std::fs::read(&resumed.lora)? == at_once);

    let families = plugins.bases.families();
    for (module, own) in adapter::read_among(&resumed.lora, &families)?.adapter.modules {
        println!("{module}: {} of rank {}", own.variant, own.rank);
    }
    Ok(())
}
