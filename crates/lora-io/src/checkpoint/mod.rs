//! Base checkpoints on disk, presented by component under diffusers' and transformers' names whatever their layout: the
//! single original (LDM) file or a diffusers folder. Tensors stay in the memory map until they are asked for.

mod family;
mod ldm;
mod single_file;

pub use family::Family;
pub use ldm::LdmNames;
pub use single_file::{CheckpointSource, Replaced, write_single_file};

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component as PathPart, Path, PathBuf};
use std::sync::Arc;

use lora_core::Component;
use sha2::{Digest, Sha256};

use crate::safetensors::{SafetensorsFile, TensorView};
use crate::{Error, Result};

/// What a Stable Diffusion 1.x checkpoint is made of; a component's name is its folder in diffusers' layout.
const COMPONENTS: [Component; 3] = [Component::TEXT_ENCODER, Component::UNET, Component::VAE];

/// An open Stable Diffusion 1.x checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    components: BTreeMap<Component, ComponentWeights>,
    scheduler: Option<serde_json::Value>,
    unused: Vec<String>,
}

/// The weights of one component under diffusers' (U-Net, autoencoder) or transformers' (text encoder, always with its
/// `text_model.` level) names.
#[derive(Debug)]
pub struct ComponentWeights {
    path: PathBuf,
    files: Vec<Arc<SafetensorsFile>>,
    entries: BTreeMap<String, Place>,
    config: Option<serde_json::Value>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    stored: String,
    shape: Vec<usize>,
}

impl Checkpoint {
    /// Opens a single LDM file or a diffusers folder; anything but Stable Diffusion 1.x is refused by name.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let kind = fs::metadata(path).map_err(Error::io(path, "open the base model"))?;
        if kind.is_dir() { Self::open_folder(path) } else { Self::open_file(path) }
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The weights of a component.
    ///
    /// # Errors
    ///
    /// If the checkpoint has no such component.
    pub fn component(&self, component: Component) -> Result<&ComponentWeights> {
        self.components.get(&component).ok_or_else(|| self.lacks(component))
    }

    /// All components, in their order.
    pub fn components(&self) -> impl Iterator<Item = (Component, &ComponentWeights)> {
        self.components.iter().map(|(component, weights)| (*component, weights))
    }

    /// `scheduler_config.json` of a diffusers folder.
    pub fn scheduler(&self) -> Option<&serde_json::Value> {
        self.scheduler.as_ref()
    }

    /// Tensors of the files that no component takes (EMA copies and the schedule's buffers apart).
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    fn open_file(path: &Path) -> Result<Self> {
        let file = Arc::new(SafetensorsFile::open(path)?);
        let names: Vec<_> = file.names().collect();
        let family = Family::of_names(&names);
        if family != Family::StableDiffusion1 {
            return Err(Error::Family { path: path.to_owned(), found: family.to_string() });
        }
        let layout = LdmNames::of_ldm(&names);
        let mut components: BTreeMap<_, _> =
            COMPONENTS.map(|component| (component, ComponentWeights::new(path))).into();
        let mut unused = Vec::new();
        for name in names {
            match layout.canonical(name) {
                Some((component, canonical)) => components
                    .entry(component)
                    .or_insert_with(|| ComponentWeights::new(path))
                    .add(&file, name, canonical)?,
                None if ldm::is_ignored(name) => {}
                None => unused.push(name.to_owned()),
            }
        }
        let checkpoint = Self { path: path.to_owned(), components, scheduler: None, unused };
        checkpoint.complete()
    }

    fn open_folder(path: &Path) -> Result<Self> {
        if path.join("text_encoder_2").is_dir() || path.join("transformer").is_dir() {
            let found = if path.join("transformer").is_dir() {
                "a transformer-based model (Flux, SD 3 …)"
            } else {
                "Stable Diffusion XL"
            };
            return Err(Error::Family { path: path.to_owned(), found: found.into() });
        }
        if !path.join("unet").is_dir() {
            let found =
                if path.join("adapter_config.json").exists() { "a PEFT adapter" } else { "a folder without unet/" };
            return Err(Error::Family { path: path.to_owned(), found: found.into() });
        }
        let mut components = BTreeMap::new();
        for component in COMPONENTS {
            let folder = path.join(component.name());
            let mut weights = ComponentWeights::new(&folder);
            weights.config = Some(read_json(&folder.join("config.json"))?);
            for file in weight_files(&folder)? {
                let file = Arc::new(SafetensorsFile::open(file)?);
                for name in file.names() {
                    if let Some(canonical) = ldm::from_diffusers(component, name) {
                        weights.add(&file, name, canonical)?;
                    }
                }
            }
            components.insert(component, weights);
        }
        let scheduler = path.join("scheduler").join("scheduler_config.json");
        let scheduler = scheduler.exists().then(|| read_json(&scheduler)).transpose()?;
        let checkpoint = Self { path: path.to_owned(), components, scheduler, unused: Vec::new() };
        // SD 2's U-Net has the same names; its text encoder tells it apart by 23 layers of the OpenCLIP kind.
        let act =
            checkpoint.component(Component::TEXT_ENCODER)?.config().and_then(|config| config["hidden_act"].as_str());
        if act == Some("gelu")
            && checkpoint
                .component(Component::UNET)?
                .shape("down_blocks.0.attentions.0.proj_in.weight")
                .is_some_and(|shape| shape.len() == 2)
        {
            return Err(Error::Family { path: path.to_owned(), found: Family::StableDiffusion2.to_string() });
        }
        checkpoint.complete()
    }

