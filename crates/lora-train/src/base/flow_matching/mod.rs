//! Bases that are trained by flow matching: a network that answers with velocities between pictures' latents and noise, an
//! encoder of captions, an autoencoder. What tells them apart is the few values of [`Kind`].
//!
//! | here | what |
//! |---|---|
//! | `z_image` | Z-Image's kind |
//! | `flux`, `chroma`, `flux2`, `sd3` | FLUX.1's, Chroma's, FLUX.2's, Stable Diffusion 3's |
//! | `qwen_image`, `anima` | Qwen-Image's, Anima's |
//! | `text` | the text encoders of a base |
//! | `language`, `conditioned`, `clip`, `t5` | captions through an encoder of each kind |

mod anima;
mod chroma;
mod clip;
mod conditioned;
mod flux;
mod flux2;
mod language;
mod qwen_image;
mod sd3;
mod t5;
mod text;
mod z_image;

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_core::random::Stream;
use lora_core::{Component, DType};
use lora_data::bucket::Framing;
use lora_data::source::{Example, Shape};
use lora_io::checkpoint::{Checkpoint, ComponentWeights};
use lora_io::family::Family;
use lora_io::family::anima::TEXT_CONDITIONER;
use lora_io::metadata::TrainingRecord;
use lora_models::diffusion::SamplerKind;
use lora_models::diffusion::flow::{self, NoiseLevels, Shift};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{LatentDistribution, VaeConfig};
use lora_models::weights::Held;
use lora_torch::dry;
use lora_torch::tch::{Device, Kind as Number, Tensor, no_grad_guard};
use lora_torch::tensor::{from_f32, kind_of, upload};

use self::text::{CaptionReaders, EncoderKind, Reads, STATES};
use super::autoencoder::{Autoencoder, latent_mask, latents_of, sample_latents};
use super::levels;
use super::noise::NoiseSettings;
use super::prior::{self, Prior};
use super::slider::{self, Slider};
use super::{
    Base, Encoded, Inputs, Item, Network, Opening, Prompt, Registration, Sample, Subject, Tensors, is_finite, shallow,
};
use crate::config::{SampleConfig, TrainConfig};
use crate::difference::{Difference, numbers};
use crate::velocity::VelocityLoss;
use crate::{Error, Result};

pub(super) use self::anima::ANIMA;
pub(super) use self::chroma::CHROMA;
pub(super) use self::flux::FLUX;
pub(super) use self::flux2::FLUX2;
pub(super) use self::qwen_image::QWEN_IMAGE;
pub(super) use self::sd3::SD3;
pub(super) use self::z_image::Z_IMAGE;

const VAE: Component = Component::VAE;
const TRANSFORMER: Component = Component::TRANSFORMER;

/// Noise levels at which an item is judged, spread evenly.
const JUDGED_LEVELS: usize = 4;

/// Builds a network that answers with velocities.
type LoadTransformer = fn(&Checkpoint, Number, Device, Held) -> Result<Box<dyn Transformer>>;

/// What differs between them, where files do not say.
struct Kind {
    family: &'static Family,
    /// Those that read captions, in the order in which they come.
    encoders: &'static [EncoderKind],
    /// The weight whose columns are the numbers of a state, of the part that reads them, where one language model's states are all
    /// it reads.
    text_columns: Option<(Component, &'static str)>,
    /// Builds the network that answers with velocities.
    load: LoadTransformer,
    /// What its network is told of captions: what all encoders kept of each, by name, laid out as a batch on the device.
    layout: fn(&[&Tensors], Device) -> Result<Inputs>,
    /// Whether latents are drawn from the autoencoder's distribution, or are its mean.
    draws_latents: bool,
    /// Latents along a side of one token.
    patch: usize,
    /// How drawn noise levels are moved where no key says it.
    shift: Shift,
    /// The noise levels that samples of so many tokens go through in so many steps, as [`flow::levels`].
    sample_levels: fn(&Checkpoint, usize, usize) -> lora_models::Result<Vec<f64>>,
    /// Guidance of samples where no key says it.
    guidance: fn(&Checkpoint) -> Guidance,
    /// Of the family's words for files that carry adapters (`modelspec.architecture` and others) those that this base has
    /// otherwise.
    labels: fn(&Checkpoint) -> &'static [(&'static str, &'static str)],
    /// Whether a base is distilled to few steps.
    is_distilled: fn(&Checkpoint) -> bool,
    /// What to know of such.
    distilled: &'static str,
    /// What a base is that has the family's names and is not trained here.
    refused: fn(&Checkpoint) -> Option<&'static str>,
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kind({})", self.family)
    }
}

