//! `lora resize`: a LoRA with other ranks.

use std::path::PathBuf;

use lora_cli::arguments::Precision;
use lora_core::{DType, compose};
use lora_io::{adapter, metadata};

use super::{Rank, apart, sound, summary, write};
use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Adapter.
    file: PathBuf,
    /// Output file.
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    rank: Rank,
    /// Type of the output's numbers (default: the input's).
    #[arg(long)]
    dtype: Option<Precision>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    apart([&arguments.file], &arguments.out)?;
    let Some(policy) = arguments.rank.policy()? else {
        return Err(Failure::Usage("name one of --rank, --sv-ratio, --sv-cumulative, --sv-fro".into()));
    };
    let read = sound(adapter::read(&arguments.file)?)?;
    let layers = adapter::in_layers_of(read.format, &read.adapter, read.family);
    let (mut resized, outcomes) = compose::resize(&layers, policy).map_err(|error| Failure::Work(error.to_string()))?;
    metadata::refresh(&mut resized);
    let dtype = arguments.dtype.map_or(read.dtype(), DType::from);
    summary(&outcomes, &resized, dtype);
    write(&arguments.out, &resized, read.format, read.family, dtype)
}
