//! Text datasets for language models: JSON, JSON lines, Parquet or plain files, whose records are tokenised once, up
//! front, and visited as rows of tokens of which some are learned. How conversations are laid out is told in
//! [`crate::template`].
//!
//! In files of their own: reading (`read.rs`), the forms of records (`record.rs`) with their keys (`fields.rs`) and
//! turns (`turns.rs`), one record as tokens (`tokenise.rs`), how documents fill rows (`rows.rs`), what the cache keeps
//! (`stored.rs`), counts (`summary.rs`).

mod fields;
mod read;
mod record;
mod rows;
mod stored;
mod summary;
mod tokenise;
mod turns;

pub use crate::source::HeldOut;
pub use record::{TextForm, TextSample};
pub use summary::{Marked, TextSummary};

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_core::random::Stream;
use lora_io::hash::sha256;
use rayon::prelude::*;

use crate::cache::DiskCache;
use crate::dataset::Strictness;
use crate::finding::{Finding, FindingKind};
use crate::sampler::Visits;
use crate::source::{Example, Identity, Overview, Shape, Source};
use crate::template::{ChatTemplate, TemplateOptions};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

use record::Parsed;
use rows::{Document, Long, Rows, TRAINED, fit};
use tokenise::Tokeniser;

/// Tokens as training sees them: one document, or several behind one another, which must not attend to each other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenRow {
    /// Numbers of the tokens, `[tokens]`.
    pub ids: Vec<u32>,
    /// Which of them are learned, `[tokens]`: those whose number is a label for the place before. Never the first of a
    /// document.
    pub trained: Vec<bool>,
    /// Lengths of the documents in order; their sum is the number of tokens.
    pub documents: Vec<usize>,
}

/// Lengths of rows are rounded up to a multiple of this.
pub const LENGTH_STEP: usize = 64;

/// What happens to a document that is longer than a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LongDocuments {
    /// It becomes several rows.
    #[default]
    Split,
    /// Its end is cut off.
    Truncate,
    /// It is left out.
    Skip,
    /// The run ends before it begins.
    Error,
}

impl LongDocuments {
    /// Names in configurations.
    pub const NAMES: [(&'static str, Self); 4] =
        [("split", Self::Split), ("truncate", Self::Truncate), ("skip", Self::Skip), ("error", Self::Error)];

    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].0
    }

    /// By its name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(own, _)| *own == name).map(|(_, policy)| *policy)
    }
}

/// Which texts, and how they are treated and visited.
#[derive(Debug, Clone, PartialEq)]
pub struct TextOptions {
    /// A file or a folder.
    pub path: PathBuf,
    /// What happens when a record cannot be used.
    pub strictness: Strictness,
    /// Visits of each row per epoch.
    pub repeats: usize,
    /// Rows at once.
    pub batch_size: usize,
    /// The most tokens of a row.
    pub max_seq_length: usize,
    /// Lengths of rows are rounded up to a multiple of this, so that there are few different ones.
    pub length_step: usize,
    /// Several documents share a row.
    pub packing: bool,
    /// What is given is learned too, not only the answers.
    pub train_on_inputs: bool,
    /// A file, or one of [`crate::template::NAMES`]; the tokenizer's own where nothing is named.
    pub chat_template: Option<String>,
    /// What templates are given beside the conversation.
    pub template: TemplateOptions,
    /// What the system says where a conversation has no such turn; nothing by default.
    pub system_prompt: Option<String>,
    /// What happens to documents longer than a row.
    pub long_documents: LongDocuments,
    /// Tokens that a piece of a long document repeats of the piece before, to be read and not learned again.
    pub overlap: usize,
    /// Whether records are preference pairs, which then count as such in a loss, or must not be; `None` takes either.
    pub pairs: Option<bool>,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            strictness: Strictness::Normal,
            repeats: 1,
            batch_size: 1,
            max_seq_length: 2048,
            length_step: LENGTH_STEP,
            packing: false,
            train_on_inputs: false,
            chat_template: None,
            template: TemplateOptions::default(),
            system_prompt: None,
            long_documents: LongDocuments::default(),
            overlap: 0,
            pairs: None,
        }
    }
}

