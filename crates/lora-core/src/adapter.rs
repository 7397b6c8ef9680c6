//! The canonical adapter: what every adapter file is read into and written from. No files here (see `lora-io`) and no
//! formulas (see [`crate::variant`]).

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::{Error, HostTensor, Result};

/// A network of a base model, by name: `unet`, `text_encoder`, `language_model` …
///
/// Known names are constants, in the order in which files and reports list them; [`Component::named`] makes others, for a
/// base that this crate does not know, and those come after the known ones by name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Component {
    place: u8,
    name: &'static str,
}

impl Component {
    /// The (first) text encoder of an image model.
    pub const TEXT_ENCODER: Self = Self { place: 0, name: "text_encoder" };
    /// The second text encoder of an image model.
    pub const TEXT_ENCODER_2: Self = Self { place: 1, name: "text_encoder_2" };
    /// The third text encoder of an image model.
    pub const TEXT_ENCODER_3: Self = Self { place: 2, name: "text_encoder_3" };
    /// The U-Net of an image model.
    pub const UNET: Self = Self { place: 3, name: "unet" };
    /// The diffusion transformer of an image model.
    pub const TRANSFORMER: Self = Self { place: 4, name: "transformer" };
    /// The autoencoder of an image model.
    pub const VAE: Self = Self { place: 5, name: "vae" };
    /// A causal language model.
    pub const LANGUAGE_MODEL: Self = Self { place: 6, name: "language_model" };
    /// A model of no known family; a module's path is as its file spells it.
    pub const MODEL: Self = Self { place: 7, name: "model" };

    /// The known ones, in their order.
    pub const KNOWN: [Self; 8] = [
        Self::TEXT_ENCODER,
        Self::TEXT_ENCODER_2,
        Self::TEXT_ENCODER_3,
        Self::UNET,
        Self::TRANSFORMER,
        Self::VAE,
        Self::LANGUAGE_MODEL,
        Self::MODEL,
    ];

    /// The longest name in bytes.
    pub(crate) const LONGEST_NAME: usize = 64;

    /// The component of a name. A name that is not known stays in memory until the process ends, once for all calls, so
    /// names come from a program and not from files.
    ///
    /// # Errors
    ///
    /// For a name that is empty, longer than 64 bytes, or made of anything but ASCII letters, digits, `_`
    /// and `-`: it begins paths, whose parts are separated by dots.
    pub fn named(name: &str) -> Result<Self> {
        static OTHERS: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
        if let Some(known) = Self::KNOWN.into_iter().find(|known| known.name == name) {
            return Ok(known);
        }
        if !Self::is_name(name) {
            return Err(Error::Option {
                key: "component",
                value: name.chars().take(Self::LONGEST_NAME).collect(),
                reason: format!("a name has 1 to {} ASCII letters, digits, `_` or `-`", Self::LONGEST_NAME),
            });
        }
        // A panic elsewhere cannot leave the set half changed.
        let mut others = OTHERS.lock().unwrap_or_else(PoisonError::into_inner);
        let name = match others.get(name) {
            Some(kept) => kept,
            None => {
                let kept: &'static str = Box::leak(name.into());
                others.insert(kept);
                kept
            }
        };
        Ok(Self { place: u8::MAX, name })
    }

    /// The same of a name in a program's text, for families that are statics.
    ///
    /// # Panics
    ///
    /// For a name that [`Self::named`] refuses, and for that of a known component, which has a constant: while the program is
    /// compiled, where a constant is made of it.
    pub const fn constant(name: &'static str) -> Self {
        assert!(Self::is_name(name), "a component's name has 1 to 64 ASCII letters, digits, `_` or `-`");
        let mut index = 0;
        while index < Self::KNOWN.len() {
            assert!(!same(Self::KNOWN[index].name, name), "a known component has a constant of its own");
            index += 1;
        }
        Self { place: u8::MAX, name }
    }

    /// Whether a component may be called so.
    const fn is_name(name: &str) -> bool {
        let bytes = name.as_bytes();
        let mut index = 0;
        while index < bytes.len() {
            if !(bytes[index].is_ascii_alphanumeric() || bytes[index] == b'_' || bytes[index] == b'-') {
                return false;
            }
            index += 1;
        }
        index > 0 && index <= Self::LONGEST_NAME
    }

    /// Its name in paths.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Whether it is a text encoder of an image model.
    pub fn is_text_encoder(self) -> bool {
        matches!(self, Self::TEXT_ENCODER | Self::TEXT_ENCODER_2 | Self::TEXT_ENCODER_3)
    }
}

/// Whether two texts are the same: `==` is not for constants.
const fn same(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let mut index = 0;
    while index < one.len() && index < other.len() && one[index] == other[index] {
        index += 1;
    }
    index == one.len() && index == other.len()
}

impl Ord for Component {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.place, self.name).cmp(&(other.place, other.name))
    }
}

impl PartialOrd for Component {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Debug for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
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
    /// The network.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_component_and_known_ones_come_first() {
        let own = Component::named("prior").unwrap();
        assert_eq!(own, Component::named(&String::from("prior")).unwrap());
        assert_eq!(own.name().as_ptr(), Component::named("prior").unwrap().name().as_ptr());
        assert_eq!(Component::named("unet").unwrap(), Component::UNET);
        assert_eq!(const { Component::constant("prior") }, own);
        let mut sorted = [own, Component::MODEL, Component::named("decoder").unwrap(), Component::UNET];
        sorted.sort();
        assert_eq!(sorted.map(Component::name), ["unet", "model", "decoder", "prior"]);
        assert!(Component::KNOWN.is_sorted());
    }

    #[test]
    fn names_that_would_not_survive_a_path_are_refused() {
        for name in ["", "a.b", "a/b", "größe", &"x".repeat(65)] {
            assert!(Component::named(name).unwrap_err().to_string().contains("component"), "{name}");
        }
        assert!(Component::named(&"x".repeat(64)).is_ok());
        for name in ["", "a.b", "größe", "unet"] {
            assert!(std::panic::catch_unwind(|| Component::constant(name)).is_err(), "{name}");
        }
    }
}
