//! sd-scripts' dataset files (`--dataset_config`, TOML or JSON): `[general]`, `[[datasets]]`, `[[datasets.subsets]]`, the
//! nearest value wins. Those of musubi-tuner, whose datasets have no subsets, are read too. Each subset becomes a dataset of ours.

use std::path::Path;

use serde_json::{Map, Value};

use crate::engine::{Scope, decide, nearest};
use crate::input::tree::{Content, Entry, Node};
use crate::input::{self, Problem, Source};
use crate::outcome::{Outcome, no_effect};
use crate::report::{Accounted, Verdict};
use crate::row::{self, Groups, Row};
use crate::tools::sd_scripts::dataset_file::ROWS;

/// A subset as a dataset of ours.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Subset {
    /// Where it stands: `datasets[0].subsets[1]`.
    pub label: String,
    /// The `[[datasets]]` that it is of; its subsets share their regularisation pictures.
    pub group: usize,
    /// Our keys.
    pub keys: Map<String, Value>,
}

/// The subsets of a dataset file, each with all that holds for it.
///
/// # Errors
/// All that is wrong with it, and each key without a counterpart here whose value would do something.
pub fn subsets(path: &Path) -> Result<Vec<Subset>, Vec<String>> {
    let file = read(path).map_err(|problem| vec![problem.to_string()])?;
    let lost = file.keys.iter().filter(|key| matches!(key.verdict, Verdict::NoCounterpart(_)));
    let lost = lost.map(|key| {
        let line = key.line.map_or_else(String::new, |line| format!(":{line}"));
        format!("{}{line}: `{}` has no counterpart here; remove it", path.display(), key.key)
    });
    let problems: Vec<String> = file.problems.iter().map(Problem::to_string).chain(lost).collect();
    match problems.is_empty() {
        true => Ok(file.subsets),
        false => Err(problems),
    }
}

/// What a dataset file says.
pub(crate) struct File {
    pub(crate) subsets: Vec<Subset>,
    /// Each key of the file with its list.
    pub(crate) keys: Vec<Accounted>,
    pub(crate) problems: Vec<Problem>,
}

pub(crate) fn read(path: &Path) -> Result<File, Problem> {
    let document = input::read(&Source::file(path))?;
    let place = document.place;
    let mut file = File { subsets: Vec::new(), keys: Vec::new(), problems: Vec::new() };
    for entry in document.root.entries() {
        if !["general", "datasets"].contains(&entry.key.as_str()) {
            let message = "unknown section; expected [general] and [[datasets]]";
            file.problems.push(Problem::new(&place, entry.line, &entry.key, message));
        }
    }
    let general = document.root.get("general").map_or(&[][..], Node::entries).to_vec();
    file.account(&place, "general.", &general, &general);
    let items = |node: Option<&Node>| match node.map(|node| &node.content) {
        Some(Content::List(items)) => items.clone(),
        _ => Vec::new(),
    };
    for (group, dataset) in items(document.root.get("datasets")).iter().enumerate() {
        let own: Vec<Entry> = dataset.entries().iter().filter(|entry| entry.key != "subsets").cloned().collect();
        let merged = over(&general, &own);
        file.account(&place, &format!("datasets[{group}]."), &own, &merged);
        for (number, subset) in items(dataset.get("subsets")).iter().enumerate() {
            let label = format!("datasets[{group}].subsets[{number}]");
            let merged = over(&merged, subset.entries());
            file.account(&place, &format!("{label}."), subset.entries(), &merged);
            let keys = translated(&merged);
            file.subsets.push(Subset { label, group, keys });
        }
        // musubi-tuner's datasets are what subsets are of sd-scripts'.
        if dataset.get("subsets").is_none() {
            let (label, keys) = (format!("datasets[{group}]"), translated(&merged));
            file.subsets.extend(keys.contains_key("train_data_dir").then_some(Subset { label, group, keys }));
        }
    }
    if file.subsets.is_empty() && file.problems.is_empty() {
        file.problems.push(Problem::of(&place, "no [[datasets.subsets]], and no [[datasets]] with an image_directory"));
    }
    Ok(file)
}

impl File {
    /// Puts each key of a table into its list.
    fn account(&mut self, place: &str, prefix: &str, own: &[Entry], merged: &[Entry]) {
        for entry in own {
            let path = format!("{prefix}{}", entry.key);
            let refused = |message: String| Problem::new(place, entry.line, &path, message);
            let Some(row) = row::find(&[ROWS], &entry.key) else {
                let near = nearest(&entry.key, ROWS.iter().flat_map(Row::names));
                let near = near.map_or_else(String::new, |name| format!("; did you mean `{name}`?"));
                self.problems.push(refused(format!("unknown key{near}")));
                continue;
            };
            let (settings, verdict) = match outcome(row, entry, merged) {
                Outcome::Refused(message) => {
                    self.problems.push(refused(message));
                    continue;
                }
                Outcome::Taken(settings) => (settings, Verdict::Taken),
                Outcome::Translated(settings, how) => (settings, Verdict::Translated(how)),
                Outcome::NoEffect(why) => (Vec::new(), Verdict::WithoutEffect(why)),
                Outcome::Lost(settings, what) => (settings, Verdict::NoCounterpart(what)),
            };
            let wrote = settings.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
            self.keys.push(Accounted { key: path, line: Some(entry.line), wrote, verdict });
        }
    }
}

fn outcome(row: &'static Row, entry: &Entry, merged: &[Entry]) -> Outcome {
    if entry.node.is_empty() {
        return no_effect("empty: as if not given");
    }
    static GROUPS: Groups = &[ROWS];
    let scope = Scope::of(merged, GROUPS);
    decide(row, &entry.node, scope, scope)
}

/// What our keys are for all that holds for a subset.
fn translated(merged: &[Entry]) -> Map<String, Value> {
    let mut keys = Map::new();
    for entry in merged {
        let Some(row) = row::find(&[ROWS], &entry.key) else { continue };
        match outcome(row, entry, merged) {
            Outcome::Taken(settings) | Outcome::Translated(settings, _) => {
                keys.extend(settings.into_iter().map(|(key, value)| (key.to_owned(), value)));
            }
            Outcome::NoEffect(_) | Outcome::Lost(..) | Outcome::Refused(_) => {}
        }
    }
    // A metadata file may do without a folder: its paths then stand for themselves.
    if keys.contains_key("metadata_file") && !keys.contains_key("train_data_dir") {
        keys.insert("train_data_dir".into(), ".".into());
    }
    keys
}

/// A table with the keys of a nearer one over its own.
fn over(outer: &[Entry], own: &[Entry]) -> Vec<Entry> {
    let kept = outer.iter().filter(|entry| own.iter().all(|other| other.key != entry.key));
    kept.chain(own).cloned().collect()
}
