//! The configuration of a run: flat keys in TOML or YAML, checked in full before any model is loaded. The table of keys
//! is in [`keys`]; nothing here touches files other than the configuration itself.

mod datasets;
pub mod keys;
mod optimizer;
mod read;
mod sd_scripts;
mod steps;

pub use read::{ConfigError, Format, Problem};
pub use steps::{RunLength, StepPlan};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_core::DType;
use lora_core::target::Targets;
use lora_data::DatasetOptions;
use lora_data::tokenizer::TextCleaning;
use lora_models::diffusion::SamplerKind;
use lora_torch::frozen::Storage;

use crate::optimiser::{Arguments, OptimiserRegistry};
use read::Reader;

/// How the learning rate goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LrScheduler {
    /// Stays.
    Constant,
    /// Falls linearly to 0.
    Linear,
    /// Falls along half a cosine to 0.
    Cosine,
}

/// A warm-up in steps or as a share of the run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// Steps.
    Steps(usize),
    /// Share of all steps, below 1.
    Share(f64),
}

/// Samples drawn along the way.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleConfig {
    /// Prompts.
    pub prompts: Vec<String>,
    /// Negative prompt.
    pub negative_prompt: String,
    /// Also during training, every so many steps.
    pub every_n_steps: Option<usize>,
    /// Sampler steps.
    pub steps: usize,
    /// Classifier-free guidance.
    pub guidance_scale: f64,
    /// Sampler.
    pub sampler: SamplerKind,
    /// Seed of the starting noise.
    pub seed: u64,
    /// Width and height.
    pub resolution: (usize, usize),
}

/// What a run trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainMode {
    /// An adapter on the frozen base.
    #[default]
    Adapter,
    /// All weights of the networks; the result is a whole checkpoint.
    Full,
}

/// Keys that say something of an adapter only.
const ADAPTER_KEYS: [&str; 13] = [
    "lora_rank",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
    "rank_dropout",
    "module_dropout",
    "variant",
    "variant_options",
    "target_modules",
    "init_from",
    "loraplus_lr_ratio",
];

/// Whether to go on from the state of an earlier run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Resume {
    /// Begin anew.
    #[default]
    No,
    /// Go on where there is a state, begin anew where there is none.
    Auto,
    /// Go on; without a state it is an error.
    Yes,
    /// Go on from this file, or from the state in this folder.
    From(PathBuf),
}

