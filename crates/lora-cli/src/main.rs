//! The `lora` command: arguments, progress and errors for people. What it does lives in the libraries.
//!
//! Exit status: 0 done, 1 the work failed, 2 the arguments or the configuration are wrong.

mod adapters;
mod caption;
mod check;
mod dataset;
mod doctor;
mod events;
mod generate;
mod import;
mod info;
mod interrupt;
mod plan;
mod progress;
mod sample;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(name = "lora", version, about = "LoRA training for little video memory", arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a LoRA from a configuration file, of this program or of another trainer.
    Train(train::Arguments),
    /// Write a configuration from another trainer's, and say what became of each of its keys.
    Import(import::Arguments),
    /// Predict the memory of a run by part, without running it, and what would make it fit.
    Plan(plan::Arguments),
    /// Look at a dataset before training: sizes, crops, captions, duplicates, blur, and what to do about them.
    Dataset(dataset::Arguments),
    /// Draw pictures with adapters, or without beside with.
    Sample(sample::Arguments),
    /// Write captions by machine: tags of a tagger, sentences of a model on a server, or both.
    Caption(Box<caption::Arguments>),
    /// Let a language model answer, with adapters or without.
    Generate(generate::GenerateArguments),
    /// Loss and perplexity of a language model on texts, with adapters or without.
    Evaluate(generate::EvaluateArguments),
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
    /// Show which libtorch and devices are used, and what is missing.
    Doctor(doctor::Arguments),
    /// Print the reference of all configuration keys (Markdown).
    Keys,
}

/// A failure on its way to the exit status.
enum Failure {
    /// The work failed.
    Work(String),
    /// The arguments or the configuration are wrong.
    Usage(String),
}

impl From<lora_train::Error> for Failure {
    fn from(error: lora_train::Error) -> Self {
        let usage = error.is_usage();
        // Where more is known, the error says it itself.
        let advised = matches!(error, lora_train::Error::OutOfMemory { .. });
        let message = if error.is_out_of_memory() && !advised {
            format!(
                "{error}\nwhat helps: less at once (batch_size, max_resolution, max_seq_length), precision = \"bf16\", base_storage = \"int8\" or \"nf4\""
            )
        } else {
            error.to_string()
        };
        if usage { Failure::Usage(message) } else { Failure::Work(message) }
    }
}

impl From<lora_caption::Error> for Failure {
    fn from(error: lora_caption::Error) -> Self {
        let message = error.to_string();
        if error.is_usage() { Failure::Usage(message) } else { Failure::Work(message) }
    }
}

impl From<lora_io::Error> for Failure {
    fn from(error: lora_io::Error) -> Self {
        Failure::Work(error.to_string())
    }
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    if matches!(command, Command::Train(_) | Command::Sample(_) | Command::Generate(_) | Command::Evaluate(_)) {
        lora_train::yield_to_busy_programs();
    }
    // What a decoder's panic on a damaged file becomes is an error that is told; the panic itself is not.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !lora_data::guard::is_guarded() {
            usual(panic);
        }
    }));
    let filter = EnvFilter::try_from_env("LORA_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .without_time()
        .with_target(false)
        .with_writer(progress::Writer)
        .finish();
    // Not by `init`, which takes in what libraries give to the crate `log`, too: at its finest an HTTP client's has the bytes of
    // requests, and a server's key among them. Nothing is set before this, so that it cannot fail.
    let _ = tracing::subscriber::set_global_default(subscriber);
    let result = match command {
        Command::Train(arguments) => train::run(&arguments),
        Command::Import(arguments) => import::run(&arguments),
        Command::Plan(arguments) => plan::run(&arguments),
        Command::Dataset(arguments) => dataset::run(&arguments),
        Command::Sample(arguments) => sample::run(&arguments),
        Command::Caption(arguments) => caption::run(&arguments),
        Command::Generate(arguments) => generate::generate(&arguments),
        Command::Evaluate(arguments) => generate::evaluate(&arguments),
        Command::Merge(arguments) => adapters::merge::run(&arguments),
        Command::Convert(arguments) => adapters::convert::run(&arguments),
        Command::Combine(arguments) => adapters::combine::run(&arguments),
        Command::Resize(arguments) => adapters::resize::run(&arguments),
        Command::Extract(arguments) => adapters::extract::run(&arguments),
        Command::Dequantise(arguments) => adapters::dequantise::run(&arguments),
        Command::Info(arguments) => info::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Keys => {
            print!("{}", lora_train::config::keys::Keys::default().reference());
            Ok(())
        }
    };
    let (message, status) = match result {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Work(message)) => (message, 1),
        Err(Failure::Usage(message)) => (message, 2),
    };
    eprintln!("error: {message}");
    ExitCode::from(status)
}
