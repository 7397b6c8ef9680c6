//! `lora generate` and `lora evaluate`: what a language model answers, and how it judges texts.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lora_cli::Failure;
use lora_cli::arguments::Precision;
use lora_core::DType;
use lora_torch::frozen::Storage;
use lora_train::Plugins;
use lora_train::inference::{EvaluationOptions, Sampling, TextModel, TextModelOptions};

use crate::failure::failure;

/// The model on the command line.
#[derive(clap::Args)]
struct Model {
    /// Base model: a folder in the layout of Hugging Face, or a GGUF file.
    #[arg(long, value_parser = lora_cli::arguments::base())]
    base: PathBuf,
    /// Adapter and how strongly it is applied (1 without), `voice:0.8`; several are added.
    #[arg(long = "lora", value_name = "FILE[:STRENGTH]")]
    loras: Vec<String>,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// What it computes in: fp32 on the CPU and bf16 on a GPU without.
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// How the base's weights are held: int8, nf4, fp8, fp16 or bf16; as they compute without.
    #[arg(long, value_parser = storage)]
    base_storage: Option<Storage>,
    /// A chat template's file or name, over the base's own.
    #[arg(long)]
    chat_template: Option<String>,
    /// What the system says first.
    #[arg(long)]
    system: Option<String>,
}

#[derive(clap::Args)]
pub(crate) struct GenerateArguments {
    #[command(flatten)]
    model: Model,
    /// A text to be continued.
    #[arg(long, required_unless_present = "chat", conflicts_with = "chat")]
    prompt: Option<String>,
    /// What a user says, or a conversation as a JSON list of messages; laid out by the chat template.
    #[arg(long)]
    chat: Option<String>,
    /// Tokens at most.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// 0 takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Draw from the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(clap::Args)]
pub(crate) struct EvaluateArguments {
    #[command(flatten)]
    model: Model,
    /// Texts: .jsonl, .json, .parquet, .txt or a folder of such. A .txt file is cut into windows side by side.
    #[arg(long)]
    data: PathBuf,
    /// Tokens of a window or a record at most.
    #[arg(long, default_value_t = 2048)]
    max_seq_length: usize,
    /// Windows or records at most.
    #[arg(long)]
    limit: Option<usize>,
    /// Judge what is given, too, not only the answers.
    #[arg(long)]
    train_on_inputs: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

fn storage(text: &str) -> Result<Storage, String> {
    let known = [Storage::Half, Storage::BFloat16, Storage::Float8, Storage::Int8, Storage::Nf4];
    known
        .into_iter()
        .find(|storage| storage.to_string() == text)
        .ok_or_else(|| format!("expected {}", known.map(|storage| storage.to_string()).join(", ")))
}

/// A file and its strength, `file:0.8`. A colon that no number follows is part of the name.
fn weighted(text: &str) -> (PathBuf, f64) {
    let split = text.rsplit_once(':').and_then(|(path, strength)| Some((path, strength.parse().ok()?)));
    match split {
        Some((path, strength)) if !Path::new(text).exists() => (path.into(), strength),
        _ => (text.into(), 1.0),
    }
}

impl Model {
    fn open(&self) -> Result<TextModel, Failure> {
        let mut options = TextModelOptions::new(&self.base);
        options.adapters = self.loras.iter().map(|text| weighted(text)).collect();
        if let Some((_, strength)) = options.adapters.iter().find(|(_, strength)| !strength.is_finite()) {
            return Err(Failure::Usage(format!("--lora: {strength} is no strength; expected a number, such as 0.8")));
        }
        options.device.clone_from(&self.device);
        let on_gpu = lora_torch::device::resolve(&self.device).map_err(failure)?.is_cuda();
        options.precision = match self.precision {
            Some(precision) => precision.into(),
            None if on_gpu => DType::BF16,
            None => DType::F32,
        };
        options.base_storage = self.base_storage;
        options.chat_template.clone_from(&self.chat_template);
        options.system_prompt.clone_from(&self.system);
        TextModel::open(&options, &Plugins::default()).map_err(failure)
    }
}

pub(crate) fn generate(arguments: &GenerateArguments) -> Result<(), Failure> {
    let GenerateArguments { max_new_tokens, temperature, top_p, seed, .. } = arguments;
    if !(*temperature >= 0.0 && temperature.is_finite() && *top_p > 0.0 && *top_p <= 1.0) {
        return Err(Failure::Usage("--temperature is 0 or more, --top-p above 0 and at most 1".into()));
    }
    let model = arguments.model.open()?;
    let tokens = match (&arguments.chat, &arguments.prompt) {
        (Some(chat), _) => model.writer().tokens(chat).map_err(failure)?,
        (None, prompt) => model.writer().plain(prompt.as_deref().unwrap_or_default()).map_err(failure)?,
    };
    let sampling =
        Sampling { temperature: *temperature, top_p: *top_p, seed: *seed, tokens: *max_new_tokens, stop: Vec::new() };
    let mut out = std::io::stdout().lock();
    let (start, mut closed) = (Instant::now(), false);
    let mut told = String::new();
    let answer = model
        .generate(&tokens, &sampling, &mut |piece| {
            told.push_str(piece);
            closed |= out.write_all(piece.as_bytes()).and_then(|()| out.flush()).is_err();
        })
        .map_err(failure)?;
    // What was never a whole character is shown as it is.
    let rest = answer.strip_prefix(&told).unwrap_or_default();
    if !closed {
        let _ = writeln!(out, "{rest}");
    }
    let seconds = start.elapsed().as_secs_f64();
    if std::io::stderr().is_terminal() {
        eprintln!("{} tokens of prompt, {seconds:.1} s", tokens.len());
    }
    Ok(())
}

pub(crate) fn evaluate(arguments: &EvaluateArguments) -> Result<(), Failure> {
    if arguments.max_seq_length < 2 {
        return Err(Failure::Usage("--max-seq-length is 2 or more: a row's first token is not predicted".into()));
    }
    let model = arguments.model.open()?;
    let mut options = EvaluationOptions::new(&arguments.data);
    options.max_seq_length = arguments.max_seq_length;
    options.limit = arguments.limit;
    options.train_on_inputs = arguments.train_on_inputs;
    options.chat_template.clone_from(&arguments.model.chat_template);
    options.system_prompt.clone_from(&arguments.model.system);
    let mut last = Instant::now();
    let evaluation = model
        .evaluate(&options, &mut |done, of| {
            if last.elapsed() > Duration::from_secs(2) {
                last = Instant::now();
                eprint!("judged {done}/{of}{}", if std::io::stderr().is_terminal() { '\r' } else { '\n' });
            }
        })
        .map_err(failure)?;
    if arguments.json {
        let json = serde_json::to_string_pretty(&evaluation).map_err(|error| Failure::Work(error.to_string()))?;
        println!("{json}");
    } else {
        println!("{evaluation}");
    }
    Ok(())
}
