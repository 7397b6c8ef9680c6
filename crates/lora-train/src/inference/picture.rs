//! What a picture base with its adapters draws. How a base draws is its own business (`base`); here is the order in which
//! networks come and go, so that no more of them is in memory at once than in training.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_core::target::TargetLayer;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, Component, Strength};
use lora_data::{PromptLine, RgbPicture};
use lora_io::checkpoint::Checkpoint;
use lora_io::family::Family;
use lora_io::metadata::FUSED;
use lora_models::weights::{Frozen, Held};
use lora_torch::TchBackend;
use lora_torch::dry::{self, DryRun, Platform};
use lora_torch::staging::Staging;
use lora_torch::tch::{Device, no_grad_guard};

use super::adapters;
use crate::base::{Base, Encoded, Opening, Prompt, Sample, Subject, Tensors, shallow};
use crate::config::{Format, TrainConfig};
use crate::plan::precision_on;
use crate::{Error, Plugins, Result};

/// What a picture model is made of.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PictureModelOptions {
    /// The base: a file or a folder.
    pub base: PathBuf,
    /// Keys of a configuration that say how the base is held and what its words mean, `key=value`: `device`, `precision`,
    /// `base_storage`, `offload_base`, `vae`, `vae_tiling`, `clip_skip`, and how pictures are drawn where a request does not
    /// say it: `sample_steps`, `sample_resolution`.
    pub keys: Vec<String>,
}

impl PictureModelOptions {
    /// A base as configurations hold it where they say nothing.
    pub fn new(base: impl Into<PathBuf>) -> Self {
        Self { base: base.into(), keys: Vec::new() }
    }
}

/// An adapter file, and how strongly it is applied.
#[derive(Debug, Clone, PartialEq)]
pub struct AppliedAdapter {
    /// The file or folder.
    pub path: PathBuf,
    /// By component and block.
    pub strength: Strength,
}

/// A picture to be drawn.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PictureRequest {
    /// The prompt, and what it says of its picture.
    pub prompt: PromptLine,
    /// What is applied while it is drawn: all at once, each live beside the base's weights, which do not change.
    pub adapters: Vec<AppliedAdapter>,
}

/// A picture base, loaded as far as drawing needs it.
#[derive(Debug)]
pub struct PictureModel {
    base: Box<dyn Base>,
    config: TrainConfig,
    checkpoint: Arc<Checkpoint>,
    variants: VariantRegistry<TchBackend>,
    families: Vec<&'static Family>,
    device: Device,
    /// All layers that can carry adapters.
    layers: Vec<TargetLayer>,
    /// Adapters that were read, by file.
    adapters: BTreeMap<PathBuf, Adapter>,
}

/// Encodings of captions, by network.
type Encodings = BTreeMap<Component, Tensors>;