/// How samples follow their prompt more closely.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Guidance {
    /// The answer moves away from that of a negative prompt, so many times as far; 1 asks for no second answer.
    Contrast(f64),
    /// The same, and each token of the answer is as long as with the prompt alone.
    Rescaled(f64),
    /// The network is told a strength, in training too.
    Told(f64),
}

impl Guidance {
    /// How strong it is.
    fn strength(self) -> f64 {
        let (Self::Contrast(strength) | Self::Rescaled(strength) | Self::Told(strength)) = self;
        strength
    }
}

/// How many states each caption has, where captions differ.
const LENGTHS: &str = "caption_lengths";

/// The name of the strengths of guidance, `[batch]`, that a network is told.
const GUIDANCE: &str = "guidance";

/// A network that answers with velocities.
trait Transformer: Adaptable + std::fmt::Debug + Send {
    /// The velocity, noise minus data, of noised latents `[batch, channels, height, width]` at noise levels `[batch]`; f32, of
    /// the latents' shape. `inputs` has what [`Kind::layout`] made of captions.
    ///
    /// # Errors
    /// Where inputs are missing or do not fit; where memory runs out.
    fn velocity(&self, latents: &Tensor, levels: &Tensor, inputs: &Inputs, pass: &Pass) -> Result<Tensor>;

    /// As what its layers are visited.
    fn as_adaptable(&mut self) -> &mut dyn Adaptable;
}

/// The kinds that are known here.
static KINDS: [&Kind; 7] =
    [&z_image::KIND, &flux::KIND, &chroma::KIND, &flux2::KIND, &sd3::KIND, &qwen_image::KIND, &anima::KIND];

/// Whether a base's transformer has a weight.
fn transformer_contains(checkpoint: &Checkpoint, weight: &str) -> bool {
    checkpoint.component(TRANSFORMER).is_ok_and(|transformer| transformer.contains(weight))
}

