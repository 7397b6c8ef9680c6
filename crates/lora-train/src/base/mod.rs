//! Base models. A base is a value that names its networks, builds each on given weights, says what of an example is worth encoding
//! once, lays a micro-batch out as named tensors and computes a loss from these tensors alone. Order, memory, graphs,
//! survival, resuming, saving and planning are written once around that value (`session`, `plan`); here is what differs
//! from base to base. Networks themselves are in `lora_models`, the names in their files in `lora_io::family`.

mod autoencoder;
mod data;
mod flow_matching;
pub(crate) mod language;
pub(crate) mod levels;
mod noise;
mod prior;
mod registry;
mod slider;
mod stable_diffusion;

pub use crate::inputs::Inputs;
pub use data::{Data, DataOpening, PICTURES};
pub use language::TEXTS;
pub use registry::{Bases, Opening, Registration};

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use lora_core::Component;
use lora_core::random::Stream;
use lora_data::RgbPicture;
use lora_data::source::{Example, Shape};
use lora_io::metadata::TrainingRecord;
use lora_models::layers::{Adaptable, Pass};
use lora_models::weights::Held;
use lora_torch::tch::{Kind, Tensor};

use crate::config::SampleConfig;
use crate::{Error, Result};

/// A network of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// The part of the base that it is.
    pub component: Component,
    /// What people call it: "text encoder".
    pub title: &'static str,
    /// Whether the configuration trains it.
    pub trains: bool,
    /// What it encodes once, before training, if that is what it is for. It leaves the device once everything is encoded, unless
    /// it trains, or examples change from visit to visit.
    pub encodes: Option<Subject>,
}

/// What a network encodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// Examples, each once.
    Examples,
    /// Captions, each text once, prompts of samples among them.
    Captions,
}

/// An example or a caption to encode.
#[derive(Debug, Clone, Copy)]
pub enum Encoded<'e> {
    /// An example, and the file that it is from, for messages.
    Example(&'e Example, &'e Path),
    /// A caption.
    Caption(&'e str),
}

/// Named tensors that a network made of one example or caption.
pub type Tensors = BTreeMap<String, Tensor>;

/// One item of a micro-batch.
#[derive(Debug)]
pub struct Item {
    /// The caption of this visit.
    pub caption: String,
    /// What networks encoded, by network: of an example what [`Base::draw`] made of it, of a caption what was kept. A network that
    /// trains, or whose captions change from visit to visit, has nothing here.
    pub encoded: BTreeMap<Component, Tensors>,
    /// The same of captions that the loss reads beside the item's own ([`Base::captions`]), by caption.
    pub beside: BTreeMap<String, BTreeMap<Component, Tensors>>,
    /// The example itself, where no network encodes examples.
    pub example: Option<Example>,
    /// How much the item counts in the loss.
    pub weight: f64,
    /// Everything random about this visit.
    pub draw: Stream,
}

impl Item {
    /// The same once more; tensors are shared.
    pub(crate) fn again(&self) -> Self {
        Self {
            caption: self.caption.clone(),
            encoded: shallow_all(&self.encoded),
            beside: self.beside.iter().map(|(caption, encoded)| (caption.clone(), shallow_all(encoded))).collect(),
            example: self.example.clone(),
            weight: self.weight,
            draw: self.draw.clone(),
        }
    }

    /// The same with another caption that the loss reads, as far as captions go.
    pub(crate) fn asked(&self, caption: &str) -> Self {
        Self {
            caption: caption.to_owned(),
            encoded: self.beside.get(caption).map(shallow_all).unwrap_or_default(),
            beside: BTreeMap::new(),
            example: None,
            weight: self.weight,
            draw: self.draw.clone(),
        }
    }
}

/// A prompt with its encodings, to make a sample of.
#[derive(Debug)]
pub struct Prompt {
    /// The prompt itself.
    pub text: String,
    /// The prompt's encodings, by network.
    pub with: BTreeMap<Component, Tensors>,
    /// The negative prompt's encodings, by network.
    pub without: BTreeMap<Component, Tensors>,
}

impl Prompt {
    /// A prompt of which nothing is encoded.
    pub(crate) fn plain(text: &str) -> Self {
        Self { text: text.to_owned(), with: BTreeMap::new(), without: BTreeMap::new() }
    }
}

/// What a base makes of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Sample {
    /// A picture.
    Picture(RgbPicture),
    /// A text: the answer to the prompt, or what follows it.
    Text(String),
}

impl Sample {
    /// The picture, if it is one.
    pub fn into_picture(self) -> Option<RgbPicture> {
        match self {
            Sample::Picture(picture) => Some(picture),
            Sample::Text(_) => None,
        }
    }
}

/// A base model that adapters are trained on.
pub trait Base: fmt::Debug + Send {
    /// Its networks, in the order in which a run meets them: those that encode first, the one that steps are made of last.
    fn networks(&self) -> &[Network];

    /// What a run says of the base before its first step: what was read off the files and could be meant otherwise.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// How the names of layers begin whose answers nothing reads, though adapters for such bases have modules on them. What is
    /// trained there does not move, as it should.
    fn unread(&self) -> Vec<String> {
        Vec::new()
    }

