//! What is done with finished adapters, a command a file, and what these commands share: rules for
//! ranks, adapters with their strengths, what may be written where.

pub(crate) mod combine;
pub(crate) mod convert;
pub(crate) mod dequantise;
pub(crate) mod extract;
pub(crate) mod merge;
pub(crate) mod resize;

use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use lora_cli::arguments::strength_of;
use lora_core::compose::{self, Outcome};
use lora_core::rank::RankPolicy;
use lora_core::{Adapter, DType};
use lora_data::tokenizer::Tokenizer;
use lora_io::adapter::{self, AdapterFile, Format};
use lora_io::family::Family;
use lora_io::merge::Weighted;
use lora_io::overwrite;

use crate::Failure;

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
    fn policy(&self) -> Result<Option<RankPolicy>, Failure> {
        let share = self.sv_cumulative.map(RankPolicy::Cumulative).or(self.sv_fro.map(RankPolicy::Frobenius));
        let policy = self.rank.map(RankPolicy::Fixed).or(self.sv_ratio.map(RankPolicy::Ratio)).or(share);
        policy.map(checked).transpose()
    }
}

/// A rule for ranks that keeps something.
fn checked(policy: RankPolicy) -> Result<RankPolicy, Failure> {
    policy.check().map(|()| policy).map_err(|error| Failure::Usage(error.to_string()))
}

/// Reads an adapter to work with, says what a reader should know of it, and refuses one that is damaged.
fn sound(read: AdapterFile) -> Result<AdapterFile, Failure> {
    read.undamaged()?;
    read.notes.iter().for_each(|note| eprintln!("note: {}: {note}", read.path.display()));
    Ok(read)
}

/// The adapters of `--lora`, none of which the output may replace, and the type of the first one's numbers.
fn weighted(arguments: &[String], out: &Path) -> Result<(Vec<Weighted>, Option<DType>), Failure> {
    let (mut adapters, mut dtype) = (Vec::new(), None);
    for argument in arguments {
        let (path, strength) = strength_of(argument)?;
        apart([path], out)?;
        let read = sound(adapter::read(path)?)?;
        dtype = dtype.or(Some(read.dtype()));
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        adapters.push(Weighted { name, adapter: read.adapter, strength });
    }
    Ok((adapters, dtype))
}

fn bytes_bar(what: &'static str, of: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}");
    ProgressBar::new(of).with_prefix(what).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Writes the tokenizer of a GGUF model beside the weights that were made of it, or says why there is none.
fn save_tokenizer(model: &Path, folder: &Path, notes: &mut Vec<String>) {
    if let Err(error) = Tokenizer::open(model).and_then(|tokenizer| tokenizer.save(folder)) {
        notes.push(format!("no tokenizer was written: {error}"));
    }
}

/// The error of an update, as a share of it, from which on rounding is worth a note.
const COARSE: f64 = 0.01;

/// Writes and says what was written.
fn write(path: &Path, adapter: &Adapter, format: Format, family: Option<&Family>, dtype: DType) -> Result<(), Failure> {
    if format == Format::Peft && path.extension().is_some_and(|extension| extension == "safetensors") {
        let path = path.display();
        return Err(Failure::Usage(format!(
            "{path}: an adapter in PEFT's layout is a folder; leave .safetensors out of its name"
        )));
    }
    for note in adapter::write_as(path, adapter, format, family, dtype)? {
        eprintln!("note: {note}");
    }
    let errors = adapter.modules.iter().map(|(path, module)| (compose::rounding(module, dtype), path));
    if let Some((error, module)) = errors.max_by(|(a, _), (b, _)| a.total_cmp(b)).filter(|(error, _)| *error > COARSE) {
        let percent = 100.0 * error;
        eprintln!("note: {dtype} rounds the update of {module} by {percent:.1}% of its norm; --dtype fp32 does not");
    }
    println!("{}: {} modules, {format}, {dtype}", path.display(), adapter.modules.len());
    Ok(())
}

/// Refuses to write over what is read.
pub(crate) fn apart<'p>(
    inputs: impl IntoIterator<Item = &'p (impl AsRef<Path> + ?Sized + 'p)>,
    output: &Path,
) -> Result<(), Failure> {
    overwrite::refuse(inputs.into_iter().map(AsRef::as_ref), output)
        .map_err(|error| Failure::Usage(format!("--out: {error}")))
}

/// The ranks and what they keep in the type that is written, as a line.
fn summary(outcomes: &[Outcome], adapter: &Adapter, dtype: DType) {
    let rounded = |outcome: &Outcome| {
        let error = adapter.modules.get(&outcome.module).map_or(0.0, |module| compose::rounding(module, dtype));
        Outcome { kept: outcome.kept * (1.0 - error * error).max(0.0).sqrt(), ..outcome.clone() }
    };
    let outcomes: Vec<Outcome> = outcomes.iter().map(rounded).collect();
    let ranks = outcomes.iter().map(|outcome| outcome.rank);
    let (lowest, highest) = (ranks.clone().min().unwrap_or(0), ranks.max().unwrap_or(0));
    let (mean, least) = compose::kept(&outcomes);
    eprintln!(
        "ranks {lowest} to {highest}; of the updates' norm {:.2}% is kept on average, {:.2}% at least",
        100.0 * mean,
        100.0 * least
    );
}
