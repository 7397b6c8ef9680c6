//! `lora merge`, `convert`, `combine`, `resize` and `extract`: what is done with finished adapters.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use lora_core::compose::{self, ExtractOptions, Keep, MajoritySign, Method, Outcome, Pruning};
use lora_core::rank::RankPolicy;
use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, DType, Strength};
use lora_data::tokenizer::Tokenizer;
use lora_io::adapter::{self, AdapterFile, Format};
use lora_io::gguf::names::Architecture;
use lora_io::gguf::{self, LanguageModel};
use lora_io::merge::{self, MergeOptions, Weighted};
use lora_io::{metadata, overwrite};

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
    /// llama.cpp's; needs --base for the model's attention heads.
    Gguf,
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
            Layout::Gguf => Format::Gguf,
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
    /// Base model: a .safetensors file, a folder, or a language model in GGUF.
    #[arg(long)]
    base: PathBuf,
    /// Adapter and strength, `FILE:0.8`; `FILE:0.8:0.6` for text encoder and U-Net; a third list gives factors by block.
    #[arg(long, required = true)]
    lora: Vec<String>,
    /// Output: a file for a file, a new folder for a folder; for GGUF a .gguf file or a new folder.
    #[arg(long)]
    out: PathBuf,
    /// Type of the output's numbers (default: the base's).
    #[arg(long)]
    dtype: Option<Precision>,
    /// Take the adapter out of a model that it was merged into.
    #[arg(long)]
    unmerge: bool,
    /// From GGUF into GGUF: quantise the tensors again that the adapter changes, in the types that they have.
    #[arg(long, conflicts_with = "dtype")]
    requantise: bool,
    /// The base is what PEFT's PiSSA or OLoRA left of the original model, for adapters that were saved unconverted.
    #[arg(long)]
    residual: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct ConvertArguments {
    /// Adapter: a .safetensors or .gguf file or a PEFT folder.
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
    /// The base model, for --flatten and for GGUF.
    #[arg(long)]
    base: Option<PathBuf>,
}

/// Methods of combining on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum CombineMethod {
    /// The exact sum; ranks add up.
    Sum,
    /// Factors one by one as PEFT's `linear` (equal ranks only; not the sum of the updates).
    Linear,
    /// The largest numbers, elected signs, the mean of those that agree.
    Ties,
    /// Random numbers, enlarged so that the mean stays.
    DareLinear,
    /// Random numbers, elected signs.
    DareTies,
    /// The largest numbers.
    MagnitudePrune,
}

/// Elections of signs on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Majority {
    /// The sign of the sum.
    Total,
    /// The sign that more adapters have.
    Frequency,
}

impl CombineArguments {
    fn method(&self) -> Result<Method, Failure> {
        let policy = self.rank.policy();
        let random = Keep::Random { seed: self.seed };
        let sign = Some(match self.majority_sign {
            Majority::Total => MajoritySign::Total,
            Majority::Frequency => MajoritySign::Frequency,
        });
        let (keep, majority) = match self.method {
            CombineMethod::Sum if self.density.is_none() => {
                return Ok(policy.map_or(Method::Concatenate, Method::Svd));
            }
            CombineMethod::Linear if policy.is_none() && self.density.is_none() => return Ok(Method::Linear),
            CombineMethod::Linear if policy.is_some() => {
                return Err(Failure::Usage("--method linear keeps the rank; leave the rule for ranks out".into()));
            }
            CombineMethod::Sum | CombineMethod::Linear => {
                return Err(Failure::Usage("--density belongs to the pruning methods".into()));
            }
            CombineMethod::Ties => (Keep::Largest, sign),
            CombineMethod::MagnitudePrune => (Keep::Largest, None),
            CombineMethod::DareLinear => (random, None),
            CombineMethod::DareTies => (random, sign),
        };
        let density =
            self.density.ok_or_else(|| Failure::Usage("this method needs --density, for instance 0.5".into()))?;
        let pruning = Pruning { keep, density, majority };
        Ok(policy.map_or(Method::Pruned(pruning), |policy| Method::PrunedSvd(pruning, policy)))
    }
}

