//! Bases that are trained by flow matching: a network that answers with velocities between pictures' latents and noise,
//! an encoder of captions, an autoencoder. What tells them apart is the few values of [`Kind`](kind::Kind).
//!
//! | here | what |
//! |---|---|
//! | `z_image` | Z-Image's kind |
//! | `flux`, `chroma`, `flux2`, `sd3` | FLUX.1's, Chroma's, FLUX.2's, Stable Diffusion 3's |
//! | `qwen_image`, `anima` | Qwen-Image's, Anima's |
//! | `kind` | what tells kinds apart, and what a network answers to |
//! | `checks` | what is said of a base before it is loaded |
//! | `text` | the text encoders of a base |
//! | `language`, `conditioned`, `clip`, `t5` | captions through an encoder of each kind |
//! | `layout` | captions of a batch as tensors |
//! | `samples`, `sliders` | from noise to pictures, and part of that way |

mod anima;
mod checks;
mod chroma;
mod clip;
mod conditioned;
mod flux;
mod flux2;
mod kind;
mod language;
mod layout;
mod qwen_image;
mod samples;
mod sd3;
mod sliders;
mod t5;
mod text;
mod z_image;

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_core::random::Stream;
use lora_core::{Component, DType};
use lora_data::source::{Example, Shape};
use lora_io::checkpoint::{Checkpoint, ComponentWeights};
use lora_io::family::anima::TEXT_CONDITIONER;
use lora_io::metadata::TrainingRecord;
use lora_models::diffusion::flow::NoiseLevels;
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{LatentDistribution, VaeConfig};
use lora_models::weights::Held;
use lora_torch::tch::{Device, Tensor, no_grad_guard};
use lora_torch::tensor::{from_f32, kind_of};

use self::checks::check_sides;
use self::kind::{GUIDANCE, Guidance, Kind, Transformer};
use self::text::CaptionReaders;
use super::autoencoder::{Autoencoder, latent_mask, latents_of, sample_latents};
use super::levels;
use super::noise::NoiseSettings;
use super::prior::{self, Prior};
use super::slider::{self, Slider};
use super::{Base, Encoded, Inputs, Item, Network, Opening, Prompt, Sample, Subject, Tensors, is_finite, shallow};
use crate::config::{SampleConfig, TrainConfig};
use crate::difference::Difference;
use crate::velocity::VelocityLoss;
use crate::{Error, Result};

pub(super) use self::anima::ANIMA;
pub(super) use self::checks::check_parts;
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
        check_sides(&base.config, base.vae.factor() * kind.patch)?;
        Ok(base)
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

    /// Captions of a batch as the network takes them: those that were kept, others as the encoder, which stays then,
    /// makes them now.
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
        let (latents, mask) = latents_of(std::slice::from_ref(item), self.device)?;
        let (_, channels, height, width) = latents.size4()?;
        let repeated = |one: &Tensor| one.f_repeat([JUDGED_LEVELS as i64, 1, 1, 1]);
        let (many, mask) = (repeated(&latents)?, mask.as_ref().map(repeated).transpose()?);
        let shape = [JUDGED_LEVELS, channels as usize, height as usize, width as usize];
        let noise = from_f32(&item.draw.at("noise").normals(shape.iter().product()), &shape, self.device)?;
        let levels: Vec<f64> =
            (0..JUDGED_LEVELS).map(|step| (2 * step + 1) as f64 / (2 * JUDGED_LEVELS) as f64).collect();
        let loss = VelocityLoss::new(&many, [&noise; 2], &levels, &[], mask.as_ref(), &self.difference)?;
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
        self.samples(prompts, config, beside_recordings)
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

fn missing(network: Component, name: &'static str) -> Error {
    Error::MissingEncoding { network, name }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_of_models;
