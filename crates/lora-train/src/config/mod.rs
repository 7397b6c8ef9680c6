//! The configuration of a run: flat keys in TOML or YAML, checked in full before any model is loaded. What each key
//! means and where it goes is in [`keys`]; nothing here touches files other than the configuration itself.

mod datasets;
mod extra;
mod given;
pub mod keys;
mod read;
mod sliders;
mod steps;
mod text;

pub use read::{ConfigError, Format, Problem};
pub use steps::{RunLength, StepPlan};

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use lora_core::DType;
use lora_data::sliders::Slider;
use lora_data::source::HeldOut;
use lora_data::texts::TextOptions;
use lora_data::tokenizer::TextCleaning;
use lora_data::{DatasetOptions, PromptLine};
use lora_models::diffusion::SamplerKind;
use lora_torch::frozen::Storage;

use crate::inference::AppliedAdapter;
use crate::optimiser::Arguments;
use crate::{Error, Plugins};
use keys::{Extra, Group, Keys};
use read::Reader;

/// How the learning rate goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LrScheduler {
    /// Stays.
    #[default]
    Constant,
    /// Falls linearly to 0.
    Linear,
    /// Falls along half a cosine to 0.
    Cosine,
    /// Falls along half a cosine `lr_scheduler_num_cycles` times, each from the top.
    CosineWithRestarts,
    /// Falls by the power `lr_scheduler_power` of what is left of the run.
    Polynomial,
    /// Falls slowly at first and fast at the end: (1 − p) / (1 − p/2) of the part p of the run (arXiv 2107.04197).
    Rex,
    /// Falls by the square root of the steps, whatever the length of the run.
    InverseSqrt,
}

/// A warm-up in steps or as a share of the run; none by default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// Steps.
    Steps(usize),
    /// Share of all steps, below 1.
    Share(f64),
}

impl Default for Warmup {
    fn default() -> Self {
        Warmup::Steps(0)
    }
}

/// Samples drawn along the way.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct SampleConfig {
    /// Prompts.
    pub prompts: Vec<String>,
    /// Negative prompt.
    pub negative_prompt: String,
    /// Also during training, every so many steps.
    pub every_n_steps: Option<usize>,
    /// Sampler steps.
    pub steps: usize,
    /// Classifier-free guidance; as usual for the base without.
    pub guidance_scale: Option<f64>,
    /// Sampler.
    pub sampler: SamplerKind,
    /// Seed of the starting noise.
    pub seed: u64,
    /// Width and height.
    pub resolution: (usize, usize),
}

impl SampleConfig {
    /// How one prompt is drawn: as it says itself, else as all are.
    ///
    /// # Errors
    /// [`Error::NoSampler`] where it names a sampler that there is not.
    pub(crate) fn for_prompt(&self, line: &PromptLine) -> Result<Self, Error> {
        let sampler = line.sampler.as_deref().map(sampler_named).transpose()?;
        let (width, height) = self.resolution;
        Ok(Self {
            negative_prompt: line.negative.clone().unwrap_or_else(|| self.negative_prompt.clone()),
            steps: line.steps.unwrap_or(self.steps),
            guidance_scale: line.guidance.or(self.guidance_scale),
            sampler: sampler.unwrap_or(self.sampler),
            seed: line.seed.unwrap_or(self.seed),
            resolution: (line.width.unwrap_or(width), line.height.unwrap_or(height)),
            ..self.clone()
        })
    }

    /// The pixels of a prompt's picture.
    pub(crate) fn area(&self, prompt: &str) -> usize {
        let line = PromptLine::parse(prompt);
        line.width.unwrap_or(self.resolution.0) * line.height.unwrap_or(self.resolution.1)
    }
}

/// The sampler of a name.
///
/// # Errors
/// [`Error::NoSampler`] with the names that there are.
pub(crate) fn sampler_named(name: &str) -> Result<SamplerKind, Error> {
    SamplerKind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| Error::NoSampler {
        name: name.to_owned(),
        known: SamplerKind::ALL.map(SamplerKind::name).join(", "),
    })
}

/// What a run trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum TrainMode {
    /// An adapter on the frozen base.
    #[default]
    Adapter,
    /// All weights of the networks; the result is a whole checkpoint.
    Full,
}

/// Whether to go on from the state of an earlier run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
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

/// The keys that a configuration was read by, and the names of those that it gives, in tables of datasets too.
#[derive(Clone)]
struct ReadBy {
    keys: Keys,
    given: Vec<&'static str>,
    /// The file, and the lines of its keys.
    path: Option<PathBuf>,
    lines: BTreeMap<String, usize>,
}

