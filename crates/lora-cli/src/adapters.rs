//! `lora merge`, `convert`, `combine`, `resize` and `extract`: what is done with finished adapters.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use lora_core::compose::{self, ExtractOptions, Method, Outcome};
use lora_core::rank::RankPolicy;
use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, DType, Strength};
use lora_io::adapter::{self, AdapterFile, Format};
use lora_io::merge::{self, MergeOptions, Weighted};

use crate::Failure;

/// Element types on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Precision {
    Fp32,
    Fp16,
    Bf16,
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Fp32 => DType::F32,
            Precision::Fp16 => DType::F16,
            Precision::Bf16 => DType::BF16,
        }
    }
}

/// Formats on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Layout {
    Kohya,
    Diffusers,
    DiffusersOld,
    Peft,
    /// A PEFT folder that the strictest consumers take: plain LoRA, one rank, one alpha.
    Portable,
}

impl Layout {
    fn format(self) -> Format {
        match self {
            Layout::Kohya => Format::Kohya,
            Layout::Diffusers => Format::Diffusers,
            Layout::DiffusersOld => Format::DiffusersOld,
            Layout::Peft | Layout::Portable => Format::Peft,
        }
    }
}

/// The rule for ranks on the command line.
#[derive(clap::Args)]
pub(crate) struct Rank {
    /// Rank of the result.
    #[arg(long)]
    rank: Option<usize>,
    /// Keep singular values above the largest divided by this.
    #[arg(long, conflicts_with = "rank")]
    sv_ratio: Option<f64>,
    /// Keep the fewest singular values whose sum reaches this share.
    #[arg(long, conflicts_with_all = ["rank", "sv_ratio"])]
    sv_cumulative: Option<f64>,
    /// Keep the fewest singular values whose norm reaches this share.
    #[arg(long, conflicts_with_all = ["rank", "sv_ratio", "sv_cumulative"])]
    sv_fro: Option<f64>,
}

impl Rank {
    fn policy(&self) -> Option<RankPolicy> {
        let share = self.sv_cumulative.map(RankPolicy::Cumulative).or(self.sv_fro.map(RankPolicy::Frobenius));
        self.rank.map(RankPolicy::Fixed).or(self.sv_ratio.map(RankPolicy::Ratio)).or(share)
    }
}

