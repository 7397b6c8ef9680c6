//! The records of text files, one after the other: JSON lines, JSON, Parquet, and plain texts of one record each.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::record::{Parsed, parse, shape};
use crate::{Error, Result};

const KNOWN: &[&str] = &[
    "jsonl",
    "ndjson",
    "json",
    "txt",
    #[cfg(feature = "parquet")]
    "parquet",
];

/// A record as it stands in its file.
#[derive(Debug)]
pub(super) struct Raw {
    /// Its line, or its place among the records, from 1; 0 where the file is the record.
    pub(super) number: u32,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Line(Vec<u8>),
    Value(Value),
    Broken(Error),
}

impl Raw {
    /// What it says.
    ///
    /// # Errors
    /// With file and line, where it is no record.
    pub(super) fn parse(self, path: &Path) -> Result<Parsed> {
        let number = (self.number > 0).then_some(self.number as usize);
        let wrong = |reason: String| Error::caption(path, number, reason);
        let value = match self.body {
            Body::Line(bytes) => match std::str::from_utf8(&bytes) {
                Ok(text) => serde_json::from_str(text).map_err(|error| wrong(format!("not valid JSON: {error}"))),
                Err(error) => {
                    Err(wrong(format!("not UTF-8 at byte {} of the line; save it as UTF-8", error.valid_up_to())))
                }
            },
            Body::Value(value) => Ok(value),
            Body::Broken(error) => Err(error),
        };
        parse(value?).map_err(wrong)
    }
}

/// The files of a dataset: a file itself, or all text files of a folder, sorted by name.
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let known = |path: &Path| KNOWN.contains(&extension(path).as_str());
    if path.is_file() {
        return match known(path) {
            true => Ok(vec![path.to_owned()]),
            false => Err(Error::Option {
                key: "train_data_dir",
                value: path.display().to_string(),
                reason: format!("expected a folder or a file that ends in {}", KNOWN.join(", ")),
            }),
        };
    }
    let entries = fs::read_dir(path).map_err(Error::io(path, "read the folder"))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| known(path)).collect();
    files.sort();
    Ok(files)
}

fn extension(path: &Path) -> String {
    path.extension().map(|extension| extension.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// The records of a file in order. An error of the iterator is one of the file; a single record's is told when it is
/// parsed.
pub(super) fn records(path: &Path) -> Result<Box<dyn Iterator<Item = Result<Raw>> + '_>> {
    let raw = |(index, body): (usize, Body)| Ok(Raw { number: u32::try_from(index + 1).unwrap_or(u32::MAX), body });
    Ok(match extension(path).as_str() {
        "jsonl" | "ndjson" => Box::new(Lines::open(path)?),
        "json" if is_lines(path)? => Box::new(Lines::open(path)?),
        "json" => Box::new(list(path)?.into_iter().map(Body::Value).enumerate().map(raw)),
        #[cfg(feature = "parquet")]
        "parquet" => {
            let body = |row: Result<Value>| row.map_or_else(Body::Broken, Body::Value);
            Box::new(crate::dataset::table::json_rows(path)?.map(body).enumerate().map(raw))
        }
        _ => {
            let text = crate::dataset::read_text(path);
            let body = text.map_or_else(Body::Broken, |text| Body::Value(Value::String(text)));
            Box::new(std::iter::once(Ok(Raw { number: 0, body })))
        }
    })
}

/// Whether a JSON file has JSON lines, as `datasets` reads files of either name: its first line is an object of its
/// own, and another line follows.
fn is_lines(path: &Path) -> Result<bool> {
    let mut lines = Lines::open(path)?;
    let first = lines.next().transpose()?;
    let follows = lines.next().transpose()?.is_some();
    Ok(follows
        && first.is_some_and(|first| match first.body {
            Body::Line(line) => serde_json::from_slice::<Map<String, Value>>(&line).is_ok(),
            _ => false,
        }))
}

/// The records of a JSON file: a list, an object with a list `data`, or one record.
fn list(path: &Path) -> Result<Vec<Value>> {
    let text = crate::dataset::read_text(path)?;
    let wrong = |line: Option<usize>, reason: String| Error::caption(path, line, reason);
    let whole: Value =
        serde_json::from_str(&text).map_err(|error| wrong(Some(error.line()), format!("not valid JSON: {error}")))?;
    match whole {
        Value::Array(rows) => Ok(rows),
        Value::Object(mut object) => match object.remove("data") {
            Some(Value::Array(rows)) => Ok(rows),
            Some(data) => {
                object.insert("data".to_owned(), data);
                Ok(vec![Value::Object(object)])
            }
            None => Ok(vec![Value::Object(object)]),
        },
        other => Err(wrong(None, format!("expected a list of records, found {}", shape(&other)))),
    }
}

/// Lines that are not blank: a file of gigabytes is never in memory as a whole.
struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    number: u32,
}

impl Lines {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        Ok(Self { path: path.to_owned(), reader: BufReader::with_capacity(1 << 18, file), number: 0 })
    }
}

impl Iterator for Lines {
    type Item = Result<Raw>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let mut line = Vec::new();
            match self.reader.read_until(b'\n', &mut line) {
                Ok(0) => return None,
                Ok(_) => self.number = self.number.saturating_add(1),
                Err(error) => return Some(Err(Error::io(&self.path, "read")(error))),
            }
            let line = match line.strip_prefix("\u{feff}".as_bytes()) {
                Some(rest) => rest.to_vec(),
                None => line,
            };
            if !line.trim_ascii().is_empty() {
                return Some(Ok(Raw { number: self.number, body: Body::Line(line) }));
            }
        }
    }
}