impl TextOptions {
    fn check(&self) -> Result<()> {
        let refused = |key, value: usize, reason: &str| {
            Err(Error::Option { key, value: value.to_string(), reason: reason.to_owned() })
        };
        match self {
            // Documents count their tokens in 32 bits.
            Self { max_seq_length: length @ (0 | 1), .. } => refused("max_seq_length", *length, "expected 2 or more"),
            Self { max_seq_length: length, .. } if *length > 1 << 24 => {
                refused("max_seq_length", *length, "expected at most 16777216")
            }
            Self { overlap, max_seq_length, .. } if overlap >= max_seq_length => {
                refused("overlap", *overlap, "expected less than max_seq_length")
            }
            _ => Ok(()),
        }
    }

    /// The length of the rows that a row of so many tokens shares its batches with.
    fn bucket(&self, length: usize) -> usize {
        match self.packing {
            true => self.max_seq_length,
            false => length.next_multiple_of(self.length_step.max(1)).min(self.max_seq_length),
        }
    }
}

/// Where a record stands, and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    /// Its file's place among the files.
    file: u32,
    /// Its line or place in the file, from 1; 0 where the file is the record.
    number: u32,
    form: TextForm,
}

/// The records of a file or a folder as rows of tokens.
#[derive(Debug, Clone)]
pub struct Texts {
    options: TextOptions,
    /// None where the texts stand in for others.
    tools: Option<Arc<Tools>>,
    files: Vec<PathBuf>,
    /// All tokens, those that are learned with the bit [`TRAINED`].
    tokens: Arc<Vec<u32>>,
    records: Vec<Record>,
    documents: Vec<Document>,
    /// How many documents, one after the other, stay together.
    groups: Vec<u32>,
    rows: Rows,
    long: Long,
    findings: Vec<Finding>,
    /// How many findings of each kind there are, those that are not kept included.
    counts: BTreeMap<FindingKind, usize>,
}

/// What turns records into tokens.
#[derive(Debug)]
struct Tools {
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
}

/// The most findings of one kind that are kept; the others are counted.
const FINDINGS: usize = 1000;
/// Records that are tokenised at once.
const AT_ONCE: usize = 2048;

impl Texts {
    /// Reads and tokenises a `.jsonl`, `.json`, `.parquet` or `.txt` file (a text file is one record), or all such
    /// files of a folder, sorted by name. Records that cannot be used are errors where the strictness says so, else
    /// they are left out, counted and reported. With a cache, files that were tokenised before are not tokenised again.
    ///
    /// # Errors
    /// Where a file cannot be read, no record is left, a record of a strict dataset cannot be used, an option is
    /// impossible, or a document is too long and that is to be an error.
    pub fn open(options: TextOptions, tokenizer: Arc<Tokenizer>, cache: Option<&DiskCache>) -> Result<Self> {
        options.check()?;
        let template = ChatTemplate::choose(options.chat_template.as_deref(), &tokenizer, &options.template)?;
        Self::read(options, Arc::new(Tools { tokenizer, template }), cache)
    }

    /// The texts of another place, treated as these are: for validation.
    ///
    /// # Errors
    /// As [`Texts::open`].
    pub fn of_another(&self, path: impl Into<PathBuf>, cache: Option<&DiskCache>) -> Result<Self> {
        let options = TextOptions { path: path.into(), repeats: 1, ..self.options.clone() };
        match &self.tools {
            Some(tools) => Self::read(options, Arc::clone(tools), cache),
            None => Ok(Self::stand_in(options, 1)),
        }
    }

