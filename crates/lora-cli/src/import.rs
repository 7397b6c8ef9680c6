//! `lora import`: a configuration of another trainer becomes one of this program.

use std::path::PathBuf;

use lora_import::{Options, Source, Tool};

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
    /// The trainer, where the content does not tell it: sd-scripts, kohya_ss, musubi-tuner, onetrainer, ai-toolkit, diffusion-pipe, axolotl, llama-factory.
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
    let imported = lora_import::import(&source, &options)?;
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
