//! Walks an input through the table of its trainer. A key is looked up before anything is made of it, so that none can go
//! unaccounted for; what becomes of it is one [`Outcome`], so that it ends in one list.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::config::Draft;
use crate::input::tree::{Content, Entry, Node};
use crate::input::{self, Document, Problem, Problems, Source};
use crate::outcome::{Outcome, Settings, lost, no_effect, refused, taken};
use crate::report::{Accounted, Import, Verdict};
use crate::row::{self, Element, Groups, Kind, Means, Row};
use crate::tools::{self, Table};
use crate::{Options, Tool, values};

/// A table of the input with the rows that its keys have.
#[derive(Clone, Copy)]
pub(crate) struct Scope<'a> {
    pub(crate) entries: &'a [Entry],
    groups: &'a [&'static [Row]],
    /// The command's script.
    script: Option<&'a str>,
}

impl<'a> Scope<'a> {
    /// A table by itself.
    pub(crate) fn of(entries: &'a [Entry], groups: &'a [&'static [Row]]) -> Self {
        Self { entries, groups, script: None }
    }

    /// What is given for a key (`optimizer.beta1` within a table), and is not empty.
    pub(crate) fn given(&self, path: &str) -> Option<Value> {
        let mut entries = self.entries;
        let mut parts = path.split('.').peekable();
        while let Some(part) = parts.next() {
            let node = &entries.iter().find(|entry| entry.key == part)?.node;
            if parts.peek().is_none() {
                return Some(node).filter(|node| !node.is_empty()).map(Node::value);
            }
            entries = node.entries();
        }
        None
    }

    /// The same, or what the trainer takes without the key.
    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        self.given(path).or_else(|| {
            let mut parts = path.split('.');
            let mut found = row::find(self.groups, parts.next()?)?;
            for part in parts {
                let Means::Table(groups) = found.means else { return None };
                found = row::find(groups, part)?;
            }
            found.default_value()
        })
    }

    pub(crate) fn number(&self, path: &str) -> Option<f64> {
        values::number(&self.get(path)?)
    }

    pub(crate) fn count(&self, path: &str) -> Option<u64> {
        values::count(&self.get(path)?)
    }

    pub(crate) fn text(&self, path: &str) -> Option<String> {
        values::text(&self.get(path)?)
    }

    /// Whether a switch is on.
    pub(crate) fn on(&self, path: &str) -> bool {
        self.get(path).is_some_and(|value| values::switch(&value) == Some(true))
    }

    /// The script that a command line runs.
    pub(crate) fn script(&self) -> Option<&str> {
        self.script
    }
}

/// A key whose meaning is decided.
pub(crate) struct Field<'a> {
    pub(crate) value: Value,
    /// The table that it stands in.
    pub(crate) here: Scope<'a>,
    /// The whole input.
    pub(crate) root: Scope<'a>,
}

impl Field<'_> {
    pub(crate) fn number(&self) -> Option<f64> {
        values::number(&self.value)
    }

    pub(crate) fn count(&self) -> Option<u64> {
        values::count(&self.value)
    }

    pub(crate) fn text(&self) -> String {
        values::text(&self.value).unwrap_or_default()
    }

    pub(crate) fn on(&self) -> bool {
        values::switch(&self.value) == Some(true)
    }

    /// The number under a name of ours.
    pub(crate) fn number_as(&self, ours: &'static str) -> Outcome {
        same(ours, Kind::Number, &self.value)
    }

    /// The whole number under a name of ours.
    pub(crate) fn count_as(&self, ours: &'static str) -> Outcome {
        same(ours, Kind::Count, &self.value)
    }

    /// What becomes of a switch that is on.
    pub(crate) fn when_on(&self, outcome: Outcome) -> Outcome {
        if self.on() { outcome } else { no_effect("off, as without it") }
    }

    /// Refuses the value.
    pub(crate) fn expected(&self, what: &str) -> Outcome {
        refused(format!("expected {what}, found {}", self.value))
    }
}

/// The trainer of a source.
pub(crate) fn recognise(source: &Source) -> Result<Option<Tool>, Problems> {
    match input::read(source) {
        Ok(document) => Ok(tools::of(&document)),
        Err(problem) if problem.message.starts_with("not valid") => Ok(None),
        Err(problem) => Err(problem.into()),
    }
}

