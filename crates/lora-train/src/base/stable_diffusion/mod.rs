//! Stable Diffusion 1.x and 2.x: a text encoder, a U-Net that denoises latents, an autoencoder. What tells the two apart is the
//! few values of [`Kind`].

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_core::random::Stream;
use lora_core::{Component, DType};
use lora_data::source::Example;
use lora_data::tokenizer::{ClipTokenizer, Padding};
use lora_io::checkpoint::Checkpoint;
use lora_io::family::{sd1, sd2};
use lora_io::metadata::TrainingRecord;
use lora_models::diffusion::{NoiseSchedule, Prediction, Sampler, noise_schedule};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{ClipConfig, ClipTextEncoder, LatentDistribution, Unet, VaeConfig, load_unet};
use lora_models::weights::{Held, Weights};
use lora_torch::tch::{Device, Kind as Number, Tensor, no_grad_guard};
use lora_torch::tensor::{from_f32, kind_of, upload};

use super::autoencoder::{Autoencoder, latent_mask, sample_latents};
use super::captions::{TextEncoding, Tokens};
use super::{
    Base, Encoded, Inputs, Item, Network, Opening, PICTURES, Prompt, Registration, Sample, Subject, Tensors, is_finite,
};
use crate::config::keys::stable_diffusion::KEYS;
use crate::config::{SampleConfig, TrainConfig};
use crate::loss::{Denoising, LossWeights};
use crate::{Error, Result};

/// What makes a run of theirs smaller.
const REMEDIES: &str = "a lower max_resolution (512 to 448 to 384), train_text_encoder = false";

/// Stable Diffusion 1.x.
pub(super) const SD1: Registration = Registration {
    family: &sd1::FAMILY,
    keys: KEYS,
    data: PICTURES,
    remedies: REMEDIES,
    open: |opening| {
        let kind = Kind { padding: Padding::End, exact_gelu: false, predicts: Some(Prediction::Epsilon) };
        Ok(Box::new(StableDiffusion::open(opening, kind)?))
    },
};

/// Stable Diffusion 2.x: OpenCLIP's text encoder; bases of 512 px predict the noise, those of 768 px the velocity.
pub(super) const SD2: Registration = Registration {
    family: &sd2::FAMILY,
    keys: KEYS,
    data: PICTURES,
    remedies: REMEDIES,
    open: |opening| {
        let kind = Kind { padding: Padding::Zero, exact_gelu: true, predicts: None };
        Ok(Box::new(StableDiffusion::open(opening, kind)?))
    },
};

const UNET: Component = Component::UNET;
const TEXT_ENCODER: Component = Component::TEXT_ENCODER;
const VAE: Component = Component::VAE;

/// Timesteps at which an item is judged, spread evenly.
const JUDGED_TIMESTEPS: usize = 16;

/// What differs between the two, where files do not say.
#[derive(Debug, Clone, Copy)]
struct Kind {
    /// What rows of tokens are filled up with.
    padding: Padding,
    /// Whether the text encoder has the exact GELU.
    exact_gelu: bool,
    /// What the U-Net predicts; `None` where there are both.
    predicts: Option<Prediction>,
}

/// A base of one of the two.
#[derive(Debug)]
struct StableDiffusion {
    kind: Kind,
    networks: [Network; 3],
    checkpoint: Arc<Checkpoint>,
    device: Device,
    precision: DType,
    config: TrainConfig,
    schedule: NoiseSchedule,
    text: TextEncoding,
    autoencoder: Option<Autoencoder>,
    text_encoder: Option<ClipTextEncoder>,
    unet: Option<Unet>,
}

impl StableDiffusion {
    fn open(opening: &Opening<'_>, kind: Kind) -> Result<Self> {
        let config = opening.config;
        let network = |component, title, trains, encodes| Network { component, title, trains, encodes };
        let text = TextEncoding {
            tokenizer: ClipTokenizer::new(config.text_cleaning).padded_with(kind.padding),
            chunks: config.caption_chunks(),
            clip_skip: config.clip_skip,
            weighted: config.weighted_captions,
        };
        Ok(Self {
            kind,
            networks: [
                network(VAE, Autoencoder::TITLE, false, Some(Subject::Examples)),
                network(TEXT_ENCODER, "text encoder", config.train_text_encoder, Some(Subject::Captions)),
                network(UNET, "U-Net", config.train_unet, None),
            ],
            schedule: schedule(config, &opening.checkpoint, kind)?,
            checkpoint: Arc::clone(&opening.checkpoint),
            device: opening.device,
            precision: opening.precision,
            config: config.clone(),
            text,
            autoencoder: None,
            text_encoder: None,
            unet: None,
        })
    }

    fn unet(&self) -> Result<&Unet> {
        self.unet.as_ref().ok_or(Error::NotLoaded { network: "U-Net" })
    }

