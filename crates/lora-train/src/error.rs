//! The crate's error type.

use std::path::PathBuf;

/// What can end a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration cannot work.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// The base model is none that can be trained.
    #[error("{path}: this is {found}; expected {expected}, in one file of the original layout or a diffusers folder", path = path.display())]
    Base {
        /// The file or folder.
        path: PathBuf,
        /// What it is.
        found: String,
        /// Families that can be trained.
        expected: String,
    },
    /// The configuration has a key that means nothing for its base.
    #[error("{key}: a base of the family {family} has no such key; take it out")]
    KeyOfAnotherBase {
        /// The key.
        key: &'static str,
        /// The base's family.
        family: &'static str,
    },
    /// A base does not say what it predicts, and its family has both kinds.
    #[error(
        "{path}: {family} predicts the noise or the velocity, and this file does not say which; set v_parameterization = true for a base of 768 px (velocity), false for one of 512 px (noise)",
        path = path.display()
    )]
    PredictionUnknown {
        /// The file.
        path: PathBuf,
        /// Its family.
        family: &'static str,
    },
    /// A base is read in parts, and one of them is not there.
    #[error("{path}: {family} without {part}, which a run needs beside the transformer; set {key} to {what}", path = path.display())]
    PartMissing {
        /// The file or folder.
        path: PathBuf,
        /// The base's family.
        family: &'static str,
        /// The part, with its article.
        part: &'static str,
        /// The key that names it.
        key: &'static str,
        /// What the key may name.
        what: &'static str,
    },
    /// What a launcher says of processes that train together makes no sense.
    #[error("{reason}")]
    Launch {
        /// Which variable, and what is wrong with it.
        reason: String,
    },
    /// Processes that train together cannot go on together.
    #[error("{0}")]
    Ranks(String),
    /// Processes that train together were to make different runs.
    #[error("ranks must make the same run, but rank {rank} differs: {list}")]
    RanksDiffer {
        /// The first that differs from rank 0.
        rank: usize,
        /// What differs.
        list: String,
    },
    /// A network is needed that is not loaded.
    #[error("the {network} is not loaded")]
    NotLoaded {
        /// The network.
        network: &'static str,
    },
    /// An encoding lacks a tensor.
    #[error("what `{network}` encoded lacks `{name}`; if it comes from cache_dir, remove that folder")]
    MissingEncoding {
        /// The network that encodes.
        network: lora_core::Component,
        /// The tensor.
        name: &'static str,
    },
    /// A network is asked to encode that does not.
    #[error("`{network}` of this base encodes neither examples nor captions")]
    EncodesNothing {
        /// The network.
        network: lora_core::Component,
    },
    /// Every network of the base is kept as it is.
    #[error("nothing is trained: the keys train_unet and train_text_encoder of this base's networks are all false")]
    NothingTrains,
    /// A loss reads a tensor that the micro-batch lacks.
    #[error("a micro-batch has no tensor `{name}`, which the loss reads")]
    MissingInput {
        /// The tensor.
        name: &'static str,
    },
    /// A recorded step is not the step that was recorded.
    #[error("{0}")]
    RecordingDiffers(String),
    /// Something is held by another thread although its work is done.
    #[error("{what} is still in use by a thread that should be done; this is a mistake of the program")]
    InUse {
        /// What is held.
        what: &'static str,
    },
    /// A base of which only adapters are trained.
    #[error(
        "{path}: train = \"full\" is for image models; of a language model adapters are trained (train = \"lora\")"
    )]
    NotTrainedWhole {
        /// The base.
        path: PathBuf,
    },
    /// A tokenizer has tokens that its model has no embedding of.
    #[error(
        "{path}: the tokenizer has {tokens} tokens, the model's embedding {rows} rows; the files are not of one model"
    )]
    Vocabulary {
        /// The tokenizer.
        path: PathBuf,
        /// Its tokens.
        tokens: usize,
        /// Rows of the embedding.
        rows: usize,
    },
    /// A text has a token of the tokenizer's that the model has no row for.
    #[error(
        "{path}: token {token} is not one of the model, whose embedding has {rows} rows; leave it out of the texts, or check that \
         tokenizer and model are of one folder",
        path = path.display()
    )]
    UnknownToken {
        /// The text's file.
        path: PathBuf,
        /// The token, or its number where it is not known.
        token: String,
        /// Rows of the embedding.
        rows: usize,
    },
    /// A part of a base from elsewhere that is another base's.
    #[error("{path}: {found}; this base needs {expected}: set {key} to that", path = path.display())]
    PartOfAnother {
        /// The part.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What the base's other parts fit.
        expected: String,
        /// The key that names it.
        key: &'static str,
    },
    /// An adapter of another base.
    #[error("{path}: {reason}")]
    NotOfThisBase {
        /// The adapter.
        path: PathBuf,
        /// By what it shows.
        reason: String,
    },
    /// A conversation, and no template to lay it out by.
    #[error("{path}: there is no chat template; set chat_template to a file or the name of one")]
    NoTemplate {
        /// The tokenizer.
        path: PathBuf,
    },
    /// A prompt that looks like a conversation and is none.
    #[error("the prompt `{prompt}` is no JSON list of messages: {reason}")]
    Prompt {
        /// The prompt.
        prompt: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A sample of a size that the base does not draw.
    #[error("a sample of {} by {} pixels: expected multiples of {multiple}", .size.0, .size.1)]
    SampleSize {
        /// Width and height.
        size: (usize, usize),
        /// What both have to be multiples of.
        multiple: usize,
    },
    /// `auto` on a system that does not tell how much memory is free.
    #[error("auto: this system does not tell how much memory of the device {device} is free; set vram_budget")]
    FreeMemoryUnknown {
        /// The key `device`.
        device: String,
    },
    /// A sampler of a name that none has.
    #[error("there is no sampler `{name}`; known are {known}")]
    NoSampler {
        /// What was asked for.
        name: String,
        /// The names that there are.
        known: String,
    },
    /// Samples of a base that makes none.
    #[error("this base makes no samples; take sample_prompts out")]
    NoSamples,
    /// Texts without a token that could be judged.
    #[error(
        "{data}: nothing in it can be judged; a text needs two tokens or more, a record an answer, and the limit rows",
        data = data.display()
    )]
    NothingJudged {
        /// What was given.
        data: PathBuf,
    },
    /// The dataset cannot be used.
    #[error(transparent)]
    Data(#[from] lora_data::Error),
    /// Captions could not be made.
    #[error("auto_label: {0}")]
    Captions(#[from] lora_caption::Error),
    /// Some pictures have got no caption, and the run is strict.
    #[error(
        "auto_label: {count} pictures have got no caption, the first: {first}; write them by hand, or set strict = false"
    )]
    NoCaption {
        /// How many.
        count: usize,
        /// The first, and why.
        first: String,
    },
    /// The run was stopped while captions were made.
    #[error("stopped while captions were made; those that are made are kept, and the next run goes on from there")]
    StoppedLabelling,
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] lora_io::Error),
    /// A network could not be built or run.
    #[error(transparent)]
    Model(lora_models::Error),
    /// A registered name is unknown or taken, or targets match nothing.
    #[error(transparent)]
    Adapter(lora_core::Error),
    /// A plugin name from the configuration is not registered.
    #[error("callbacks: no callback is called `{name}`; registered are {known}")]
    UnknownCallback {
        /// The name in the configuration.
        name: String,
        /// The registered names.
        known: String,
    },
    /// An optimiser name from the configuration is not registered.
    #[error("optimizer: no optimiser is called `{name}`; registered are {known}{near}")]
    UnknownOptimiser {
        /// The name in the configuration.
        name: String,
        /// The registered names.
        known: String,
        /// The nearest of them, as advice.
        near: String,
    },
    /// Two configuration keys of one name.
    #[error("a configuration key called `{name}` is registered already; choose another name")]
    DuplicateKey {
        /// The name.
        name: String,
    },
    /// Two optimisers of one name.
    #[error("an optimiser called `{name}` is registered already; choose another name")]
    DuplicateOptimiser {
        /// The name.
        name: String,
    },
    /// An optimiser does not take a number of the configuration.
    #[error("optimizer `{optimiser}`: `{argument}`: {reason}")]
    OptimiserArgument {
        /// The optimiser.
        optimiser: String,
        /// The number's name.
        argument: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The adapter to go on from does not fit the configuration.
    #[error("{path}: cannot go on from this LoRA: {reason}", path = path.display())]
    InitFrom {
        /// The adapter file.
        path: PathBuf,
        /// What differs, and the remedy.
        reason: String,
    },
    /// A state cannot be read.
    #[error(
        "{path}: cannot go on from this state: {reason}. Remove the file or set resume = false to begin anew; init_from = the last saved LoRA keeps what was learnt", path = path.display()
    )]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A state cannot be written.
    #[error(
        "the state of step {step} ({:.1} MB) cannot be written: {source}; {}. Make room there or set another output_dir",
        megabytes(.bytes), before(.kept)
    )]
    StateNotWritten {
        /// Steps done.
        step: usize,
        /// Bytes that it takes.
        bytes: u64,
        /// Whether an older one is there.
        kept: bool,
        /// The disk's words.
        source: lora_io::Error,
    },
    /// A state that no run could go on from, and that was therefore not written.
    #[error("the state of step {step} is not written: {reason}")]
    StateUnusable {
        /// Steps done.
        step: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is no state to go on from.
    #[error(
        "resume: there is no state {path}; resume = \"auto\" begins anew where there is none, and save_state = true leaves one", path = path.display()
    )]
    NoState {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Another run has the folder.
    #[error(
        "{path}: another run is writing into this folder; wait until it has ended, or set output_dir to another", path = path.display()
    )]
    OutputInUse {
        /// The folder.
        path: PathBuf,
    },
    /// A state is another run's.
    #[error(
        "{path}: this state belongs to another run: {list}. Set it back to go on exactly where the run stood; or begin a new run from what was learnt with resume = false and init_from = its saved LoRA", path = path.display()
    )]
    OtherRun {
        /// The state.
        path: PathBuf,
        /// The settings that differ, with their values then and now.
        list: String,
    },
    /// An autoencoder that decodes into something else than pictures.
    #[error("the autoencoder decodes into {shape:?}, which are no pictures [batch, 3, height, width]")]
    DecodedPicture {
        /// The shape of what it decoded.
        shape: Vec<i64>,
    },
    /// A tensor of a state does not fit the run.
    #[error("tensor `{name}`: expected {expected}, found {found}")]
    StateTensor {
        /// The tensor.
        name: String,
        /// What the run has in its place.
        expected: String,
        /// What the state holds.
        found: String,
    },
    /// Memory ran out and nothing is left that would help and leave the run what it is.
    #[error("out of memory {place}: {reason}{}\n{remedies}", table(.tried))]
    OutOfMemory {
        /// The step or stage.
        place: String,
        /// The allocator's words.
        reason: String,
        /// What was done before, in order.
        tried: Vec<String>,
        /// What would change the run, and help.
        remedies: String,
    },
    /// NaN or infinity, by the stage that made it first.
    #[error("NaN or infinity in {stage}{place}; {remedy}")]
    NotFinite {
        /// What made it: "the VAE", "the U-Net", "the gradients".
        stage: std::borrow::Cow<'static, str>,
        /// The step or picture.
        place: String,
        /// What helps.
        remedy: &'static str,
    },
    /// No remedy makes the run fit into the memory that it may use.
    #[error(
        "vram_budget: {budget} is too little for this run: it needs at least {smallest}, {with}; give it more memory, train fewer layers (target_modules), or: {remedies}"
    )]
    Budget {
        /// The budget.
        budget: String,
        /// The smallest possible peak.
        smallest: String,
        /// What would have to be set for it.
        with: String,
        /// What of the base's keys makes a run smaller.
        remedies: &'static str,
    },
    /// A callback of the user's gave up.
    #[error("callback `{name}`: {reason}")]
    Callback {
        /// The callback.
        name: String,
        /// Its own words.
        reason: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the configuration or the arguments are to blame, rather than the work.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Error::Config(_)
                | Error::Budget { .. }
                | Error::UnknownCallback { .. }
                | Error::NoState { .. }
                | Error::OtherRun { .. }
                | Error::OutputInUse { .. }
                | Error::UnknownOptimiser { .. }
                | Error::OptimiserArgument { .. }
                | Error::Adapter(lora_core::Error::NoMatch { .. })
        ) || matches!(self, Error::Captions(error) if error.is_usage())
    }

    /// Whether memory ran out.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Error::OutOfMemory { .. } => true,
            Error::Model(error) => error.is_out_of_memory(),
            _ => false,
        }
    }

    /// Whether the device is gone for this process, with everything that was on it.
    pub fn is_device_lost(&self) -> bool {
        matches!(self, Error::Model(error) if error.is_device_lost())
    }
}

