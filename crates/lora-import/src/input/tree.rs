//! Values with the lines that they stand on, from TOML and YAML.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::Spanned;
use toml::de::{DeTable, DeValue};

use super::Problem;

/// A value and its line, from 1 (0: unknown).
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) line: usize,
    pub(crate) content: Content,
}

#[derive(Debug, Clone)]
pub(crate) enum Content {
    /// No list and no table.
    Scalar(Value),
    List(Vec<Node>),
    Table(Vec<Entry>),
}

/// A key and its value.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) line: usize,
    pub(crate) node: Node,
}

impl Node {
    pub(crate) fn scalar(line: usize, value: Value) -> Self {
        Self { line, content: Content::Scalar(value) }
    }

    pub(crate) fn table(line: usize, entries: Vec<Entry>) -> Self {
        Self { line, content: Content::Table(entries) }
    }

    /// Without lines.
    pub(crate) fn value(&self) -> Value {
        match &self.content {
            Content::Scalar(value) => value.clone(),
            Content::List(items) => items.iter().map(Node::value).collect(),
            Content::Table(entries) => {
                Value::Object(entries.iter().map(|entry| (entry.key.clone(), entry.node.value())).collect())
            }
        }
    }

    /// The entries of a table; none of anything else.
    pub(crate) fn entries(&self) -> &[Entry] {
        match &self.content {
            Content::Table(entries) => entries,
            Content::Scalar(_) | Content::List(_) => &[],
        }
    }

    /// The value of a key of a table.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        self.entries().iter().find(|entry| entry.key == key).map(|entry| &entry.node)
    }

    /// Whether it is nothing, or text without a letter.
    pub(crate) fn is_empty(&self) -> bool {
        match &self.content {
            Content::Scalar(Value::Null) => true,
            Content::Scalar(Value::String(text)) => text.is_empty(),
            _ => false,
        }
    }
}

/// Without the byte order mark that editors put first.
pub(crate) fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// Where the lines of a text begin.
pub(super) struct Lines(Vec<usize>);

impl Lines {
    pub(super) fn of(text: &str) -> Self {
        Self(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect())
    }

    /// The line that a byte stands on, from 1.
    pub(super) fn at(&self, byte: usize) -> usize {
        self.0.partition_point(|&end| end < byte) + 1
    }
}

pub(crate) fn of_toml(place: &str, text: &str) -> Result<Node, Problem> {
    let lines = Lines::of(text);
    let table = DeTable::parse(text).map_err(|error| {
        let line = error.span().map_or(0, |span| lines.at(span.start));
        let advice = match error.message() {
            message if message.contains("duplicate") => "; keep one of them",
            message if message.contains("escape") => "; write \\ in paths as / or \\\\, or use single quotes",
            _ => "",
        };
        Problem::new(place, line, "", format!("not valid TOML: {}{advice}", error.message()))
    })?;
    Ok(toml_table(&lines, table.get_ref(), 1))
}

fn toml_table(lines: &Lines, table: &DeTable<'_>, line: usize) -> Node {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let entry = |(key, value): (&toml::Spanned<_>, &toml::Spanned<DeValue<'_>>)| {
        let line = lines.at(key.span().start);
        let key: &std::borrow::Cow<'_, str> = key.get_ref();
        Entry { key: key.to_string(), line, node: toml_value(lines, value.get_ref(), line) }
    };
    Node::table(line, entries.into_iter().map(entry).collect())
}

fn toml_value(lines: &Lines, value: &DeValue<'_>, line: usize) -> Node {
    let scalar = match value {
        DeValue::Table(table) => return toml_table(lines, table, line),
        DeValue::Array(items) => {
            let item =
                |item: &toml::Spanned<DeValue<'_>>| toml_value(lines, item.get_ref(), lines.at(item.span().start));
            return Node { line, content: Content::List(items.iter().map(item).collect()) };
        }
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Boolean(on) => Value::Bool(*on),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => number.into(),
            Err(_) => Value::String(number.to_string()),
        },
        // NaN and infinity, which no key takes, stay words.
        DeValue::Float(number) => match number.as_str().parse::<f64>().ok().and_then(serde_json::Number::from_f64) {
            Some(number) => Value::Number(number),
            None => Value::String(number.to_string()),
        },
        DeValue::Datetime(time) => Value::String(time.to_string()),
    };
    Node::scalar(line, scalar)
}

