//! How a network's weights are named inside a layout, and where they lie in its tensors. [`ldm`] holds the original
//! names of U-Nets and autoencoders, [`clip`] those of text encoders. Which component has which tree, behind which
//! prefix, is a family's business.
//!
//! The canonical names are diffusers' (U-Nets, transformers, autoencoders) and transformers' (text encoders, always with
//! their `text_model.` level).

pub mod anima;
pub mod clip;
pub mod flux;
pub mod flux2;
pub mod ldm;
pub mod qwen_image;
pub mod sd3;
mod t5;
mod table;
pub mod z_image;

use std::fmt::Debug;

use super::language;

pub use t5::T5;
pub use table::{Module, Order, Table};

/// What depths of a network decide about names, read off a file's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depths {
    /// Residual blocks of a U-Net level on the way down, plus one for the layer that changes the size.
    pub stride: usize,
    /// Levels of the U-Net's way up that have transformers, counted from the middle: bit `i` for level `i`.
    pub up_attention: u64,
    /// Levels of the autoencoder.
    pub levels: usize,
    /// Layers of the text encoder that are used.
    pub layers: usize,
}

impl Default for Depths {
    /// Those of every published U-Net of Stable Diffusion as far as they agree.
    fn default() -> Self {
        Self { stride: 3, up_attention: 0, levels: 0, layers: 0 }
    }
}

/// What of a stored tensor a weight is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// All of it, in its shape.
    All,
    /// All of it, a matrix that may be stored as the kernel of a 1×1 convolution.
    Pointwise,
    /// Some of its rows.
    Rows(Share),
    /// A matrix with rows and columns exchanged.
    Transposed,
    /// All of it, the second half of its rows before the first.
    Swapped,
}

/// A share of a tensor's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Parts before it.
    pub first: usize,
    /// Parts that it has.
    pub count: usize,
    /// Parts of equally many rows that the tensor has.
    pub of: usize,
}

impl Share {
    /// One of several equal parts.
    pub const fn one(part: usize, of: usize) -> Self {
        Self { first: part, count: 1, of }
    }

    /// Its rows of so many; `None` where these do not divide into parts.
    pub fn rows(self, all: usize) -> Option<std::ops::Range<usize>> {
        let part = all.is_multiple_of(self.of).then(|| all / self.of)?;
        Some(self.first * part..(self.first + self.count) * part)
    }
}

/// The names of one network in one layout, both ways. Names come without the component's prefix.
pub trait Tree: Debug + Send + Sync {
    /// The depths, from the names in a file.
    fn depths_of_stored(&self, _names: &[&str]) -> Depths {
        Depths::default()
    }

    /// The depths, from canonical names.
    fn depths_of_canonical(&self, _names: &[&str]) -> Depths {
        Depths::default()
    }

    /// The canonical weights that a stored tensor holds: none for a tensor that is no weight. `None` for a tensor that
    /// this tree does not know.
    fn weights(&self, stored: &str, depths: &Depths) -> Option<Vec<(String, Piece)>>;

    /// The stored tensor that holds a canonical weight.
    fn stored(&self, canonical: &str, depths: &Depths) -> Option<(String, Piece)>;

    /// Whether the model reads anything of a stored tensor that this tree knows.
    fn is_used(&self, _stored: &str, _depths: &Depths) -> bool {
        true
    }

    /// The names that llama.cpp's files have for the network, where it converts such.
    fn in_gguf(&self) -> Option<InGguf> {
        None
    }

    /// A second name that a stored tensor is written under, for programs that expect a tensor there and do not use it.
    fn copy_of(&self, _stored: &str, _depths: &Depths) -> Option<String> {
        None
    }
}

/// What a network is in files that llama.cpp makes.
#[derive(Debug, Clone, Copy)]
pub enum InGguf {
    /// Tensors under names of a tree.
    Tree(&'static dyn Tree),
    /// A language model, whose rows are in another order too ([`crate::gguf::LanguageModel`]).
    LanguageModel,
}

/// The canonical names themselves.
#[derive(Debug)]
pub struct Canonical;

impl Tree for Canonical {
    fn weights(&self, stored: &str, _depths: &Depths) -> Option<Vec<(String, Piece)>> {
        Some(vec![(stored.to_owned(), Piece::All)])
    }

    fn stored(&self, canonical: &str, _depths: &Depths) -> Option<(String, Piece)> {
        Some((canonical.to_owned(), Piece::All))
    }
}

/// A language model that reads captions, in Hugging Face's names: of one that wraps others, the language model alone. One without a
/// head, as diffusers saves Anima's, has them without `model.`.
#[derive(Debug)]
pub struct LanguageEncoder;

impl Tree for LanguageEncoder {
    fn weights(&self, stored: &str, _depths: &Depths) -> Option<Vec<(String, Piece)>> {
        let is_bare = ["embed_tokens.", "layers.", "norm."].iter().any(|start| stored.starts_with(start));
        let bare = is_bare.then(|| format!("model.{stored}"));
        if let Some(name) = bare.or_else(|| language::canonical(stored)) {
            return Some(vec![(name, Piece::All)]);
        }
        // What a wrapper has beside its language model.
        ["visual.", "model.visual."].iter().any(|start| stored.starts_with(start)).then(Vec::new)
    }

    fn stored(&self, canonical: &str, _depths: &Depths) -> Option<(String, Piece)> {
        Some((canonical.to_owned(), Piece::All))
    }

    fn in_gguf(&self) -> Option<InGguf> {
        Some(InGguf::LanguageModel)
    }
}

/// `12.rest` as 12 and `rest`.
fn numbered(text: &str) -> Option<(usize, &str)> {
    let (number, rest) = text.split_once('.')?;
    // A hostile name must not overflow the arithmetic on indices.
    Some((number.parse::<u16>().ok()?.into(), rest))
}

/// Replaces the first matching prefix of a table, from its left column to its right one or back.
fn swap_prefix(name: &str, table: &[(&str, &str)], back: bool) -> Option<String> {
    table.iter().find_map(|&(original, canonical)| {
        let (from, to) = if back { (canonical, original) } else { (original, canonical) };
        name.strip_prefix(from).map(|rest| format!("{to}{rest}"))
    })
}
