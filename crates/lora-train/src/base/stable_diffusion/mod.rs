//! Stable Diffusion 1.x, 2.x and XL: one or two text encoders, a U-Net that denoises latents, an autoencoder. What
//! tells them apart is the few values of [`Kind`].
//!
//! | here | what |
//! |---|---|
//! | `text` | captions through the text encoders |
//! | `prediction` | the noise schedule and what the U-Net predicts, as files and keys say it |
//! | `samples` | from noise along a sampler's way to pictures |
//! | `sliders` | the tensors that concept sliders are trained on |

mod prediction;
mod samples;
mod sliders;
mod text;

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_core::random::Stream;
use lora_core::{Component, DType};
use lora_data::Sample as PictureSample;
use lora_data::source::{Example, Shape};
use lora_data::tokenizer::Padding;
use lora_io::checkpoint::Checkpoint;
use lora_io::family::{sd1, sd2, sdxl};
use lora_io::metadata::TrainingRecord;
use lora_models::diffusion::flow::{Density, NoiseLevels, Shift};
use lora_models::diffusion::{NoiseSchedule, Prediction};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{Conditions, LatentDistribution, Unet, VaeConfig, load_unet};
use lora_models::weights::Held;
use lora_torch::tch::{Device, Kind as Number, Tensor, no_grad_guard};
use lora_torch::tensor::{from_f32, kind_of};

use self::text::{EncoderKind, InputNames, Reads, Text, TextEncoder};
use super::autoencoder::{Autoencoder, latent_mask, latents_of, sample_latents};
use super::levels;
use super::noise::NoiseSettings;
use super::prior::{self, Prior};
use super::slider::{self, Slider};
use super::{
    Base, Encoded, Inputs, Item, Network, Opening, PICTURES, Prompt, Registration, Sample, Subject, Tensors, is_finite,
};
use crate::config::keys::{sdxl as sdxl_keys, stable_diffusion as keys};
use crate::config::{SampleConfig, TrainConfig};
use crate::difference::Difference;
use crate::loss::{Denoising, LossWeights};
use crate::{Error, Result};

/// What makes a run of theirs smaller.
const REMEDIES: &str = "a lower max_resolution (512 to 448 to 384), train_text_encoder = false";

/// Stable Diffusion 1.x.
pub(super) const SD1: Registration = Registration {
    family: &sd1::FAMILY,
    keys: keys::KEYS,
    data: PICTURES,
    remedies: REMEDIES,
    open: |opening| Ok(Box::new(StableDiffusion::open(opening, &SD1_KIND)?)),
};

/// Stable Diffusion 2.x: OpenCLIP's text encoder; bases of 512 px predict the noise, those of 768 px the velocity.
pub(super) const SD2: Registration = Registration {
    family: &sd2::FAMILY,
    keys: keys::KEYS,
    data: PICTURES,
    remedies: REMEDIES,
    open: |opening| Ok(Box::new(StableDiffusion::open(opening, &SD2_KIND)?)),
};

/// Stable Diffusion XL and the many bases that were trained from it: two text encoders, sizes beside the text.
pub(super) const SDXL: Registration = Registration {
    family: &sdxl::FAMILY,
    keys: sdxl_keys::KEYS,
    data: PICTURES,
    remedies: "a lower max_resolution (1024 to 896 to 768), train_text_encoder = false",
    open: |opening| Ok(Box::new(StableDiffusion::open(opening, &SDXL_KIND)?)),
};

static SD1_KIND: Kind = Kind {
    encoders: &[EncoderKind {
        component: TEXT_ENCODER,
        title: "text encoder",
        padding: Padding::End,
        exact_gelu: false,
        pools: false,
        keys: None,
        inputs: InputNames::FIRST,
    }],
    reads: Reads::Normed,
    reads_sizes: false,
    predicts: Some(Prediction::Epsilon),
};

static SD2_KIND: Kind = Kind {
    encoders: &[EncoderKind {
        component: TEXT_ENCODER,
        title: "text encoder",
        padding: Padding::Zero,
        exact_gelu: true,
        pools: false,
        keys: None,
        inputs: InputNames::FIRST,
    }],
    reads: Reads::Normed,
    reads_sizes: false,
    predicts: None,
};

