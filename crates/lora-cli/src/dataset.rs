//! `lora dataset`: a look at pictures and captions, or at texts, before hours are spent on them. What a configuration
//! says of a dataset `lora-trainer` reads; the look itself, and all of it where no configuration is named, is here.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lora_data::dataset::Strictness;
use lora_data::finding::{Finding, FindingKind, Severity};
use lora_data::processor::ProcessorRegistry;
use lora_data::report::texts::{self, TextReport};
use lora_data::report::{DatasetReport, ReportOptions, html, inspect};
use lora_data::texts::{TextOptions, Texts};
use lora_data::tokenizer::{ClipTokenizer, TextCleaning, Tokenizer};
use lora_data::{DatasetOptions, Pictures};

use crate::Failure;

/// What is looked at, and how it is told.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Folder, .tar or .parquet, or, with --tokenizer or the configuration of a language model, a folder or file of
    /// texts; may be left out where the configuration names it.
    #[arg(required_unless_present = "config")]
    folder: Option<PathBuf>,
    /// Configuration (.toml, .yaml, .json) whose resolution, buckets, crops and captions count, or whose tokenizer,
    /// template and rows.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Set a key over the configuration's value, for instance `--set enable_bucket=true`.
    #[arg(long = "set", value_name = "KEY=VALUE", num_args = 1..)]
    set: Vec<String>,
    /// The model whose tokenizer and chat template count (a folder or a GGUF file): the dataset is one of texts.
    #[arg(long, value_name = "MODEL", requires = "folder", conflicts_with = "config", value_parser = crate::arguments::base())]
    tokenizer: Option<PathBuf>,
    /// The most tokens of a row of texts.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, requires = "tokenizer")]
    max_seq_length: usize,
    /// Write everything as one page with pictures.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// The most pictures on that page.
    #[arg(long, default_value_t = 200)]
    shown: usize,
    /// The most findings of one kind in the table.
    #[arg(long, default_value_t = 5)]
    findings: usize,
    /// Fail where anything is unreadable or unusable.
    #[arg(long)]
    strict: bool,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// The configuration, with what is set over it and the folder that takes the place of its own; `None` where none is
    /// named.
    pub fn configuration(&self) -> Option<(Option<&Path>, &[String], Option<&Path>)> {
        let named = self.config.is_some() || !self.set.is_empty();
        named.then_some((self.config.as_deref(), self.set.as_slice(), self.folder.as_deref()))
    }
}

/// The tokens of a caption that count where no configuration says it.
const TOKENS: usize = 75;

/// A look at what no configuration is needed for.
///
/// # Errors
/// [`Failure::Work`] where nothing can be used, or, where that is asked for, not all.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    let folder = arguments.folder.as_deref().unwrap_or(Path::new("."));
    match &arguments.tokenizer {
        Some(tokenizer) => {
            let path = folder.to_owned();
            let max_seq_length = arguments.max_seq_length;
            look_at_texts(arguments, tokenizer, vec![TextOptions { path, max_seq_length, ..TextOptions::default() }])
        }
        None => look(arguments, vec![DatasetOptions::of(folder)], TOKENS),
    }
}

/// A look at datasets of pictures, whose captions count up to so many tokens.
///
/// # Errors
/// As of [`run`].
pub fn look(arguments: &Arguments, mut datasets: Vec<DatasetOptions>, tokens: usize) -> Result<(), Failure> {
    for dataset in &mut datasets {
        dataset.scan.strictness = Strictness::Inspect;
    }
    let title = datasets.iter().map(|dataset| dataset.path.display().to_string()).collect::<Vec<_>>().join(", ");
    let pictures = Pictures::open(datasets, &ProcessorRegistry::default())?;
    let options = ReportOptions {
        shown: if arguments.html.is_some() { arguments.shown } else { 0 },
        samples: if arguments.html.is_some() { ReportOptions::default().samples } else { 0 },
        tokens: Some((ClipTokenizer::new(TextCleaning::default()), tokens)),
        ..ReportOptions::default()
    };
    let mut last = Instant::now();
    let mut progress = |done: usize, of: usize| {
        if last.elapsed() > Duration::from_secs(2) {
            last = Instant::now();
            eprint!("looked at {done}/{of}{}", if std::io::stderr().is_terminal() { '\r' } else { '\n' });
        }
    };
    let report = inspect(Arc::new(pictures), &options, &mut progress)?;
    let lost = report.findings.iter().filter(|finding| finding.kind.severity() == Severity::Lost).count();
    let (page, json, print) = (html::page, serde_json::to_string_pretty, print_pictures);
    Told { title: &title, report: &report, page, json, print, usable: report.pictures.len(), noun: "pictures", lost }
        .tell(arguments)
}

/// A look at datasets of texts as the tokenizer of a model, a folder or a GGUF file, lays them out.
///
/// # Errors
/// As of [`run`], and [`Failure::Usage`] where several datasets are to be one page or one value of JSON.
pub fn look_at_texts(arguments: &Arguments, tokenizer: &Path, datasets: Vec<TextOptions>) -> Result<(), Failure> {
    if datasets.len() > 1 && (arguments.json || arguments.html.is_some()) {
        let message = "--json and --html tell of one dataset of texts; name one of the configuration's before --config";
        return Err(Failure::Usage(message.to_owned()));
    }
    let tokenizer = Arc::new(Tokenizer::open(tokenizer)?);
    datasets.into_iter().try_for_each(|options| look_at_text(arguments, &tokenizer, options))
}

