//! What a run is about to learn from its texts, as a table for people.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use super::{TextForm, Texts, TokenRow};
use crate::finding::{FindingKind, Severity};
use crate::source::{Overview, Source};

/// Characters of the record that is shown.
const SHOWN: usize = 1500;

/// A text with what is learned of it: parts in order, each with whether it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Marked(pub Vec<(String, bool)>);

impl fmt::Display for Marked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (text, trained) in &self.0 {
            match trained {
                true => write!(f, "⟦{text}⟧")?,
                false => f.write_str(text)?,
            }
        }
        Ok(())
    }
}

/// Counts of a dataset before its first step.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[non_exhaustive]
pub struct TextSummary {
    /// Usable records by their form.
    pub forms: BTreeMap<TextForm, usize>,
    /// Rows.
    pub rows: usize,
    /// Tokens of all rows.
    pub tokens: usize,
    /// Of these, how many are learned.
    pub trained: usize,
    /// Tokens of all rows once they are filled up to their shapes.
    pub padded: usize,
    /// Tokens of the longest document.
    pub longest: usize,
    /// Records whose end is cut off, and the tokens that are.
    pub cut: (usize, usize),
    /// Records that are split, and their pieces.
    pub split: (usize, usize),
    /// Records that are left out because they are too long.
    pub skipped: usize,
    /// Findings by kind.
    pub findings: BTreeMap<FindingKind, usize>,
    /// The first record with its learned part marked.
    pub shown: Marked,
}

impl Texts {
    /// Counts of what training will see.
    pub fn summary(&self) -> TextSummary {
        let records: BTreeSet<u32> = self.documents.iter().map(|document| document.record).collect();
        let mut forms = BTreeMap::new();
        for record in &records {
            *forms.entry(self.records[*record as usize].form).or_default() += 1;
        }
        let lengths = || self.documents.iter().map(|document| document.length as usize);
        let row = |row: usize| self.documents_of(row).map(|document| document.length as usize).sum::<usize>();
        let sum = |list: &[(u32, usize)]| (list.len(), list.iter().map(|(_, number)| number).sum());
        TextSummary {
            forms,
            rows: self.count(),
            tokens: lengths().sum(),
            trained: self.documents.iter().map(|document| document.trained as usize).sum(),
            padded: (0..self.count()).map(|own| self.options.bucket(row(own))).sum(),
            longest: lengths().max().unwrap_or(0),
            cut: sum(&self.long.cut),
            split: sum(&self.long.split),
            skipped: self.long.skipped.len(),
            findings: self.counts.clone(),
            shown: if self.count() > 0 { self.marked(0) } else { Marked::default() },
        }
    }

    /// The first document of a row as text, with what is learned of it; the middle of a long one is left out.
    pub fn marked(&self, row: usize) -> Marked {
        let Some(tokenizer) = self.tokenizer() else { return Marked::default() };
        let TokenRow { ids, trained, documents } = self.row(row);
        let length = documents.first().copied().unwrap_or(0);
        let (ids, trained) = (&ids[..length], &trained[..length]);
        let mut parts = Vec::new();
        let mut start = 0;
        while start < length {
            let run = trained[start..].iter().take_while(|own| **own == trained[start]).count();
            let text = tokenizer.decode(&ids[start..start + run]).unwrap_or_default();
            parts.push((shortened(text), trained[start]));
            start += run;
        }
        Marked(parts)
    }
}

/// Without its middle, where it is long.
fn shortened(text: String) -> String {
    let characters = text.chars().count();
    if characters <= SHOWN {
        return text;
    }
    let begin: String = text.chars().take(SHOWN / 2).collect();
    let end: String = text.chars().skip(characters - SHOWN / 2).collect();
    format!("{begin} […] {end}")
}

impl TextSummary {
    /// What there is to see, by its subject.
    fn lines(&self) -> Vec<(&'static str, Vec<String>)> {
        let share = |part: usize, whole: usize| 100.0 * part as f64 / whole.max(1) as f64;
        let forms: Vec<String> = self.forms.iter().map(|(form, count)| format!("{count} {}", form.name())).collect();
        let filling = share(self.padded - self.tokens.min(self.padded), self.padded);
        let ((cut, tokens), (split, pieces)) = (self.cut, self.split);
        let long =
            format!("{cut} cut ({tokens} tokens lost), {split} split into {pieces} rows, {} left out", self.skipped);
        vec![
            ("records", vec![if forms.is_empty() { "none".to_owned() } else { forms.join(", ") }]),
            ("tokens", vec![format!("{}, the longest document {}; {filling:.1}% filling", self.tokens, self.longest)]),
            ("learned", vec![format!("{} tokens, {:.1}%", self.trained, share(self.trained, self.tokens))]),
            ("too long", vec![long]),
            ("the first", format!("(learned in ⟦⟧)\n{}", self.shown).lines().map(str::to_owned).collect()),
        ]
    }

    /// Findings that cost something, in words.
    fn notes(&self) -> Vec<String> {
        let costly = self.findings.iter().filter(|(kind, _)| kind.severity() != Severity::Advice);
        costly.map(|(kind, count)| format!("{}: {count}; {}", kind.name(), kind.remedy())).collect()
    }

    /// The same as the first lines of a run.
    pub(super) fn overview(&self) -> Overview {
        let lost = self.findings.iter().filter(|(kind, _)| kind.severity() == Severity::Lost);
        let left_out = lost.map(|(_, count)| count).sum::<usize>();
        Overview { noun: "rows", items: self.rows, left_out, lines: self.lines(), notes: self.notes() }
    }
}

impl fmt::Display for TextSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.overview().fmt(f)?;
        self.notes().iter().try_for_each(|note| write!(f, "\n{note}"))
    }
}
