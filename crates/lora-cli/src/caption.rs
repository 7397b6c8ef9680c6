//! `lora caption`: captions by machine for the pictures of a folder.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use lora_caption::{Captioner, Device, Existing, FolderOptions, Output, RatingPlace, Report, Settings, caption_folder};
use lora_cli::interrupt;
use lora_cli::progress::{advance, new_bar, put};
use lora_data::dataset::{ScanOptions, TextEncoding};
use lora_data::report::html;

use crate::Failure;

/// The most failures of one kind that are listed.
const LISTED: usize = 20;
/// The most tags of the table.
const TAGS: usize = 100;

/// What becomes of captions on the command line.
#[derive(Clone, Copy, ValueEnum)]
enum OnExisting {
    Skip,
    Append,
    Prepend,
    Overwrite,
}

/// Where captions go on the command line.
#[derive(Clone, Copy, ValueEnum)]
enum Form {
    Txt,
    Csv,
    Jsonl,
}

/// Devices on the command line.
#[derive(Clone, Copy, ValueEnum)]
enum On {
    Auto,
    Cpu,
    Cuda,
}

/// Places of the rating on the command line.
#[derive(Clone, Copy, ValueEnum)]
enum Rating {
    None,
    First,
    Last,
}

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Folder of pictures.
    folder: PathBuf,

    /// Tagger: a folder with model.onnx and selected_tags.csv, the .onnx file, or a metadata.jsonl that a tagger filled before.
    #[arg(long, value_name = "PATH", required_unless_present = "server", help_heading = "Tagger")]
    tagger: Option<PathBuf>,
    /// Where the tagger computes.
    #[arg(long, value_enum, default_value = "auto", help_heading = "Tagger")]
    device: On,
    /// General tags from this probability on.
    #[arg(long, default_value_t = Settings::default().threshold, help_heading = "Tagger")]
    threshold: f32,
    /// Characters from this probability on.
    #[arg(long, default_value_t = Settings::default().character_threshold, help_heading = "Tagger")]
    character_threshold: f32,
    /// The most tags of a caption.
    #[arg(long, help_heading = "Tagger")]
    max_tags: Option<usize>,
    /// Leave underscores as they are; otherwise they become spaces but in emoticons.
    #[arg(long, help_heading = "Tagger")]
    keep_underscores: bool,
    /// Tags to leave out, separated by commas.
    #[arg(long, value_name = "TAGS", value_delimiter = ',', help_heading = "Tagger")]
    exclude: Vec<String>,
    /// Call a tag otherwise; may be given several times.
    #[arg(long, value_name = "TAG=NAME", value_parser = replacement, help_heading = "Tagger")]
    replace: Vec<(String, String)>,
    /// Tags that stand first where a picture has them, separated by commas.
    #[arg(long, value_name = "TAGS", value_delimiter = ',', help_heading = "Tagger")]
    always_first: Vec<String>,
    /// Characters before other tags; otherwise the more probable tag stands first.
    #[arg(long, help_heading = "Tagger")]
    characters_first: bool,
    /// Where the most probable rating stands.
    #[arg(long, value_enum, default_value = "none", help_heading = "Tagger")]
    rating: Rating,
    /// Write brackets as \( and \), as some programs have them in prompts.
    #[arg(long, help_heading = "Tagger")]
    escape_brackets: bool,

    /// Address of an OpenAI-compatible server (Ollama, LM Studio, llama.cpp, vLLM), for instance http://localhost:11434.
    #[arg(long, value_name = "URL", requires = "model", help_heading = "Server")]
    server: Option<String>,
    /// Name of its model.
    #[arg(long, requires = "server", help_heading = "Server")]
    model: Option<String>,
    /// What to ask; {tags} is what the tagger says, {name} the file's name, {folder} its folder's.
    #[arg(long, requires = "server", help_heading = "Server")]
    prompt: Option<String>,
    /// Environment variable with the server's key; LORA_API_KEY without it.
    #[arg(long, value_name = "NAME", requires = "server", help_heading = "Server")]
    api_key_env: Option<String>,
    /// The longer side of the JPEG that is sent, at most.
    #[arg(long, value_name = "PIXELS", default_value_t = Settings::default().max_side, help_heading = "Server")]
    max_side: usize,
    /// The most tokens of an answer, thoughts included.
    #[arg(long, default_value_t = Settings::default().max_tokens, help_heading = "Server")]
    max_tokens: usize,
    /// Temperature; without it the server's own.
    #[arg(long, help_heading = "Server")]
    temperature: Option<f64>,
    /// Requests at once.
    #[arg(long, default_value_t = Settings::default().requests, help_heading = "Server")]
    requests: usize,
    /// How often a request is sent again where the server is busy or fails.
    #[arg(long, default_value_t = Settings::default().retries, help_heading = "Server")]
    retries: usize,
    /// How long an answer may take.
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().timeout, help_heading = "Server")]
    timeout: u64,

    /// What becomes of captions that are there.
    #[arg(long, value_enum, default_value = "skip", help_heading = "Captions")]
    existing: OnExisting,
    /// Stands before every caption, as a trigger word does.
    #[arg(long, default_value = "", hide_default_value = true, help_heading = "Captions")]
    prefix: String,
    /// Stands behind every caption.
    #[arg(long, default_value = "", hide_default_value = true, help_heading = "Captions")]
    suffix: String,
    /// Between tags, and between a caption and what is put before or behind it.
    #[arg(long, default_value_t = Settings::default().separator, help_heading = "Captions")]
    separator: String,
    /// Text files beside the pictures, metadata.csv, or metadata.jsonl with the tagger's probabilities.
    #[arg(long, value_enum, default_value = "txt", help_heading = "Captions")]
    output: Form,
    /// Extension of caption files.
    #[arg(long, help_heading = "Captions")]
    extension: Option<String>,
    /// Encoding of captions that are there and are not UTF-8, for instance windows-1252.
    #[arg(long, value_name = "ENCODING", value_parser = encoding, help_heading = "Captions")]
    encoding: Option<TextEncoding>,
    /// Read folders below, too.
    #[arg(long, help_heading = "Captions")]
    recursive: bool,
    /// Print captions and write nothing.
    #[arg(long, help_heading = "Captions")]
    dry_run: bool,

    /// Print how many captions have each tag.
    #[arg(long)]
    frequencies: bool,
    /// Write the pictures with their captions as one page.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// The most pictures on that page.
    #[arg(long, default_value_t = 200)]
    shown: usize,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

