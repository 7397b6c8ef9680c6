//! A look at a text dataset: what there is, how long it is, in which scripts it is written, and what is the matter with which
//! record.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use rayon::prelude::*;
use serde::Serialize;
use unicode_script::{Script, UnicodeScript};

use crate::finding::{Finding, FindingKind};
use crate::source::Source;
use crate::texts::{Marked, TextSummary, Texts};

/// A row of which the learned part is marked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Shown {
    /// Where it is from.
    pub place: String,
    /// Its first document.
    pub text: Marked,
}

/// What a look at a text dataset gives.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct TextReport {
    /// Counts.
    pub summary: TextSummary,
    /// Documents by their number of tokens, in steps that double.
    pub lengths: Vec<(String, usize)>,
    /// Visits an epoch by the length that rows are filled up to.
    pub shapes: Vec<(String, usize)>,
    /// Batches of an epoch.
    pub batches: usize,
    /// Documents by the script of most of their letters, the most frequent first.
    pub scripts: Vec<(String, usize)>,
    /// What is the matter with which record, worst first.
    pub findings: Vec<Finding>,
    /// Some rows, spread over the dataset.
    pub shown: Vec<Shown>,
}

impl fmt::Display for TextReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.summary)?;
        for (title, rows) in [("lengths:", &self.lengths), ("shapes:", &self.shapes), ("scripts:", &self.scripts)] {
            writeln!(f, "{title}")?;
            let most = rows.iter().map(|(_, count)| *count).max().unwrap_or(1).max(1);
            for (name, count) in rows {
                writeln!(f, "  {name:<16} {count:>8} {}", "█".repeat((30 * count).div_ceil(most)))?;
            }
        }
        write!(f, "{} batches an epoch", self.batches)
    }
}

/// Looks at all documents, on all cores, and shows so many rows.
pub fn inspect(texts: &Texts, shown: usize) -> TextReport {
    let mut findings = texts.findings().to_vec();
    find_duplicates(texts, &mut findings);
    findings.sort_by(|a, b| (a.kind.severity(), a.kind, &a.path).cmp(&(b.kind.severity(), b.kind, &b.path)));
    let mut summary = texts.summary();
    summary.findings = BTreeMap::new();
    for finding in &findings {
        *summary.findings.entry(finding.kind).or_default() += 1;
    }
    // Of what was found when the records were read, not all is kept.
    for (kind, count) in texts.counts() {
        summary.findings.insert(*kind, *count);
    }
    let sampler = texts.sampler(0);
    let shapes = sampler.visits_by_shape().into_iter().map(|(shape, visits)| (shape.to_string(), visits));
    TextReport {
        lengths: lengths(texts),
        shapes: shapes.collect(),
        batches: sampler.batches_per_epoch(),
        scripts: scripts(texts),
        shown: rows(texts, shown),
        summary,
        findings,
    }
}

/// Each later document is reported with the first one that it repeats to the token.
fn find_duplicates(texts: &Texts, findings: &mut Vec<Finding>) {
    let mut first: HashMap<Vec<u32>, (String, u32)> = HashMap::new();
    // The two documents of a pair begin alike and may be alike.
    if texts.are_pairs() {
        return;
    }
    for (path, number, ids) in texts.all_documents() {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        match first.get(&ids) {
            Some((other, line)) => {
                let detail = format!("{}the same as {}", prefix(number), place(other, *line));
                findings.push(Finding::new(path, FindingKind::DuplicateText, detail));
            }
            None => {
                first.insert(ids, (name, number));
            }
        }
    }
}

fn prefix(number: u32) -> String {
    if number > 0 { format!("line {number}: ") } else { String::new() }
}

fn place(name: &str, number: u32) -> String {
    if number > 0 { format!("{name}, line {number}") } else { name.to_owned() }
}

fn lengths(texts: &Texts) -> Vec<(String, usize)> {
    let mut counts = BTreeMap::<usize, usize>::new();
    for (_, _, ids) in texts.all_documents() {
        *counts.entry(ids.len().next_power_of_two().max(16)).or_default() += 1;
    }
    counts.into_iter().map(|(most, count)| (format!("up to {most}"), count)).collect()
}

/// Documents by the script of most of their letters.
fn scripts(texts: &Texts) -> Vec<(String, usize)> {
    let Some(tokenizer) = texts.tokenizer() else { return Vec::new() };
    let documents: Vec<Vec<u32>> = texts.all_documents().map(|(_, _, ids)| ids).collect();
    let most = |ids: &Vec<u32>| {
        let text = tokenizer.decode_text(ids).unwrap_or_default();
        let mut counts = HashMap::<Script, usize>::new();
        for script in text.chars().map(|c| c.script()) {
            if !matches!(script, Script::Common | Script::Inherited | Script::Unknown) {
                *counts.entry(script).or_default() += 1;
            }
        }
        // By name where two are equal, so that a report is the same from run to run.
        let most = counts.into_iter().max_by_key(|(script, count)| (*count, std::cmp::Reverse(script.full_name())));
        most.map_or("none", |(script, _)| script.full_name())
    };
    let mut counts = BTreeMap::<&str, usize>::new();
    for script in documents.par_iter().map(most).collect::<Vec<_>>() {
        *counts.entry(script).or_default() += 1;
    }
    let mut scripts: Vec<(String, usize)> = counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
    scripts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    scripts
}

fn rows(texts: &Texts, shown: usize) -> Vec<Shown> {
    let count = texts.rows();
    let step = count.div_ceil(shown.max(1)).max(1);
    let show = |row: usize| Shown { place: texts.path(row).display().to_string(), text: texts.marked(row) };
    (0..count).step_by(step).take(shown).map(show).collect()
}