fn look_at_text(arguments: &Arguments, tokenizer: &Arc<Tokenizer>, options: TextOptions) -> Result<(), Failure> {
    let title = options.path.display().to_string();
    let texts = Texts::open(TextOptions { strictness: Strictness::Inspect, ..options }, Arc::clone(tokenizer), None)?;
    let report = texts::inspect(&texts, if arguments.html.is_some() { arguments.shown } else { 0 });
    let lost =
        texts.counts().iter().filter(|(kind, _)| kind.severity() == Severity::Lost).map(|(_, count)| count).sum();
    let (page, json, print) = (html::page_of_texts, serde_json::to_string_pretty, print_texts);
    Told { title: &title, report: &report, page, json, print, usable: texts.rows(), noun: "rows", lost }.tell(arguments)
}

/// What is known of a dataset, and how it is told.
struct Told<'t, R> {
    title: &'t str,
    /// What is used of it, in the plural.
    noun: &'static str,
    report: &'t R,
    page: fn(&str, &R) -> String,
    json: fn(&R) -> serde_json::Result<String>,
    print: fn(&R, usize),
    /// Pictures or rows that can be used.
    usable: usize,
    /// Findings that cost some of them.
    lost: usize,
}

impl<R> Told<'_, R> {
    /// As a page, as JSON or in words, as the arguments ask.
    fn tell(&self, arguments: &Arguments) -> Result<(), Failure> {
        let Self { title, noun, report, page, json, print, usable, lost } = *self;
        if let Some(path) = &arguments.html {
            let page = page(title, report);
            lora_io::atomic::write(path, |file| std::io::Write::write_all(file, page.as_bytes()))?;
            eprintln!("page: {}", path.display());
        }
        if arguments.json {
            let json = json(report).map_err(|error| Failure::Work(error.to_string()))?;
            println!("{json}");
        } else {
            println!("{title}");
            print(report, arguments.findings);
        }
        match (usable, arguments.strict && lost > 0) {
            (0, _) => Err(Failure::Work(format!("{title}: there are no {noun} that can be used"))),
            (_, true) => Err(Failure::Work(format!("{lost} file(s), folder(s) or record(s) cannot be used"))),
            _ => Ok(()),
        }
    }
}

fn print_texts(report: &TextReport, most: usize) {
    println!("{report}");
    print_findings(&report.findings, &report.summary.findings, most);
}

fn print_pictures(report: &DatasetReport, most: usize) {
    let regularisation = match report.regularisation_visits {
        0 => String::new(),
        visits => format!(", {visits} of them of regularisation pictures"),
    };
    println!("pictures:  {}, {} visits an epoch{regularisation}", report.pictures.len(), report.visits);
    let captions = &report.captions;
    let sources: Vec<_> = captions.sources.iter().map(|(source, count)| format!("{count} from {source}")).collect();
    println!("captions:  {}; {} different, {} empty", sources.join(", "), captions.different, captions.empty);
    let mut pixels: Vec<f64> = report.pictures.iter().map(|own| (own.size.0 * own.size.1) as f64 / 1e6).collect();
    pixels.sort_by(f64::total_cmp);
    if let (Some(least), Some(most)) = (pixels.first(), pixels.last()) {
        println!("sizes:     {least:.2} to {most:.2} megapixels, the middle one {:.2}", pixels[pixels.len() / 2]);
    }
    let trimmed = report.pictures.iter().map(|own| own.trimmed).sum::<f64>() / report.pictures.len().max(1) as f64;
    println!("cropping:  {:.1}% of the pixels are cut away", 100.0 * trimmed);
    println!("buckets:   {} batches an epoch", report.batches);
    let largest = report.buckets.values().max().copied().unwrap_or(1).max(1);
    for (bucket, visits) in &report.buckets {
        println!("  {bucket:<12} {visits:>7} {}", "█".repeat((30 * visits).div_ceil(largest)));
    }
    let tags: Vec<_> = report.tags.iter().take(15).map(|(tag, count)| format!("{tag} {count}")).collect();
    if !tags.is_empty() {
        println!("tags:      {}", tags.join(" · "));
    }
    print_findings(&report.findings, &report.counts(), most);
}

/// Findings by kind, the first ones of each in full.
fn print_findings(findings: &[Finding], counts: &BTreeMap<FindingKind, usize>, most: usize) {
    if findings.is_empty() {
        println!("nothing is the matter");
    }
    for (kind, count) in counts {
        println!("{} ({}): {count}. Remedy: {}", kind.name(), kind.severity().name(), kind.remedy());
        for finding in findings.iter().filter(|finding| finding.kind == *kind).take(most) {
            println!("  {}: {}", finding.path.display(), finding.detail);
        }
        if *count > most {
            println!("  and {} more (--findings N, --json or --html shows them)", count - most);
        }
    }
}
