//! The tokenizer of a language model: the `tokenizers` crate's, with what training asks beside it: which tokens begin
//! and end texts, which are special, and the chat templates that stand beside it. How it is read from files is told in
//! [`super::folder`] and [`super::gguf`].

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use lora_io::gguf::{self, GgufFile};
use lora_io::hash::sha256;

use super::{folder, gguf as from_gguf};
use crate::guard::guarded;
use crate::{Error, Result};

/// A token that has a meaning of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// Its number.
    pub id: u32,
    /// How it is written.
    pub text: String,
}

/// The tokens that begin, end and fill texts, where a tokenizer has them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<SpecialToken>,
    /// Ends a text.
    pub eos: Option<SpecialToken>,
    /// Fills up rows.
    pub pad: Option<SpecialToken>,
    /// Stands for what cannot be written.
    pub unk: Option<SpecialToken>,
}

/// A text as tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Encoding {
    /// Numbers of the tokens.
    pub ids: Vec<u32>,
    /// The bytes of the text that each stands for. Several tokens may stand for one character.
    pub spans: Vec<Range<usize>>,
}

/// What a reader of files hands over.
pub(super) struct Parts {
    pub(super) path: PathBuf,
    pub(super) inner: tokenizers::Tokenizer,
    pub(super) special: SpecialTokens,
    /// Tokens that end a generated text, [`SpecialTokens::eos`] among them.
    pub(super) ends: BTreeSet<u32>,
    /// Chat templates by name; the usual one is called `default`.
    pub(super) templates: Vec<(String, String)>,
    /// All that the numbers of a text depend on.
    pub(super) digest: String,
}

