//! `lora extract`: a LoRA of the difference of two models.

use std::path::PathBuf;

use lora_cli::arguments::Precision;
use lora_core::compose::ExtractOptions;
use lora_core::rank::RankPolicy;
use lora_core::target::Targets;
use lora_io::{adapter, merge};

use super::{Rank, apart, summary, write};
use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The model before.
    #[arg(long, value_parser = lora_cli::arguments::base())]
    base: PathBuf,
    /// The model after, of the same layout.
    #[arg(long, value_parser = lora_cli::arguments::base())]
    tuned: PathBuf,
    /// Output file.
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    rank: Rank,
    /// Highest rank, for the rules that choose one.
    #[arg(long, default_value_t = 128)]
    max_rank: usize,
    /// Layers, as `target_modules` in a configuration.
    #[arg(long, default_values_t = ["attention-mlp".to_owned()])]
    targets: Vec<String>,
    /// Clip the factors to this quantile of their magnitudes (sd-scripts: 0.99).
    #[arg(long)]
    clamp_quantile: Option<f64>,
    /// Compute all singular values.
    #[arg(long)]
    exact: bool,
    /// Type of the output's numbers.
    #[arg(long, default_value = "fp16")]
    dtype: Precision,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    apart([&arguments.base, &arguments.tuned], &arguments.out)?;
    let policy = arguments.rank.policy()?.unwrap_or(RankPolicy::Fixed(32));
    if arguments.max_rank == 0 {
        return Err(Failure::Usage("--max-rank 0: expected a whole number from 1".into()));
    }
    let targets = Targets::parse(&arguments.targets).map_err(|error| Failure::Usage(error.to_string()))?;
    let options = ExtractOptions {
        policy,
        limit: arguments.rank.rank.unwrap_or(arguments.max_rank),
        clamp_quantile: arguments.clamp_quantile,
        exact: arguments.exact,
        ..ExtractOptions::default()
    };
    let extracted = merge::extract(&arguments.base, &arguments.tuned, &targets, &options)?;
    let (adapter, family, dtype) = (&extracted.adapter, extracted.family, arguments.dtype.into());
    summary(&extracted.outcomes, adapter, dtype);
    extracted.notes.iter().for_each(|note| eprintln!("note: {note}"));
    write(&arguments.out, adapter, adapter::usual_format(adapter, family), family, dtype)
}
