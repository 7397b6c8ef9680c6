//! Stable Diffusion 1.x, 2.x and XL: one or two text encoders, a U-Net that denoises latents, an autoencoder. What tells them
//! apart is the few values of [`Kind`].
//!
//! | here | what |
//! |---|---|
//! | `text` | captions through the text encoders |
//! | `prediction` | the noise schedule and what the U-Net predicts, as files and keys say it |

mod prediction;
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
use lora_models::diffusion::{NoiseSchedule, Prediction, Sampler};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{Conditions, LatentDistribution, Unet, VaeConfig, load_unet};
use lora_models::weights::Held;
use lora_torch::dry;
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

    /// Latents along a sampler's way from noise `[1, channels, height, width]`, with what was kept of a negative prompt and of a
    /// prompt, and the embedded sizes of the picture where the U-Net reads such. A guidance of 1 asks for no second answer.
    fn denoised(
        &self,
        (sampler, guidance, pass): (&Sampler, f64, &Pass),
        noise: &Tensor,
        fresh: impl FnMut(usize) -> lora_models::Result<Tensor>,
        [without, with]: [&BTreeMap<Component, Tensors>; 2],
        sizes: Option<&Tensor>,
    ) -> Result<Tensor> {
        let unet = self.unet()?;
        let mut texts = vec![self.kept(with)?];
        if guidance != 1.0 {
            texts.insert(0, self.kept(without)?);
        }
        let added = texts.iter().map(|text| added(text, sizes)).collect::<Result<Vec<_>>>()?;
        let added: Vec<Tensor> = added.into_iter().flatten().collect();
        let added = (!added.is_empty()).then(|| Tensor::f_cat(&added, 0)).transpose()?;
        let context = Tensor::f_cat(&texts.iter().map(|text| &text.states).collect::<Vec<_>>(), 0)?;
        let conditions = Conditions { context: &context, added: added.as_ref() };
        Ok(sampler.sample(noise, fresh, |latents, timestep| {
            if texts.len() == 1 {
                return unet.forward(latents, &[timestep], conditions, pass);
            }
            let both = unet.forward(&Tensor::f_cat(&[latents, latents], 0)?, &[timestep; 2], conditions, pass)?;
            let halves = both.f_chunk(2, 0)?;
            sampler.guided(&halves[0], &halves[1], guidance)
        })?)
    }

    /// The tensors of a micro-batch of sliders: of each item latents that are denoised from noise to its timestep.
    fn slider_inputs(&self, slider: &Slider, items: &[Item]) -> Result<Inputs> {
        let _guard = no_grad_guard();
        let (vae, (width, height)) = (self.vae_config()?, slider.size(items)?);
        let shape = [items.len(), vae.latent_channels, height / vae.factor(), width / vae.factor()];
        let noise = self.noise.draw(items, &shape.map(|side| side as i64), self.device)?.added;
        let sizes = whole([width, height]);
        let embedded = self.sizes(&[sizes])?;
        let (mut noised, mut times) = (Vec::new(), Vec::new());
        for (index, item) in items.iter().enumerate() {
            // A dry run goes all the way.
            let timestep = if dry::is_dry(self.device) { 0 } else { self.timestep(&item.draw) };
            let sampler = Sampler::until(&self.schedule, slider.steps(self.device), timestep)?;
            let (empty, noise) = (item.asked(""), noise.f_narrow(0, index as i64, 1)?);
            let way = (&sampler, slider.guidance, &slider.way(item));
            let fresh = |_: usize| Ok(noise.f_zeros_like()?);
            noised.push(self.denoised(way, &noise, fresh, [&empty.encoded, &item.encoded], embedded.as_ref())?);
            times.push(timestep as f64);
        }
        self.with_prompts(slider, items, &noised, &times, self.sizes(&vec![sizes; items.len()])?)
    }

    /// What a U-Net is told of a micro-batch of sliders, with its latents at their timesteps.
    fn with_prompts(
        &self,
        slider: &Slider,
        items: &[Item],
        noised: &[Tensor],
        times: &[f64],
        sizes: Option<Tensor>,
    ) -> Result<Inputs> {
        let inputs = Inputs::default()
            .with("noised", Some(Tensor::f_cat(noised, 0)?))
            .with("times", Some(self.unet()?.time_embedding(times, self.device)?))
            .with(SIZES, sizes);
        let inputs = self.with_captions(inputs, items)?;
        slider.beside(inputs, items, |asked| self.with_captions(Inputs::default(), asked))
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

/// Height and width of a picture in its file, top and left edge of the part that is shown in the picture as it was scaled, and
/// the part's height and width: what SDXL is told (Podell et al., 2023, section 2.2), as diffusers' training scripts tell it.
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
        let latents = tensor(encoded, VAE, "latents")?;
        let (channels, height, width) = latents.size3()?;
        let many = latents.f_to_device(self.device)?.f_unsqueeze(0)?.f_repeat([count, 1, 1, 1])?;
        let shape = [JUDGED_TIMESTEPS, channels as usize, height as usize, width as usize];
        let noise = from_f32(&item.draw.at("noise").normals(shape.iter().product()), &shape, self.device)?;
        let times: Vec<usize> = (0..JUDGED_TIMESTEPS)
            .map(|step| (2 * step + 1) * NoiseSchedule::TIMESTEPS / (2 * JUDGED_TIMESTEPS))
            .collect();
        let text = self.kept(&item.encoded)?.repeated(count)?;
        let added = added(&text, self.item_sizes(&[encoded; JUDGED_TIMESTEPS])?.as_ref())?;
        let weights = LossWeights { difference: self.difference, ..LossWeights::default() };
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
        let _guard = no_grad_guard();
        let vae = self.vae_config()?;
        let (width, height) = (config.resolution.0 / vae.factor(), config.resolution.1 / vae.factor());
        let sampler = Sampler::new(config.sampler, &self.schedule, config.steps)?;
        let guidance = config.guidance_scale.unwrap_or(GUIDANCE);
        let sizes = self.sizes(&[whole([config.resolution.0, config.resolution.1])])?;
        // The autoencoder comes when all latents are there, which are small, so that it is never beside the U-Net at work.
        let mut all = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let draw = Stream::new(config.seed).at("sample").with(index as u64);
            let shape = [1, vae.latent_channels, height, width];
            let normals = |draw: &Stream| from_f32(&draw.clone().normals(shape.iter().product()), &shape, self.device);
            let noise = normals(&draw)?;
            let fresh = |step: usize| Ok(normals(&draw.at("step").with(step as u64))?);
            let way = (&sampler, guidance, &Pass::default());
            all.push(self.denoised(way, &noise, fresh, [&prompt.without, &prompt.with], sizes.as_ref())?);
        }
        // In f32, where fp16 is too little, whole pictures of such sizes take several times the U-Net's own memory.
        let mut decoder = self.autoencoder()?.in_tiles(self.config.vae_tiling || vae.overflows_in_half);
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
mod tests {
    use lora_core::LayerGeometry;
    use lora_core::variant::{Lora, Parameters};
    use lora_data::RgbPicture;
    use lora_data::crop::CropPlan;
    use lora_models::layers::AttachedAdapter;
    use lora_models::synthetic::SyntheticModel;