fn megabytes(bytes: &u64) -> f64 {
    *bytes as f64 / 1e6
}

fn before(kept: &bool) -> &'static str {
    if *kept { "the one before it is whole and stays" } else { "there is none before it" }
}

/// What was tried, a line each.
fn table(tried: &[String]) -> String {
    let lines: Vec<_> = tried.iter().enumerate().map(|(index, line)| format!("\n  {}. {line}", index + 1)).collect();
    match lines.is_empty() {
        true => String::new(),
        false => format!("\ntried before:{}", lines.concat()),
    }
}

impl From<lora_models::Error> for Error {
    fn from(error: lora_models::Error) -> Self {
        match error {
            lora_models::Error::Checkpoint(error) => Error::File(error),
            other => Error::Model(other),
        }
    }
}

impl From<lora_torch::Error> for Error {
    fn from(error: lora_torch::Error) -> Self {
        match error {
            lora_torch::Error::Adapter(error) => Error::Adapter(error),
            other => Error::Model(other.into()),
        }
    }
}

impl From<lora_torch::tch::TchError> for Error {
    fn from(error: lora_torch::tch::TchError) -> Self {
        lora_torch::Error::from(error).into()
    }
}

impl From<lora_core::Error> for Error {
    fn from(error: lora_core::Error) -> Self {
        lora_torch::Error::from(error).into()
    }
}