pub(crate) fn import(source: &Source, options: &Options) -> Result<Import, Problems> {
    let document = input::read(source)?;
    let tool = match options.tool {
        Some(tool) => tool,
        None => tools::of(&document).ok_or_else(|| tools::unknown(&document))?,
    };
    let table = tools::table(tool);
    let document = (table.prepare)(document)?;
    let mut walk = Walk::new(&document, table, options.allow_unknown);
    let root = Scope { entries: document.root.entries(), groups: table.groups, script: document.script.as_deref() };
    walk.table(root, root, "", None);
    walk.defaults(root, root, table.groups, "", None);
    (table.finish)(&root, &mut walk.draft, &mut walk.keys)?;
    walk.finish(tool)
}

/// The walk through one input.
struct Walk<'a> {
    place: &'a str,
    table: &'static Table,
    allow_unknown: bool,
    draft: Draft,
    keys: Vec<Accounted>,
    defaults: Vec<Accounted>,
    problems: Vec<Problem>,
}

/// Where a key stands: its path, its line, and the dataset that it belongs to.
struct At<'p> {
    path: &'p str,
    line: usize,
    dataset: Option<usize>,
    /// It is not given, but what the trainer does without it.
    assumed: bool,
}

impl<'a> Walk<'a> {
    fn new(document: &'a Document, table: &'static Table, allow_unknown: bool) -> Self {
        let (draft, keys, defaults, problems) = Default::default();
        Self { place: &document.place, table, allow_unknown, draft, keys, defaults, problems }
    }

    /// Every key of a table, in the order of the rows.
    fn table(&mut self, root: Scope<'_>, here: Scope<'_>, prefix: &str, dataset: Option<usize>) {
        let place_of =
            |entry: &&Entry| here.groups.iter().flat_map(|rows| rows.iter()).position(|row| row.is(&entry.key));
        let mut entries: Vec<&Entry> = here.entries.iter().collect();
        entries.sort_by_key(|entry| place_of(entry).unwrap_or(usize::MAX));
        for entry in entries {
            let path = format!("{prefix}{}", entry.key);
            let at = At { path: &path, line: entry.line, dataset, assumed: false };
            match row::find(here.groups, &entry.key) {
                None => self.unknown(here.groups, &at, &entry.key),
                Some(_) if entry.node.is_empty() => self.account(&at, &[], no_effect("empty: as if not given")),
                Some(row) => self.key(root, here, row, &entry.node, &at),
            }
        }
    }

    /// What the trainer does where keys are not given.
    fn defaults(&mut self, root: Scope<'_>, here: Scope<'_>, groups: Groups, prefix: &str, dataset: Option<usize>) {
        for row in row::rows(groups) {
            let path = format!("{prefix}{}", row.name());
            match &row.means {
                Means::Table(groups) => {
                    let entries = here.entries.iter().find(|entry| row.is(&entry.key));
                    let within = Scope { entries: entries.map_or(&[], |entry| entry.node.entries()), groups, ..here };
                    for inner in row::rows(groups).filter(|inner| within.given(inner.name()).is_none()) {
                        self.assume(root, within, inner, &format!("{path}.{}", inner.name()), dataset);
                    }
                }
                _ if row.names().all(|name| here.given(name).is_none()) => self.assume(root, here, row, &path, dataset),
                _ => {}
            }
        }
    }

    fn assume(&mut self, root: Scope<'_>, here: Scope<'_>, row: &'static Row, path: &str, dataset: Option<usize>) {
        if let Some(value) = row.default_value() {
            let at = At { path, line: 0, dataset, assumed: true };
            self.key(root, here, row, &Node::scalar(0, value), &at);
        }
    }