static SDXL_KIND: Kind = Kind {
    encoders: &[
        EncoderKind {
            component: TEXT_ENCODER,
            title: "first text encoder",
            padding: Padding::End,
            exact_gelu: false,
            pools: false,
            keys: Some(["train_text_encoder_1", "text_encoder_1_lr"]),
            inputs: InputNames::FIRST,
        },
        EncoderKind {
            component: Component::TEXT_ENCODER_2,
            title: "second text encoder",
            padding: Padding::Zero,
            exact_gelu: true,
            pools: true,
            keys: Some(["train_text_encoder_2", "text_encoder_2_lr"]),
            inputs: InputNames::SECOND,
        },
    ],
    reads: Reads::Penultimate,
    reads_sizes: true,
    predicts: Some(Prediction::Epsilon),
};

const UNET: Component = Component::UNET;
const TEXT_ENCODER: Component = Component::TEXT_ENCODER;
const VAE: Component = Component::VAE;

/// Guidance of samples where nothing says it.
const GUIDANCE: f64 = 7.5;

/// Timesteps at which an item is judged, spread evenly.
const JUDGED_TIMESTEPS: usize = 16;

/// What differs between them, where files do not say.
#[derive(Debug)]
struct Kind {
    /// Their text encoders, in the order in which the U-Net reads their states side by side.
    encoders: &'static [EncoderKind],
    /// Which states of them the U-Net reads.
    reads: Reads,
    /// Whether the U-Net reads a pooled vector and the sizes of the picture and of its part that is shown.
    reads_sizes: bool,
    /// What the U-Net predicts where nothing says it; `None` where that would be a guess.
    predicts: Option<Prediction>,
}

/// A base of one of them.
#[derive(Debug)]
struct StableDiffusion {
    kind: &'static Kind,
    networks: Vec<Network>,
    checkpoint: Arc<Checkpoint>,
    device: Device,
    precision: DType,
    config: TrainConfig,
    schedule: NoiseSchedule,
    levels: NoiseLevels,
    noise: NoiseSettings,
    difference: Difference,
    /// By what it is known what the U-Net predicts, for people.
    known_by: &'static str,
    prior: Prior,
    slider: Option<Slider>,
    autoencoder: Option<Autoencoder>,
    encoders: Vec<TextEncoder>,
    unet: Option<Unet>,
}

impl StableDiffusion {
    fn open(opening: &Opening<'_>, kind: &'static Kind) -> Result<Self> {
        let config = opening.config;
        let network = |component, title, trains, encodes| Network { component, title, trains, encodes };
        let encoders: Vec<_> = kind.encoders.iter().map(|own| TextEncoder::new(own, kind.reads, config)).collect();
        // Prompts alone need no autoencoder.
        let of_pictures = config.sliders.is_empty();
        let autoencoder = of_pictures.then(|| network(VAE, Autoencoder::TITLE, false, Some(Subject::Examples)));
        let mut networks: Vec<Network> = autoencoder.into_iter().collect();
        networks.extend(encoders.iter().map(|encoder| {
            network(encoder.kind.component, encoder.kind.title, encoder.trains, Some(Subject::Captions))
        }));
        networks.push(network(UNET, "U-Net", config.train_unet, None));
        if networks.iter().all(|network| !network.trains) {
            return Err(Error::NothingTrains);
        }
        let (schedule, known_by) = prediction::schedule(config, &opening.checkpoint, kind.predicts)?;
        Ok(Self {
            kind,
            networks,
            schedule,
            levels: levels::of(config, None)?,
            noise: NoiseSettings::of(config)?,
            difference: Difference::of_diffusion(config),
            known_by,
            checkpoint: Arc::clone(&opening.checkpoint),
            device: opening.device,
            precision: opening.precision,
            config: config.clone(),
            prior: Prior::of(config),
            slider: Slider::of(config),
            autoencoder: None,
            encoders,
            unet: None,
        })
    }

    fn unet(&self) -> Result<&Unet> {
        self.unet.as_ref().ok_or(Error::NotLoaded { network: "U-Net" })
    }

    fn encoder(&self, component: Component) -> Result<&TextEncoder> {
        self.encoders.iter().find(|own| own.kind.component == component).ok_or_else(|| missing(component, "captions"))
    }

    fn autoencoder(&self) -> Result<Autoencoder> {
        Ok(Autoencoder::load(&self.checkpoint, self.precision, self.device)?.in_tiles(self.config.vae_tiling))
    }

    fn vae_config(&self) -> Result<VaeConfig> {
        Ok(VaeConfig::detect(&self.checkpoint)?)
    }

    /// The timestep of a visit with these draws.
    fn timestep(&self, draw: &Stream) -> usize {
        levels::timestep(&self.levels, &draw.at("timestep"))
    }

