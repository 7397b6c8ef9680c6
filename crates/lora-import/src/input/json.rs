//! Values with their lines from JSON, whose library knows places within a text by its pieces.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::Problem;
use super::tree::{Content, Entry, Node, line_at};

pub(crate) fn parse(place: &str, text: &str) -> Result<Node, Problem> {
    let root: &RawValue = serde_json::from_str(text)
        .map_err(|error| Problem::new(place, error.line(), "", format!("not valid JSON: {error}")))?;
    Text { place, text }.node(root)
}

struct Text<'t> {
    place: &'t str,
    text: &'t str,
}

impl Text<'_> {
    /// The line of a piece of the text.
    fn line(&self, piece: &str) -> usize {
        line_at(self.text, (piece.as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize))
    }

    fn node(&self, raw: &RawValue) -> Result<Node, Problem> {
        let line = self.line(raw.get());
        let refused = |error: serde_json::Error| Problem::new(self.place, line, "", format!("not valid JSON: {error}"));
        let content = match raw.get().as_bytes().first() {
            Some(b'{') => self.table(serde_json::from_str(raw.get()).map_err(refused)?)?,
            Some(b'[') => {
                let items: Vec<&RawValue> = serde_json::from_str(raw.get()).map_err(refused)?;
                Content::List(items.into_iter().map(|item| self.node(item)).collect::<Result<_, _>>()?)
            }
            _ => Content::Scalar(serde_json::from_str::<Value>(raw.get()).map_err(refused)?),
        };
        Ok(Node { line, content })
    }

    fn table(&self, pairs: Pairs<'_>) -> Result<Content, Problem> {
        let mut entries: Vec<Entry> = Vec::with_capacity(pairs.0.len());
        for (key, raw) in pairs.0 {
            let node = self.node(raw)?;
            if entries.iter().any(|entry| entry.key == key) {
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