#[derive(clap::Args)]
pub(crate) struct CombineArguments {
    /// Adapter and strength, as of `lora merge`.
    #[arg(long, required = true)]
    lora: Vec<String>,
    /// Output file.
    #[arg(long)]
    out: PathBuf,
    /// How the updates become one. With a rule for ranks, the result is taken apart again to those ranks.
    #[arg(long, default_value = "sum")]
    method: CombineMethod,
    /// Share of the numbers that the pruning methods keep.
    #[arg(long)]
    density: Option<f64>,
    /// How `ties` and `dare-ties` elect signs.
    #[arg(long, default_value = "total")]
    majority_sign: Majority,
    /// Seed of the numbers that `dare-linear` and `dare-ties` keep.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    rank: Rank,
    /// Type of the output's numbers (default: the first adapter's).
    #[arg(long)]
    dtype: Option<Precision>,
}

#[derive(clap::Args)]
pub(crate) struct DequantiseArguments {
    /// Language model in GGUF.
    file: PathBuf,
    /// Output: a new folder with weights, configuration and tokenizer, or a .safetensors file.
    #[arg(long)]
    out: PathBuf,
    /// Type of the output's numbers.
    #[arg(long, default_value = "bf16")]
    dtype: Precision,
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

/// `FILE`, `FILE:0.8`, `FILE:0.8:0.6`, `FILE:0.8:0.6:1,0,…`: the file, and how strongly it is applied.
fn strength_of(argument: &str) -> Result<(&Path, Strength), Failure> {
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
    Ok((Path::new(path), strength))
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

pub(crate) fn dequantise(arguments: &DequantiseArguments) -> Result<(), Failure> {
    apart([&arguments.file], &arguments.out)?;
    let model = LanguageModel::open(&arguments.file)?;
    let dtype = DType::from(arguments.dtype);
    let elements = |name: &str| model.shape(name).unwrap_or_default().iter().product::<usize>();
    let bytes = model.names().map(elements).sum::<usize>() * dtype.size();
    let bar = bytes_bar("writing", bytes as u64);
    let progress = |bytes| bar.inc(bytes);
    let is_file = arguments.out.extension().is_some_and(|extension| extension == "safetensors");
    let written = match is_file {
        true => gguf::dequantise(&arguments.file, &arguments.out, dtype, &progress)?,
        false => gguf::dequantise_to_folder(&arguments.file, &arguments.out, dtype, &progress)?,
    };
    bar.finish_and_clear();
    println!("{}: {} tensors, {} bytes", arguments.out.display(), model.names().count(), written);
    if !is_file {
        let mut notes = Vec::new();
        save_tokenizer(&arguments.file, &arguments.out, &mut notes);
        notes.iter().for_each(|note| eprintln!("note: {note}"));
        return Ok(());
    }
    match model.rope_scaling() {
        Ok(None) => {}
        Ok(Some(scaling)) => scale_rope(&arguments.out.with_file_name("config.json"), scaling)?,
        Err(error) => eprintln!("note: {error}"),
    }
    Ok(())
}

/// Writes the tokenizer of a GGUF model beside the weights that were made of it, or says why there is none.
fn save_tokenizer(model: &Path, folder: &Path, notes: &mut Vec<String>) {
    if let Err(error) = Tokenizer::open(model).and_then(|tokenizer| tokenizer.save(folder)) {
        notes.push(format!("no tokenizer was written: {error}"));
    }
}

/// Puts the scaling of a model's rotary frequencies into the configuration beside its weights, or says that it belongs
/// there.
fn scale_rope(path: &Path, scaling: serde_json::Value) -> Result<(), Failure> {
    let missing = || eprintln!("note: the config.json of this model needs \"rope_scaling\": {scaling}");
    let Ok(text) = std::fs::read(path) else {
        missing();
        return Ok(());
    };
    let parsed: Result<serde_json::Map<String, serde_json::Value>, _> =
        serde_json::from_slice(lora_io::json::without_mark(&text));
    let Ok(mut config) = parsed else {
        missing();
        return Ok(());
    };
    let of_config = ["rope_scaling", "rope_parameters"].iter().find_map(|key| {
        config.get(*key).and_then(serde_json::Value::as_object).filter(|own| own.contains_key("factor"))
    });
    let number = |value: Option<&serde_json::Value>| value.and_then(serde_json::Value::as_f64);
    let says = |own: &serde_json::Map<String, serde_json::Value>| {
        let mut numbers = scaling.as_object().into_iter().flatten().filter(|(_, value)| value.is_number());
        numbers.all(|(key, value)| number(own.get(key)) == number(Some(value)))
    };
    match of_config {
        Some(own) if says(own) => return Ok(()),
        Some(_) => {
            eprintln!("note: {} scales RoPE in another way than the file, whose factors are {scaling}", path.display());
            return Ok(());
        }
        None => {}
    }
    config.insert("rope_scaling".into(), scaling.clone());
    let text = format!("{:#}\n", serde_json::Value::from(config));
    lora_io::atomic::write(path, |file| std::io::Write::write_all(file, text.as_bytes()))?;
    eprintln!("note: {}: \"rope_scaling\": {scaling} was added", path.display());
    Ok(())
}

pub(crate) fn merge(arguments: &MergeArguments) -> Result<(), Failure> {
    let (mut adapters, _) = weighted(&arguments.lora, &arguments.out)?;
    if arguments.residual {
        adapters.iter_mut().for_each(|weighted| adapter::on_residual(&mut weighted.adapter));
    }
    let (unmerge, requantise) = (arguments.unmerge, arguments.requantise);
    let options = MergeOptions { dtype: arguments.dtype.map(DType::from), unmerge, requantise };
    let started = Instant::now();
    let bar = Mutex::new(None::<ProgressBar>);
    let progress = |done: u64, of: u64| {
        let Ok(mut bar) = bar.lock() else { return };
        bar.get_or_insert_with(|| bytes_bar("merging", of)).set_position(done);
    };
    let mut report =
        merge::merge(&arguments.base, &adapters, &arguments.out, &options, &VariantRegistry::default(), &progress)?;
    if arguments.base.is_file() && arguments.out.is_dir() {
        save_tokenizer(&arguments.base, &arguments.out, &mut report.notes);
    }
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

/// The layout that most programs load for an adapter's family: PEFT's for language models, else kohya's.
fn usual_format(adapter: &Adapter) -> Format {
    match adapter::family(adapter) {
        Some(family) if !family.image => Format::Peft,
        _ => Format::Kohya,
    }
}

/// Writes and says what was written.
fn write(path: &Path, adapter: &Adapter, format: Format, dtype: DType) -> Result<(), Failure> {
    if format == Format::Peft && path.extension().is_some_and(|extension| extension == "safetensors") {
        let path = path.display();
        return Err(Failure::Usage(format!(
            "{path}: an adapter in PEFT's layout is a folder; leave .safetensors out of its name"
        )));
    }
    for note in adapter::write(path, adapter, format, dtype)? {
        eprintln!("note: {note}");
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

pub(crate) fn convert(arguments: &ConvertArguments) -> Result<(), Failure> {
    apart(std::iter::once(&arguments.file).chain(&arguments.base), &arguments.out)?;
    // Rows of a llama model are in another order in GGUF, by heads that only the base knows.
    let architecture = match (&arguments.base, arguments.to, is_gguf(&arguments.file)) {
        (Some(base), Layout::Gguf, _) | (Some(base), _, true) => Some(Architecture::of_base(base)?),
        _ => None,
    };
    let read = sound(match &architecture {
        Some(architecture) if is_gguf(&arguments.file) => adapter::gguf::read_for(&arguments.file, architecture)?,
        _ => adapter::read(&arguments.file)?,
    })?;
    let dtype = arguments.dtype.map_or(read.dtype(), DType::from);
    let AdapterFile { mut adapter, .. } = read;
    if let Some(architecture) = &architecture {
        adapter::gguf::set_architecture(&mut adapter, architecture);
    }
    if let (Some(rank), Some(base)) = (arguments.flatten, &arguments.base) {
        // What does not fit is an error below where the base is needed for it.
        let notes = merge::matches(base, adapter.clone()).unwrap_or_default();
        notes.iter().for_each(|note| eprintln!("note: {note}"));
        let options = ExtractOptions { policy: RankPolicy::Fixed(rank), limit: rank, ..ExtractOptions::default() };
        let (flat, outcomes) = merge::flatten(base, &adapter, &options, &VariantRegistry::default())?;
        adapter = flat;
        metadata::refresh(&mut adapter);
        summary(&outcomes);
    }
    if let Some(alpha) = arguments.alpha {
        if !(alpha.is_finite() && alpha > 0.0) {
            return Err(Failure::Usage(format!("--alpha {alpha}: expected a number above 0")));
        }
        compose::set_alpha(&mut adapter, alpha).map_err(|error| Failure::Work(error.to_string()))?;
        metadata::refresh(&mut adapter);
    }
    if matches!(arguments.to, Layout::Portable) {
        let (portable, notes) = adapter::portable::portable(&adapter)?;
        notes.iter().for_each(|note| eprintln!("note: {note}"));
        adapter = portable;
    }
    write(&arguments.out, &adapter, arguments.to.format(), dtype)
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gguf")
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
    let (adapters, dtype) = weighted(&arguments.lora, &arguments.out)?;
    let mut families: Vec<_> = adapters.iter().filter_map(|weighted| adapter::family(&weighted.adapter)).collect();
    families.dedup();
    if let [first, second, ..] = families.as_slice() {
        eprintln!("note: these adapters seem to be made for different base models: {first} and {second}");
    }
    let method = arguments.method()?;
    let parts: Vec<_> = adapters.iter().map(|weighted| (&weighted.adapter, &weighted.strength)).collect();
    let (mut combined, outcomes) =
        compose::combine(&parts, method).map_err(|error| Failure::Work(error.to_string()))?;
    summary(&outcomes);
    if let Some(version) = adapters[0].adapter.metadata.get("ss_base_model_version") {
        combined.metadata.insert("ss_base_model_version".into(), version.clone());
    }
    let names: Vec<_> = adapters.iter().map(|weighted| weighted.name.as_str()).collect();
    combined.metadata.insert("lora_combined".into(), names.join(", "));
    let dtype = arguments.dtype.map(DType::from).or(dtype).unwrap_or_default();
    write(&arguments.out, &combined, usual_format(&combined), dtype)
}

pub(crate) fn resize(arguments: &ResizeArguments) -> Result<(), Failure> {
    apart([&arguments.file], &arguments.out)?;
    let Some(policy) = arguments.rank.policy() else {
        return Err(Failure::Usage("name one of --rank, --sv-ratio, --sv-cumulative, --sv-fro".into()));
    };
    let read = sound(adapter::read(&arguments.file)?)?;
    let (mut resized, outcomes) =
        compose::resize(&read.adapter, policy).map_err(|error| Failure::Work(error.to_string()))?;
    metadata::refresh(&mut resized);
    summary(&outcomes);
    write(&arguments.out, &resized, read.format, arguments.dtype.map_or(read.dtype(), DType::from))
}

pub(crate) fn extract(arguments: &ExtractArguments) -> Result<(), Failure> {
    apart([&arguments.base, &arguments.tuned], &arguments.out)?;
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
    write(&arguments.out, &adapter, usual_format(&adapter), arguments.dtype.into())
}
