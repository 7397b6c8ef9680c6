//! Values with their lines from JSON, whose library knows places within a text by its pieces.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::Problem;
use super::tree::{Content, Entry, Lines, Node};

pub(crate) fn parse(place: &str, text: &str) -> Result<Node, Problem> {
    let root: &RawValue = serde_json::from_str(text)
        .map_err(|error| Problem::new(place, error.line(), "", format!("not valid JSON: {error}")))?;
    Text { place, text, lines: Lines::of(text) }.node(root, 0)
}

struct Text<'t> {
    place: &'t str,
    text: &'t str,
    lines: Lines,
}

/// Tables and lists within each other; configurations have five.
const DEPTH: usize = 64;

impl Text<'_> {
    /// The line of a piece of the text.
    fn line(&self, piece: &str) -> usize {
        self.lines.at((piece.as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize))
    }

    fn node(&self, raw: &RawValue, depth: usize) -> Result<Node, Problem> {
        let line = self.line(raw.get());
        if depth > DEPTH {
            return Err(Problem::new(self.place, line, "", "too deep: tables within tables within tables"));
        }
        let refused = |error: serde_json::Error| Problem::new(self.place, line, "", format!("not valid JSON: {error}"));
        let content = match raw.get().as_bytes().first() {
            Some(b'{') => self.table(serde_json::from_str(raw.get()).map_err(refused)?, depth)?,
            Some(b'[') => {
                let items: Vec<&RawValue> = serde_json::from_str(raw.get()).map_err(refused)?;
                Content::List(items.into_iter().map(|item| self.node(item, depth + 1)).collect::<Result<_, _>>()?)
            }
            _ => Content::Scalar(serde_json::from_str::<Value>(raw.get()).map_err(refused)?),
        };
        Ok(Node { line, content })
    }

    fn table(&self, pairs: Pairs<'_>, depth: usize) -> Result<Content, Problem> {
        let mut known = BTreeSet::new();
        let mut entries: Vec<Entry> = Vec::with_capacity(pairs.0.len());
        for (key, raw) in pairs.0 {
            let node = self.node(raw, depth + 1)?;
            if !known.insert(key.clone()) {
                return Err(Problem::new(self.place, node.line, &key, "it is given twice; keep one of them"));
            }
            entries.push(Entry { key, line: node.line, node });
        }
        Ok(Content::Table(entries))
    }
}

/// The pairs of an object, in their order, equal names among them.
struct Pairs<'t>(Vec<(String, &'t RawValue)>);

impl<'de> Deserialize<'de> for Pairs<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PairsVisitor)
    }
}

struct PairsVisitor;

impl<'de> Visitor<'de> for PairsVisitor {
    type Value = Pairs<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<Pairs<'de>, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = items.next_entry()? {
            pairs.push(pair);
        }
        Ok(Pairs(pairs))
    }
}