fn replacement(text: &str) -> Result<(String, String), String> {
    let (from, to) = text.split_once('=').ok_or("expected TAG=NAME, for instance 1girl=woman")?;
    Ok((from.to_owned(), to.to_owned()))
}

fn encoding(name: &str) -> Result<TextEncoding, String> {
    TextEncoding::named(name).ok_or_else(|| "no encoding is called so".to_owned())
}

impl Arguments {
    fn settings(&self) -> Settings {
        Settings {
            tagger: self.tagger.clone(),
            device: match self.device {
                On::Auto => Device::Auto,
                On::Cpu => Device::Cpu,
                On::Cuda => Device::Cuda,
            },
            threshold: self.threshold,
            character_threshold: self.character_threshold,
            max_tags: self.max_tags,
            keep_underscores: self.keep_underscores,
            exclude: self.exclude.clone(),
            replace: self.replace.iter().cloned().collect::<BTreeMap<_, _>>(),
            always_first: self.always_first.clone(),
            characters_first: self.characters_first,
            rating: match self.rating {
                Rating::None => RatingPlace::None,
                Rating::First => RatingPlace::First,
                Rating::Last => RatingPlace::Last,
            },
            escape_brackets: self.escape_brackets,
            server: self.server.clone(),
            model: self.model.clone(),
            prompt: self.prompt.clone(),
            api_key_env: self.api_key_env.clone(),
            max_side: self.max_side,
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            requests: self.requests,
            retries: self.retries,
            timeout: self.timeout,
            prefix: self.prefix.clone(),
            suffix: self.suffix.clone(),
            separator: self.separator.clone(),
        }
    }