    fn text_encoder(&self) -> Result<&ClipTextEncoder> {
        self.text_encoder.as_ref().ok_or(Error::NotLoaded { network: "text encoder" })
    }

    fn autoencoder(&self) -> Result<Autoencoder> {
        Ok(Autoencoder::load(&self.checkpoint, self.precision, self.device)?.in_tiles(self.config.vae_tiling))
    }

    fn vae_config(&self) -> Result<VaeConfig> {
        Ok(VaeConfig::detect(self.checkpoint.component(VAE)?)?)
    }

    fn load_text_encoder(&self, held: Held) -> Result<ClipTextEncoder> {
        let component = self.checkpoint.component(TEXT_ENCODER)?;
        let mut config = ClipConfig::detect(component)?;
        if component.config().is_none() {
            config.exact_gelu = self.kind.exact_gelu;
        }
        if self.config.clip_skip > config.layers {
            return Err(lora_models::Error::Input {
                what: "clip_skip",
                expected: format!("1 to {}", config.layers),
                found: self.config.clip_skip.to_string(),
            }
            .into());
        }
        let weights = Weights::new(component, kind_of(self.precision), self.device).held(held);
        Ok(ClipTextEncoder::new(&weights, config)?)
    }

    /// `[batch, 4, height, width]` f32 on the device, scaled, and how much each place counts, `[batch, 1, height, width]`, where
    /// any item has a mask.
    fn latents(&self, items: &[Item]) -> Result<(Tensor, Option<Tensor>)> {
        let of = |item: &Item| -> Result<(Tensor, Option<Tensor>)> {
            let encoded = item.encoded.get(&VAE).ok_or_else(|| missing(VAE, "latents"))?;
            Ok((upload(tensor(encoded, VAE, "latents")?, self.device)?, encoded.get("mask").map(Tensor::shallow_clone)))
        };
        let (latents, masks): (Vec<_>, Vec<_>) = items.iter().map(of).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let latents = Tensor::f_stack(&latents, 0)?;
        if masks.iter().all(Option::is_none) {
            return Ok((latents, None));
        }
        let (_, _, height, width) = latents.size4()?;
        let full = Tensor::f_ones([1, height, width], (Number::Float, Device::Cpu))?;
        let masks: Vec<&Tensor> = masks.iter().map(|mask| mask.as_ref().unwrap_or(&full)).collect();
        let masks = upload(&Tensor::f_stack(&masks, 0)?, self.device)?;
        Ok((latents, Some(masks)))
    }

    /// Standard normal noise of each item, with its offset, `[batch, 4, height, width]`.
    fn noise(&self, items: &[Item], (count, channels, height, width): (i64, i64, i64, i64)) -> Result<Tensor> {
        let plane = (height * width) as usize;
        let mut noise = Vec::with_capacity(count as usize * channels as usize * plane);
        for item in items {
            let mut own = item.draw.at("noise").normals(channels as usize * plane);
            if self.config.noise_offset > 0.0 {
                let offsets = item.draw.at("noise_offset").normals(channels as usize);
                for (plane, offset) in own.chunks_exact_mut(plane).zip(offsets) {
                    plane.iter_mut().for_each(|value| *value += self.config.noise_offset as f32 * offset);
                }
            }
            noise.extend(own);
        }
        Ok(from_f32(&noise, &[count, channels, height, width].map(|side| side as usize), self.device)?)
    }

    /// The captions of a batch: as tokens where the text encoder trains, else as states, made anew where captions change.
    fn captions(&self, items: &[Item]) -> Result<Captions> {
        let captions: Vec<&str> = items.iter().map(|item| item.caption.as_str()).collect();
        if self.config.train_text_encoder {
            return Ok(Captions::Tokens(self.text.tokens(&captions, self.device)?));
        }
        let kept: Option<Vec<&Tensors>> = items.iter().map(|item| item.encoded.get(&TEXT_ENCODER)).collect();
        let Some(kept) = kept else {
            let _guard = no_grad_guard();
            let encoder = self.text_encoder()?;
            return Ok(Captions::States(self.text.states(encoder, &captions, self.device, &Pass::default())?));
        };
        let states = kept.into_iter().map(|kept| tensor(kept, TEXT_ENCODER, "states")).collect::<Result<Vec<_>>>()?;
        Ok(Captions::States(upload(&Tensor::f_cat(&states, 0)?, self.device)?))
    }

    fn states_of(&self, encoded: &BTreeMap<Component, Tensors>) -> Result<Tensor> {
        let encoded = encoded.get(&TEXT_ENCODER).ok_or_else(|| missing(TEXT_ENCODER, "states"))?;
        Ok(tensor(encoded, TEXT_ENCODER, "states")?.f_to_device(self.device)?)
    }
}