/// A checked configuration; the fields are the keys of `docs/config.md`, defaults filled in.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "each field is the key of its name in the table of keys")]
#[non_exhaustive]
pub struct TrainConfig {
    pub base_model: PathBuf,
    /// `train_data_dir`, `reg_data_dir`, `datasets` or `dataset_config`, with the keys of pictures and captions.
    pub datasets: Vec<DatasetOptions>,
    pub output_dir: PathBuf,
    pub output_name: String,
    pub init_from: Option<PathBuf>,
    pub strict: bool,
    pub train: TrainMode,
    pub ema_decay: f64,
    pub lora_rank: usize,
    pub lora_alpha: f64,
    pub use_rslora: bool,
    pub lora_dropout: f64,
    pub rank_dropout: f64,
    pub module_dropout: f64,
    pub variant: String,
    pub variant_options: BTreeMap<String, f64>,
    pub rank_pattern: BTreeMap<String, f64>,
    pub alpha_pattern: BTreeMap<String, f64>,
    pub loraplus_lr_ratio: f64,
    pub target_modules: Vec<String>,
    pub train_unet: bool,
    pub train_text_encoder: bool,
    pub save_precision: DType,
    pub learning_rate: f64,
    pub unet_lr: f64,
    pub text_encoder_lr: f64,
    /// As it is written: whether there is such an optimiser is known to [`crate::Plugins`].
    pub optimizer: String,
    /// `optimizer_args`, with `adam_betas`, `adam_eps` and `weight_decay` under their names there.
    pub optimizer_args: Arguments,
    pub lr_scheduler: LrScheduler,
    pub lr_warmup: Warmup,
    pub max_grad_norm: f64,
    pub batch_size: usize,
    pub gradient_accumulation_steps: usize,
    pub length: RunLength,
    pub seed: u64,
    pub max_resolution: (usize, usize),
    pub clip_skip: usize,
    pub max_token_length: usize,
    pub text_cleaning: TextCleaning,
    pub weighted_captions: bool,
    pub prior_loss_weight: f64,
    pub masked_loss: bool,
    pub noise_offset: f64,
    pub min_snr_gamma: Option<f64>,
    pub precision: DType,
    pub device: String,
    /// `base_storage`; `None` where weights are stored as they compute.
    pub base_storage: Option<Storage>,
    pub offload_base: bool,
    pub gradient_checkpointing: bool,
    pub cpu_offload_checkpointing: bool,
    /// Compute the inner part of the U-Net's feed-forwards again.
    pub recompute_feed_forward: bool,
    /// On a GPU: launch the kernels of a step together.
    pub cuda_graphs: bool,
    pub cache_latents: bool,
    /// The autoencoder works on tiles of pictures.
    pub vae_tiling: bool,
    /// `vram_budget` in bytes.
    pub vram_budget: Option<u64>,
    pub auto: bool,
    pub allow_lower_resolution: bool,
    pub cache_dir: Option<PathBuf>,
    pub save_every_n_steps: Option<usize>,
    pub save_every_n_epochs: Option<usize>,
    pub validation_data_dir: Option<PathBuf>,
    pub validate_every_n_steps: Option<usize>,
    pub save_state: bool,
    pub save_state_every_n_steps: Option<usize>,
    pub resume: Resume,
    pub samples: SampleConfig,
    pub callbacks: Vec<String>,
}

impl TrainConfig {
    /// Reads a `.toml`, `.yaml`, `.yml` or `.json` file; `overrides` are `key=value` and win over it.
    pub fn from_file<S: AsRef<str>>(path: impl AsRef<Path>, overrides: &[S]) -> Result<Self, ConfigError> {
        let mut reader = Self::reader_of(path.as_ref())?;
        overrides.iter().for_each(|assignment| reader.set(assignment.as_ref()));
        let config = Self::read(&mut reader);
        reader.finish(config)
    }

    /// From text.
    pub fn from_text<S: AsRef<str>>(text: &str, format: Format, overrides: &[S]) -> Result<Self, ConfigError> {
        Self::parse(text, format, overrides)
    }

    /// Only what a file says of datasets, for a look at them before there is a base model. `folder` takes the place of the
    /// file's own.
    pub fn datasets_of<S: AsRef<str>>(
        path: Option<&Path>,
        folder: Option<&Path>,
        overrides: &[S],
    ) -> Result<(Vec<DatasetOptions>, usize), ConfigError> {
        let mut reader = match path {
            Some(path) => Self::reader_of(path)?,
            None => Reader::parse(None, "", Format::Toml)?,
        };
        overrides.iter().for_each(|assignment| reader.set(assignment.as_ref()));
        if let Some(folder) = folder {
            reader.replace_folder(folder);
        }
        let datasets = datasets::read(&mut reader, true);
        let tokens = reader.count("max_token_length", 1).unwrap_or(75);
        reader.finish((datasets, tokens))
    }