    /// Adds the captions of a batch, for each text encoder as it takes them or as it left them.
    fn with_captions(&self, mut inputs: Inputs, items: &[Item]) -> Result<Inputs> {
        let captions: Vec<&str> = items.iter().map(|item| item.caption.as_str()).collect();
        for encoder in &self.encoders {
            let kept = items.iter().map(|item| item.encoded.get(&encoder.kind.component)).collect();
            inputs = encoder.with_captions(inputs, &captions, kept, self.device)?;
        }
        Ok(inputs)
    }

    /// What was kept of one caption.
    fn kept(&self, encoded: &BTreeMap<Component, Tensors>) -> Result<Text> {
        let of = |encoder: &TextEncoder| {
            let component = encoder.kind.component;
            let kept = encoded.get(&component).ok_or_else(|| missing(component, "states"))?;
            encoder.kept(&[kept], self.device)
        };
        Text::joined(self.encoders.iter().map(of).collect::<Result<_>>()?)
    }

    /// The text of a micro-batch.
    fn text(&self, inputs: &Inputs, pass: &Pass) -> Result<Text> {
        Text::joined(self.encoders.iter().map(|encoder| encoder.of_inputs(inputs, pass)).collect::<Result<_>>()?)
    }

    /// The sizes that the U-Net reads, embedded, `[batch, 1536]`; `None` for one that reads none.
    fn sizes(&self, of: &[[f64; 6]]) -> Result<Option<Tensor>> {
        Ok(self.kind.reads_sizes.then(|| Unet::size_embedding(of, self.device)).transpose()?)
    }

    /// The sizes of items.
    fn item_sizes(&self, items: &[&Tensors]) -> Result<Option<Tensor>> {
        if !self.kind.reads_sizes {
            return Ok(None);
        }
        let of = |kept: &&Tensors| {
            let sizes = Vec::<f64>::try_from(tensor(kept, VAE, SIZES)?.f_to_kind(Number::Double)?)?;
            sizes.try_into().map_err(|_| missing(VAE, SIZES))
        };
        self.sizes(&items.iter().map(of).collect::<Result<Vec<_>>>()?)
    }
}

/// What a U-Net reads beside states: the pooled text with the sizes, `[batch, added]`.
fn added(text: &Text, sizes: Option<&Tensor>) -> Result<Option<Tensor>> {
    let (Some(pooled), Some(sizes)) = (&text.pooled, sizes) else { return Ok(None) };
    Ok(Some(Tensor::f_cat(&[pooled, &sizes.f_to_kind(pooled.kind())?], -1)?))
}

/// What the U-Net is told of a picture of this width and height, all of which is shown.
fn whole(sides: [usize; 2]) -> [f64; 6] {
    let [wide, high] = sides.map(|side| side as f64);
    [high, wide, 0.0, 0.0, high, wide]
}

/// The name under which the sizes of a picture and of its part that is shown are kept.
const SIZES: &str = "sizes";

/// Height and width of a picture in its file, top and left edge of the part that is shown in the picture as it was
/// scaled, and the part's height and width: what SDXL is told (Podell et al., 2023, section 2.2), as diffusers'
/// training scripts tell it.
fn sizes_of(sample: &PictureSample) -> [f32; 6] {
    let (frame, (width, height)) = (sample.frame, sample.size());
    let left = match frame.mirrored {
        true => frame.scaled.0.saturating_sub(frame.offset.0 + width),
        false => frame.offset.0,
    };
    [frame.source.1, frame.source.0, frame.offset.1, left, height, width].map(|side| side as f32)
}

impl Base for StableDiffusion {
    fn networks(&self) -> &[Network] {
        &self.networks
    }

    fn notes(&self) -> Vec<String> {
        let predicts = match self.schedule.prediction() {
            Prediction::Velocity => "the velocity",
            _ => "the noise",
        };
        let zero = if self.schedule.has_zero_terminal_snr() { " with zero terminal SNR" } else { "" };
        vec![format!("the U-Net predicts {predicts}{zero}, as {}", self.known_by)]
    }

    fn unread(&self) -> Vec<String> {
        self.encoders.iter().flat_map(TextEncoder::unread).collect()
    }

    fn load(&mut self, network: Component, held: Held) -> Result<()> {
        match network {
            VAE => self.autoencoder = Some(self.autoencoder()?),
            UNET => self.unet = Some(load_unet(&self.checkpoint, kind_of(self.precision), self.device, held)?),
            _ => {
                let Self { checkpoint, precision, device, .. } = self;
                for encoder in self.encoders.iter_mut().filter(|own| own.kind.component == network) {
                    encoder.load(checkpoint, *precision, *device, held.clone())?;
                }
            }
        }
        Ok(())
    }