impl fmt::Debug for ReadBy {
    // What a configuration says is in its fields.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadBy").finish_non_exhaustive()
    }
}

/// What a run is logged for, beside `metrics.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Tracker {
    /// TensorBoard.
    TensorBoard,
    /// A table in `metrics.csv`.
    Csv,
}

/// Declares [`TrainConfig`] together with the blank one that keys are read into, so that a field stands once.
macro_rules! fields {
    ($($(#[$attribute:meta])* $field:ident: $type:ty,)*) => {
        /// A checked configuration; the fields are the keys of `docs/config.md`, defaults filled in.
        #[derive(Debug, Clone)]
        #[allow(missing_docs, reason = "each field is the key of its name in the table of keys")]
        #[non_exhaustive]
        pub struct TrainConfig {
            $($(#[$attribute])* pub $field: $type,)*
            /// Values of keys that a program registers.
            pub extra: Extra,
            /// Where this process stands among those that train together; alone without it. No key: a launcher says it,
            /// and [`crate::ranks::place`] reads that.
            pub place: Option<crate::ranks::Place>,
            read_by: ReadBy,
        }

        impl TrainConfig {
            /// Before anything is read: every key assigns its field.
            fn blank(read_by: ReadBy) -> Self {
                Self { $($field: Default::default(),)* extra: Extra::default(), place: None, read_by }
            }

            /// Names of the fields.
            #[cfg(test)]
            const FIELDS: &[&str] = &[$(stringify!($field)),*];
        }
    };
}

fields! {
    base_model: PathBuf,
    /// `train_data_dir`, `reg_data_dir`, `datasets` or `dataset_config`, with the keys of pictures and captions.
    datasets: Vec<DatasetOptions>,
    /// Attributes to train on prompts alone, in the place of datasets.
    sliders: Vec<Slider>,
    slider_resolutions: Vec<(usize, usize)>,
    slider_steps: usize,
    slider_sample_guidance: f64,
    /// Where captions of pictures without one come from.
    auto_label: Option<lora_caption::Settings>,
    output_dir: PathBuf,
    output_name: String,
    init_from: Option<PathBuf>,
    /// Merged into the frozen base as it is read.
    fuse_adapters: Vec<AppliedAdapter>,
    strict: bool,
    train: TrainMode,
    ema_decay: f64,
    lora_rank: usize,
    lora_alpha: f64,
    use_rslora: bool,
    lora_dropout: f64,
    rank_dropout: f64,
    module_dropout: f64,
    variant: String,
    variant_options: BTreeMap<String, f64>,
    rank_pattern: BTreeMap<String, f64>,
    alpha_pattern: BTreeMap<String, f64>,
    /// Learning rates of some layers, by pattern.
    learning_rate_pattern: BTreeMap<String, f64>,
    loraplus_lr_ratio: f64,
    target_modules: Vec<String>,
    train_unet: bool,
    train_text_encoder: bool,
    save_precision: DType,
    learning_rate: f64,
    unet_lr: f64,
    text_encoder_lr: f64,
    /// As it is written: whether there is such an optimiser is known to [`crate::Plugins`].
    optimizer: String,
    /// `optimizer_args`, with `adam_betas`, `adam_eps` and `weight_decay` under their names there.
    optimizer_args: Arguments,
    lr_scheduler: LrScheduler,
    /// How often `cosine_with_restarts` falls.
    lr_scheduler_num_cycles: usize,
    /// The power of `polynomial`.
    lr_scheduler_power: f64,
    /// What share of the learning rate schedules end at.
    lr_min_ratio: f64,
    /// The last steps, over which alone the learning rate falls.
    lr_decay_steps: Option<usize>,
    lr_warmup: Warmup,
    max_grad_norm: f64,
    batch_size: usize,
    ddp_timeout: usize,
    gradient_accumulation_steps: usize,
    length: RunLength,
    seed: u64,
    max_resolution: (usize, usize),
    clip_skip: usize,
    max_token_length: usize,
    text_cleaning: TextCleaning,
    weighted_captions: bool,
    prior_loss_weight: f64,
    masked_loss: bool,
    prior_prompt: Option<String>,
    prior_prompt_weight: f64,
    prior_blank_weight: f64,
    prior_mask_weight: f64,
    noise_offset: f64,
    v_parameterization: Option<bool>,
    min_snr_gamma: Option<f64>,
    precision: DType,
    device: String,
    /// `base_storage`; `None` where weights are stored as they compute.
    base_storage: Option<Storage>,
    offload_base: bool,
    gradient_checkpointing: bool,
    cpu_offload_checkpointing: bool,
    /// Compute the inner part of the U-Net's feed-forwards again.
    recompute_feed_forward: bool,
    /// On a GPU: launch the kernels of a step together.
    cuda_graphs: bool,
    cache_latents: bool,
    /// The autoencoder works on tiles of pictures.
    vae_tiling: bool,
    /// `vram_budget` in bytes.
    vram_budget: Option<u64>,
    auto: bool,
    allow_lower_resolution: bool,
    cache_dir: Option<PathBuf>,
    save_every_n_steps: Option<usize>,
    save_every_minutes: Option<f64>,
    sample_every_minutes: Option<f64>,
    save_every_n_epochs: Option<usize>,
    save_total_limit: Option<usize>,
    validation_data_dir: Option<PathBuf>,
    validation_split: Option<HeldOut>,
    validate_every_n_steps: Option<usize>,
    early_stopping_patience: Option<usize>,
    early_stopping_threshold: f64,
    save_best: bool,
    save_state: bool,
    save_state_every_n_steps: Option<usize>,
    resume: Resume,
    log_with: Vec<Tracker>,
    logging_dir: PathBuf,
    samples: SampleConfig,
    callbacks: Vec<String>,
}

/// Whether the data of this name can be texts alone.
fn names_texts(path: &str) -> bool {
    let extension = Path::new(path).extension().unwrap_or_default();
    ["jsonl", "json", "txt"].iter().any(|own| extension.eq_ignore_ascii_case(own))
}

impl TrainConfig {
    /// Reads a `.toml`, `.yaml`, `.yml` or `.json` file; `overrides` are `key=value` and win over it.
    ///
    /// # Errors
    /// All that is wrong with it, each with its line and what would be right.
    pub fn from_file<S: AsRef<str>>(path: impl AsRef<Path>, overrides: &[S]) -> Result<Self, ConfigError> {
        Self::from_file_with(path, overrides, &Plugins::default())
    }

    /// As [`TrainConfig::from_file`], with the keys and the optimisers that a program registers.
    ///
    /// # Errors
    /// As [`TrainConfig::from_file`].
    pub fn from_file_with<S: AsRef<str>>(
        path: impl AsRef<Path>,
        overrides: &[S],
        plugins: &Plugins,
    ) -> Result<Self, ConfigError> {
        Self::read(Reader::open(path.as_ref(), plugins)?, overrides)
    }

    /// From text.
    ///
    /// # Errors
    /// As [`TrainConfig::from_file`].
    pub fn from_text<S: AsRef<str>>(text: &str, format: Format, overrides: &[S]) -> Result<Self, ConfigError> {
        Self::from_text_with(text, format, overrides, &Plugins::default())
    }

    /// As [`TrainConfig::from_text`], with the keys and the optimisers that a program registers.
    ///
    /// # Errors
    /// As [`TrainConfig::from_file`].
    pub fn from_text_with<S: AsRef<str>>(
        text: &str,
        format: Format,
        overrides: &[S],
        plugins: &Plugins,
    ) -> Result<Self, ConfigError> {
        Self::read(Reader::parse(None, text, format, plugins)?, overrides)
    }

    /// The texts that a file trains a language model on, with its base, for a look at them; `None` where its base is no
    /// language model, or not named. `folder` takes the place of the file's own.
    ///
    /// # Errors
    /// As [`TrainConfig::from_file`]; where the data are texts by their name, those of opening the base, too.
    pub fn texts_of<S: AsRef<str>>(
        path: Option<&Path>,
        folder: Option<&Path>,
        overrides: &[S],
    ) -> Result<Option<(PathBuf, Vec<TextOptions>)>, ConfigError> {
        let plugins = Plugins::default();
        let mut reader = Self::reader_of(path, folder, overrides, &plugins)?;
        let text = |key: &str| reader.values.get(key).and_then(serde_json::Value::as_str);
        let base = match text("base_model").map(|base| plugins.bases.checkpoint(Path::new(base))) {
            Some(Ok(base)) if !base.family().image => base,
            // Pictures are looked at without their base.
            Some(Err(error)) if text("train_data_dir").is_some_and(names_texts) => {
                reader.problem(Some("base_model"), error.to_string());
                return Self::read::<&str>(reader, &[]).map(|_| None);
            }
            _ => return Ok(None),
        };
        let config = Self::read::<&str>(reader, &[])?;
        Ok(Some((base.path().to_owned(), crate::base::language::options(&config))))
    }

    /// A file, or nothing, with what is set over it.
    fn reader_of<S: AsRef<str>>(
        path: Option<&Path>,
        folder: Option<&Path>,
        overrides: &[S],
        plugins: &Plugins,
    ) -> Result<Reader, ConfigError> {
        let mut reader = match path {
            Some(path) => Reader::open(path, plugins)?,
            None => Reader::parse(None, "", Format::Toml, plugins)?,
        };
        overrides.iter().for_each(|assignment| reader.set(assignment.as_ref()));
        if let Some(folder) = folder {
            reader.replace_folder(folder);
        }
        Ok(reader)
    }

    /// Only what a file says of datasets, for a look at them before there is a base model. `folder` takes the place of
    /// the file's own.
    ///
    /// # Errors
    /// As [`TrainConfig::from_file`].
    pub fn datasets_of<S: AsRef<str>>(
        path: Option<&Path>,
        folder: Option<&Path>,
        overrides: &[S],
    ) -> Result<(Vec<DatasetOptions>, usize), ConfigError> {
        let mut reader = Self::reader_of(path, folder, overrides, &Plugins::default())?;
        let of_prompts = reader.has("sliders") && folder.is_none();
        if of_prompts {
            reader.problem(Some("sliders"), "sliders are trained on prompts alone: there are no pictures to look at");
        }
        let datasets = datasets::read(&mut reader, !of_prompts);
        let tokens = reader.given("max_token_length").count(1).unwrap_or(75);
        reader.finish((datasets, tokens))
    }

    fn read<S: AsRef<str>>(mut reader: Reader, overrides: &[S]) -> Result<Self, ConfigError> {
        overrides.iter().for_each(|assignment| reader.set(assignment.as_ref()));
        let keys = reader.keys().clone();
        let (path, lines) = (reader.path().map(Path::to_owned), reader.lines());
        let mut config = Self::blank(ReadBy { keys: keys.clone(), given: Vec::new(), path, lines });
        keys.read(&mut reader, &mut config);
        let has_sliders = reader.has("sliders");
        if has_sliders {
            sliders::settle(&mut reader, &keys, &mut config);
        }
        config.datasets = datasets::read(&mut reader, !has_sliders);
        if has_sliders {
            config.datasets.clear();
        }
        config.read_by.given = keys.names().filter(|key| reader.gives(key)).collect();
        reader.finish(config)
    }

    /// The sizes that sliders are trained at.
    pub(crate) fn slider_sizes(&self) -> Vec<(usize, usize)> {
        match self.slider_resolutions.as_slice() {
            [] => vec![self.max_resolution],
            several => several.to_vec(),
        }
    }

    /// The keys that it was read by: what a resumed run must agree with is theirs to say.
    pub(crate) fn keys(&self) -> &Keys {
        &self.read_by.keys
    }

    /// What is found out later to be wrong with values of keys, as it is said of what is wrong when the configuration
    /// is read.
    pub(crate) fn refused(&self, problems: impl IntoIterator<Item = (&'static str, String)>) -> ConfigError {
        let problem = |(key, message): (&str, String)| Problem {
            line: self.read_by.lines.get(key).copied(),
            key: Some(key.to_owned()),
            message,
        };
        ConfigError { path: self.read_by.path.clone(), problems: problems.into_iter().map(problem).collect() }
    }

    /// Keys that are given although only other bases bring them, where a base brings these groups.
    pub(crate) fn keys_of_other_bases(&self, own: &[&Group]) -> Vec<&'static str> {
        let ReadBy { keys, given, .. } = &self.read_by;
        keys.of_other_bases(own).filter(|key| given.contains(key)).collect()
    }

    /// Whether a key is given, rather than left to its default.
    pub(crate) fn gives(&self, key: &'static str) -> bool {
        self.read_by.given.contains(&key)
    }

    /// Whether a base that brings these groups has a key.
    pub(crate) fn has_key(&self, key: &str, own: &[&Group]) -> bool {
        let keys = &self.read_by.keys;
        keys.get(key).is_some() && keys.of_other_bases(own).all(|other| other != key)
    }

    /// Rows of 77 tokens that a caption takes.
    pub(crate) fn caption_chunks(&self) -> usize {
        self.max_token_length / 75
    }
}