    fn reader_of(path: &Path) -> Result<Reader, ConfigError> {
        let problem = |message: String| ConfigError {
            path: Some(path.to_owned()),
            problems: vec![Problem { line: None, key: None, message }],
        };
        let format = match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => Format::Toml,
            Some("yaml" | "yml" | "json") => Format::Yaml,
            _ => return Err(problem("expected a name that ends in .toml, .yaml, .yml or .json".into())),
        };
        let bytes = std::fs::read(path).map_err(|error| problem(format!("cannot read: {error}")))?;
        let text = String::from_utf8(bytes).map_err(|error| problem(format!("not UTF-8: {error}")))?;
        Reader::parse(Some(path.to_owned()), &text, format)
    }

    fn parse<S: AsRef<str>>(text: &str, format: Format, overrides: &[S]) -> Result<Self, ConfigError> {
        let mut reader = Reader::parse(None, text, format)?;
        overrides.iter().for_each(|assignment| reader.set(assignment.as_ref()));
        let config = Self::read(&mut reader);
        reader.finish(config)
    }

    fn read(reader: &mut Reader) -> Self {
        const DTYPES: &[(&str, DType)] = &[
            ("fp32", DType::F32),
            ("fp16", DType::F16),
            ("bf16", DType::BF16),
            ("no", DType::F32),
            ("float", DType::F32),
        ];
        let not_negative = |value: f64| value >= 0.0;
        let positive = |value: f64| value > 0.0;

        let train =
            reader.choice("train", &[("lora", TrainMode::Adapter), ("full", TrainMode::Full)]).unwrap_or_default();
        if train == TrainMode::Full {
            for key in ADAPTER_KEYS.into_iter().chain(["base_storage", "offload_base"]) {
                if reader.has(key) {
                    reader.problem(Some(key), "means nothing with train = full; take it out, or train = lora");
                }
            }
        }
        let gradient_checkpointing = reader.boolean("gradient_checkpointing", false);
        let recompute_feed_forward = reader.boolean("recompute_feed_forward", false);
        let cuda_graphs = reader.boolean("cuda_graphs", true);
        let cpu_offload_checkpointing = reader.boolean("cpu_offload_checkpointing", false);
        if cpu_offload_checkpointing && !gradient_checkpointing {
            reader.problem(Some("cpu_offload_checkpointing"), "means nothing without gradient_checkpointing = true");
        }
        let lora_rank = reader.count("lora_rank", 1).unwrap_or(16);
        let (optimizer, optimizer_args) = optimizer::read(reader);
        let usual = OptimiserRegistry::default().usual_learning_rate(&optimizer);
        let learning_rate = reader.number("learning_rate", "a number above 0", positive).unwrap_or(usual);
        let max_resolution = reader.size("max_resolution").unwrap_or((512, 512));
        let datasets = datasets::read(reader, true);
        let seed = reader.count("seed", 0).unwrap_or(42) as u64;

        let length = match (reader.count("epochs", 1), reader.count("max_train_steps", 1)) {
            (Some(_), Some(_)) => {
                reader.problem(Some("max_train_steps"), "give epochs or max_train_steps, not both");
                RunLength::Epochs(1)
            }
            (None, Some(steps)) => RunLength::Steps(steps),
            (epochs, None) => RunLength::Epochs(epochs.unwrap_or(10)),
        };
        let (train_unet, train_text_encoder) =
            (reader.boolean("train_unet", true), reader.boolean("train_text_encoder", true));
        if !train_unet && !train_text_encoder {
            reader.problem(
                Some("train_text_encoder"),
                "train_unet and train_text_encoder are both off; there is nothing to train",
            );
        }
        let target_modules = reader.texts("target_modules").unwrap_or_else(|| vec!["attention-mlp".into()]);
        if let Err(error) = Targets::parse(&target_modules) {
            reader.problem(Some("target_modules"), error.to_string());
        }
        let lr_warmup = match reader.number("lr_warmup_steps", "a number of steps, or a share below 1", not_negative) {
            Some(share) if share > 0.0 && share < 1.0 => Warmup::Share(share),
            Some(steps) if steps.fract() != 0.0 => {
                reader.problem(
                    Some("lr_warmup_steps"),
                    format!("{steps} is neither a whole number of steps nor a share below 1"),
                );
                Warmup::Steps(0)
            }
            steps => Warmup::Steps(steps.unwrap_or(0.0) as usize),
        };
        let output_name = reader.text("output_name").unwrap_or_else(|| "lora".into());
        if output_name.is_empty() || output_name.contains(['/', '\\', ':', '>', '<']) || output_name.starts_with('.') {
            reader.problem(
                Some("output_name"),
                format!("`{output_name}` cannot name a file that prompts call (no / \\ : < >)"),
            );
        }
        let samples = SampleConfig {
            prompts: reader.texts("sample_prompts").unwrap_or_default(),
            negative_prompt: reader.text("sample_negative_prompt").unwrap_or_default(),
            every_n_steps: reader.count("sample_every_n_steps", 1),
            steps: reader.count("sample_steps", 1).unwrap_or(20),
            guidance_scale: reader
                .number("sample_guidance_scale", "a number from 1 on", |scale| scale >= 1.0)
                .unwrap_or(7.5),
            sampler: reader
                .choice("sample_sampler", &[("euler", SamplerKind::Euler), ("ddim", SamplerKind::Ddim)])
                .unwrap_or_default(),
            seed: reader.count("sample_seed", 0).map_or(seed, |seed| seed as u64),
            resolution: reader.size("sample_resolution").unwrap_or(max_resolution),
        };
        if samples.steps > 1000 {
            reader.problem(Some("sample_steps"), format!("expected 1 to 1000, found {}", samples.steps));
        }
        if samples.every_n_steps.is_some() && !reader.has("sample_prompts") {
            reader.problem(Some("sample_every_n_steps"), "there are no sample_prompts to draw");
        }
        let max_token_length = reader.count("max_token_length", 1).unwrap_or(75);
        if ![75, 150, 225].contains(&max_token_length) {
            reader.problem(Some("max_token_length"), format!("expected 75, 150 or 225, found {max_token_length}"));
        }
        let device = reader.text("device").unwrap_or_else(|| "auto".into());
        let number = device.strip_prefix("cuda:").map(|number| number.parse::<usize>().is_ok());
        if !matches!(device.as_str(), "auto" | "cpu" | "cuda") && number != Some(true) {
            reader.problem(Some("device"), format!("expected auto, cpu, cuda or cuda:N, found `{device}`"));
        }

        let save_state_every_n_steps = reader.count("save_state_every_n_steps", 1);
        let path = |reader: &mut Reader, key: &str| PathBuf::from(reader.required_text(key));
        let probability = |reader: &mut Reader, key: &str| {
            reader.number(key, "a number from 0 to below 1", |p| (0.0..1.0).contains(&p)).unwrap_or(0.0)
        };
        Self {
            base_model: path(reader, "base_model"),
            datasets,
            output_dir: path(reader, "output_dir"),
            output_name,
            init_from: reader.text("init_from").map(PathBuf::from),
            strict: reader.boolean("strict", false),
            train,
            ema_decay: probability(reader, "ema_decay"),
            lora_rank,
            lora_alpha: reader.number("lora_alpha", "a number above 0", positive).unwrap_or(lora_rank as f64),
            use_rslora: reader.boolean("use_rslora", false),
            lora_dropout: probability(reader, "lora_dropout"),
            rank_dropout: probability(reader, "rank_dropout"),
            module_dropout: probability(reader, "module_dropout"),
            variant: reader.text("variant").unwrap_or_else(|| "lora".into()),
            variant_options: reader.numbers("variant_options"),
            rank_pattern: reader.numbers("rank_pattern"),
            alpha_pattern: reader.numbers("alpha_pattern"),
            loraplus_lr_ratio: reader.number("loraplus_lr_ratio", "a number above 0", positive).unwrap_or(1.0),
            target_modules,
            train_unet,
            train_text_encoder,
            save_precision: reader.choice("save_precision", DTYPES).unwrap_or(DType::F16),
            learning_rate,
            unet_lr: reader.number("unet_lr", "a number from 0 on", not_negative).unwrap_or(learning_rate),
            text_encoder_lr: reader
                .number("text_encoder_lr", "a number from 0 on", not_negative)
                .unwrap_or(learning_rate / 2.0),
            optimizer,
            optimizer_args,
            lr_scheduler: reader
                .choice(
                    "lr_scheduler",
                    &[
                        ("constant", LrScheduler::Constant),
                        ("constant_with_warmup", LrScheduler::Constant),
                        ("linear", LrScheduler::Linear),
                        ("cosine", LrScheduler::Cosine),
                    ],
                )
                .unwrap_or(LrScheduler::Constant),
            lr_warmup,
            max_grad_norm: reader.number("max_grad_norm", "a number from 0 on", not_negative).unwrap_or(1.0),
            batch_size: reader.count("batch_size", 1).unwrap_or(1),
            gradient_accumulation_steps: reader.count("gradient_accumulation_steps", 1).unwrap_or(1),
            length,
            seed,
            max_resolution,
            clip_skip: reader.count("clip_skip", 1).unwrap_or(1),
            max_token_length,
            text_cleaning: reader
                .choice("text_cleaning", &[("ftfy", TextCleaning::Ftfy), ("none", TextCleaning::None)])
                .unwrap_or_default(),
            weighted_captions: reader.boolean("weighted_captions", false),
            prior_loss_weight: reader.number("prior_loss_weight", "a number from 0 on", not_negative).unwrap_or(1.0),
            masked_loss: reader.boolean("masked_loss", false),
            noise_offset: reader.number("noise_offset", "a number from 0 on", not_negative).unwrap_or(0.0),
            min_snr_gamma: reader.number("min_snr_gamma", "a number above 0", positive),
            precision: reader.choice("precision", DTYPES).unwrap_or(DType::F16),
            device,
            base_storage: reader
                .choice(
                    "base_storage",
                    &[
                        ("precision", None),
                        ("fp16", Some(Storage::Half)),
                        ("bf16", Some(Storage::BFloat16)),
                        ("fp8", Some(Storage::Float8)),
                        ("int8", Some(Storage::Int8)),
                        ("nf4", Some(Storage::Nf4)),
                    ],
                )
                .unwrap_or_default(),
            offload_base: reader.boolean("offload_base", false),
            gradient_checkpointing,
            cpu_offload_checkpointing,
            recompute_feed_forward,
            cuda_graphs,
            cache_latents: reader.boolean("cache_latents", true),
            vae_tiling: reader.boolean("vae_tiling", false),
            vram_budget: reader.bytes("vram_budget"),
            auto: reader.boolean("auto", false),
            allow_lower_resolution: reader.boolean("allow_lower_resolution", false),
            cache_dir: reader.text("cache_dir").map(PathBuf::from),
            save_every_n_steps: reader.count("save_every_n_steps", 1),
            save_every_n_epochs: reader.count("save_every_n_epochs", 1),
            validation_data_dir: reader.text("validation_data_dir").map(PathBuf::from),
            validate_every_n_steps: reader.count("validate_every_n_steps", 1),
            save_state: reader.boolean("save_state", save_state_every_n_steps.is_some()),
            save_state_every_n_steps,
            resume: match reader.word("resume").as_deref() {
                None | Some("false") => Resume::No,
                Some("true") => Resume::Yes,
                Some("auto") => Resume::Auto,
                Some("") => {
                    reader.problem(Some("resume"), "expected true, false, auto or a path");
                    Resume::No
                }
                Some(path) => Resume::From(path.into()),
            },
            samples,
            callbacks: if reader.has("callbacks") { reader.texts("callbacks").unwrap_or_default() } else { Vec::new() },
        }
    }

    /// Rows of 77 tokens that a caption takes.
    pub fn caption_chunks(&self) -> usize {
        self.max_token_length / 75
    }
}
