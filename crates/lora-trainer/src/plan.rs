//! `lora plan`.

use std::path::PathBuf;

use lora_cli::Failure;
use lora_torch::device::{CudaStatus, cuda};
use lora_train::Plugins;
use lora_train::plan::plan;
use lora_train::ranks::Place;

use crate::configuration;
use crate::failure::failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Configuration file (.toml, .yaml, .json), of this program or of another trainer.
    config: PathBuf,
    /// Memory that the run may use, such as 8GiB; over the file's vram_budget. It is a card's: with device = "auto" the run
    /// is planned for a GPU, even where this machine has none.
    #[arg(long, value_name = "SIZE")]
    vram: Option<String>,
    /// Plan for so many processes that train together, on a device each.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    ranks: u16,
    /// Set a key over the file's value, for instance `--set batch_size=4`.
    #[arg(long = "set", value_name = "KEY=VALUE", num_args = 1..)]
    set: Vec<String>,
    /// Print the plan as JSON on standard output; sizes are bytes.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut set = arguments.set.clone();
    set.extend(arguments.vram.as_ref().map(|size| format!("vram_budget={size}")));
    let mut config = configuration::read(&arguments.config, &set)?;
    if arguments.vram.is_some() && config.device == "auto" && !matches!(cuda(), CudaStatus::Available(_)) {
        set.push("device=cuda".to_owned());
        config = configuration::read(&arguments.config, &set)?;
    }
    let ranks = usize::from(arguments.ranks);
    config.place = (ranks > 1).then(|| Place::new(0, ranks));
    let plan = plan(&config, &Plugins::default()).map_err(failure)?;
    if arguments.json {
        let json = serde_json::to_string_pretty(&plan).map_err(|error| Failure::Work(error.to_string()))?;
        println!("{json}");
    } else {
        print!("{plan}");
    }
    Ok(())
}
