//! The program that `lora` becomes for commands that compute with libtorch or read the configuration of a run:
//! arguments, progress and errors for people. What it does lives in the libraries.
//!
//! Exit status: 0 done, 1 the work failed, 2 the arguments or the configuration are wrong.

#[macro_use(eprint, eprintln, print, println)]
extern crate lora_cli;

mod configuration;
mod doctor;
mod events;
mod failure;
mod generate;
mod plan;
mod progress;
mod sample;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lora_cli::{Failure, dataset, training};
use lora_train::config::TrainConfig;

// Help speaks of `lora`, which is what people call.
#[derive(Parser)]
#[command(name = "lora", bin_name = "lora", version, about = "The commands of `lora` that need libtorch")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    #[command(about = training::TRAIN.about)]
    Train(train::Arguments),
    #[command(about = training::PLAN.about)]
    Plan(plan::Arguments),
    #[command(about = training::KEYS.about)]
    Keys,
    #[command(about = training::DATASET.about)]
    Dataset(dataset::Arguments),
    #[command(about = training::SAMPLE.about)]
    Sample(sample::Arguments),
    #[command(about = training::GENERATE.about)]
    Generate(generate::GenerateArguments),
    #[command(about = training::EVALUATE.about)]
    Evaluate(generate::EvaluateArguments),
    #[command(about = training::DOCTOR.about)]
    Doctor(doctor::Arguments),
}

impl Command {
    fn run(&self) -> Result<(), Failure> {
        match self {
            Command::Train(arguments) => train::run(arguments),
            Command::Plan(arguments) => plan::run(arguments),
            Command::Keys => {
                print!("{}", lora_train::config::keys::Keys::default().reference());
                Ok(())
            }
            Command::Dataset(arguments) => look(arguments),
            Command::Sample(arguments) => sample::run(arguments),
            Command::Generate(arguments) => generate::generate(arguments),
            Command::Evaluate(arguments) => generate::evaluate(arguments),
            Command::Doctor(arguments) => doctor::run(arguments),
        }
    }
}

/// A look at the datasets of a configuration.
fn look(arguments: &dataset::Arguments) -> Result<(), Failure> {
    let Some((path, set, folder)) = arguments.configuration() else { return dataset::run(arguments) };
    if let Some((base, texts)) = TrainConfig::texts_of(path, folder, set).map_err(failure::failure)? {
        return dataset::look_at_texts(arguments, &base, texts);
    }
    let (datasets, tokens) = TrainConfig::datasets_of(path, folder, set).map_err(failure::failure)?;
    dataset::look(arguments, datasets, tokens)
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    lora_cli::run(|| command.run())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clap::CommandFactory;

    use super::*;

    #[test]
    fn this_program_has_the_commands_that_lora_passes_on_and_no_others() {
        let arguments = Arguments::command();
        let about = |own: &clap::Command| own.get_about().map(ToString::to_string).unwrap_or_default();
        let own: BTreeMap<_, _> =
            arguments.get_subcommands().map(|own| (own.get_name().to_owned(), about(own))).collect();
        let passed_on = training::COMMANDS.iter().chain([&training::DATASET]);
        let told: BTreeMap<_, _> =
            passed_on.map(|command| (command.name.to_owned(), command.about.to_owned())).collect();
        assert_eq!(own, told);
    }
}