    /// Rows of no file, each of the longest shape and learned in full. What a run needs can be found with them before
    /// anybody has tokenised the real ones.
    pub fn stand_in(options: TextOptions, rows: usize) -> Self {
        let length = options.max_seq_length;
        let tokens = vec![TRAINED; length];
        let document = |range| Document::new(&tokens, range, 1, 0);
        let (form, group) = match options.pairs {
            Some(true) => (TextForm::Preference, vec![document(0..length / 2), document(length / 2..length)]),
            _ => (TextForm::Plain, vec![document(0..length)]),
        };
        let mut texts = Self::empty(options, None);
        texts.files.push("stand-in".into());
        texts.tokens = Arc::new(tokens);
        texts.records = vec![Record { file: 0, number: 0, form }];
        texts.groups = vec![group.len() as u32; rows];
        texts.documents = std::iter::repeat_n(group, rows).flatten().collect();
        texts.arrange();
        texts
    }

    fn empty(options: TextOptions, tools: Option<Arc<Tools>>) -> Self {
        Self {
            options,
            tools,
            files: Vec::new(),
            tokens: Arc::default(),
            records: Vec::new(),
            documents: Vec::new(),
            groups: Vec::new(),
            rows: Rows::default(),
            long: Long::default(),
            findings: Vec::new(),
            counts: BTreeMap::new(),
        }
    }

    fn read(options: TextOptions, tools: Arc<Tools>, cache: Option<&DiskCache>) -> Result<Self> {
        let paths = read::files(&options.path)?;
        let mut texts = Self::empty(options, Some(Arc::clone(&tools)));
        let mut tokens = Vec::new();
        for path in paths {
            let treated = texts.file(&tools, &path, cache)?;
            texts.take(path, treated, &mut tokens)?;
        }
        tokens.shrink_to_fit();
        texts.tokens = Arc::new(tokens);
        texts.report_long();
        texts.arrange();
        match texts.count() {
            0 if texts.options.strictness != Strictness::Inspect => {
                let found = match texts.findings.first() {
                    Some(first) => {
                        format!(
                            "{} record(s) could not be used, the first: {first}",
                            texts.counts.values().sum::<usize>()
                        )
                    }
                    None => "there are no records".into(),
                };
                let looked_for = "texts in jsonl, json, parquet, txt".into();
                Err(Error::Empty { path: texts.options.path.clone(), looked_for, found })
            }
            _ => Ok(texts),
        }
    }

    /// The records of a file as tokens, from the cache where they are there.
    fn file(&self, tools: &Tools, path: &Path, cache: Option<&DiskCache>) -> Result<stored::File> {
        let key = match cache {
            Some(cache) => Some((cache, stored::key(cache, path, &self.options, tools)?)),
            None => None,
        };
        if let Some(file) = key.as_ref().and_then(|(cache, key)| stored::get(cache, key)) {
            return Ok(file);
        }
        let file = self.tokenise(tools, path)?;
        if let Some((cache, key)) = key {
            stored::put(cache, &key, &file)?;
        }
        Ok(file)
    }

    fn tokenise(&self, tools: &Tools, path: &Path) -> Result<stored::File> {
        let TextOptions { train_on_inputs, system_prompt, strictness, .. } = &self.options;
        let tokeniser =
            Tokeniser::new(&tools.tokenizer, tools.template.as_ref(), *train_on_inputs, system_prompt.as_deref());
        let (mut file, mut records) = (stored::File::default(), read::records(path)?);
        loop {
            let raw = records.by_ref().take(AT_ONCE).collect::<Result<Vec<_>>>()?;
            if raw.is_empty() {
                return Ok(file);
            }
            let treat = |raw: read::Raw| {
                let number = raw.number;
                let parsed = raw.parse(path).map_err(|error| (None, error));
                let tokenised = parsed.and_then(|Parsed { form, sample, unread }| {
                    let refused = |(kind, reason)| (Some(kind), Error::caption(path, place(number), reason));
                    let mut own = tokeniser.record(sample).map_err(refused)?;
                    if !unread.is_empty() {
                        own.warnings.push((FindingKind::UnreadKey, format!("not read: {}", unread.join(", "))));
                    }
                    Ok((form, own))
                });
                (number, tokenised)
            };
            let treated: Vec<_> = raw.into_par_iter().map(treat).collect();
            for (number, tokenised) in treated {
                match tokenised {
                    Ok((form, own)) => file.push(number, form, own),
                    Err((_, error)) if *strictness == Strictness::Strict => return Err(error),
                    Err((kind, error)) => file.found(kind.unwrap_or(FindingKind::TextRecord), error.reason()),
                }
            }
        }
    }