    /// One key.
    fn key(&mut self, root: Scope<'_>, here: Scope<'_>, row: &'static Row, node: &Node, at: &At<'_>) {
        match &row.means {
            Means::Table(groups) => match &node.content {
                Content::Table(entries) => {
                    let within = Scope { entries, groups, ..here };
                    self.table(root, within, &format!("{}.", at.path), at.dataset);
                }
                _ => self.refuse(at, "expected a table"),
            },
            Means::Arguments(rows) => match arguments(node) {
                Ok(node) => {
                    let within = Scope { entries: node.entries(), groups: &[rows], ..here };
                    self.table(root, within, &format!("{}.", at.path), at.dataset);
                }
                Err(message) => self.refuse(at, message),
            },
            Means::Datasets(rows, is) => match &node.content {
                Content::List(items) => {
                    for (index, item) in items.iter().enumerate() {
                        self.dataset(root, here, rows, *is, item, &format!("{}[{index}].", at.path));
                    }
                }
                _ => self.refuse(at, "expected a list of tables"),
            },
            Means::Same(..) | Means::By(..) | Means::NoEffect(_) | Means::Lost(..) => {
                let outcome = decide(row, node, here, root);
                self.account(at, &row::keys_of_row(row), outcome);
            }
        }
    }

    /// An element of a list of datasets.
    fn dataset(
        &mut self,
        root: Scope<'_>,
        here: Scope<'_>,
        rows: &'static &'static [Row],
        is: fn(&Field<'_>) -> Element,
        item: &Node,
        prefix: &str,
    ) {
        let groups = std::slice::from_ref(rows);
        let within = Scope { entries: item.entries(), groups, ..here };
        match is(&Field { value: item.value(), here: within, root }) {
            Element::Dataset => {
                let dataset = Some(self.draft.add_dataset());
                self.table(root, within, prefix, dataset);
                self.defaults(root, within, groups, prefix, dataset);
            }
            Element::Apart(but, reason) => {
                for entry in within.entries {
                    let path = format!("{prefix}{}", entry.key);
                    let at = At { path: &path, line: entry.line, dataset: None, assumed: false };
                    match row::find(groups, &entry.key) {
                        None => self.unknown(groups, &at, &entry.key),
                        Some(row) if but.contains(&row.name()) => self.key(root, within, row, &entry.node, &at),
                        Some(_) => self.account(&at, &[], no_effect(reason)),
                    }
                }
            }
        }
    }

    fn unknown(&mut self, groups: &[&'static [Row]], at: &At<'_>, key: &str) {
        let names = groups.iter().flat_map(|rows| rows.iter()).flat_map(Row::names);
        let near = nearest(key, names).map_or_else(String::new, |name| format!("; did you mean `{name}`?"));
        match self.allow_unknown {
            true => self.account(at, &[], lost("not known; whatever it does is not done")),
            false => self.refuse(at, format!("{} has no such key that is known here{near}", self.table.name)),
        }
    }

    fn refuse(&mut self, at: &At<'_>, message: impl Into<String>) {
        self.problems.push(Problem::new(self.place, at.line, at.path, message));
    }

    /// Puts a key into its list and what it sets into the draft.
    fn account(&mut self, at: &At<'_>, allowed: &[&'static str], outcome: Outcome) {
        let (settings, verdict) = match outcome {
            Outcome::Refused(message) => return self.refuse(at, message),
            Outcome::Taken(settings) => (settings, Verdict::Taken),
            Outcome::Translated(settings, how) => (settings, Verdict::Translated(how)),
            Outcome::NoEffect(why) => (Settings::new(), Verdict::WithoutEffect(why)),
            Outcome::Lost(settings, what) => (settings, Verdict::NoCounterpart(what)),
        };
        debug_assert!(
            settings.iter().all(|(key, _)| allowed.contains(key)),
            "the row of {} sets {settings:?}, of which it declares {allowed:?} alone",
            at.path
        );
        for (key, value) in &settings {
            if let Err(message) = self.draft.set(at.dataset, key, value, at.path, &verdict, at.assumed) {
                self.refuse(at, message);
            }
        }
        let wrote = settings.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let accounted =
            Accounted { key: at.path.to_owned(), line: Some(at.line).filter(|&line| line > 0), wrote, verdict };
        match at.assumed {
            false => self.keys.push(accounted),
            // What makes no difference here is nothing to tell of.
            true if matches!(accounted.verdict, Verdict::WithoutEffect(_)) => {}
            true => self.defaults.push(accounted),
        }
    }

    fn finish(mut self, tool: Tool) -> Result<Import, Problems> {
        if !self.problems.is_empty() {
            self.problems.sort_by_key(|problem| problem.line);
            return Err(Problems(self.problems));
        }
        self.keys.sort_by_key(|key| key.line);
        Ok(Import::new(self.place.to_owned(), tool, self.keys, self.defaults, self.draft))
    }
}

/// What becomes of a key that is no table.
pub(crate) fn decide(row: &'static Row, node: &Node, here: Scope<'_>, root: Scope<'_>) -> Outcome {
    let value = node.value();
    match &row.means {
        Means::Same(ours, kind) => same(ours, *kind, &value),
        Means::By(_, _, decide) => decide(&Field { value, here, root }),
        Means::NoEffect(why) => no_effect(*why),
        Means::Lost(neutral, what) => {
            let is = |json: &&str| serde_json::from_str::<Value>(json).is_ok_and(|one| alike(&one, &value));
            if neutral.iter().any(is) { no_effect("off, as without it") } else { lost(*what) }
        }
        Means::Table(_) | Means::Arguments(_) | Means::Datasets(..) => refused("expected a table"),
    }
}

/// A key that means the same here.
fn same(ours: &'static str, kind: Kind, value: &Value) -> Outcome {
    let number = || values::number(value);
    let (given, expected) = match kind {
        Kind::Text => (values::text(value).map(Value::from), "text"),
        Kind::Number | Kind::Positive => (number().map(values::of_number), "a number"),
        Kind::Count | Kind::AtLeastOne => (values::count(value).map(Value::from), "a whole number from 0 on"),
        Kind::Flag | Kind::Switch => (values::switch(value).map(Value::from), "true or false"),
    };
    let off = match kind {
        Kind::Flag => given == Some(false.into()),
        Kind::Positive => number().is_some_and(|number| number <= 0.0),
        Kind::AtLeastOne => given == Some(0.into()),
        _ => false,
    };
    match given {
        Some(_) if off => no_effect("off, as without it"),
        Some(given) => taken(ours, given),
        None => refused(format!("expected {expected}, found {value}")),
    }
}

/// Whether two values are the same for a program that takes numbers and switches as text too.
fn alike(one: &Value, other: &Value) -> bool {
    one == other
        || values::number(one).is_some_and(|number| values::number(other) == Some(number))
        || one.is_boolean() && values::switch(one) == values::switch(other)
}

/// Texts `name=value`, a list of them or one text with blanks between them, as a table.
fn arguments(node: &Node) -> Result<Node, String> {
    let own: Vec<(usize, String)> = match &node.content {
        Content::Table(_) => return Ok(node.clone()),
        Content::Scalar(Value::String(text)) => {
            text.split_whitespace().map(|word| (node.line, word.to_owned())).collect()
        }
        Content::List(items) => {
            let text = |item: &Node| values::text(&item.value()).map(|text| (item.line, text));
            items.iter().map(text).collect::<Option<_>>().ok_or("expected a list of texts name=value")?
        }
        Content::Scalar(_) => return Err("expected a list of texts name=value".to_owned()),
    };
    let mut entries: Vec<Entry> = Vec::new();
    for (line, text) in own {
        // The GUI keeps the quotes of a shell.
        let text = text.trim_matches(['"', '\'']);
        let (key, value) = text.split_once('=').ok_or_else(|| format!("expected name=value, found `{text}`"))?;
        let value = match value.trim().trim_matches(['"', '\'']) {
            "None" => Value::Null,
            value => Value::String(value.to_owned()),
        };
        if entries.iter().any(|entry| entry.key == key) {
            return Err(format!("`{key}` is given twice; keep one of them"));
        }
        entries.push(Entry { key: key.trim().to_owned(), line, node: Node::scalar(line, value) });
    }
    Ok(Node::table(node.line, entries))
}

/// The nearest of some names, if one is near.
pub(crate) fn nearest<'n>(word: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let names: BTreeSet<&str> = names.collect();
    let scored = names.into_iter().map(|name| (strsim::jaro_winkler(word, name), name));
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(score, _)| *score > 0.8).map(|(_, name)| name)
}