    fn unload(&mut self, network: Component) {
        match network {
            VAE => self.autoencoder = None,
            UNET => self.unet = None,
            _ => {
                self.encoders.iter_mut().filter(|own| own.kind.component == network).for_each(|own| own.network = None)
            }
        }
    }

    fn is_loaded(&self, network: Component) -> bool {
        match network {
            VAE => self.autoencoder.is_some(),
            UNET => self.unet.is_some(),
            _ => self.encoder(network).is_ok_and(|encoder| encoder.network.is_some()),
        }
    }

    fn adaptable(&mut self, network: Component) -> Option<&mut dyn Adaptable> {
        match network {
            UNET => self.unet.as_mut().map(|network| network as &mut dyn Adaptable),
            _ => {
                let encoder = self.encoders.iter_mut().find(|own| own.kind.component == network)?;
                encoder.network.as_mut().map(|network| network as &mut dyn Adaptable)
            }
        }
    }

    fn learning_rate(&self, network: Component) -> f64 {
        self.encoder(network).map_or(self.config.unet_lr, |encoder| encoder.learning_rate)
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
                if self.kind.reads_sizes {
                    tensors.insert(SIZES.into(), Tensor::from_slice(&sizes_of(sample)));
                }
                Ok(tensors)
            }
            Encoded::Caption(caption) => {
                let _guard = no_grad_guard();
                let text = self.encoder(network)?.text(&[caption], self.device, &Pass::default())?;
                for tensor in text.tensors() {
                    if !is_finite(tensor)? {
                        return Err(Error::NotFinite {
                            stage: "the text encoder".into(),
                            place: format!(" for the caption {caption:?}"),
                            remedy: "use precision = \"bf16\" or \"fp32\"",
                        });
                    }
                }
                Ok(text.into_tensors())
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
                let settings = self.encoder(network)?.settings();
                format!("{hash} {:?} {:?} {device:?} {settings}", kind_of(self.precision), config.base_storage)
            }
        })
    }

    fn draw(&self, network: Component, encoded: &Tensors, draw: &Stream) -> Result<Tensors> {
        let part = |name: &'static str| Ok::<_, Error>(tensor(encoded, network, name)?.shallow_clone());
        let distribution = LatentDistribution { mean: part("mean")?, log_variance: part("log_variance")? };
        let latents = sample_latents(&distribution, &self.vae_config()?, &draw.at("latent"))?;
        let mut drawn = Tensors::from([("latents".to_owned(), latents)]);
        for name in ["mask", SIZES] {
            if let Some(kept) = encoded.get(name) {
                drawn.insert(name.into(), kept.shallow_clone());
            }
        }
        Ok(drawn)
    }

    fn caption_length(&self, caption: &str) -> Option<usize> {
        Some(self.encoders.first()?.length(caption))
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
        let noise = self.noise.draw(items, &latents.size(), self.device)?;
        let timesteps: Vec<usize> = items.iter().map(|item| self.timestep(&item.draw)).collect();
        let weights: Vec<f64> = items.iter().map(|item| item.weight).collect();
        let weights = LossWeights { items: &weights, mask: mask.as_ref(), ..LossWeights::of(&self.config) };
        let denoising = Denoising::new(
            self.unet()?,
            &self.schedule,
            &latents,
            [&noise.target, &noise.added],
            &timesteps,
            &weights,
        )?;
        let kept: Vec<&Tensors> = items.iter().filter_map(|item| item.encoded.get(&VAE)).collect();
        let inputs = self.with_captions(denoising.into_inputs().with(SIZES, self.item_sizes(&kept)?), items)?;
        self.prior.beside(inputs, items, |asked| self.with_captions(Inputs::default(), asked))
    }

    fn noise_level(&self, draw: &Stream, _shape: Shape) -> Option<f64> {
        Some(self.timestep(draw) as f64 / NoiseSchedule::TIMESTEPS as f64)
    }

    fn validation_inputs(&self, item: &Item) -> Result<Inputs> {
        let count = JUDGED_TIMESTEPS as i64;
        let encoded = item.encoded.get(&VAE).ok_or_else(|| missing(VAE, "latents"))?;
        let (latents, mask) = latents_of(std::slice::from_ref(item), self.device)?;
        let (_, channels, height, width) = latents.size4()?;
        let repeated = |one: &Tensor| one.f_repeat([count, 1, 1, 1]);
        let (many, mask) = (repeated(&latents)?, mask.as_ref().map(repeated).transpose()?);
        let shape = [JUDGED_TIMESTEPS, channels as usize, height as usize, width as usize];
        let noise = from_f32(&item.draw.at("noise").normals(shape.iter().product()), &shape, self.device)?;
        let times: Vec<usize> = (0..JUDGED_TIMESTEPS)
            .map(|step| (2 * step + 1) * NoiseSchedule::TIMESTEPS / (2 * JUDGED_TIMESTEPS))
            .collect();
        let text = self.kept(&item.encoded)?.repeated(count)?;
        let added = added(&text, self.item_sizes(&[encoded; JUDGED_TIMESTEPS])?.as_ref())?;
        let weights = LossWeights { difference: self.difference, mask: mask.as_ref(), ..LossWeights::default() };
        let denoising = Denoising::new(self.unet()?, &self.schedule, &many, [&noise; 2], &times, &weights)?;
        Ok(denoising.into_inputs().with(CONTEXT, Some(text.states)).with(ADDED, added))
    }

    fn loss(&self, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let unet = self.unet()?;
        let answer = |inputs: &Inputs, pass: &Pass| {
            let text = self.text(inputs, pass)?;
            let added = added(&text, inputs.find(SIZES))?;
            let conditions = Conditions { context: &text.states, added: added.as_ref() };
            Ok(unet.forward_embedded(inputs.get("noised")?, inputs.get("times")?, conditions, pass)?)
        };
        if let Some(slider) = &self.slider {
            return slider.loss(inputs, pass, &answer);
        }
        let denoising = Denoising::of(inputs, self.difference.loss)?;
        if let Some(context) = inputs.find(CONTEXT) {
            return denoising.loss(unet, Conditions { context, added: inputs.find(ADDED) }, pass);
        }
        self.prior.loss(inputs, pass, &answer, |answer| denoising.of_answer(answer))
    }

    fn culprit(&self, items: &[Item]) -> Result<Option<(&'static str, &'static str)>> {
        let _guard = no_grad_guard();
        if self.slider.is_none() && !is_finite(&latents_of(items, self.device)?.0)? {
            return Ok(Some(("the VAE's latents", "the base model's autoencoder or a picture is damaged")));
        }
        let text = self.text(&self.with_captions(Inputs::default(), items)?, &Pass::default())?;
        for tensor in text.tensors() {
            if !is_finite(tensor)? {
                let remedy = "use precision = \"bf16\" or \"fp32\", or a lower learning_rate";
                return Ok(Some(("the text encoder", remedy)));
            }
        }
        Ok(None)
    }

    fn sample(&mut self, prompts: &[Prompt], config: &SampleConfig, beside_recordings: bool) -> Result<Vec<Sample>> {
        self.samples(prompts, config, beside_recordings)
    }

    fn record(&self, record: &mut TrainingRecord) {
        let config = &self.config;
        record.unet_lr = config.train_unet.then_some(config.unet_lr);
        record.text_encoder_lr = self.encoders.iter().find(|own| own.trains).map(|own| own.learning_rate);
        record.clip_skip = (config.clip_skip > 1).then_some(config.clip_skip);
        record.max_token_length = (config.max_token_length > 75).then_some(config.max_token_length);
        record.noise_offset = (config.noise_offset > 0.0).then_some(config.noise_offset);
        record.min_snr_gamma = config.min_snr_gamma;
        record.text_cleaning = config.text_cleaning.name().into();
        record.further.extend(prior::record(config));
        record.further.extend(slider::record(config));
        record.velocity = self.schedule.prediction() == Prediction::Velocity;
        record.further.extend(self.noise.record());
        record.further.extend(self.difference.record());
        record.further.extend(LossWeights::of(config).record());
        if self.schedule.has_zero_terminal_snr() {
            record.further.push(("ss_zero_terminal_snr", "True".to_owned()));
        }
        // Even ones need no word.
        if (self.levels.density, self.levels.shift) != (Density::Uniform, Shift::Factor(1.0)) {
            record.further.extend(levels::record(config, None, &self.levels));
        }
    }
}

/// Names of what an item is judged by: its conditions side by side, once for all timesteps.
const CONTEXT: &str = "context";
const ADDED: &str = "added";

fn tensor<'t>(encoded: &'t Tensors, network: Component, name: &'static str) -> Result<&'t Tensor> {
    encoded.get(name).ok_or_else(|| missing(network, name))
}

fn missing(network: Component, name: &'static str) -> Error {
    Error::MissingEncoding { network, name }
}

#[cfg(test)]
mod tests_of_sliders;

#[cfg(test)]
mod tests;