    /// Builds a network. `held` says how its weights are held; a network that leaves before training may hold them as it likes.
    ///
    /// # Errors
    /// Where its file lacks a weight or a weight has another shape, and where memory runs out.
    fn load(&mut self, network: Component, held: Held) -> Result<()>;

    /// Lets go of a network.
    fn unload(&mut self, network: Component);

    /// Whether a network is loaded.
    fn is_loaded(&self, network: Component) -> bool;

    /// A loaded network whose layers can carry adapters.
    fn adaptable(&mut self, network: Component) -> Option<&mut dyn Adaptable>;

    /// The learning rate of a network, before its schedule.
    fn learning_rate(&self, network: Component) -> f64;

    /// What a loaded network makes of an example or a caption, on the device, without gradients. A base of which no network encodes
    /// has nothing to say here.
    ///
    /// # Errors
    /// Where what it makes is not finite, and where memory runs out.
    fn encode(&mut self, network: Component, _what: Encoded<'_>) -> Result<Tensors> {
        Err(Error::EncodesNothing { network })
    }

    /// Everything besides the example or caption that [`Base::encode`]'s answer depends on: what files that keep it are kept
    /// apart by.
    ///
    /// # Errors
    /// Where a file cannot be read.
    fn encoding_identity(&self, network: Component) -> Result<String> {
        Err(Error::EncodesNothing { network })
    }

    /// What training sees of an encoded example: the encoding, or one sample of it where it is a distribution.
    ///
    /// # Errors
    /// [`Error::MissingEncoding`] where a tensor is not there, as in a file that another program wrote.
    fn draw(&self, _network: Component, encoded: &Tensors, _draw: &Stream) -> Result<Tensors> {
        Ok(shallow(encoded))
    }

    /// Number of tokens in a caption; `None` for a base whose captions are not cut.
    fn caption_length(&self, _caption: &str) -> Option<usize> {
        None
    }

    /// Captions that the loss of an item reads beside its own, `caption`: each is encoded once, and the item has them
    /// ([`Item::beside`]).
    fn captions(&self, _caption: &str) -> Vec<String> {
        Vec::new()
    }

    /// The tensors of a micro-batch, on the device. All draws are made here, on the host, each from its item's own.
    ///
    /// # Errors
    /// Where memory runs out.
    fn inputs(&self, items: &[Item]) -> Result<Inputs>;

    /// The tensors by which an item that is not trained on is judged: the same at every look.
    ///
    /// # Errors
    /// As [`Base::inputs`].
    fn validation_inputs(&self, item: &Item) -> Result<Inputs>;

    /// The noise level, from 0 for data to 1 for noise, at which a visit of an item of a shape with these draws is trained; `None`
    /// for a base that adds none.
    fn noise_level(&self, draw: &Stream, shape: Shape) -> Option<f64> {
        let _ = (draw, shape);
        None
    }

    /// What [`Base::loss`] tells beside the loss, for people to see: names, as they are in `metrics.jsonl`.
    fn figures(&self) -> &'static [&'static str] {
        &[]
    }

    /// The mean loss of a micro-batch, a scalar; where there are [`Base::figures`], the loss and behind it these, each a mean
    /// like it, `[1 + figures]`. It reads nothing but `inputs` and the loaded networks: it is recorded as a CUDA graph and run
    /// on the device without memory.
    ///
    /// # Errors
    /// Where memory runs out.
    fn loss(&self, inputs: &Inputs, pass: &Pass) -> Result<Tensor>;

    /// What is to blame for a loss that is not finite, as far as items tell: what it is, and what helps. `None` blames the last
    /// network.
    ///
    /// # Errors
    /// Where memory runs out.
    fn culprit(&self, _items: &[Item]) -> Result<Option<(&'static str, &'static str)>> {
        Ok(None)
    }

    /// A sample of each prompt. `beside_recordings`: recorded steps keep memory that can be had instead of going to the CPU.
    ///
    /// # Errors
    /// [`Error::NoSamples`] for a base that makes none; where memory runs out.
    fn sample(&mut self, prompts: &[Prompt], config: &SampleConfig, beside_recordings: bool) -> Result<Vec<Sample>> {
        let _ = (prompts, config, beside_recordings);
        Err(Error::NoSamples)
    }

    /// What the file of an adapter says of the base and of what only the base knows.
    fn record(&self, _record: &mut TrainingRecord) {}
}

/// The same tensors once more.
pub(crate) fn shallow(tensors: &Tensors) -> Tensors {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

/// The same of several networks.
fn shallow_all(encoded: &BTreeMap<Component, Tensors>) -> BTreeMap<Component, Tensors> {
    encoded.iter().map(|(network, tensors)| (*network, shallow(tensors))).collect()
}

/// Whether all elements are finite; waits for the device.
pub(crate) fn is_finite(tensor: &Tensor) -> Result<bool> {
    Ok(f64::try_from(tensor.detach().f_isfinite()?.f_all()?.f_to_kind(Kind::Double)?)? != 0.0)
}