    use super::*;
    use crate::config::Format;

    /// A tiny base with its text encoder and its U-Net loaded.
    fn tiny(path: &std::path::Path, keys: &[&str]) -> StableDiffusion {
        let text = format!("base_model: {}\ntrain_data_dir: d\noutput_dir: o\n", path.display());
        let config = TrainConfig::from_text(&text, Format::Yaml, keys).unwrap();
        let checkpoint = Arc::new(Checkpoint::open(path).unwrap());
        let opening = Opening::new(&config, &checkpoint, Device::Cpu, DType::F32);
        let mut base = StableDiffusion::open(&opening, &SD1_KIND).unwrap();
        for component in [TEXT_ENCODER, UNET] {
            base.load(component, Held::default()).unwrap();
        }
        base
    }

    /// Random LoRAs of rank 2 on the linear layers of both networks; their factors.
    fn adapted(base: &mut StableDiffusion) -> Vec<Tensor> {
        let mut leaves = Vec::new();
        for component in [TEXT_ENCODER, UNET] {
            let network = base.adaptable(component).unwrap();
            network
                .visit_layers(&mut |layer| {
                    let LayerGeometry::Linear { in_features, out_features } = layer.geometry() else { return };
                    let leaf = |name: &str, shape: [usize; 2]| {
                        let values = Stream::new(7).at(layer.path()).at(name).normals(shape[0] * shape[1]);
                        (from_f32(&values, &shape, Device::Cpu).unwrap() * 0.1).set_requires_grad(true)
                    };
                    let tensors = BTreeMap::from([
                        ("down".to_owned(), leaf("down", [2, in_features])),
                        ("up".to_owned(), leaf("up", [out_features, 2])),
                    ]);
                    leaves.extend(tensors.values().map(Tensor::shallow_clone));
                    let parameters = Parameters { tensors, scale: 0.5 };
                    layer.attach(AttachedAdapter { variant: Arc::new(Lora), parameters });
                })
                .unwrap();
        }
        leaves
    }