    fn complete(self) -> Result<Self> {
        match self.components.iter().find(|(_, weights)| weights.entries.is_empty()) {
            Some((component, _)) => Err(self.lacks(*component)),
            None => Ok(self),
        }
    }

    fn lacks(&self, component: Component) -> Error {
        let name = component.name().replace('_', " ");
        Error::format(&self.path, format!("has no {name}; expected a whole Stable Diffusion 1.x checkpoint"))
    }
}

impl ComponentWeights {
    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), files: Vec::new(), entries: BTreeMap::new(), config: None }
    }

    fn add(&mut self, file: &Arc<SafetensorsFile>, stored: &str, canonical: String) -> Result<()> {
        let index = match self.files.iter().position(|known| Arc::ptr_eq(known, file)) {
            Some(index) => index,
            None => {
                self.files.push(Arc::clone(file));
                self.files.len() - 1
            }
        };
        let stored_shape = file.shape(stored).unwrap_or_default();
        let place =
            Place { file: index, stored: stored.to_owned(), shape: ldm::canonical_shape(&canonical, stored_shape) };
        match self.entries.insert(canonical.clone(), place) {
            None => Ok(()),
            Some(other) => {
                let reason =
                    format!("and `{}` are both `{canonical}` of the model; expected one of them", other.stored);
                Err(Error::tensor(file.path(), stored, reason))
            }
        }
    }

    /// The file or folder it is in.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder's `config.json`; `None` in a single file.
    pub fn config(&self) -> Option<&serde_json::Value> {
        self.config.as_ref()
    }

    /// Names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is a weight.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The shape of a weight.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|place| place.shape.as_slice())
    }

    /// A weight in the memory map.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let place = self.entries.get(name).ok_or_else(|| Error::tensor(&self.path, name, "is missing"))?;
        Ok(self.files[place.file].get(&place.stored)?.with_shape(&place.shape))
    }

    /// SHA-256 of all weights with their names and shapes: what caches of this component's outputs are kept apart by.
    pub fn sha256(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for name in self.names() {
            let tensor = self.tensor(name)?;
            hash.update(format!("{name} {} {:?}\n", tensor.dtype(), tensor.shape()));
            hash.update(tensor.bytes());
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Tells the kernel that a weight's pages are not needed any more.
    pub fn release(&self, name: &str) {
        if let Some(place) = self.entries.get(name) {
            self.files[place.file].release(&place.stored);
        }
    }
}

/// The weight files of a diffusers component: one file, or the shards of an index.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    for stem in ["diffusion_pytorch_model", "model"] {
        for variant in ["", ".fp16"] {
            let single = folder.join(format!("{stem}{variant}.safetensors"));
            if single.exists() {
                return Ok(vec![single]);
            }
            let index = folder.join(format!("{stem}.safetensors.index{variant}.json"));
            if index.exists() {
                return shards(folder, &index);
            }
        }
    }
    let pickled = ["diffusion_pytorch_model.bin", "pytorch_model.bin"].iter().any(|name| folder.join(name).exists());
    let reason = if pickled {
        "holds PyTorch pickles only, which can run any code when they are read; save it again with safe_serialization=True"
    } else {
        "has no diffusion_pytorch_model.safetensors or model.safetensors"
    };
    Err(Error::format(folder, reason))
}

fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let json = read_json(index)?;
    let map = json["weight_map"].as_object().ok_or_else(|| Error::format(index, "has no object `weight_map`"))?;
    let mut files = BTreeSet::new();
    for file in map.values() {
        let name = file.as_str().ok_or_else(|| Error::format(index, "`weight_map` names a file that is no text"))?;
        // A name may not lead out of the folder.
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(PathPart::Normal(_)), None)) {
            return Err(Error::format(index, format!("shard `{name}` is not a file of this folder")));
        }
        files.insert(folder.join(name));
    }
    Ok(files.into_iter().collect())
}

fn read_json(path: &Path) -> Result<serde_json::Value> {
    let bytes = fs::read(path).map_err(Error::io(path, "read"))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::format(path, format!("is not valid JSON: {error}")))
}