pub(crate) fn of_yaml(place: &str, text: &str) -> Result<Node, Problem> {
    let root: Spanned<YamlNode> = serde_saphyr::from_str(text).map_err(|error| {
        let line = error.location().map_or(0, |location| location.line() as usize);
        let reason = error.to_string();
        let reason = reason.lines().next().unwrap_or_default();
        let reason = reason.strip_prefix("error: ").unwrap_or(reason);
        let reason = match reason.split_once(": ") {
            Some((place, reason)) if place.starts_with("line ") => reason,
            _ => reason,
        };
        Problem::new(place, line, "", format!("not valid YAML: {reason}"))
    })?;
    Ok(Node { line: root.referenced.line() as usize, content: root.value.0 })
}

/// What a node of YAML holds; its line is told from outside.
struct YamlNode(Content);

impl<'de> Deserialize<'de> for YamlNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(YamlVisitor).map(Self)
    }
}

struct YamlVisitor;

impl YamlVisitor {
    fn node(spanned: Spanned<YamlNode>) -> Node {
        Node { line: spanned.referenced.line() as usize, content: spanned.value.0 }
    }
}

impl<'de> Visitor<'de> for YamlVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, on: bool) -> Result<Content, E> {
        Ok(Content::Scalar(on.into()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Content, E> {
        Ok(Content::Scalar(number.into()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Content, E> {
        Ok(Content::Scalar(number.into()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Content, E> {
        Ok(Content::Scalar(
            serde_json::Number::from_f64(number).map_or_else(|| number.to_string().into(), Value::Number),
        ))
    }

    fn visit_str<E>(self, text: &str) -> Result<Content, E> {
        Ok(Content::Scalar(text.into()))
    }

    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(Content::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Content, E> {
        Ok(Content::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Content, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(Self::node(item));
        }
        Ok(Content::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<Content, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = items.next_key::<Spanned<String>>()? {
            let node = Self::node(items.next_value()?);
            entries.push(Entry { key: key.value, line: key.referenced.line() as usize, node });
        }
        Ok(Content::Table(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(node: &Node) -> Vec<(String, usize)> {
        let own = |entry: &Entry| {
            let mut all = vec![(entry.key.clone(), entry.line)];
            all.extend(lines(&entry.node));
            all
        };
        match &node.content {
            Content::Table(entries) => entries.iter().flat_map(own).collect(),
            Content::List(items) => items.iter().flat_map(lines).collect(),
            Content::Scalar(_) => Vec::new(),
        }
    }

    #[test]
    fn keys_know_their_lines_in_every_format() {
        let wanted = [("b", 1), ("a", 2), ("c", 3), ("c", 4)].map(|(key, line)| (key.to_owned(), line));
        let toml = of_toml("f", "b = 1\n[[a]]\nc = true\n[[a]]\n").unwrap();
        assert_eq!(lines(&toml)[..3], wanted[..3]);
        let yaml = of_yaml("f", "b: 1\na:\n  - c: true\n  - c: x\n").unwrap();
        assert_eq!(lines(&yaml), wanted);
        let json = super::super::json::parse("f", "{\"b\": 1,\n\"a\": [\n{\"c\": true},\n{\"c\": \"x\"}]}").unwrap();
        assert_eq!(lines(&json), wanted);
        assert_eq!(json.value(), yaml.value());
    }

    #[test]
    fn a_half_written_text_is_refused_with_its_line() {
        let said = |problem: Problem| problem.to_string();
        assert!(said(of_toml("f.toml", "a = 1\nb = \n").unwrap_err()).starts_with("f.toml:2: not valid TOML"));
        assert!(said(of_yaml("f.yml", "a: 1\nb: [1,\nc: {").unwrap_err()).contains("not valid YAML"));
        assert!(said(super::super::json::parse("f", "{\"a\": 1,\n\"b\": ").unwrap_err()).starts_with("f:2"));
        let twice = super::super::json::parse("f", "{\"a\": 1,\n\"a\": 2}").unwrap_err();
        assert!(said(twice.clone()).starts_with("f:2: `a`: it is given twice"), "{twice}");
        assert!(said(of_toml("f", "a = 1\na = 2").unwrap_err()).contains("duplicate"));
        let deep = "[".repeat(100_000);
        for refused in
            [of_toml("f", &format!("a = {deep}")), of_yaml("f", &deep), super::super::json::parse("f", &deep)]
        {
            assert!(refused.is_err());
        }
        let deep = format!("{deep}{}", "]".repeat(100_000));
        assert!(said(super::super::json::parse("f", &deep).unwrap_err()).contains("too deep"));
    }
}