#[derive(clap::Args)]
pub(crate) struct MergeArguments {
    /// Base model: a .safetensors file or a folder.
    #[arg(long)]
    base: PathBuf,
    /// Adapter and strength, `FILE:0.8`; `FILE:0.8:0.6` for text encoder and U-Net; a third list gives factors by block.
    #[arg(long, required = true)]
    lora: Vec<String>,
    /// Output: a file for a file, a new folder for a folder.
    #[arg(long)]
    out: PathBuf,
    /// Type of the output's numbers (default: the base's).
    #[arg(long)]
    dtype: Option<Precision>,
    /// Take the adapter out of a model that it was merged into.
    #[arg(long)]
    unmerge: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct ConvertArguments {
    /// Adapter: a .safetensors file or a PEFT folder.
    file: PathBuf,
    /// Format of the output.
    #[arg(long)]
    to: Layout,
    /// Output: a file, or a folder for PEFT.
    #[arg(long)]
    out: PathBuf,
    /// Type of the output's numbers (default: the input's).
    #[arg(long)]
    dtype: Option<Precision>,
    /// Write this alpha, with the same effect.
    #[arg(long)]
    alpha: Option<f64>,
    /// Turn other variants into plain LoRA of this rank first; needs --base.
    #[arg(long, requires = "base")]
    flatten: Option<usize>,
    /// The base model, for --flatten.
    #[arg(long)]
    base: Option<PathBuf>,
}

#[derive(clap::Args)]
pub(crate) struct CombineArguments {
    /// Adapter and strength, as of `lora merge`.
    #[arg(long, required = true)]
    lora: Vec<String>,
    /// Output file.
    #[arg(long)]
    out: PathBuf,
    /// Add the factors one by one as PEFT's `linear` (equal ranks only; not the sum of the updates).
    #[arg(long)]
    linear: bool,
    #[command(flatten)]
    rank: Rank,
    /// Type of the output's numbers (default: the first adapter's).
    #[arg(long)]
    dtype: Option<Precision>,
}

#[derive(clap::Args)]
pub(crate) struct ResizeArguments {
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

#[derive(clap::Args)]
pub(crate) struct ExtractArguments {
    /// The model before.
    #[arg(long)]
    base: PathBuf,
    /// The model after, of the same layout.
    #[arg(long)]
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

/// `FILE`, `FILE:0.8`, `FILE:0.8:0.6`, `FILE:0.8:0.6:1,0,…`.
fn weighted(argument: &str) -> Result<Weighted, Failure> {
    let numbers = |text: &str| !text.is_empty() && text.split(',').all(|part| part.trim().parse::<f64>().is_ok());
    let mut path = argument;
    let mut strength = "";
    for _ in 0..3 {
        match path.rsplit_once(':') {
            Some((rest, last)) if numbers(last) => {
                path = rest;
                strength = &argument[rest.len() + 1..];
            }
            _ => break,
        }
    }
    let strength = match strength {
        "" => Strength::default(),
        text => Strength::parse(text).map_err(|error| Failure::Usage(format!("--lora {argument}: {error}")))?,
    };
    let name = Path::new(path).file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Weighted { name, adapter: adapter::read(path)?.adapter, strength })
}

pub(crate) fn merge(arguments: &MergeArguments) -> Result<(), Failure> {
    let adapters: Vec<Weighted> = arguments.lora.iter().map(|lora| weighted(lora)).collect::<Result<_, _>>()?;
    let options = MergeOptions { dtype: arguments.dtype.map(DType::from), unmerge: arguments.unmerge };
    let started = Instant::now();
    let bar = Mutex::new(None::<ProgressBar>);
    let progress = |done: u64, of: u64| {
        let Ok(mut bar) = bar.lock() else { return };
        let bar = bar.get_or_insert_with(|| {
            let style =
                ProgressStyle::with_template("merging {bar:30} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}");
            ProgressBar::new(of).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        bar.set_position(done);
    };
    let report =
        merge::merge(&arguments.base, &adapters, &arguments.out, &options, &VariantRegistry::default(), &progress)?;
    if let Ok(Some(bar)) = bar.into_inner() {
        bar.finish_and_clear();
    }
    if arguments.json {
        let json = serde_json::json!({ "files": report.files, "changed": report.changed, "copied": report.copied,
            "notes": report.notes, "seconds": started.elapsed().as_secs_f64() });
        println!("{json:#}");
        return Ok(());
    }
    report.notes.iter().for_each(|note| eprintln!("note: {note}"));
    println!(
        "{}: {} tensors changed, {} copied, {:.1} s",
        arguments.out.display(),
        report.changed,
        report.copied,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Writes and says what was written.
fn write(path: &Path, adapter: &Adapter, format: Format, dtype: DType) -> Result<(), Failure> {
    for note in adapter::write(path, adapter, format, dtype)? {
        eprintln!("note: {note}");
    }
    println!("{}: {} modules, {format}, {dtype}", path.display(), adapter.modules.len());
    Ok(())
}

/// Refuses to write over what was read.
fn apart(input: &Path, output: &Path) -> Result<(), Failure> {
    match (input.canonicalize(), output.canonicalize()) {
        (Ok(input), Ok(output)) if input == output => {
            Err(Failure::Usage(format!("--out {}: is the input itself; name another file", output.display())))
        }
        _ => Ok(()),
    }
}

pub(crate) fn convert(arguments: &ConvertArguments) -> Result<(), Failure> {
    apart(&arguments.file, &arguments.out)?;
    let read = adapter::read(&arguments.file)?;
    let dtype = arguments.dtype.map_or(read.dtype(), DType::from);
    let AdapterFile { mut adapter, .. } = read;
    if let (Some(rank), Some(base)) = (arguments.flatten, &arguments.base) {
        let options = ExtractOptions { policy: RankPolicy::Fixed(rank), limit: rank, ..ExtractOptions::default() };
        let (flat, outcomes) = merge::flatten(base, &adapter, &options, &VariantRegistry::default())?;
        adapter = flat;
        summary(&outcomes);
    }
    if let Some(alpha) = arguments.alpha {
        if !(alpha.is_finite() && alpha > 0.0) {
            return Err(Failure::Usage(format!("--alpha {alpha}: expected a number above 0")));
        }
        compose::set_alpha(&mut adapter, alpha).map_err(|error| Failure::Work(error.to_string()))?;
    }
    if matches!(arguments.to, Layout::Portable) {
        let (portable, notes) = adapter::portable::portable(&adapter)?;
        notes.iter().for_each(|note| eprintln!("note: {note}"));
        adapter = portable;
    }
    write(&arguments.out, &adapter, arguments.to.format(), dtype)
}

/// The ranks and what they keep, as a line.
fn summary(outcomes: &[Outcome]) {
    let (mut least, mut sum, mut ranks) = (f64::INFINITY, 0.0, (usize::MAX, 0));
    for outcome in outcomes {
        least = least.min(outcome.kept);
        sum += outcome.kept;
        ranks = (ranks.0.min(outcome.rank), ranks.1.max(outcome.rank));
    }
    let mean = sum / outcomes.len().max(1) as f64;
    eprintln!(
        "ranks {} to {}; of the updates' norm {:.2}% is kept on average, {:.2}% at least",
        ranks.0,
        ranks.1,
        100.0 * mean,
        100.0 * least
    );
}

pub(crate) fn combine(arguments: &CombineArguments) -> Result<(), Failure> {
    let adapters: Vec<Weighted> = arguments.lora.iter().map(|lora| weighted(lora)).collect::<Result<_, _>>()?;
    let method = match (arguments.linear, arguments.rank.policy()) {
        (true, None) => Method::Linear,
        (true, Some(_)) => return Err(Failure::Usage("--linear keeps the rank; leave the other rule out".into())),
        (false, Some(policy)) => Method::Svd(policy),
        (false, None) => Method::Concatenate,
    };
    let parts: Vec<_> = adapters.iter().map(|weighted| (&weighted.adapter, &weighted.strength)).collect();
    let (mut combined, outcomes) =
        compose::combine(&parts, method).map_err(|error| Failure::Work(error.to_string()))?;
    summary(&outcomes);
    if let Some(version) = adapters[0].adapter.metadata.get("ss_base_model_version") {
        combined.metadata.insert("ss_base_model_version".into(), version.clone());
    }
    let names: Vec<_> = adapters.iter().map(|weighted| weighted.name.as_str()).collect();
    combined.metadata.insert("lora_combined".into(), names.join(", "));
    write(&arguments.out, &combined, Format::Kohya, arguments.dtype.map_or(DType::F16, DType::from))
}

pub(crate) fn resize(arguments: &ResizeArguments) -> Result<(), Failure> {
    apart(&arguments.file, &arguments.out)?;
    let Some(policy) = arguments.rank.policy() else {
        return Err(Failure::Usage("name one of --rank, --sv-ratio, --sv-cumulative, --sv-fro".into()));
    };
    let read = adapter::read(&arguments.file)?;
    let (resized, outcomes) =
        compose::resize(&read.adapter, policy).map_err(|error| Failure::Work(error.to_string()))?;
    summary(&outcomes);
    write(&arguments.out, &resized, read.format, arguments.dtype.map_or(read.dtype(), DType::from))
}

pub(crate) fn extract(arguments: &ExtractArguments) -> Result<(), Failure> {
    let policy = arguments.rank.policy().unwrap_or(RankPolicy::Fixed(32));
    let targets = Targets::parse(&arguments.targets).map_err(|error| Failure::Usage(error.to_string()))?;
    let options = ExtractOptions {
        policy,
        limit: arguments.rank.rank.unwrap_or(arguments.max_rank),
        clamp_quantile: arguments.clamp_quantile,
        exact: arguments.exact,
        ..ExtractOptions::default()
    };
    let (adapter, outcomes) = merge::extract(&arguments.base, &arguments.tuned, &targets, &options)?;
    summary(&outcomes);
    write(&arguments.out, &adapter, Format::Kohya, arguments.dtype.into())
}