    /// Takes up the records of a file.
    fn take(&mut self, path: PathBuf, mut file: stored::File, tokens: &mut Vec<u32>) -> Result<()> {
        let place = self.files.len() as u32;
        let TextOptions { max_seq_length, long_documents, overlap, .. } = self.options;
        let mut start = tokens.len();
        match tokens.is_empty() {
            true => *tokens = std::mem::take(&mut file.tokens),
            false => tokens.append(&mut file.tokens),
        }
        let mut lengths = file.lengths.iter();
        for own in &file.records {
            let is_pair = |form| form == TextForm::Preference;
            if self.options.pairs.is_some_and(|pairs| pairs != is_pair(own.form)) {
                let reason = match is_pair(own.form) {
                    true => "it is a preference pair; objective = \"dpo\" or \"orpo\" learns from pairs".to_owned(),
                    false => format!(
                        "it is of the form {}; objective = \"dpo\" and \"orpo\" need pairs, `chosen` and `rejected`",
                        own.form.name()
                    ),
                };
                return Err(Error::caption(&path, self::place(own.number), reason));
            }
            if self.records.first().is_some_and(|first| is_pair(first.form) != is_pair(own.form)) {
                let reason = "a dataset is of preference pairs, or of other records; this one follows the other kind";
                return Err(Error::caption(&path, self::place(own.number), reason));
            }
            let number = self.records.len() as u32;
            let mut whole = Vec::with_capacity(own.documents as usize);
            for length in lengths.by_ref().take(own.documents as usize) {
                whole.push(start..start + *length as usize);
                start += *length as usize;
            }
            let length: usize = whole.iter().map(ExactSizeIterator::len).sum();
            if long_documents == LongDocuments::Error && length > max_seq_length {
                let reason = format!(
                    "the record has {length} tokens, max_seq_length is {max_seq_length}; raise it, or set long_documents to \
                     split, truncate or skip"
                );
                return Err(Error::caption(&path, self::place(own.number), reason));
            }
            self.records.push(Record { file: place, number: own.number, form: own.form });
            let groups = fit(tokens, &whole, number, (max_seq_length, long_documents, overlap), &mut self.long);
            for group in groups {
                self.groups.push(group.len() as u32);
                self.documents.extend(group);
            }
        }
        for (kind, count) in file.counts {
            *self.counts.entry(kind).or_default() += count;
        }
        let findings = file.findings.into_iter().map(|(kind, detail)| Finding::new(&path, kind, detail));
        self.findings.extend(findings);
        self.files.push(path);
        Ok(())
    }

    /// Names what became of documents that were too long.
    fn report_long(&mut self) {
        let most = self.options.max_seq_length;
        let Long { cut, split, skipped, emptied } = self.long.clone();
        let cut = cut.into_iter().map(|(record, tokens)| {
            (record, FindingKind::TextCut, format!("the last {tokens} tokens are cut off to fit into {most}"))
        });
        let split = split.into_iter().map(|(record, pieces)| {
            (
                record,
                FindingKind::TextSplit,
                format!("it is longer than {most} tokens and is split into {pieces} pieces"),
            )
        });
        let skipped = skipped.into_iter().map(|(record, tokens)| {
            (record, FindingKind::TextSkipped, format!("{tokens} tokens do not fit into {most}, and it is left out"))
        });
        let emptied = emptied.into_iter().map(|record| {
            (record, FindingKind::NothingLearned, format!("its first {most} tokens hold no answer, and it is left out"))
        });
        for (record, kind, detail) in cut.chain(split).chain(skipped).chain(emptied).collect::<Vec<_>>() {
            let count = self.counts.entry(kind).or_default();
            *count += 1;
            if *count <= FINDINGS {
                let Record { file, number, .. } = self.records[record as usize];
                let detail = Error::caption(&self.files[file as usize], place(number), detail).reason();
                self.findings.push(Finding::new(&self.files[file as usize], kind, detail));
            }
        }
    }