/// The tokenizer of a language model.
pub struct Tokenizer {
    parts: Parts,
    /// Tokens that the tokenizer itself calls special.
    marked: BTreeSet<u32>,
    vocabulary_size: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({}, {} tokens)", self.parts.path.display(), self.vocabulary_size)
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a model: a folder in the layout of Hugging Face, or a GGUF file.
    ///
    /// # Errors
    /// Where there is none, or one that would give other numbers than its model was trained with.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        match path.is_dir() {
            true => Self::from_folder(path),
            false => Self::from_gguf(&GgufFile::open(path)?),
        }
    }

    /// Whether [`Tokenizer::open`] would read this: a folder with a `tokenizer.json`, or a GGUF file.
    pub fn is_at(path: impl AsRef<Path>) -> bool {
        let path = path.as_ref();
        let magic = || {
            use std::io::Read;
            let mut begin = [0; 4];
            std::fs::File::open(path)
                .and_then(|mut file| file.read_exact(&mut begin))
                .is_ok_and(|()| begin == *gguf::MAGIC)
        };
        path.join("tokenizer.json").is_file() || (path.is_file() && magic())
    }

    /// Reads `tokenizer.json` of a folder, with `tokenizer_config.json`, `generation_config.json` and chat templates
    /// beside it.
    ///
    /// # Errors
    /// Where there is no `tokenizer.json`, or one of the files is damaged.
    pub(crate) fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        Self::new(folder::read(folder.as_ref())?)
    }

    /// Reads the tokenizer inside a GGUF file.
    ///
    /// # Errors
    /// Where there is none, or one of a kind that is not known here.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        Self::new(from_gguf::read(file)?)
    }

    fn new(mut parts: Parts) -> Result<Self> {
        let path = parts.path.clone();
        // A length limit or padding saved beside the vocabulary would cut or fill texts silently.
        let whole = parts.inner.with_truncation(None).map(|_| ());
        whole.map_err(|failure| Error::tokenizer(&path, failure.to_string()))?;
        parts.inner.with_padding(None);
        let added = parts.inner.get_added_tokens_decoder();
        let mut marked: BTreeSet<u32> = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        marked.extend(&parts.ends);
        let SpecialTokens { bos, eos, pad, unk } = &parts.special;
        marked.extend([bos, eos, pad, unk].into_iter().flatten().map(|token| token.id));
        let highest = parts.inner.get_vocab(true).into_values().max();
        let vocabulary_size = highest.map_or(0, |id| id as usize + 1);
        if vocabulary_size > MOST_TOKENS {
            let reason = format!("it has {vocabulary_size} tokens; expected at most {MOST_TOKENS}");
            return Err(Error::tokenizer(&path, reason));
        }
        Ok(Self { parts, marked, vocabulary_size })
    }

    pub(super) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.parts.inner
    }

    /// Where it was read from.
    pub fn path(&self) -> &Path {
        &self.parts.path
    }

    /// The highest number of a token, plus one. A model's embedding has at least so many rows.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }

    /// The tokens that begin, end and fill texts.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.parts.special
    }

    /// Numbers of the tokens that end what a model generates, ascending: the end of a text, and the end of a turn.
    pub fn ends(&self) -> impl Iterator<Item = u32> {
        self.parts.ends.iter().copied()
    }

    /// Whether a token is one that texts are laid out with, rather than a part of them.
    pub fn is_special(&self, id: u32) -> bool {
        self.marked.contains(&id)
    }

    /// How the special tokens are written.
    pub(crate) fn special_texts(&self) -> impl Iterator<Item = String> {
        self.marked.iter().filter_map(|id| self.text_of(*id))
    }

    /// Chat templates by name, as they stand beside the tokenizer; the usual one is called `default`.
    pub fn templates(&self) -> &[(String, String)] {
        &self.parts.templates
    }

    /// Tells tokenizers apart that may give different numbers.
    pub fn digest(&self) -> &str {
        &self.parts.digest
    }

    /// The number of a token that is written so.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.parts.inner.token_to_id(token)
    }

    /// How the vocabulary writes a token.
    pub fn text_of(&self, id: u32) -> Option<String> {
        self.parts.inner.id_to_token(id)
    }

    /// The tokens of a text that a chat template has laid out: no token is added.
    ///
    /// # Errors
    /// Where the tokenizer fails, which those of published models never do.
    pub fn encode(&self, text: &str) -> Result<Encoding> {
        let encoding = self.asked(|inner| inner.encode(text, false))?;
        let spans = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok(Encoding { ids: encoding.get_ids().to_vec(), spans })
    }

    /// The tokens of a plain text between its begin, by the tokenizer's own rule, and its end; each once, where the
    /// text has them written out.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.asked(|inner| inner.encode_fast(text, true))?;
        let mut ids = encoding.get_ids().to_vec();
        if let Some(bos) = &self.parts.special.bos
            && ids.starts_with(&[bos.id, bos.id])
        {
            ids.remove(0);
        }
        if let Some(eos) = &self.parts.special.eos
            && ids.last() != Some(&eos.id)
        {
            ids.push(eos.id);
        }
        Ok(ids)
    }

    /// The text of tokens, special ones written out.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.asked(|inner| inner.decode(ids, false))
    }

    /// The text of tokens without special ones.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn decode_text(&self, ids: &[u32]) -> Result<String> {
        let ids: Vec<u32> = ids.iter().copied().filter(|id| !self.is_special(*id)).collect();
        self.decode(&ids)
    }

    fn asked<T>(&self, work: impl FnOnce(&tokenizers::Tokenizer) -> tokenizers::Result<T>) -> Result<T> {
        let failed = |reason: &str| Error::tokenizer(&self.parts.path, reason);
        guarded(
            || failed("it is damaged: it gave up on a text"),
            || work(&self.parts.inner).map_err(|failure| failed(&failure.to_string())),
        )
    }
}

/// The highest bit of a token's number tells whether it is trained (see [`crate::texts`]); no vocabulary comes near it.
const MOST_TOKENS: usize = 1 << 30;

/// One digest of several parts.
pub(super) fn digest(parts: &[&[u8]]) -> String {
    sha256(parts.iter().map(|part| sha256(part)).collect::<Vec<_>>().join(" ").as_bytes())
}