    fn folder_options(&self) -> FolderOptions {
        FolderOptions {
            folder: self.folder.clone(),
            scan: ScanOptions {
                recursive: self.recursive,
                caption_extension: self.extension.clone(),
                caption_encoding: self.encoding,
                ..ScanOptions::default()
            },
            existing: match self.existing {
                OnExisting::Skip => Existing::Skip,
                OnExisting::Append => Existing::Append,
                OnExisting::Prepend => Existing::Prepend,
                OnExisting::Overwrite => Existing::Overwrite,
            },
            output: match self.output {
                Form::Txt => Output::Files,
                Form::Csv => Output::Csv,
                Form::Jsonl => Output::Jsonl,
            },
            dry_run: self.dry_run,
            cards: if self.html.is_some() { self.shown } else { 0 },
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let captioner = Captioner::open(arguments.settings())?;
    if let Some(tagger) = captioner.tagger() {
        let place = if tagger.on_gpu() { "the GPU" } else { "the CPU" };
        eprintln!("tagger: {}, {} tags, on {place}", tagger.path().display(), tagger.tags().0.len());
    }
    let stop = interrupt::flag(
        "stopping after the pictures that are being looked at; captions are kept (once more to end at once)",
    );
    let mut bar = CaptionBar::default();
    let report = caption_folder(&Arc::new(captioner), &arguments.folder_options(), &stop, &mut |own| {
        bar.show(own.done, own.of, own.caption.is_err());
    });
    drop(bar);
    let report = report?;
    if let Some(path) = &arguments.html {
        let page = html::contact_sheet(&arguments.folder.display().to_string(), &summary(&report), &report.cards);
        lora_io::atomic::write(path, |file| file.write_all(page.as_bytes()))?;
        eprintln!("page: {}", path.display());
    }
    if arguments.json {
        println!("{:#}", serde_json::to_value(&report).map_err(|error| Failure::Work(error.to_string()))?);
    } else {
        print(arguments, &report);
    }
    match report.failed.len() {
        0 => Ok(()),
        count => {
            let kinds: Vec<_> = report.counts().into_iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            Err(Failure::Work(format!(
                "{count} of {} pictures have got no caption: {}",
                report.pictures,
                kinds.join(", ")
            )))
        }
    }
}

fn summary(report: &Report) -> String {
    let Report { pictures, kept, captioned, failed, stopped, .. } = report;
    let stopped = if *stopped { "; stopped early, run again to go on" } else { "" };
    format!(
        "{pictures} pictures: {} got a caption, {kept} had one, {} got none{stopped}",
        captioned.len(),
        failed.len()
    )
}

fn print(arguments: &Arguments, report: &Report) {
    if arguments.dry_run {
        for own in &report.captioned {
            println!("{}: {}", own.path.display(), own.caption.replace('\n', " | "));
        }
    }
    if arguments.frequencies {
        for (tag, count) in report.ranked_tags().into_iter().take(TAGS) {
            println!("{count:>7} {tag}");
        }
    }
    for kind in report.counts().into_keys() {
        let own: Vec<_> = report.failed.iter().filter(|failure| failure.problem.name() == kind).collect();
        println!("{kind}: {}", own.len());
        own.iter().take(LISTED).for_each(|failure| println!("  {}: {}", failure.path.display(), failure.problem));
        if own.len() > LISTED {
            println!("  and {} more (--json lists all)", own.len() - LISTED);
        }
    }
    report.notes.iter().for_each(|note| println!("note: {note}"));
    println!("{}", summary(report));
    if arguments.dry_run {
        println!("nothing was written (--dry-run)");
    }
}

/// The bar of captions: how many have failed, pictures a second, time left.
struct CaptionBar {
    terminal: bool,
    start: Instant,
    printed: Instant,
    failed: usize,
}

impl Default for CaptionBar {
    fn default() -> Self {
        let now = Instant::now();
        Self { terminal: io::stderr().is_terminal(), start: now, printed: now, failed: 0 }
    }
}

impl CaptionBar {
    /// One more picture is done.
    fn show(&mut self, done: usize, of: usize, failed: bool) {
        self.failed += usize::from(failed);
        let elapsed = self.start.elapsed().as_secs_f64();
        let failures = if self.failed > 0 { format!(" {} without", self.failed) } else { String::new() };
        let message = format!("{:.2} img/s{failures}", done as f64 / elapsed.max(1e-3));
        if self.terminal {
            if done == 1 {
                put(Some(new_bar(of)));
            }
            advance(done, message);
        } else if done == of || self.printed.elapsed() > Duration::from_secs(10) {
            self.printed = Instant::now();
            let left = elapsed / done as f64 * (of - done) as f64;
            eprintln!("caption {done}/{of} {message}, {left:.0} s left");
        }
    }
}

impl Drop for CaptionBar {
    fn drop(&mut self) {
        put(None);
    }
}