    /// Lays the documents out in rows.
    fn arrange(&mut self) {
        let TextOptions { max_seq_length, packing, .. } = self.options;
        self.rows = Rows::of(&self.documents, &self.groups, max_seq_length, packing);
    }

    /// Takes some records out, chosen by the seed, to be looked at beside training. Both parts have at least one
    /// record.
    ///
    /// # Errors
    /// Where there are not so many.
    pub fn held_out(mut self, held_out: HeldOut, seed: u64) -> Result<(Self, Self)> {
        let mut records: Vec<u32> = self.documents.iter().map(|document| document.record).collect();
        records.dedup();
        let chosen = held_out.choose(records.len(), seed)?;
        let chosen: BTreeSet<u32> = chosen.into_iter().map(|place| records[place]).collect();
        let mut other = self.clone();
        other.options.repeats = 1;
        other.findings.clear();
        other.counts.clear();
        self.keep(|record| !chosen.contains(&record));
        other.keep(|record| chosen.contains(&record));
        Ok((self, other))
    }

    /// Drops the documents of other records.
    fn keep(&mut self, keeps: impl Fn(u32) -> bool) {
        let (mut documents, mut groups, mut start) = (Vec::new(), Vec::new(), 0);
        for members in &self.groups {
            let group = &self.documents[start..start + *members as usize];
            start += group.len();
            if group.iter().all(|document| keeps(document.record)) {
                documents.extend_from_slice(group);
                groups.push(*members);
            }
        }
        (self.documents, self.groups) = (documents, groups);
        for list in [&mut self.long.cut, &mut self.long.split, &mut self.long.skipped] {
            list.retain(|(record, _)| keeps(*record));
        }
        self.arrange();
    }

    /// The options that it was opened with.
    pub fn options(&self) -> &TextOptions {
        &self.options
    }

    /// The tokenizer; none for texts that stand in for others.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.tools.as_ref().map(|tools| &tools.tokenizer)
    }

    /// The chat template that conversations are laid out with.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.tools.as_ref()?.template.as_ref()
    }

    /// Whether the rows are pairs: each holds two documents, the better answer before the worse one.
    pub fn are_pairs(&self) -> bool {
        self.records.first().is_some_and(|record| record.form == TextForm::Preference)
    }

    /// How many findings there are of each kind. The findings themselves are kept up to a thousand of each.
    pub fn counts(&self) -> &BTreeMap<FindingKind, usize> {
        &self.counts
    }

    /// The documents of all rows: the record's file and line (0 where the file is the record), and the tokens without
    /// what is learned of them.
    pub(crate) fn all_documents(&self) -> impl Iterator<Item = (&Path, u32, Vec<u32>)> {
        self.documents.iter().map(|document| {
            let Record { file, number, .. } = self.records[document.record as usize];
            let ids = self.tokens[document.range()].iter().map(|token| token & !TRAINED).collect();
            (self.files[file as usize].as_path(), number, ids)
        })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows.count()
    }

    /// A row as training sees it.
    pub fn row(&self, row: usize) -> TokenRow {
        let mut own = TokenRow::default();
        for document in self.documents_of(row) {
            let tokens = &self.tokens[document.range()];
            own.ids.extend(tokens.iter().map(|token| token & !TRAINED));
            let learned = |(place, token): (usize, &u32)| place >= document.context as usize && token & TRAINED != 0;
            own.trained.extend(tokens.iter().enumerate().map(learned));
            own.documents.push(tokens.len());
        }
        own
    }

    fn documents_of(&self, row: usize) -> impl Iterator<Item = &Document> {
        self.rows.documents(row).iter().map(|document| &self.documents[*document as usize])
    }

    /// Distinguishes rows by what they say.
    fn digest(&self, row: usize) -> String {
        let TokenRow { ids, trained, documents } = self.row(row);
        let tokens = ids.iter().zip(trained).flat_map(|(id, trained)| (id | u32::from(trained) << 31).to_le_bytes());
        sha256(&documents.iter().flat_map(|length| length.to_le_bytes()).chain(tokens).collect::<Vec<_>>())
    }
}