impl PictureModel {
    /// Opens a base. Its networks are built without weights, to know their layers; weights come when they are needed.
    ///
    /// # Errors
    /// [`Error::Base`] for a base that is not known or draws no pictures; [`Error::Config`] for keys that cannot be.
    pub fn open(options: &PictureModelOptions, plugins: &Plugins) -> Result<Self> {
        let config = config(options, &[], plugins)?;
        let checkpoint = Arc::new(plugins.bases.configured(&config)?);
        if !checkpoint.family().image {
            let found = format!("{}, which writes texts (`lora generate`)", checkpoint.family());
            return Err(Error::Base { path: options.base.clone(), found, expected: "a base that draws".into() });
        }
        // Prompts mean what they mean in the WebUI, where a base has such captions.
        let groups: Vec<_> = plugins.bases.registration(&checkpoint)?.groups().collect();
        let weighted = config.has_key(WEIGHTED, &groups).then(|| format!("{WEIGHTED}=true"));
        let config = self::config(options, weighted.as_slice(), plugins)?;
        let device = lora_torch::device::resolve(&config.device)?;
        let precision = precision_on(dry::platform(device), config.precision);
        let layers = layers(&config, &checkpoint, plugins)?;
        let base = plugins.bases.open(&Opening::new(&config, &checkpoint, device, precision))?;
        let (variants, families) = (plugins.variants.clone(), plugins.bases.families());
        Ok(Self { base, config, checkpoint, variants, families, device, layers, adapters: BTreeMap::new() })
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Reads an adapter and holds it against the base's layers, before anything is loaded.
    ///
    /// # Errors
    /// What reading gives; [`Error::NotOfThisBase`] for an adapter of another base.
    pub fn read(&mut self, path: &Path) -> Result<()> {
        if !self.adapters.contains_key(path) {
            let adapter = adapters::read(path, self.checkpoint.family(), &self.layers, &self.families)?;
            self.adapters.insert(path.to_owned(), adapter);
        }
        Ok(())
    }

    /// What to know of the adapters that were read: which of them were trained on a base that others were merged into, where
    /// nothing is merged into this one (`fuse_adapters`).
    pub fn notes(&self) -> Vec<String> {
        let of = |(path, adapter): (&PathBuf, &Adapter)| {
            let fused = adapter.metadata.get(FUSED).filter(|_| self.config.fuse_adapters.is_empty())?;
            let fused: Vec<serde_json::Value> = serde_json::from_str(fused).ok()?;
            let names: Vec<String> = fused.iter().map(|own| format!("{} ({})", own["name"], own["unet"])).collect();
            let names = names.join(", ");
            Some(format!("{}: it was trained with {names} in the base; apply them too", path.display()))
        };
        self.adapters.iter().filter_map(of).collect()
    }

    /// Draws a picture of each request, in their order. `each` is given every picture as soon as it is there, with its place
    /// among the requests; pictures with the same adapters are drawn one after the other.
    ///
    /// # Errors
    /// As [`PictureModel::read`]; [`Error::NoSampler`]; where memory runs out.
    pub fn draw(
        &mut self,
        requests: &[PictureRequest],
        each: &mut dyn FnMut(usize, &RgbPicture),
    ) -> Result<Vec<RgbPicture>> {
        let _guard = no_grad_guard();
        for adapter in requests.iter().flat_map(|request| &request.adapters) {
            self.read(&adapter.path)?;
        }
        let configs = requests.iter().map(|request| self.config.samples.for_prompt(&request.prompt));
        let configs: Vec<_> = configs.collect::<Result<_>>()?;
        let mut sets: Vec<&[AppliedAdapter]> = Vec::new();
        for request in requests {
            if !sets.contains(&request.adapters.as_slice()) {
                sets.push(&request.adapters);
            }
        }
        let joined: Vec<_> = sets.iter().map(|set| self.joined(set)).collect::<Result<_>>()?;
        let set_of =
            |request: &PictureRequest| sets.iter().position(|set| *set == request.adapters).unwrap_or_default();
        let captions: BTreeSet<(usize, &str)> = requests
            .iter()
            .zip(&configs)
            .flat_map(|(request, config)| {
                [(set_of(request), &*request.prompt.text), (set_of(request), &config.negative_prompt)]
            })
            .collect();
        let encoded = self.encode(&captions, &joined)?;

        let networks = self.base.networks();
        let Some(last) = networks.last().map(|network| network.component) else { return Ok(Vec::new()) };
        if !self.base.is_loaded(last) {
            let staging = self.config.offload_base.then(|| Staging::new(self.device)).transpose()?;
            let held = Frozen { staging, ..Frozen::stored(self.config.base_storage) };
            self.base.load(last, Held::Frozen(held))?;
        }
        let mut pictures: Vec<Option<RgbPicture>> = vec![None; requests.len()];
        for (set, adapters) in joined.iter().enumerate() {
            if let Some(network) = self.base.adaptable(last) {
                adapters::hang(adapters, network, &self.variants)?;
            }
            for (index, request) in requests.iter().enumerate().filter(|(_, request)| set_of(request) == set) {
                let of = |caption: &str| -> Encodings {
                    let found = encoded.get(&(set, caption)).into_iter().flatten();
                    found.map(|(network, tensors)| (*network, shallow(tensors))).collect()
                };
                let (with, without) = (of(&request.prompt.text), of(&configs[index].negative_prompt));
                let prompt = Prompt { text: request.prompt.text.clone(), with, without };
                let drawn = self.base.sample(&[prompt], &configs[index], false)?;
                let picture = drawn.into_iter().next().and_then(Sample::into_picture).ok_or(Error::NoSamples)?;
                each(index, &picture);
                pictures[index] = Some(picture);
            }
        }
        Ok(pictures.into_iter().flatten().collect())
    }

    /// Adapters that are read, as few as do the same.
    fn joined(&self, set: &[AppliedAdapter]) -> Result<Vec<(Adapter, Strength)>> {
        let read = set.iter().filter_map(|own| Some((self.adapters.get(&own.path)?, &own.strength)));
        adapters::joined(&read.collect::<Vec<_>>())
    }

    /// Captions through the networks that encode them, each with the adapters of its set. One network at a time is there.
    fn encode<'c>(
        &mut self,
        captions: &BTreeSet<(usize, &'c str)>,
        joined: &[Vec<(Adapter, Strength)>],
    ) -> Result<BTreeMap<(usize, &'c str), Encodings>> {
        let mut encoded: BTreeMap<(usize, &str), Encodings> = BTreeMap::new();
        for network in self.base.networks().to_vec() {
            if network.encodes != Some(Subject::Captions) {
                continue;
            }
            let component = network.component;
            self.base.load(component, Held::Frozen(Frozen::stored(self.config.base_storage)))?;
            let mut hung = None;
            for &(set, caption) in captions {
                if hung != Some(set)
                    && let Some(network) = self.base.adaptable(component)
                {
                    adapters::hang(&joined[set], network, &self.variants)?;
                    hung = Some(set);
                }
                let tensors = self.base.encode(component, Encoded::Caption(caption))?;
                encoded.entry((set, caption)).or_default().insert(component, tensors);
            }
            self.base.unload(component);
        }
        Ok(encoded)
    }
}

/// Whether brackets weigh words.
const WEIGHTED: &str = "weighted_captions";

/// The configuration of a base that is not trained: of its keys those count that say how the base is held. `usual` are keys that
/// options may change.
fn config(options: &PictureModelOptions, usual: &[String], plugins: &Plugins) -> Result<TrainConfig> {
    let text = serde_json::json!({ "base_model": options.base, "train_data_dir": ".", "output_dir": "." });
    let keys = [usual, &options.keys].concat();
    // JSON is YAML.
    Ok(TrainConfig::from_text_with(&text.to_string(), Format::Yaml, &keys, plugins)?)
}

/// The layers of all networks, from the headers of the base's files.
fn layers(config: &TrainConfig, checkpoint: &Arc<Checkpoint>, plugins: &Plugins) -> Result<Vec<TargetLayer>> {
    // On macOS there are no dry runs: there the networks are loaded for it, one after the other.
    let run = DryRun::begin(Platform::cpu()).ok();
    let device = run.as_ref().map_or(Device::Cpu, DryRun::device);
    let opening = Opening::new(config, checkpoint, device, config.precision);
    lora_torch::caught(|| {
        let mut base = plugins.bases.open(&opening)?;
        let mut layers = Vec::new();
        for network in base.networks().to_vec() {
            base.load(network.component, Held::default())?;
            if let Some(network) = base.adaptable(network.component) {
                layers.extend(network.adaptable_layers()?);
            }
            base.unload(network.component);
        }
        Ok(layers)
    })
}
