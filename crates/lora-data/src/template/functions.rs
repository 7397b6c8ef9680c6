//! What transformers gives to chat templates beside Jinja's own: `tojson` as Python writes JSON, `raise_exception` and
//! `strftime_now`; and where minijinja differs from Jinja and Python: two tests, and methods of texts. `%` between
//! texts is not there: minijinja has no way to add an operator.

use jiff::civil::Date;
use jiff::fmt::strtime;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;
use serde::Serialize;
use serde_json::ser::Formatter;

/// A value of JSON as templates see it.
pub(super) fn value(of: impl Serialize) -> Value {
    Value::from(Serde(of))
}

/// A value as Python's `json.dumps(value, ensure_ascii=False)` writes it, which is how models met it in training.
pub(super) fn tojson(own: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        // Python leaves the blank out where the line ends.
        _ => (if indent.is_some() { ",".into() } else { ", ".into() }, ": ".to_owned()),
    };
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut json = serde_json::to_value(own).map_err(failed)?;
    if sorted {
        json.sort_all_objects();
    }
    let mut bytes = Vec::new();
    let style = PythonStyle { indent: indent.map(|width| width.min(64)), item, key, depth: 0, empty: true };
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, style)).map_err(failed)?;
    let text = String::from_utf8(bytes).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from(if ascii { escaped(&text) } else { text }))
}

/// Characters outside ASCII as escapes, in pairs where they are beyond the first plane.
fn escaped(text: &str) -> String {
    let escape = |c: char| match c.is_ascii() {
        true => c.to_string(),
        false => c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
    };
    text.chars().map(escape).collect()
}

pub(super) fn raise_exception(text: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, text.to_owned()))
}

/// Jinja's test: whether Python's `iter` takes the value. minijinja takes `none` for an empty list.
pub(super) fn is_iterable(own: &Value) -> bool {
    !own.is_none() && own.try_iter().is_ok()
}

/// Jinja's test: whether the value has a length and places, which texts, objects and undefined values have too.
pub(super) fn is_sequence(own: &Value) -> bool {
    matches!(own.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined)
}

/// Jinja's filter: runs of letters, digits and underscores.
pub(super) fn wordcount(text: &str) -> usize {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).count()
}

/// Methods that values have in Python.
pub(super) fn method(state: &mut State<'_, '_>, own: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let text = |place: usize| arguments.get(place).and_then(Value::as_str);
    match (own.as_str(), name) {
        (Some(own), "swapcase") if arguments.is_empty() => Ok(own.chars().flat_map(swapped).collect::<String>().into()),
        (Some(own), "removeprefix") if arguments.len() == 1 && text(0).is_some() => {
            Ok(text(0).and_then(|prefix| own.strip_prefix(prefix)).unwrap_or(own).into())
        }
        (Some(own), "removesuffix") if arguments.len() == 1 && text(0).is_some() => {
            Ok(text(0).and_then(|suffix| own.strip_suffix(suffix)).unwrap_or(own).into())
        }
        (Some(own), "rsplit") if arguments.len() <= 2 && text(0).is_some_and(|separator| !separator.is_empty()) => {
            let most = arguments.get(1).and_then(Value::as_i64).and_then(|most| usize::try_from(most).ok());
            let separator = text(0).unwrap_or_default();
            let mut parts: Vec<&str> =
                own.rsplitn(most.map_or(usize::MAX, |most| most.saturating_add(1)), separator).collect();
            parts.reverse();
            Ok(Value::from_iter(parts))
        }
        _ => pycompat::unknown_method_callback(state, own, name, arguments),
    }
}

fn swapped(c: char) -> Vec<char> {
    if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
}

pub(super) fn strftime(date: Date, format: &str) -> Result<String, Error> {
    strtime::format(format, date.at(0, 0, 0, 0))
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}")))
}

/// Separators, line ends and numbers of Python's `json`.
struct PythonStyle {
    indent: Option<usize>,
    item: String,
    key: String,
    depth: usize,
    /// Whether nothing has been written into the innermost list or object.
    empty: bool,
}

impl PythonStyle {
    fn line<W: ?Sized + std::io::Write>(&self, writer: &mut W) -> std::io::Result<()> {
        match self.indent {
            Some(width) => write!(writer, "\n{}", " ".repeat(width * self.depth)),
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth += 1;
        self.empty = true;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.line(writer)?;
        }
        self.empty = false;
        writer.write_all(bracket)
    }

    fn next<W: ?Sized + std::io::Write>(&self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line(writer)
    }
}

impl Formatter for PythonStyle {
    fn write_f64<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, value: f64) -> std::io::Result<()> {
        writer.write_all(python_float(value).as_bytes())
    }

    fn begin_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.next(writer, first)
    }

    fn end_array_value<W: ?Sized + std::io::Write>(&mut self, _writer: &mut W) -> std::io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn begin_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + std::io::Write>(&mut self, _writer: &mut W) -> std::io::Result<()> {
        self.empty = false;
        Ok(())
    }
}

/// A number as Python's `repr`: the fewest digits that give it back, with an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent @ -4..16) => {
            let plain = format!("{value}");
            if exponent >= 0 && !plain.contains('.') { format!("{plain}.0") } else { plain }
        }
        Ok(exponent) => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
        Err(_) => scientific,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(own: serde_json::Value, options: &[(&str, Value)]) -> String {
        let options = Kwargs::from_iter(options.iter().cloned());
        tojson(&value(own), options).unwrap().to_string()
    }

    /// Python 3.12's `json.dumps(value, ensure_ascii=False, …)`.
    #[test]
    fn json_is_written_as_python_writes_it() {
        let own = serde_json::json!({"b": [1, 2.0, null], "a": {"é<": "x\n\"'&"}, "e": [], "o": {}});
        assert_eq!(json(own.clone(), &[]), r#"{"b": [1, 2.0, null], "a": {"é<": "x\n\"'&"}, "e": [], "o": {}}"#);
        let indented = "{\n  \"b\": [\n    1,\n    2.0,\n    null\n  ],\n  \"a\": {\n    \"é<\": \"x\\n\\\"'&\"\n  },\n  \"e\": [],\n  \"o\": {}\n}";
        assert_eq!(json(own.clone(), &[("indent", 2.into())]), indented);
        let sorted = [("sort_keys", true.into()), ("ensure_ascii", true.into())];
        assert_eq!(json(own, &sorted), r#"{"a": {"\u00e9<": "x\n\"'&"}, "b": [1, 2.0, null], "e": [], "o": {}}"#);
        let tight = [("separators", value([",", ":"]))];
        assert_eq!(json(serde_json::json!({"a": [1, "🦀"]}), &tight), r#"{"a":[1,"🦀"]}"#);
    }

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        let cases = [
            (0.5, "0.5"),
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (1e-5, "1e-05"),
            (0.0001, "0.0001"),
            (1.5e-7, "1.5e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e300, "1.25e+300"),
            (123456.789, "123456.789"),
        ];
        for (number, text) in cases {
            assert_eq!(python_float(number), text);
        }
    }

    #[test]
    fn dates_are_fixed_and_unknown_formats_are_refused() {
        let date = jiff::civil::date(2025, 5, 5);
        assert_eq!(strftime(date, "%d %b %Y").unwrap(), "05 May 2025");
        assert_eq!(strftime(date, "%A, %-d %B %Y %H:%M").unwrap(), "Monday, 5 May 2025 00:00");
        assert!(strftime(date, "%Q").unwrap_err().to_string().contains("%Q"));
    }
}