/// A line for messages.
fn place(number: u32) -> Option<usize> {
    (number > 0).then_some(number as usize)
}

impl Source for Texts {
    fn count(&self) -> usize {
        self.rows.count()
    }

    fn visits(&self, item: usize) -> Visits {
        let TextOptions { repeats, batch_size, .. } = self.options;
        let length = self.documents_of(item).map(|document| document.length as usize).sum();
        Visits { count: repeats, shape: Shape::Tokens(self.options.bucket(length)), batch_size }
    }

    fn path(&self, item: usize) -> &Path {
        let file = self.documents_of(item).next().map_or(0, |first| self.records[first.record as usize].file);
        &self.files[file as usize]
    }

    fn example(&self, item: usize, _draw: &Stream) -> Result<Example> {
        Ok(Example::Tokens(self.row(item)))
    }

    fn measure(&self, item: usize) -> f64 {
        match self.options.pairs {
            Some(true) => self.documents_of(item).count() as f64 / 2.0,
            _ => self.amount(item),
        }
    }

    /// The tokens that are learned.
    fn amount(&self, item: usize) -> f64 {
        self.documents_of(item).map(|document| f64::from(document.trained)).sum()
    }

    fn key_parts(
        &self,
        item: usize,
        _variation: Option<usize>,
        _draw: &Stream,
        _cache: &DiskCache,
    ) -> Result<Vec<String>> {
        Ok(vec![self.digest(item)])
    }

    fn identity(&self) -> Identity {
        let TextOptions { batch_size, max_seq_length, length_step, packing, train_on_inputs, .. } = &self.options;
        let TextOptions { long_documents, overlap, repeats, .. } = &self.options;
        let count = self.count();
        let all: Vec<String> = (0..count).map(|item| self.digest(item)).collect();
        let options = [
            ("batch_size of the dataset", batch_size.to_string()),
            ("max_seq_length", max_seq_length.to_string()),
            ("length_step", length_step.to_string()),
            ("packing", packing.to_string()),
            ("train_on_inputs", train_on_inputs.to_string()),
            ("long_documents", format!("{} (overlap {overlap})", long_documents.name())),
        ];
        Identity {
            options: options.map(|(name, value)| (name.to_owned(), value)).into(),
            items: vec![
                ("dataset".into(), format!("{count} rows of texts, {} visits an epoch", count * repeats)),
                ("texts".into(), sha256(all.join(" ").as_bytes())[..16].to_owned()),
            ],
        }
    }

    fn findings(&self) -> &[Finding] {
        &self.findings
    }

    fn of_another(&self, path: &Path) -> Result<Box<dyn Source>> {
        Self::of_another(self, path, None).map(|texts| Box::new(texts) as Box<dyn Source>)
    }

    fn hold_out(&mut self, held_out: HeldOut, seed: u64) -> Result<Box<dyn Source>> {
        let (own, other) = self.clone().held_out(held_out, seed)?;
        *self = own;
        Ok(Box::new(other))
    }

    fn overview(&self) -> Overview {
        self.summary().overview()
    }

    fn leave_out(&mut self, unusable: Vec<(usize, Error)>) {
        let mut kept = vec![true; self.count()];
        for (item, error) in unusable {
            kept[item] = false;
            *self.counts.entry(FindingKind::TextRecord).or_default() += 1;
            self.findings.push(Finding::new(self.path(item), FindingKind::TextRecord, error.reason()));
        }
        self.rows.retain(&kept);
    }
}
