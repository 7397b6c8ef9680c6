//! What tells a kind of base from the others, where its files do not say it: [`Kind`], and what a network answers to:
//! [`Transformer`]. Each kind's own values are in the file of its name.

use lora_core::Component;
use lora_io::checkpoint::Checkpoint;
use lora_io::family::Family;
use lora_models::diffusion::flow::Shift;
use lora_models::layers::{Adaptable, Pass};
use lora_models::weights::Held;
use lora_torch::tch::{Device, Kind as Number, Tensor};

use super::super::{Inputs, Tensors};
use super::TRANSFORMER;
use super::text::EncoderKind;
use crate::Result;

/// Builds a network that answers with velocities.
type LoadTransformer = fn(&Checkpoint, Number, Device, Held) -> Result<Box<dyn Transformer>>;

/// What differs between them, where files do not say.
pub(super) struct Kind {
    pub(super) family: &'static Family,
    /// Those that read captions, in the order in which they come.
    pub(super) encoders: &'static [EncoderKind],
    /// The weight whose columns are the numbers of a state, of the part that reads them, where one language model's states are all
    /// it reads.
    pub(super) text_columns: Option<(Component, &'static str)>,
    /// Builds the network that answers with velocities.
    pub(super) load: LoadTransformer,
    /// What its network is told of captions: what all encoders kept of each, by name, laid out as a batch on the device.
    pub(super) layout: fn(&[&Tensors], Device) -> Result<Inputs>,
    /// Whether latents are drawn from the autoencoder's distribution, or are its mean.
    pub(super) draws_latents: bool,
    /// Latents along a side of one token.
    pub(super) patch: usize,
    /// How drawn noise levels are moved where no key says it.
    pub(super) shift: Shift,
    /// The noise levels that samples of so many tokens go through in so many steps, as [`flow::levels`].
    pub(super) sample_levels: fn(&Checkpoint, usize, usize) -> lora_models::Result<Vec<f64>>,
    /// Guidance of samples where no key says it.
    pub(super) guidance: fn(&Checkpoint) -> Guidance,
    /// Of the family's words for files that carry adapters (`modelspec.architecture` and others) those that this base has
    /// otherwise.
    pub(super) labels: fn(&Checkpoint) -> &'static [(&'static str, &'static str)],
    /// Whether a base is distilled to few steps.
    pub(super) is_distilled: fn(&Checkpoint) -> bool,
    /// What to know of such.
    pub(super) distilled: &'static str,
    /// What a base is that has the family's names and is not trained here.
    pub(super) refused: fn(&Checkpoint) -> Option<&'static str>,
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kind({})", self.family)
    }
}

/// How samples follow their prompt more closely.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Guidance {
    /// The answer moves away from that of a negative prompt, so many times as far; 1 asks for no second answer.
    Contrast(f64),
    /// The same, and each token of the answer is as long as with the prompt alone.
    Rescaled(f64),
    /// The network is told a strength, in training too.
    Told(f64),
}

impl Guidance {
    /// How strong it is.
    pub(super) fn strength(self) -> f64 {
        let (Self::Contrast(strength) | Self::Rescaled(strength) | Self::Told(strength)) = self;
        strength
    }
}

/// The name of the strengths of guidance, `[batch]`, that a network is told.
pub(super) const GUIDANCE: &str = "guidance";

/// A network that answers with velocities.
pub(super) trait Transformer: Adaptable + std::fmt::Debug + Send {
    /// The velocity, noise minus data, of noised latents `[batch, channels, height, width]` at noise levels `[batch]`; f32, of
    /// the latents' shape. `inputs` has what [`Kind::layout`] made of captions.
    ///
    /// # Errors
    /// Where inputs are missing or do not fit; where memory runs out.
    fn velocity(&self, latents: &Tensor, levels: &Tensor, inputs: &Inputs, pass: &Pass) -> Result<Tensor>;

    /// As what its layers are visited.
    fn as_adaptable(&mut self) -> &mut dyn Adaptable;
}

/// Whether a base's transformer has a weight.
pub(super) fn transformer_contains(checkpoint: &Checkpoint, weight: &str) -> bool {
    checkpoint.component(TRANSFORMER).is_ok_and(|transformer| transformer.contains(weight))
}

/// The name of a base's file or folder, in small letters.
pub(super) fn name_of(checkpoint: &Checkpoint) -> String {
    checkpoint.path().file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// Whether the name of a base says that it is distilled to few steps.
pub(super) fn named_distilled(checkpoint: &Checkpoint) -> bool {
    let name = name_of(checkpoint);
    ["turbo", "schnell", "distilled"].iter().any(|word| name.contains(word))
}
