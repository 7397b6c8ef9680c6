//! The `lora` command: arguments, progress and errors for people. What it does lives in the libraries; what needs
//! libtorch, in the program that [`launch`] starts.
//!
//! Exit status: 0 done, 1 the work failed, 2 the arguments or the configuration are wrong.

#[macro_use(eprint, eprintln, print, println)]
extern crate lora_cli;

mod adapters;
mod caption;
mod check;
mod import;
mod info;
mod launch;

use std::process::ExitCode;

use clap::{FromArgMatches, Subcommand};
use lora_cli::{Failure, dataset, training};

#[derive(Subcommand)]
enum Command {
    /// Write a configuration from another trainer's, and say what became of each of its keys.
    Import(import::Arguments),
    #[command(about = training::DATASET.about)]
    Dataset(dataset::Arguments),
    /// Write captions by machine: tags of a tagger, sentences of a model on a server, or both.
    Caption(Box<caption::Arguments>),
    /// Merge adapters into a base model.
    Merge(adapters::merge::Arguments),
    /// Write an adapter in another format.
    Convert(adapters::convert::Arguments),
    /// Make one LoRA of several.
    Combine(adapters::combine::Arguments),
    /// Give a LoRA other ranks.
    Resize(adapters::resize::Arguments),
    /// Make a LoRA of the difference of two models.
    Extract(adapters::extract::Arguments),
    /// Write the weights of a language model in GGUF as safetensors.
    Dequantise(adapters::dequantise::Arguments),
    /// Show what a LoRA file holds, or of what family a base model is.
    Info(info::Arguments),
    /// Say what other programs would make of an adapter, and whether its numbers are healthy.
    Check(check::Arguments),
}

impl Command {
    fn run(&self) -> Result<(), Failure> {
        match self {
            Command::Import(arguments) => import::run(arguments),
            Command::Dataset(arguments) => dataset::run(arguments),
            Command::Caption(arguments) => caption::run(arguments),
            Command::Merge(arguments) => adapters::merge::run(arguments),
            Command::Convert(arguments) => adapters::convert::run(arguments),
            Command::Combine(arguments) => adapters::combine::run(arguments),
            Command::Resize(arguments) => adapters::resize::run(arguments),
            Command::Extract(arguments) => adapters::extract::run(arguments),
            Command::Dequantise(arguments) => adapters::dequantise::run(arguments),
            Command::Info(arguments) => info::run(arguments),
            Command::Check(arguments) => check::run(arguments),
        }
    }
}

/// All commands in one list. Those of the second program are names here: they are passed on before this is asked.
fn command_line() -> clap::Command {
    let of_training = training::COMMANDS.iter().map(|command| clap::Command::new(command.name).about(command.about));
    let program = clap::Command::new("lora")
        .version(env!("CARGO_PKG_VERSION"))
        .about("LoRA training for little video memory")
        .arg_required_else_help(true)
        .subcommand_required(true)
        .subcommands(of_training);
    Command::augment_subcommands(program)
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some((command, arguments)) = launch::passed_on(&arguments) {
        return launch::launch(command, &arguments);
    }
    let matches = command_line().get_matches();
    let command = Command::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if let Command::Dataset(own) = &command
        && own.configuration().is_some()
    {
        return launch::launch(training::DATASET, &arguments);
    }
    lora_cli::run(|| command.run())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_command_is_in_both_programs() {
        command_line().debug_assert();
    }
}
