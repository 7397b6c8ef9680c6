//! The text encoders of a base: which there are, what each keeps of a caption, and all of that together. How a kind of encoder
//! reads captions is in `language`, `conditioned`, `clip` and `t5`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_core::Component;
use lora_data::tokenizer::Tokenizer;
use lora_io::checkpoint::Checkpoint;
use lora_io::hub;
use lora_models::weights::Held;
use lora_torch::tch::{Device, Kind};

use super::super::{Item, Tensors};
use super::clip::ClipReader;
use super::conditioned::ConditionedReader;
use super::language::LanguageReader;
use super::t5::T5Reader;
use crate::config::TrainConfig;
use crate::{Error, Result};

/// A text encoder of a kind of base: what its files do not say.
#[derive(Debug)]
pub(super) struct EncoderKind {
    /// The part of the base that it is.
    pub(super) component: Component,
    /// What people call it.
    pub(super) title: &'static str,
    /// The key that names it, where the base's file is the transformer alone.
    pub(super) key: &'static str,
    /// What that key may name, for people.
    pub(super) published: &'static str,
    /// The folder of its tokenizer in a diffusers folder; `None` where the vocabulary is this program's.
    pub(super) tokenizer: Option<&'static str>,
    /// How it reads captions.
    pub(super) reads: Reads,
}

/// How an encoder reads captions.
#[derive(Debug)]
pub(super) enum Reads {
    /// A language model.
    Language(Language),
    /// A language model, and the text conditioner that makes states of T5's tokens of its own.
    Conditioned(Language),
    /// T5.
    T5(T5),
    /// CLIP's, of which this is kept.
    Clip(Clip),
}

/// How T5 reads captions.
#[derive(Debug, Clone, Copy)]
pub(super) struct T5 {
    /// Tokens of a row at most, where no key says it.
    pub(super) length: fn(&Checkpoint) -> usize,
    /// Rows are filled up to their greatest length, and all see what fills them up. Otherwise one token stands behind a caption,
    /// which no other sees.
    pub(super) fills_up: bool,
}

/// How a language model reads captions.
#[derive(Debug)]
pub(super) struct Language {
    /// What stands before a caption and behind it, special tokens among them.
    pub(super) around: [&'static str; 2],
    /// Which of its states are read. Those behind the last layer are normed, others are not.
    pub(super) states: States,
    /// Tokens at the front whose states are not read.
    pub(super) dropped: usize,
    /// Tokens of a row at most behind these, where no key says it.
    pub(super) length: usize,
    /// Rows are filled up to their greatest length, and states of what fills them up are read like others.
    pub(super) fills_up: bool,
}

/// Which states of a language model are read.
#[derive(Debug)]
pub(super) enum States {
    /// Those before its last so many layers.
    Before(usize),
    /// Those behind so many layers each, one beside the other.
    Behind(&'static [usize]),
}

impl States {
    /// How many stand side by side.
    pub(super) fn count(&self) -> usize {
        match self {
            Self::Before(_) => 1,
            Self::Behind(depths) => depths.len().max(1),
        }
    }

