//! `lora train`.

use std::path::PathBuf;

use lora_cli::progress::name_rank;
use lora_cli::{Failure, interrupt};
use lora_train::{Best, Plugins, ranks, train};

use crate::configuration;
use crate::events::{self, Target};
use crate::failure::failure;
use crate::progress::{TrainingBar, preparing};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Configuration file (.toml, .yaml, .json), of this program (`lora keys` lists all keys) or of another trainer.
    config: PathBuf,
    /// Set a key over the file's value, for instance `--set lora_rank=8`.
    #[arg(long = "set", value_name = "KEY=VALUE", num_args = 1..)]
    set: Vec<String>,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    json: bool,
    /// Write what happens as lines of JSON to standard output, or with `--events=TARGET` to a file or to an open file
    /// descriptor of that number; and take the commands pause, resume, sample, save and stop from standard input, a
    /// line each.
    #[arg(
        long,
        value_name = "TARGET",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "-",
        value_parser = |text: &str| Ok::<_, std::convert::Infallible>(Target::from(text))
    )]
    events: Option<Target>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let to_stdout = arguments.events == Some(Target::StandardOutput);
    if to_stdout && arguments.json {
        return Err(Failure::Usage("--events and --json both write to standard output; use --events=FILE".into()));
    }
    let place = ranks::place().map_err(failure)?;
    place.iter().for_each(|place| name_rank(place.rank));
    // The first rank tells of the run, and takes commands; the others tell of what goes wrong with them.
    let follows = place.as_ref().is_some_and(|place| place.rank > 0);
    let mut callbacks =
        arguments.events.as_ref().filter(|_| !follows).map(Target::callbacks).transpose()?.unwrap_or_default();
    let mut config = configuration::read(&arguments.config, &arguments.set)
        .inspect_err(|failure| events::tell_failure(&mut callbacks, failure))?;
    config.place = place;
    let output_dir = config.output_dir.clone();
    let has_samples = !config.samples.prompts.is_empty();

    let stop = interrupt::flag("stopping after this step; the LoRA will be saved (once more to end at once)");
    if follows {
        train(config, &Plugins::default(), Vec::new(), &stop, &mut |_| {}).map_err(failure)?;
        return Ok(());
    }
    callbacks.push(Box::new(TrainingBar::default()));
    let result = train(config, &Plugins::default(), callbacks, &stop, &mut preparing()).map_err(failure)?;
    if to_stdout {
        return Ok(());
    }
    if arguments.json {
        let json = serde_json::json!({ "lora": result.lora, "steps": result.steps, "stopped": result.stopped, "best": result.best });
        println!("{json}");
        return Ok(());
    }
    if let Some(reason) = &result.stopped {
        println!("stopped early ({reason}) after {} steps", result.steps);
    }
    println!("LoRA:       {}", result.lora.display());
    if let Some(Best { step, loss, lora }) = &result.best {
        let place = lora.as_ref().map_or_else(String::new, |lora| format!(", {}", lora.display()));
        println!("best:       step {step}, validation loss {loss:.4}{place}");
    }
    println!("loss curve: {}", output_dir.join("loss.png").display());
    if has_samples {
        let files = ["samples.png", "samples.md"].map(|name| output_dir.join(name));
        files.iter().filter(|file| file.exists()).for_each(|file| println!("samples:    {}", file.display()));
    }
    Ok(())
}