/// Captions of a micro-batch.
enum Captions {
    /// Of a text encoder that trains.
    Tokens(Tokens),
    /// Of one that does not, encoded.
    States(Tensor),
}

impl Base for StableDiffusion {
    fn networks(&self) -> &[Network] {
        &self.networks
    }

    fn load(&mut self, network: Component, held: Held) -> Result<()> {
        match network {
            VAE => self.autoencoder = Some(self.autoencoder()?),
            TEXT_ENCODER => self.text_encoder = Some(self.load_text_encoder(held)?),
            _ => {
                let kind = kind_of(self.precision);
                self.unet = Some(load_unet(&self.checkpoint, kind, self.device, held)?);
            }
        }
        Ok(())
    }

    fn unload(&mut self, network: Component) {
        match network {
            VAE => self.autoencoder = None,
            TEXT_ENCODER => self.text_encoder = None,
            _ => self.unet = None,
        }
    }

    fn is_loaded(&self, network: Component) -> bool {
        match network {
            VAE => self.autoencoder.is_some(),
            TEXT_ENCODER => self.text_encoder.is_some(),
            _ => self.unet.is_some(),
        }
    }

    fn adaptable(&mut self, network: Component) -> Option<&mut dyn Adaptable> {
        match network {
            TEXT_ENCODER => self.text_encoder.as_mut().map(|network| network as &mut dyn Adaptable),
            UNET => self.unet.as_mut().map(|network| network as &mut dyn Adaptable),
            _ => None,
        }
    }

    fn learning_rate(&self, network: Component) -> f64 {
        if network == UNET { self.config.unet_lr } else { self.config.text_encoder_lr }
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
                let states = self.text.states(self.text_encoder()?, &[caption], self.device, &Pass::default())?;
                match is_finite(&states)? {
                    true => Ok(Tensors::from([("states".into(), states)])),
                    false => Err(Error::NotFinite {
                        stage: "the text encoder".into(),
                        place: format!(" for the caption {caption:?}"),
                        remedy: "use precision = \"bf16\" or \"fp32\"",
                    }),
                }
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
                let TextEncoding { tokenizer, chunks, clip_skip, weighted } = &self.text;
                let settings = format!("{chunks} {clip_skip} {weighted} {tokenizer:?}");
                format!("{hash} {:?} {:?} {device:?} {settings}", kind_of(self.precision), config.base_storage)
            }
        })
    }

    fn draw(&self, network: Component, encoded: &Tensors, draw: &Stream) -> Result<Tensors> {
        let part = |name: &'static str| Ok::<_, Error>(tensor(encoded, network, name)?.shallow_clone());
        let distribution = LatentDistribution { mean: part("mean")?, log_variance: part("log_variance")? };
        let latents = sample_latents(&distribution, self.vae_config()?.scaling_factor, &draw.at("latent"))?;
        let mut drawn = Tensors::from([("latents".to_owned(), latents)]);
        if let Some(mask) = encoded.get("mask") {
            drawn.insert("mask".into(), mask.shallow_clone());
        }
        Ok(drawn)
    }

    fn caption_length(&self, caption: &str) -> Option<usize> {
        Some(self.text.tokenizer.encode(caption).len())
    }

    fn inputs(&self, items: &[Item]) -> Result<Inputs> {
        let (latents, mask) = self.latents(items)?;
        let noise = self.noise(items, latents.size4()?)?;
        let timesteps: Vec<usize> =
            items.iter().map(|item| item.draw.at("timestep").below(NoiseSchedule::TIMESTEPS as u64) as usize).collect();
        let captions = self.captions(items)?;
        let weights: Vec<f64> = items.iter().map(|item| item.weight).collect();
        let weights = LossWeights { min_snr_gamma: self.config.min_snr_gamma, items: &weights, mask: mask.as_ref() };
        let denoising = Denoising::new(self.unet()?, &self.schedule, &latents, &noise, &timesteps, &weights)?;
        let inputs = denoising.into_inputs();
        Ok(match captions {
            Captions::Tokens(tokens) => inputs.with("tokens", Some(tokens.rows)).with("token_weights", tokens.weights),
            Captions::States(states) => inputs.with("states", Some(states)),
        })
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
        let states = self.states_of(&item.encoded)?.f_repeat([count, 1, 1])?;
        let denoising = Denoising::new(self.unet()?, &self.schedule, &many, &noise, &times, &LossWeights::default())?;
        Ok(denoising.into_inputs().with("states", Some(states)))
    }

    fn loss(&self, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let context = match inputs.find("states") {
            Some(states) => states,
            None => {
                let weights = inputs.find("token_weights").map(Tensor::shallow_clone);
                let tokens = Tokens { rows: inputs.get("tokens")?.shallow_clone(), weights };
                &self.text.encode(self.text_encoder()?, &tokens, pass)?
            }
        };
        Denoising::of(inputs)?.loss(self.unet()?, context, pass)
    }

    fn culprit(&self, items: &[Item]) -> Result<Option<(&'static str, &'static str)>> {
        let _guard = no_grad_guard();
        if !is_finite(&self.latents(items)?.0)? {
            return Ok(Some(("the VAE's latents", "the base model's autoencoder or a picture is damaged")));
        }
        let states = match self.captions(items)? {
            Captions::Tokens(tokens) => self.text.encode(self.text_encoder()?, &tokens, &Pass::default())?,
            Captions::States(states) => states,
        };
        let remedy = "use precision = \"bf16\" or \"fp32\", or a lower learning_rate";
        Ok((!is_finite(&states)?).then_some(("the text encoder", remedy)))
    }

    fn sample(&mut self, prompts: &[Prompt], config: &SampleConfig, beside_recordings: bool) -> Result<Vec<Sample>> {
        let _guard = no_grad_guard();
        let vae = self.vae_config()?;
        let (width, height) = (config.resolution.0 / vae.factor(), config.resolution.1 / vae.factor());
        let sampler = Sampler::new(config.sampler, &self.schedule, config.steps)?;
        let (pass, unet) = (Pass::default(), self.unet()?);
        // The autoencoder comes when all latents are there, which are small, so that it is never beside the U-Net at work.
        let mut all = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let draw = Stream::new(config.seed).at("sample").with(index as u64);
            let noise = draw.clone().normals(vae.latent_channels * height * width);
            let noise = from_f32(&noise, &[1, vae.latent_channels, height, width], self.device)?;
            let context = Tensor::f_cat(&[self.states_of(&prompt.without)?, self.states_of(&prompt.with)?], 0)?;
            all.push(sampler.sample(&noise, |latents, timestep| {
                let both = unet.forward(&Tensor::f_cat(&[latents, latents], 0)?, &[timestep; 2], &context, &pass)?;
                let halves = both.f_chunk(2, 0)?;
                sampler.guided(&halves[0], &halves[1], config.guidance_scale)
            })?);
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
        let config = &self.config;
        record.unet_lr = config.train_unet.then_some(config.unet_lr);
        record.text_encoder_lr = config.train_text_encoder.then_some(config.text_encoder_lr);
        record.clip_skip = (config.clip_skip > 1).then_some(config.clip_skip);
        record.max_token_length = (config.max_token_length > 75).then_some(config.max_token_length);
        record.noise_offset = (config.noise_offset > 0.0).then_some(config.noise_offset);
        record.min_snr_gamma = config.min_snr_gamma;
        record.text_cleaning = config.text_cleaning.name().into();
        record.velocity = self.schedule.prediction() == Prediction::Velocity;
    }
}