/// The name of a base's file or folder, in small letters.
fn name_of(checkpoint: &Checkpoint) -> String {
    checkpoint.path().file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// Whether the name of a base says that it is distilled to few steps.
fn named_distilled(checkpoint: &Checkpoint) -> bool {
    let name = name_of(checkpoint);
    ["turbo", "schnell", "distilled"].iter().any(|word| name.contains(word))
}

/// Holds a base of one of these kinds against what a run needs beside its transformer; bases of other kinds are let be.
///
/// # Errors
/// [`Error::PartMissing`] with the key that names the part; [`Error::PartOfAnother`] for a text encoder of another width;
/// [`Error::Base`] for a base that is not trained here.
pub(super) fn check_parts(checkpoint: &Checkpoint, config: &TrainConfig) -> Result<()> {
    let Some(kind) = KINDS.iter().find(|kind| kind.family == checkpoint.family()) else { return Ok(()) };
    if let Some(found) = (kind.refused)(checkpoint) {
        let (path, expected) = (checkpoint.path().to_owned(), kind.family.title.to_owned());
        return Err(Error::Base { path, found: found.to_owned(), expected });
    }
    let missing = |part, key, what| {
        let (path, family) = (checkpoint.path().to_owned(), kind.family.title);
        Err(Error::PartMissing { path, family, part, key, what })
    };
    if checkpoint.component(VAE).is_err() {
        let what = "the file or folder of its autoencoder (ae.safetensors), or a diffusers folder that has it";
        return missing("an autoencoder", "vae", what);
    }
    for encoder in kind.encoders {
        if checkpoint.component(encoder.component).is_err() {
            return missing("a text encoder", encoder.key, encoder.published);
        }
        let tokenizer = |folder| text::tokenizer(checkpoint, encoder.component, ["tokenizer", folder], config);
        if encoder.tokenizer.is_some_and(|folder| tokenizer(folder).is_none()) {
            return missing("a tokenizer", "tokenizer", "a folder with the tokenizer.json of its text encoder");
        }
        let is_conditioned = matches!(encoder.reads, Reads::Conditioned(_));
        if is_conditioned && text::tokenizer(checkpoint, TEXT_CONDITIONER, text::T5_TOKENIZER, config).is_none() {
            return missing(
                "T5's tokenizer",
                "t5_tokenizer",
                "a folder with T5's tokenizer.json; T5 itself is not read",
            );
        }
        check_width(checkpoint, kind, encoder)?;
    }
    Ok(())
}

/// Holds the width of a language model's states against what reads them.
fn check_width(checkpoint: &Checkpoint, kind: &Kind, encoder: &EncoderKind) -> Result<()> {
    let (Some((reader, weight)), Reads::Language(reads) | Reads::Conditioned(reads)) =
        (kind.text_columns, &encoder.reads)
    else {
        return Ok(());
    };
    let own = checkpoint.component(encoder.component)?;
    let columns = |shape: Option<&[usize]>| shape.and_then(|shape| shape.get(1).copied());
    let read = columns(checkpoint.component(reader)?.shape(weight)).map(|columns| columns / reads.states.count());
    match (columns(own.shape("model.embed_tokens.weight")), read) {
        (Some(width), Some(read)) if width != read => Err(Error::PartOfAnother {
            path: own.path().to_owned(),
            found: format!("a text encoder of {width} numbers a state"),
            expected: format!("one of {read}, of {}", encoder.published),
            key: encoder.key,
        }),
        _ => Ok(()),
    }
}

/// A base of one of them.
#[derive(Debug)]
struct FlowMatching {
    kind: &'static Kind,
    networks: Vec<Network>,
    checkpoint: Arc<Checkpoint>,
    device: Device,
    precision: DType,
    config: TrainConfig,
    levels: NoiseLevels,
    prior: Prior,
    slider: Option<Slider>,
    noise: NoiseSettings,
    difference: Difference,
    autoencoder: Option<Autoencoder>,
    encoders: CaptionReaders,
    guidance: Guidance,
    vae: VaeConfig,
    transformer: Option<Box<dyn Transformer>>,
}

impl FlowMatching {
    fn open(opening: &Opening<'_>, kind: &'static Kind) -> Result<Self> {
        let config = opening.config;
        let network = |component, title, trains, encodes| Network { component, title, trains, encodes };
        // Prompts alone need no autoencoder.
        let of_pictures = config.sliders.is_empty();
        let autoencoder = of_pictures.then(|| network(VAE, Autoencoder::TITLE, false, Some(Subject::Examples)));
        let mut networks: Vec<Network> = autoencoder.into_iter().collect();
        networks
            .extend(kind.encoders.iter().map(|own| network(own.component, own.title, false, Some(Subject::Captions))));
        networks.push(network(TRANSFORMER, "transformer", true, None));
        let base = Self {
            kind,
            networks,
            encoders: CaptionReaders::open(kind.encoders, &opening.checkpoint, config)?,
            guidance: (kind.guidance)(&opening.checkpoint),
            vae: VaeConfig::detect(&opening.checkpoint)?,
            levels: levels::of(config, Some(kind.shift))?,
            noise: NoiseSettings::of(config)?,
            difference: Difference::of_flow(config)?,
            checkpoint: Arc::clone(&opening.checkpoint),
            device: opening.device,
            precision: opening.precision,
            config: config.clone(),
            prior: Prior::of(config),
            slider: Slider::of(config),
            autoencoder: None,
            transformer: None,
        };
        base.check_sides()?;
        Ok(base)
    }

    /// Pictures have to be cut into whole tokens.
    fn check_sides(&self) -> Result<()> {
        let multiple = self.vae.factor() * self.kind.patch;
        let fits = |(width, height): (usize, usize)| width % multiple == 0 && height % multiple == 0;
        let mut problems = Vec::new();
        for dataset in &self.config.datasets {
            match &dataset.framing {
                Framing::Buckets(buckets) if buckets.options().step % multiple != 0 => {
                    let step = buckets.options().step;
                    problems.push(("bucket_reso_steps", format!("{step}; expected a multiple of {multiple}")));
                }
                Framing::Buckets(_) => {}
                framing => {
                    let (wide, high) = framing.resolution();
                    if !fits((wide, high)) {
                        problems.push(("max_resolution", format!("{wide}×{high}; expected multiples of {multiple}")));
                    }
                }
            }
        }
        for (wide, high) in self.slider.iter().flat_map(|_| self.config.slider_sizes()) {
            if !fits((wide, high)) {
                let key =
                    if self.config.slider_resolutions.is_empty() { "max_resolution" } else { "slider_resolutions" };
                problems.push((key, format!("{wide}×{high}; expected multiples of {multiple}")));
            }
        }
        let (wide, high) = self.config.samples.resolution;
        if !self.config.samples.prompts.is_empty() && !fits((wide, high)) {
            problems.push(("sample_resolution", format!("{wide}×{high}; expected multiples of {multiple}")));
        }
        problems.dedup();
        if problems.is_empty() { Ok(()) } else { Err(self.config.refused(problems).into()) }
    }

    fn transformer(&self) -> Result<&dyn Transformer> {
        self.transformer.as_deref().ok_or(Error::NotLoaded { network: "transformer" })
    }

    fn autoencoder(&self) -> Result<Autoencoder> {
        Ok(Autoencoder::load(&self.checkpoint, self.precision, self.device)?.in_tiles(self.config.vae_tiling))
    }

    /// Tokens of a picture of so many latents.
    fn tokens(&self, (height, width): (i64, i64)) -> usize {
        let patch = self.kind.patch as i64;
        ((height / patch) * (width / patch)) as usize
    }

    /// Captions of a batch as the network takes them: those that were kept, others as the encoder, which stays then, makes
    /// them now.
    fn with_captions(&self, inputs: Inputs, items: &[Item]) -> Result<Inputs> {
        let _guard = no_grad_guard();
        let of = |item: &Item| self.encoders.of_item(item, self.device);
        let encoded = items.iter().map(of).collect::<Result<Vec<_>>>()?;
        let inputs = inputs.and((self.kind.layout)(&encoded.iter().collect::<Vec<_>>(), self.device)?);
        self.with_guidance(inputs, items.len(), self.trained_guidance())
    }

    /// The strength of guidance that the network is told in training.
    fn trained_guidance(&self) -> f64 {
        self.config.extra.number("guidance_scale").unwrap_or(1.0)
    }

    /// Adds the strength of guidance for each of `count` items, where the network is told such.
    fn with_guidance(&self, inputs: Inputs, count: usize, strength: f64) -> Result<Inputs> {
        match self.guidance {
            Guidance::Contrast(_) | Guidance::Rescaled(_) => Ok(inputs),
            Guidance::Told(_) => {
                Ok(inputs.with(GUIDANCE, Some(from_f32(&vec![strength as f32; count], &[count], self.device)?)))
            }
        }
    }

    /// Latents from noise `[1, channels, height, width]` through noise levels, with encodings of a prompt and of a negative one.
    fn denoised(
        &self,
        noise: &Tensor,
        [with, without]: [&BTreeMap<Component, Tensors>; 2],
        levels: &[f64],
        (guidance, pass): (f64, &Pass),
    ) -> Result<Tensor> {
        let transformer = self.transformer()?;
        let of = |kept| self.with_guidance(self.kept(kept, 1)?, 1, guidance);
        let (with, without) = (of(with)?, of(without)?);
        let is_told = matches!(self.guidance, Guidance::Told(_));
        flow::euler(noise, levels, |mixture, level| {
            let level = from_f32(&[level as f32], &[1], self.device)?;
            let with = transformer.velocity(mixture, &level, &with, pass)?;
            if is_told || guidance == 1.0 {
                return Ok(with);
            }
            // One after the other: captions differ in length, and half as much is in memory.
            let without = transformer.velocity(mixture, &level, &without, pass)?;
            let guided = without.f_add(&with.f_sub(&without)?.f_mul_scalar(guidance)?)?;
            match self.guidance {
                Guidance::Rescaled(_) => rescaled(&guided, &with, self.kind.patch),
                _ => Ok(guided),
            }
        })
    }

    /// The tensors of a micro-batch of sliders: of each item latents that go from noise to its noise level.
    fn slider_inputs(&self, slider: &Slider, items: &[Item]) -> Result<Inputs> {
        let _guard = no_grad_guard();
        let (factor, (width, height)) = (self.vae.factor(), slider.size(items)?);
        let shape = [items.len(), self.vae.latent_channels, height / factor, width / factor].map(|side| side as i64);
        let noise = self.noise.draw(items, &shape, self.device)?.added;
        let tokens = self.tokens((shape[2], shape[3]));
        let all = (self.kind.sample_levels)(&self.checkpoint, slider.steps(self.device), tokens)?;
        let (mut noised, mut levels) = (Vec::new(), Vec::new());
        for (index, item) in items.iter().enumerate() {
            // A dry run goes all the way.
            let drawn = || self.levels.draw(&item.draw.at("timestep"), tokens);
            let level = if dry::is_dry(self.device) { 0.0 } else { drawn() };
            let through: Vec<f64> = all.iter().copied().filter(|&own| own > level).chain([level]).collect();
            let (empty, noise) = (item.asked(""), noise.f_narrow(0, index as i64, 1)?);
            let way = (slider.guidance, &slider.way(item));
            noised.push(self.denoised(&noise, [&item.encoded, &empty.encoded], &through, way)?);
            levels.push(level);
        }
        let inputs = Inputs::default()
            .with("noised", Some(Tensor::f_cat(&noised, 0)?))
            .with("levels", Some(numbers(&levels, self.device)?));
        let inputs = self.with_captions(inputs, items)?;
        slider.beside(inputs, items, |asked| self.with_captions(Inputs::default(), asked))
    }

    /// What was kept of one caption, `count` times.
    fn kept(&self, encoded: &BTreeMap<Component, Tensors>, count: usize) -> Result<Inputs> {
        let kept = self.encoders.kept(encoded)?;
        (self.kind.layout)(&vec![&kept; count], self.device)
    }
}

impl Base for FlowMatching {
    fn networks(&self) -> &[Network] {
        &self.networks
    }

    fn notes(&self) -> Vec<String> {
        let distilled = (self.kind.is_distilled)(&self.checkpoint);
        distilled.then(|| self.kind.distilled.to_owned()).into_iter().collect()
    }

    fn load(&mut self, network: Component, held: Held) -> Result<()> {
        let kind = kind_of(self.precision);
        match network {
            VAE => self.autoencoder = Some(self.autoencoder()?),
            TRANSFORMER => self.transformer = Some((self.kind.load)(&self.checkpoint, kind, self.device, held)?),
            _ => {
                if let Some(encoder) = self.encoders.of_mut(network) {
                    encoder.load(&self.checkpoint, kind, self.device, held)?;
                }
            }
        }
        Ok(())
    }

    fn unload(&mut self, network: Component) {
        match network {
            VAE => self.autoencoder = None,
            TRANSFORMER => self.transformer = None,
            _ => {
                if let Some(encoder) = self.encoders.of_mut(network) {
                    encoder.unload();
                }
            }
        }
    }

    fn is_loaded(&self, network: Component) -> bool {
        match network {
            VAE => self.autoencoder.is_some(),
            TRANSFORMER => self.transformer.is_some(),
            _ => self.encoders.of(network).is_ok_and(|encoder| encoder.is_loaded()),
        }
    }

    fn adaptable(&mut self, network: Component) -> Option<&mut dyn Adaptable> {
        let transformer = self.transformer.as_mut().filter(|_| network == TRANSFORMER)?;
        Some(transformer.as_adaptable())
    }

    fn learning_rate(&self, _network: Component) -> f64 {
        self.config.learning_rate
    }

    fn encode(&mut self, network: Component, what: Encoded<'_>) -> Result<Tensors> {
        match what {
            Encoded::Example(Example::Picture(sample), path) => {
                let Some(autoencoder) = &mut self.autoencoder else {
                    return Err(Error::NotLoaded { network: Autoencoder::TITLE });
                };
                let LatentDistribution { mean, log_variance } =
                    autoencoder.encode(&self.checkpoint, path, &sample.picture)?;
                let mut tensors = Tensors::from([("mean".into(), mean), ("log_variance".into(), log_variance)]);
                if let Some(mask) = &sample.mask {
                    tensors.insert("mask".into(), latent_mask(mask, autoencoder.factor())?);
                }
                Ok(tensors)
            }
            Encoded::Caption(caption) => {
                let _guard = no_grad_guard();
                let encoded = self.encoders.of(network)?.encode(caption, self.device)?;
                for tensor in encoded.values() {
                    if !is_finite(tensor)? {
                        return Err(Error::NotFinite {
                            stage: "the text encoder".into(),
                            place: format!(" for the caption {caption:?}"),
                            remedy: "use precision = \"bf16\" or \"fp32\"",
                        });
                    }
                }
                Ok(encoded)
            }
            Encoded::Example(..) => Err(missing(network, "a picture")),
        }
    }

    fn encoding_identity(&self, network: Component) -> Result<String> {
        let (device, config) = (self.device, &self.config);
        let hash = self.checkpoint.component(network)?.sha256()?;
        Ok(match (network, &self.autoencoder) {
            (VAE, Some(autoencoder)) => {
                let tiles = if config.vae_tiling { " in tiles" } else { "" };
                format!("{hash} {:?} {device:?}{tiles}", autoencoder.kind())
            }
            _ => {
                let settings = self.encoders.of(network)?.settings();
                // Its answers go through the conditioner's weights too, where there is one.
                let behind = self.checkpoint.component(TEXT_CONDITIONER).ok().map(ComponentWeights::sha256);
                let hash = [hash, behind.transpose()?.unwrap_or_default()].concat();
                format!("{hash} {:?} {:?} {device:?} {settings}", kind_of(self.precision), config.base_storage)
            }
        })
    }

    fn draw(&self, network: Component, encoded: &Tensors, draw: &Stream) -> Result<Tensors> {
        let vae = &self.vae;
        let mean = tensor(encoded, network, "mean")?.shallow_clone();
        let latents = match self.kind.draws_latents {
            true => {
                let log_variance = tensor(encoded, network, "log_variance")?.shallow_clone();
                sample_latents(&LatentDistribution { mean, log_variance }, vae, &draw.at("latent"))?
            }
            false => vae.normalised(&mean)?.f_squeeze_dim(0)?,
        };
        let mut drawn = Tensors::from([("latents".to_owned(), latents)]);
        if let Some(mask) = encoded.get("mask") {
            drawn.insert("mask".into(), mask.shallow_clone());
        }
        Ok(drawn)
    }

    fn caption_length(&self, caption: &str) -> Option<usize> {
        self.encoders.longest()?.tokens(caption).ok()
    }

    fn captions(&self, caption: &str) -> Vec<String> {
        self.slider.as_ref().map_or_else(|| self.prior.captions(caption), |slider| slider.captions(caption))
    }

    fn figures(&self) -> &'static [&'static str] {
        self.prior.figures()
    }

    fn inputs(&self, items: &[Item]) -> Result<Inputs> {
        if let Some(slider) = &self.slider {
            return self.slider_inputs(slider, items);
        }
        let (latents, mask) = latents_of(items, self.device)?;
        let (_, _, height, width) = latents.size4()?;
        let noise = self.noise.draw(items, &latents.size(), self.device)?;
        let tokens = self.tokens((height, width));
        let levels: Vec<f64> = items.iter().map(|item| self.levels.draw(&item.draw.at("timestep"), tokens)).collect();
        let weights: Vec<f64> = items.iter().map(|item| item.weight).collect();
        let loss = VelocityLoss::new(
            &latents,
            [&noise.target, &noise.added],
            &levels,
            &weights,
            mask.as_ref(),
            &self.difference,
        )?;
        let inputs = self.with_captions(loss.into_inputs(), items)?;
        self.prior.beside(inputs, items, |asked| self.with_captions(Inputs::default(), asked))
    }

    fn noise_level(&self, draw: &Stream, shape: Shape) -> Option<f64> {
        let Shape::Picture(width, height) = shape else { return None };
        let tokens = self.tokens([height, width].map(|side| (side / self.vae.factor()) as i64).into());
        Some(self.levels.draw(&draw.at("timestep"), tokens))
    }

    fn validation_inputs(&self, item: &Item) -> Result<Inputs> {
        let encoded = item.encoded.get(&VAE).ok_or_else(|| missing(VAE, "latents"))?;
        let latents = tensor(encoded, VAE, "latents")?;
        let (channels, height, width) = latents.size3()?;
        let many = latents.f_to_device(self.device)?.f_unsqueeze(0)?.f_repeat([JUDGED_LEVELS as i64, 1, 1, 1])?;
        let shape = [JUDGED_LEVELS, channels as usize, height as usize, width as usize];
        let noise = from_f32(&item.draw.at("noise").normals(shape.iter().product()), &shape, self.device)?;
        let levels: Vec<f64> =
            (0..JUDGED_LEVELS).map(|step| (2 * step + 1) as f64 / (2 * JUDGED_LEVELS) as f64).collect();
        let loss = VelocityLoss::new(&many, [&noise; 2], &levels, &[], None, &self.difference)?;
        let inputs = loss.into_inputs().and(self.kept(&item.encoded, JUDGED_LEVELS)?);
        self.with_guidance(inputs, JUDGED_LEVELS, self.trained_guidance())
    }

    fn loss(&self, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let transformer = self.transformer()?;
        let (noised, levels) = (inputs.get("noised")?, inputs.get("levels")?);
        let answer = |inputs: &Inputs, pass: &Pass| transformer.velocity(noised, levels, inputs, pass);
        if let Some(slider) = &self.slider {
            return slider.loss(inputs, pass, &answer);
        }
        let loss = VelocityLoss::of(inputs, self.difference.loss)?;
        self.prior.loss(inputs, pass, &answer, |answer| loss.loss(|_, _| Ok(answer.shallow_clone())))
    }

    fn culprit(&self, items: &[Item]) -> Result<Option<(&'static str, &'static str)>> {
        let _guard = no_grad_guard();
        if self.slider.is_none() && !is_finite(&latents_of(items, self.device)?.0)? {
            return Ok(Some(("the VAE's latents", "the base model's autoencoder or a picture is damaged")));
        }
        if self.precision == DType::F16 {
            return Ok(Some(("the transformer", "use precision = \"bf16\": such transformers overflow in fp16")));
        }
        Ok(None)
    }

    fn sample(&mut self, prompts: &[Prompt], config: &SampleConfig, beside_recordings: bool) -> Result<Vec<Sample>> {
        let _guard = no_grad_guard();
        let vae = &self.vae;
        let multiple = vae.factor() * self.kind.patch;
        if !config.resolution.0.is_multiple_of(multiple) || !config.resolution.1.is_multiple_of(multiple) {
            return Err(Error::SampleSize { size: config.resolution, multiple });
        }
        let (width, height) = (config.resolution.0 / vae.factor(), config.resolution.1 / vae.factor());
        let tokens = self.tokens((height as i64, width as i64));
        let levels = (self.kind.sample_levels)(&self.checkpoint, config.steps, tokens)?;
        let guidance = config.guidance_scale.unwrap_or_else(|| self.guidance.strength());
        if config.sampler != SamplerKind::Euler {
            let known = SamplerKind::Euler.name().to_owned();
            return Err(Error::NoSampler { name: config.sampler.name().into(), known });
        }
        // The autoencoder comes when all latents are there, which are small, so that it is never beside the transformer at work.
        let mut all = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let mut draw = Stream::new(config.seed).at("sample").with(index as u64);
            let noise = draw.normals(vae.latent_channels * height * width);
            let noise = from_f32(&noise, &[1, vae.latent_channels, height, width], self.device)?;
            let way = (guidance, &Pass::default());
            all.push(self.denoised(&noise, [&prompt.with, &prompt.without], &levels, way)?);
        }
        let mut decoder = self.autoencoder()?;
        let mut pictures = Vec::new();
        for latents in all {
            pictures.extend(match beside_recordings {
                false => decoder.decode(&self.checkpoint, &latents)?,
                // Recordings make room before the autoencoder leaves the device.
                true => decoder.decode_here(&self.checkpoint, &latents)?,
            });
        }
        Ok(pictures.into_iter().map(Sample::Picture).collect())
    }

    fn record(&self, record: &mut TrainingRecord) {
        record.flow = true;
        record.noise_offset = (self.config.noise_offset > 0.0).then_some(self.config.noise_offset);
        record.unet_lr = Some(self.config.learning_rate);
        record.max_token_length = self.encoders.longest().map(|encoder| encoder.length());
        record.further.extend(prior::record(&self.config));
        record.further.extend(slider::record(&self.config));
        record.further.extend(levels::record(&self.config, Some(self.kind.shift), &self.levels));
        record.further.extend(self.noise.record());
        record.further.extend(self.difference.record());
        let labels = (self.kind.labels)(&self.checkpoint);
        record.further.extend(labels.iter().map(|(key, label)| (*key, (*label).to_owned())));
        if matches!(self.guidance, Guidance::Told(_)) {
            record.further.push(("ss_guidance_scale", self.trained_guidance().to_string()));
        }
    }
}

