//! `lora import`, and how other commands read a configuration that may be another trainer's.

use std::path::{Path, PathBuf};

use lora_import::{Import, Options, Problems, Source, Tool};
use lora_train::config::{Format, TrainConfig};

use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Configuration of another trainer: a file, or a script with the command.
    #[arg(required_unless_present = "command")]
    file: Option<PathBuf>,
    /// The command itself, as `lora import -- accelerate launch train_network.py …`.
    #[arg(last = true, conflicts_with = "file")]
    command: Vec<String>,
    /// Write the configuration here instead of to standard output.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The trainer, where the content does not tell it: sd-scripts, kohya_ss, onetrainer, ai-toolkit, axolotl, llama-factory.
    #[arg(long, value_name = "TRAINER")]
    from: Option<Tool>,
    /// List keys that are not known as having no counterpart, instead of refusing them.
    #[arg(long)]
    allow_unknown: bool,
    /// Print the lists and the configuration as JSON on standard output.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let source = match &arguments.file {
        Some(file) => Source::file(file),
        None => Source::command_line(arguments.command.iter().cloned()),
    };
    let options = Options { tool: arguments.from, allow_unknown: arguments.allow_unknown };
    let imported = lora_import::import(&source, &options).map_err(refused)?;
    if let Some(out) = &arguments.out {
        std::fs::write(out, imported.config())
            .map_err(|error| Failure::Work(format!("{}: cannot write: {error}", out.display())))?;
    }
    match (arguments.json, &arguments.out) {
        (true, _) => {
            let json = serde_json::to_string_pretty(&imported).map_err(|error| Failure::Work(error.to_string()))?;
            println!("{json}");
        }
        (false, Some(out)) => println!("{imported}written:    {}", out.display()),
        // The configuration can go into a file or a pipe by itself.
        (false, None) => {
            eprint!("{imported}");
            print!("{}", imported.config());
        }
    }
    Ok(())
}

/// The configuration of a file, of this program or of another trainer. What became of another's keys is told first.
pub(crate) fn configuration(path: &Path, set: &[String]) -> Result<TrainConfig, Failure> {
    let Some(imported) = foreign(path).map_err(refused)? else {
        return TrainConfig::from_file(path, set).map_err(|error| lora_train::Error::from(error).into());
    };
    eprint!("{imported}");
    TrainConfig::from_text(&imported.config(), Format::Toml, set)
        .map_err(|error| Failure::Usage(format!("of {}, translated: {error}", path.display())))
}

/// Another trainer's configuration, translated. What cannot be read is left to the reader of this program's own.
fn foreign(path: &Path) -> Result<Option<Import>, Problems> {
    let source = Source::file(path);
    match lora_import::recognise(&source) {
        Ok(Some(tool)) => {
            let options = Options { tool: Some(tool), ..Options::default() };
            lora_import::import(&source, &options).map(Some)
        }
        Ok(None) | Err(_) => Ok(None),
    }
}

fn refused(problems: Problems) -> Failure {
    Failure::Usage(problems.to_string())
}
