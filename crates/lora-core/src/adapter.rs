//! The canonical adapter: what every adapter file is read into and written from. No files here (see `lora-io`) and no
//! formulas (see [`crate::variant`]).

use std::collections::BTreeMap;
use std::fmt;

use crate::HostTensor;

/// The part of a base model that a module belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Component {
    /// The (first) text encoder of an image model.
    TextEncoder,
    /// The second text encoder of an SDXL model.
    TextEncoder2,
    /// The U-Net of an image model.
    Unet,
    /// A causal language model.
    LanguageModel,
    /// A model of no known family; the path is as the file spells it.
    Model,
}

impl Component {
    /// Its name in paths: `text_encoder`, `text_encoder_2`, `unet`, `language_model`.
    pub fn name(self) -> &'static str {
        match self {
            Component::TextEncoder => "text_encoder",
            Component::TextEncoder2 => "text_encoder_2",
            Component::Unet => "unet",
            Component::LanguageModel => "language_model",
            Component::Model => "model",
        }
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which layer of the base model an adapter module changes.
///
/// `path` is the dotted path in the diffusers (U-Net) or transformers (text encoder, with its `text_model.` level;
/// language model, with its `model.` level) module tree, for instance
/// `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q` or `model.layers.0.self_attn.q_proj`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModulePath {
    /// The part of the model.
    pub component: Component,
    /// The dotted path inside it.
    pub path: String,
}

impl ModulePath {
    /// From a component and a dotted path inside it.
    pub fn new(component: Component, path: impl Into<String>) -> Self {
        Self { component, path: path.into() }
    }
}

impl fmt::Display for ModulePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.component, self.path)
    }
}

/// One adapted layer: a variant's named tensors and their scale.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterModule {
    /// Name of the variant whose formula applies, `lora` for the plain one.
    pub variant: String,
    /// The variant's tensors by its own names, for plain LoRA `down` and `up`.
    pub tensors: BTreeMap<String, HostTensor>,
    /// Rank of the update; 1 for variants that have none.
    pub rank: usize,
    /// Alpha: the update is multiplied by `alpha / rank`.
    pub alpha: f64,
}

impl AdapterModule {
    /// The factor on the update: `alpha / rank`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank.max(1) as f64
    }
}

/// A whole adapter in memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Adapter {
    /// The adapted layers.
    pub modules: BTreeMap<ModulePath, AdapterModule>,
    /// What the file it came from said of itself (free text by key), and what a file made from it will say.
    pub metadata: BTreeMap<String, String>,
}