fn tensor<'t>(encoded: &'t Tensors, network: Component, name: &'static str) -> Result<&'t Tensor> {
    encoded.get(name).ok_or_else(|| missing(network, name))
}

/// Velocities `[batch, channels, height, width]` of which each token, a square of `patch` a side, is as long as another's.
fn rescaled(velocity: &Tensor, like: &Tensor, patch: usize) -> Result<Tensor> {
    let patch = patch as i64;
    let length = |velocity: &Tensor| -> Result<Tensor> {
        let squares = velocity.f_square()?.f_sum_dim_intlist([1i64].as_slice(), true, Number::Float)?;
        // The mean instead of the sum: only the ratio counts.
        Ok(squares.f_avg_pool2d([patch, patch], [patch, patch], [0, 0], false, true, None::<i64>)?.f_sqrt()?)
    };
    let ratio = length(like)?.f_div(&length(velocity)?.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)?;
    let (_, _, height, width) = velocity.size4()?;
    Ok(velocity.f_mul(&ratio.f_upsample_nearest2d([height, width], None, None)?)?)
}

/// What was kept of captions under a name, one behind the other along a new first axis.
fn stacked(captions: &[&Tensors], network: Component, name: &'static str) -> Result<Tensor> {
    let each: Vec<&Tensor> = captions.iter().map(|kept| tensor(kept, network, name)).collect::<Result<_>>()?;
    Ok(Tensor::f_stack(&each, 0)?)
}