    /// By how many layers are before them, in a model of so many.
    pub(super) fn depths(&self, layers: usize) -> Vec<usize> {
        match self {
            Self::Before(unread) => vec![layers.saturating_sub(*unread)],
            Self::Behind(depths) => depths.to_vec(),
        }
    }
}

/// What is kept of CLIP's answer.
#[derive(Debug, Clone, Copy)]
pub(super) enum Clip {
    /// The normed state of the end, under this name.
    End(&'static str),
    /// The states before the last layer, and the projected state of the end.
    StatesAndPooled {
        /// Their names.
        names: [&'static str; 2],
        /// OpenCLIP's: rows are filled up with 0, the GELU is exact.
        open: bool,
    },
}

/// The name of the states that are kept of a caption.
pub(super) const STATES: &str = "states";

/// A text encoder of an open base.
pub(super) trait CaptionReader: std::fmt::Debug + Send {
    /// Builds the network.
    fn load(&mut self, checkpoint: &Checkpoint, kind: Kind, device: Device, held: Held) -> Result<()>;
    /// Lets go of it.
    fn unload(&mut self);
    /// Whether it is there.
    fn is_loaded(&self) -> bool;
    /// Tokens of a caption at most.
    fn length(&self) -> usize;
    /// The number of a caption's tokens with what stands around it, uncut.
    fn tokens(&self, caption: &str) -> Result<usize>;
    /// What answers depend on beside the caption and the weights.
    fn settings(&self) -> String;
    /// What is kept of a caption, on the device, in the compute dtype.
    fn encode(&self, caption: &str, device: Device) -> Result<Tensors>;
}

/// All text encoders of an open base, in their order.
#[derive(Debug)]
pub(super) struct CaptionReaders(Vec<(&'static EncoderKind, Box<dyn CaptionReader>)>);

/// The key that names the tokenizer of a text conditioner, and its folder in a diffusers folder.
pub(super) const T5_TOKENIZER: [&str; 2] = ["t5_tokenizer", "t5_tokenizer"];

/// Where the tokenizer of a base's text encoder is: where the key says it, in the encoder's own folder, or beside it.
///
/// # Errors
/// [`Error::Config`] where there is none where the key says.
pub(super) fn tokenizer(
    checkpoint: &Checkpoint,
    component: Component,
    [key, folder]: [&'static str; 2],
    config: &TrainConfig,
) -> Result<Option<PathBuf>> {
    let at = |places: Vec<PathBuf>| places.into_iter().find(|place| Tokenizer::is_at(place));
    if let Some(given) = config.extra.text(key) {
        let given = hub::place(Path::new(given))?.into_owned();
        let missing = || config.refused([(key, format!("{}: there is no tokenizer.json in it", given.display()))]);
        return Ok(Some(at(vec![given.clone(), given.join(folder)]).ok_or_else(missing)?));
    }
    let Ok(encoder) = checkpoint.component(component) else { return Ok(None) };
    let beside = [Some(encoder.path()), encoder.path().parent()].into_iter().flatten();
    let places = beside.flat_map(|place| [place.to_owned(), place.join(folder)]);
    // The text encoder may come from elsewhere without one: a base's own is of the same kind.
    Ok(at(places.chain([checkpoint.path().join(folder)]).collect()))
}

/// That tokenizer, held against the number of `rows` in its encoder's table.
pub(super) fn open_tokenizer(
    checkpoint: &Checkpoint,
    component: Component,
    (names, table): ([&'static str; 2], &str),
    config: &TrainConfig,
) -> Result<Tokenizer> {
    let found = tokenizer(checkpoint, component, names, config)?;
    let path = found.unwrap_or_else(|| checkpoint.path().join(names[1]));
    let tokenizer = Tokenizer::open(&path)?;
    let rows = checkpoint.component(component)?.shape(table).and_then(<[_]>::first);
    match rows.filter(|rows| **rows < tokenizer.vocabulary_size()) {
        Some(&rows) => Err(Error::Vocabulary { path, tokens: tokenizer.vocabulary_size(), rows }),
        None => Ok(tokenizer),
    }
}

impl CaptionReaders {
    pub(super) fn open(kinds: &'static [EncoderKind], checkpoint: &Checkpoint, config: &TrainConfig) -> Result<Self> {
        let open = |kind: &'static EncoderKind| -> Result<(&'static EncoderKind, Box<dyn CaptionReader>)> {
            Ok((
                kind,
                match &kind.reads {
                    Reads::Language(reads) => Box::new(LanguageReader::open(kind, reads, checkpoint, config)?),
                    Reads::Conditioned(reads) => Box::new(ConditionedReader::open(kind, reads, checkpoint, config)?),
                    Reads::T5(reads) => Box::new(T5Reader::open(kind, *reads, checkpoint, config)?),
                    Reads::Clip(kept) => Box::new(ClipReader::new(kind, *kept, config)),
                },
            ))
        };
        kinds.iter().map(open).collect::<Result<_>>().map(Self)
    }

    pub(super) fn of(&self, component: Component) -> Result<&dyn CaptionReader> {
        let own = self.0.iter().find(|(kind, _)| kind.component == component);
        own.map(|(_, reader)| &**reader).ok_or(Error::EncodesNothing { network: component })
    }

    pub(super) fn of_mut(&mut self, component: Component) -> Option<&mut Box<dyn CaptionReader>> {
        self.0.iter_mut().find(|(kind, _)| kind.component == component).map(|(_, reader)| reader)
    }

    /// The one that reads the most of a caption.
    pub(super) fn longest(&self) -> Option<&dyn CaptionReader> {
        self.0.iter().map(|(_, reader)| &**reader).max_by_key(|reader| reader.length())
    }

    /// What all keep of an item's caption: what was kept, or what those that stayed make of it now.
    pub(super) fn of_item(&self, item: &Item, device: Device) -> Result<Tensors> {
        let mut all = Tensors::new();
        for (kind, reader) in &self.0 {
            match item.encoded.get(&kind.component) {
                Some(kept) => all.extend(super::shallow(kept)),
                None => all.extend(reader.encode(&item.caption, device)?),
            }
        }
        Ok(all)
    }

    /// What all kept of a caption.
    pub(super) fn kept(&self, encoded: &BTreeMap<Component, Tensors>) -> Result<Tensors> {
        let mut all = Tensors::new();
        for (kind, _) in &self.0 {
            let kept = encoded.get(&kind.component);
            all.extend(super::shallow(kept.ok_or_else(|| super::missing(kind.component, STATES))?));
        }
        Ok(all)
    }
}
