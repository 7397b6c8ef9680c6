//! A file's records as tokens, in memory and in the cache: before documents are split or packed, so that only what
//! changes the tokens themselves asks for tokenising again.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::record::TextForm;
use super::tokenise::Tokenised;
use super::{FINDINGS, TextOptions, Tools};
use crate::cache::{DiskCache, Key};
use crate::dataset::{Stored, Strictness};
use crate::error::Error;
use crate::finding::FindingKind;
use crate::{Result, texts};

/// Part of every key: raised when the same record would give other tokens.
const FORMAT: &str = "texts 2";

/// A record's place and form, and how many documents it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Own {
    pub(super) number: u32,
    pub(super) form: TextForm,
    pub(super) documents: u8,
}

/// The records of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct File {
    pub(super) records: Vec<Own>,
    /// Of every document of every record.
    pub(super) lengths: Vec<u32>,
    /// Of all documents, one after the other.
    pub(super) tokens: Vec<u32>,
    pub(super) findings: Vec<(FindingKind, String)>,
    pub(super) counts: BTreeMap<FindingKind, usize>,
}

impl File {
    pub(super) fn push(&mut self, number: u32, form: TextForm, own: Tokenised) {
        for (kind, detail) in own.warnings {
            self.found(kind, Error::caption(Path::new(""), texts::place(number), detail).reason());
        }
        self.records.push(Own { number, form, documents: own.documents.len() as u8 });
        for document in own.documents {
            self.lengths.push(document.len() as u32);
            self.tokens.extend(document);
        }
    }

    pub(super) fn found(&mut self, kind: FindingKind, detail: String) {
        let count = self.counts.entry(kind).or_default();
        *count += 1;
        if *count <= FINDINGS {
            self.findings.push((kind, detail));
        }
    }
}

/// The key of a file's tokens: the file itself and all that they depend on.
pub(super) fn key(cache: &DiskCache, path: &Path, options: &TextOptions, tools: &Tools) -> Result<Key> {
    let content = cache.content(&Stored::file(path))?;
    let template = tools.template.as_ref().map(|template| template.sources());
    let TextOptions { train_on_inputs, system_prompt, template: given, strictness, .. } = options;
    let strict = *strictness == Strictness::Strict;
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    let settings = format!("{extension:?} {train_on_inputs} {system_prompt:?} {given:?} {template:?} {strict}");
    Ok(cache.key(&[FORMAT, &content, tools.tokenizer.digest(), &settings]))
}

/// What is small of an entry.
#[derive(Serialize, Deserialize)]
struct Header {
    records: usize,
    lengths: usize,
    findings: Vec<(String, String)>,
    counts: Vec<(String, usize)>,
}

pub(super) fn put(cache: &DiskCache, key: &Key, file: &File) -> Result<()> {
    let header = Header {
        records: file.records.len(),
        lengths: file.lengths.len(),
        findings: file.findings.iter().map(|(kind, detail)| (kind.name().to_owned(), detail.clone())).collect(),
        counts: file.counts.iter().map(|(kind, count)| (kind.name().to_owned(), *count)).collect(),
    };
    let header = serde_json::json!(header).to_string();
    let mut bytes = Vec::with_capacity(8 + header.len() + 6 * file.records.len() + 4 * file.tokens.len());
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header.as_bytes());
    for own in &file.records {
        bytes.extend(own.number.to_le_bytes());
        bytes.extend([own.form as u8, own.documents]);
    }
    for number in file.lengths.iter().chain(&file.tokens) {
        bytes.extend(number.to_le_bytes());
    }
    cache.put_bytes(key, &bytes)
}

/// A file's tokens from the cache; `None` where there are none, or they are not whole.
pub(super) fn get(cache: &DiskCache, key: &Key) -> Option<File> {
    let bytes = cache.get_bytes(key)?;
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (header, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let Header { records, lengths, findings, counts } = serde_json::from_slice(header).ok()?;
    let (own, rest) = rest.split_at_checked(records.checked_mul(6)?)?;
    let record = |bytes: &[u8; 6]| {
        let [a, b, c, d, form, documents] = *bytes;
        let form = TextForm::ALL.into_iter().find(|own| *own as u8 == form)?;
        Some(Own { number: u32::from_le_bytes([a, b, c, d]), form, documents })
    };
    let records = own.as_chunks::<6>().0.iter().map(record).collect::<Option<Vec<_>>>()?;
    let numbers =
        |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|own| u32::from_le_bytes(*own)).collect::<Vec<_>>();
    let (own, rest) = rest.split_at_checked(lengths.checked_mul(4)?)?;
    let (lengths, tokens) = (numbers(own), numbers(rest));
    let kind = |(name, value): (String, _)| Some((FindingKind::of_name(&name)?, value));
    let findings = findings
        .into_iter()
        .map(|(name, detail)| Some((FindingKind::of_name(&name)?, detail)))
        .collect::<Option<Vec<_>>>()?;
    let counts = counts.into_iter().map(kind).collect::<Option<BTreeMap<_, _>>>()?;
    let whole = lengths.iter().map(|length| *length as usize).sum::<usize>() == tokens.len()
        && records.iter().map(|own| usize::from(own.documents)).sum::<usize>() == lengths.len();
    whole.then_some(File { records, lengths, tokens, findings, counts })
}