/// States of captions of any lengths side by side: as long as the longest is when it is filled up to a multiple, `[captions,
/// tokens, width]` on the host, with zeros behind a caption's own; and how many each has.
fn side_by_side(captions: &[&Tensors], multiple: usize) -> Result<(Tensor, Vec<i64>)> {
    let states: Vec<&Tensor> =
        captions.iter().map(|kept| tensor(kept, Component::TEXT_ENCODER, STATES)).collect::<Result<_>>()?;
    let lengths: Vec<i64> = states.iter().map(|states| Ok(states.size2()?.0)).collect::<Result<_>>()?;
    let longest = lengths.iter().map(|&length| (length as usize).next_multiple_of(multiple)).max().unwrap_or(0);
    let behind = |length: i64| [0, 0, 0, longest as i64 - length];
    let long = states.iter().zip(&lengths).map(|(states, &length)| states.f_constant_pad_nd(behind(length)));
    Ok((Tensor::f_stack(&long.collect::<std::result::Result<Vec<_>, _>>()?, 0)?, lengths))
}

/// Captions' states side by side, and how many each has, where they differ.
fn ragged(captions: &[&Tensors], device: Device) -> Result<Inputs> {
    let (states, lengths) = side_by_side(captions, 1)?;
    let longest = states.size3()?.1;
    let ragged = lengths.iter().any(|&length| length != longest);
    let lengths = ragged.then(|| upload(&Tensor::from_slice(&lengths), device)).transpose()?;
    Ok(Inputs::default().with(STATES, Some(upload(&states, device)?)).with(LENGTHS, lengths))
}

fn missing(network: Component, name: &'static str) -> Error {
    Error::MissingEncoding { network, name }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_of_models;