    /// The loss and its gradient against the same of two bases apart, one of which never had an adapter.
    #[test]
    fn what_is_kept_are_the_answers_of_the_base_without_its_adapter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base.safetensors");
        SyntheticModel::tiny().write(&path, DType::F32).unwrap();
        let weights =
            ["prior_prompt=a thing", "prior_prompt_weight=0.5", "prior_blank_weight=2", "prior_mask_weight=3"];
        let (mut base, bare) = (tiny(&path, &[&weights[..], &["min_snr_gamma=5"]].concat()), tiny(&path, &[]));
        let leaves = adapted(&mut base);
        let item = |number: u64| {
            let values = |name: &str, count| Stream::new(number).at(name).normals(count);
            let latents = from_f32(&values("latents", 256), &[4, 8, 8], Device::Cpu).unwrap();
            let mask = from_f32(&values("mask", 64), &[1, 8, 8], Device::Cpu).unwrap().sigmoid();
            let drawn = Tensors::from([("latents".to_owned(), latents), ("mask".to_owned(), mask)]);
            Item {
                caption: format!("picture {number}"),
                encoded: BTreeMap::from([(VAE, drawn)]),
                beside: BTreeMap::new(),
                example: None,
                weight: 1.0 + number as f64,
                draw: Stream::new(number),
            }
        };
        let items = [item(1), item(2)];
        let inputs = base.inputs(&items).unwrap();
        let asked = vec!["a thing".to_owned(), String::new()];
        assert_eq!((base.captions("picture 1"), base.figures()), (asked, &["prior_loss"][..]));

        let answer = |base: &StableDiffusion, captions: [&str; 2]| {
            let text = base.encoders[0].text(&captions, Device::Cpu, &Pass::default()).unwrap();
            let (noised, times) = (inputs.get("noised").unwrap(), inputs.get("times").unwrap());
            let conditions = Conditions { context: &text.states, added: None };
            base.unet().unwrap().forward_embedded(noised, times, conditions, &Pass::default()).unwrap()
        };
        let (mask, factors) = (inputs.get("mask").unwrap(), inputs.get("factors").unwrap());
        let mean =
            |squares: Tensor| (squares.flatten(1, -1).mean_dim(1, false, Number::Float) * factors).mean(Number::Float);
        let far = |captions: [&str; 2]| (answer(&base, captions) - answer(&bare, captions).detach()).square();
        let captions = ["picture 1", "picture 2"];
        let kept =
            mean(far(["a thing"; 2])) * 0.5 + mean(far([""; 2])) * 2.0 + mean(far(captions) * (1.0 - mask)) * 3.0;
        let own = mean((answer(&base, captions) - inputs.get("target").unwrap()).square() * mask);
        let gradients = Tensor::run_backward(&[&own + &kept], &leaves, false, false);

        for recompute in [false, true] {
            let told = base.loss(&inputs, &Pass { recompute, ..Pass::default() }).unwrap();
            let near = |found: Tensor, expected: &Tensor| {
                let (found, expected) = (f64::try_from(found).unwrap(), f64::try_from(expected).unwrap());
                assert!((found - expected).abs() < 1e-5 * expected, "{found} {expected}");
            };
            near(told.get(0), &(&own + &kept));
            near(told.get(1), &kept);
            // Blocks that are computed again hand gradients to the leaves themselves.
            told.get(0).backward();
            for (leaf, expected) in leaves.iter().zip(&gradients) {
                let far = f64::try_from((leaf.grad() - expected).norm()).unwrap();
                assert!(far <= 1e-3 * f64::try_from(expected.norm()).unwrap() + 1e-5, "recompute {recompute}: {far}");
                let _ = leaf.grad().zero_();
            }
        }
        assert!(f64::try_from(&kept).unwrap() > 1e-4);
    }

    #[test]
    fn layers_behind_the_states_that_are_read_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base.safetensors");
        SyntheticModel::tiny_sdxl().write(&path, DType::F16).unwrap();
        let text = format!("base_model: {}\ntrain_data_dir: d\noutput_dir: o\n", path.display());
        let config = TrainConfig::from_text::<&str>(&text, Format::Yaml, &[]).unwrap();
        let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
        let opening = Opening::new(&config, &checkpoint, Device::Cpu, DType::F32);
        let mut base = StableDiffusion::open(&opening, &SDXL_KIND).unwrap();
        for component in [TEXT_ENCODER, Component::TEXT_ENCODER_2] {
            base.load(component, Held::default()).unwrap();
        }
        // Of two layers the last; of the second encoder's the pooled vector comes from it.
        assert_eq!(base.unread(), ["text_encoder.text_model.encoder.layers.1."]);
    }

    #[test]
    fn sizes_are_those_of_the_part_that_is_shown() {
        let picture = RgbPicture::new(20, 10, vec![7; 600]).unwrap();
        let whole = PictureSample::new(picture, None).unwrap();
        assert_eq!(sizes_of(&whole), [10.0, 20.0, 0.0, 0.0, 10.0, 20.0]);
        let plan = CropPlan { resized: (16, 8), offset: (5, 1), target: (8, 6) };
        let part = whole.crop(&plan).unwrap();
        assert_eq!(sizes_of(&part), [10.0, 20.0, 1.0, 5.0, 6.0, 8.0]);
        // Of a mirrored picture the left edge is what was the right one: 16 - 5 - 8.
        assert_eq!(sizes_of(&part.mirror()), [10.0, 20.0, 1.0, 3.0, 6.0, 8.0]);
    }
}
