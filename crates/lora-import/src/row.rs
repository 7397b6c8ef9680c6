//! The rows of a trainer's table: a key, and what it means here.

use serde_json::Value;

use crate::engine::Field;
use crate::outcome::Outcome;

/// What a value must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Number,
    /// A whole number from 0 on.
    Count,
    /// True or false; false is what we do without the key.
    Flag,
    Switch,
    /// A number above 0; 0 and less switch it off, there as without the key here.
    Positive,
    /// A whole number from 1 on; 0 switches it off.
    AtLeastOne,
}

/// Decides what becomes of a key.
pub(crate) type Decide = fn(&Field<'_>) -> Outcome;

/// What an element of a list of tables is.
pub(crate) enum Element {
    /// A dataset of ours.
    Dataset,
    /// Nothing that is trained on, for a reason; but for these keys it means nothing.
    Apart(&'static [&'static str], &'static str),
}

/// What a key means here.
pub(crate) enum Means {
    /// The same, under a name of ours.
    Same(&'static str, Kind),
    /// What a function decides; it may set these keys of ours. The text is for the page of this table.
    By(&'static [&'static str], &'static str, Decide),
    /// The result does not depend on it.
    NoEffect(&'static str),
    /// Nothing like it here; with one of these values (JSON) nothing is lost.
    Lost(&'static [&'static str], &'static str),
    /// A table with rows of its own.
    Table(Groups),
    /// A list of texts `name=value` with rows of their own.
    Arguments(&'static [Row]),
    /// A list of tables, each a dataset or nothing.
    Datasets(&'static [Row], fn(&Field<'_>) -> Element),
}

/// A key of another trainer, or several of which the same is said.
pub(crate) struct Row {
    /// Its name; several, among them older ones, with blanks between them.
    names: &'static str,
    /// What the trainer does without the key, as JSON, where that is not what this program does.
    pub(crate) default: Option<&'static str>,
    pub(crate) means: Means,
}

impl Row {
    const fn new(names: &'static str, means: Means) -> Self {
        Self { names, default: None, means }
    }

    /// With the value that the trainer takes where the key is not given.
    pub(crate) const fn default(self, json: &'static str) -> Self {
        Self { names: self.names, default: Some(json), means: self.means }
    }

    /// Its keys.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.names.split_whitespace()
    }

    /// Its key, the first of several.
    pub(crate) fn name(&self) -> &'static str {
        self.names().next().unwrap_or_default()
    }

    /// Whether it is the row of a key.
    pub(crate) fn is(&self, name: &str) -> bool {
        self.names().any(|own| own == name)
    }

    /// The default as a value.
    pub(crate) fn default_value(&self) -> Option<Value> {
        self.default.and_then(|json| serde_json::from_str(json).ok())
    }
}

pub(crate) const fn same(names: &'static str, ours: &'static str, kind: Kind) -> Row {
    Row::new(names, Means::Same(ours, kind))
}

pub(crate) const fn by(names: &'static str, ours: &'static [&'static str], how: &'static str, decide: Decide) -> Row {
    Row::new(names, Means::By(ours, how, decide))
}

pub(crate) const fn nothing(names: &'static str, why: &'static str) -> Row {
    Row::new(names, Means::NoEffect(why))
}

pub(crate) const fn gone(names: &'static str, neutral: &'static [&'static str], what: &'static str) -> Row {
    Row::new(names, Means::Lost(neutral, what))
}

pub(crate) const fn table(names: &'static str, groups: Groups) -> Row {
    Row::new(names, Means::Table(groups))
}

pub(crate) const fn arguments(names: &'static str, rows: &'static [Row]) -> Row {
    Row::new(names, Means::Arguments(rows))
}

pub(crate) const fn datasets(names: &'static str, rows: &'static [Row], is: fn(&Field<'_>) -> Element) -> Row {
    Row::new(names, Means::Datasets(rows, is))
}

/// Values with which a switch or a number does nothing.
pub(crate) const OFF: &[&str] = &["false", "0", "null", "\"\"", "[]", "{}"];

/// The rows of a table, made of groups that tables share; the first of a name counts.
pub(crate) type Groups = &'static [&'static [Row]];

/// The row of a name.
pub(crate) fn find(groups: &[&'static [Row]], name: &str) -> Option<&'static Row> {
    groups.iter().flat_map(|rows| rows.iter()).find(|row| row.is(name))
}

/// All rows that count, in their order.
pub(crate) fn rows(groups: &'static [&'static [Row]]) -> impl Iterator<Item = &'static Row> {
    groups
        .iter()
        .flat_map(|rows| rows.iter())
        .filter(|row| find(groups, row.name()).is_some_and(|first| std::ptr::eq(first, *row)))
}

/// The keys of ours that a table can set.
pub(crate) fn keys_of(groups: Groups) -> Vec<&'static str> {
    rows(groups).flat_map(keys_of_row).collect()
}

/// The keys of ours that a row can set.
pub(crate) fn keys_of_row(row: &'static Row) -> Vec<&'static str> {
    match row.means {
        Means::Same(ours, _) => vec![ours],
        Means::By(ours, ..) => ours.to_vec(),
        Means::NoEffect(_) | Means::Lost(..) => Vec::new(),
        Means::Table(groups) => keys_of(groups),
        Means::Arguments(rows) => rows.iter().flat_map(keys_of_row).collect(),
        Means::Datasets(rows, _) => rows.iter().flat_map(keys_of_row).chain(["datasets"]).collect(),
    }
}