/// The noise schedule, with what the U-Net predicts: as the configuration says, or a mark in the file, the scheduler of a
/// folder or the file's metadata; what all bases of a kind predict is told last. Nothing is guessed.
fn schedule(config: &TrainConfig, checkpoint: &Checkpoint, kind: Kind) -> Result<NoiseSchedule> {
    let asked = config.v_parameterization;
    let marked = checkpoint.is_marked("v_pred");
    if asked.is_none() && !marked && checkpoint.scheduler().is_some() {
        return Ok(noise_schedule(checkpoint)?);
    }
    let labelled = checkpoint.family().labels.and_then(|labels| {
        let architecture = checkpoint.metadata().get("modelspec.architecture")?;
        [false, true].into_iter().find(|&velocity| labels.architecture(velocity) == architecture)
    });
    let typed = match checkpoint.metadata().get("modelspec.prediction_type").map(String::as_str) {
        Some("v") => Some(true),
        Some("epsilon") => Some(false),
        _ => None,
    };
    let usual = kind.predicts.map(|prediction| prediction == Prediction::Velocity);
    let velocity = asked.or(marked.then_some(true)).or(typed).or(labelled).or(usual);
    let Some(velocity) = velocity else {
        return Err(Error::PredictionUnknown { path: checkpoint.path().to_owned(), family: checkpoint.family().title });
    };
    let schedule = NoiseSchedule::new(if velocity { Prediction::Velocity } else { Prediction::Epsilon });
    match checkpoint.is_marked("ztsnr") && velocity {
        true => Ok(schedule.with_zero_terminal_snr()?),
        false => Ok(schedule),
    }
}

fn tensor<'t>(encoded: &'t Tensors, network: Component, name: &'static str) -> Result<&'t Tensor> {
    encoded.get(name).ok_or_else(|| missing(network, name))
}

fn missing(network: Component, name: &'static str) -> Error {
    Error::MissingEncoding { network, name }
}
