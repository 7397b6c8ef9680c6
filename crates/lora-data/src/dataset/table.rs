//! Tables in Apache Parquet: rows of pictures and captions, as the `datasets` library writes them, and rows of texts.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use parquet::basic::Type as Physical;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::captions::{CAPTION_KEYS, caption_lines};
use super::footer;
use super::{CaptionSource, ImageDataset, Stored, file_name};
use crate::finding::FindingKind;
use crate::guard::guarded;
use crate::{Error, Result, picture};

/// Columns that hold pictures: bytes, or a group with `bytes`.
const PICTURE_KEYS: &[&str] = &["image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes"];

/// Why a table is not read whose reader gave up.
const DAMAGED: &str = "it is damaged";

/// Rows that stay in memory when several threads ask for them a little out of order.
const RECENT: usize = 32;

/// The pictures of a table, read on demand. Rows that follow each other are read in one go; going back begins the table
/// anew, so random order is slow: cached latents read every row once, in order.
pub(super) struct Table {
    path: PathBuf,
    column: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rows: Option<Rows>,
    next: usize,
    recent: BTreeMap<usize, Vec<u8>>,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("path", &self.path).field("column", &self.column).finish()
    }
}

impl Table {
    /// The encoded picture of a row.
    pub(super) fn picture(&self, row: usize) -> Result<Vec<u8>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = state.recent.remove(&row) {
            return Ok(bytes);
        }
        if state.rows.is_none() || state.next > row {
            *state = State { rows: Some(rows(&self.path, Some(&[self.column.as_str()]))?), ..State::default() };
        }
        loop {
            let next = state.rows.as_mut().and_then(Iterator::next);
            let found = next.ok_or_else(|| failed(&self.path, format!("there is no row {row} any more")))?;
            let bytes = picture_of(&found?, &self.column);
            state.next += 1;
            if state.next == row + 1 {
                return bytes.ok_or_else(|| failed(&self.path, format!("row {row} has no picture")));
            }
            if let Some(bytes) = bytes.filter(|_| state.next + RECENT > row) {
                let number = state.next - 1;
                state.recent.insert(number, bytes);
                if state.recent.len() > RECENT {
                    state.recent.pop_first();
                }
            }
        }
    }
}

fn failed(path: &Path, reason: impl fmt::Display) -> Error {
    Error::picture(path, format!("the table cannot be read: {reason}"))
}

fn reader(path: &Path) -> Result<SerializedFileReader<File>> {
    let mut file = File::open(path).map_err(Error::io(path, "open"))?;
    if !footer::is_plausible(&mut file).map_err(Error::io(path, "read"))? {
        return Err(failed(path, DAMAGED));
    }
    guarded(
        || failed(path, DAMAGED),
        || SerializedFileReader::new(file).map_err(|error: ParquetError| failed(path, error)),
    )
}

/// The rows of a table up to the first that cannot be read.
struct Rows {
    path: PathBuf,
    rows: Option<RowIter<'static>>,
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        let (path, rows) = (&self.path, self.rows.as_mut()?);
        let next = guarded(|| failed(path, DAMAGED), || rows.next().transpose().map_err(|error| failed(path, error)));
        if next.is_err() {
            self.rows = None;
        }
        next.transpose()
    }
}

/// The rows of a table, all columns or some.
fn rows(path: &Path, columns: Option<&[&str]>) -> Result<Rows> {
    let reader = reader(path)?;
    let schema = reader.metadata().file_metadata().schema();
    let projection = columns.map(|columns| {
        let fields = schema.get_fields().iter().filter(|field| columns.contains(&field.name())).cloned().collect();
        Type::group_type_builder(schema.name()).with_fields(fields).build()
    });
    let projection = projection.transpose().map_err(|error| failed(path, error))?;
    let rows = guarded(
        || failed(path, DAMAGED),
        || RowIter::from_file_into(Box::new(reader)).project(projection).map_err(|error| failed(path, error)),
    )?;
    Ok(Rows { path: path.to_owned(), rows: Some(rows) })
}

fn picture_of(row: &Row, column: &str) -> Option<Vec<u8>> {
    let bytes = |field: &Field| match field {
        Field::Bytes(bytes) => Some(bytes.data().to_vec()),
        _ => None,
    };
    row.get_column_iter().find(|(name, _)| *name == column).and_then(|(_, field)| match field {
        Field::Group(group) => {
            group.get_column_iter().find(|(name, _)| *name == "bytes").and_then(|(_, field)| bytes(field))
        }
        other => bytes(other),
    })
}

fn text_of(row: &Row, column: &str) -> Option<String> {
    row.get_column_iter().find(|(name, _)| *name == column).and_then(|(_, field)| match field {
        Field::Str(text) => Some(text.clone()),
        // One caption of several, as the first line of a file.
        Field::ListInternal(list) => match list.elements().first() {
            Some(Field::Str(text)) => Some(text.clone()),
            _ => None,
        },
        _ => None,
    })
}

fn is_picture(field: &Type) -> bool {
    match field.is_group() {
        true => field.get_fields().iter().any(|inner| inner.name() == "bytes"),
        false => field.get_physical_type() == Physical::BYTE_ARRAY,
    }
}

impl ImageDataset {
    pub(super) fn table(&mut self, path: &Path, repeats: usize) -> Result<()> {
        let reader = reader(path)?;
        let schema = reader.metadata().file_metadata().schema();
        let names: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
        let fields = schema.get_fields();
        let column = PICTURE_KEYS.iter().find(|key| fields.iter().any(|f| f.name() == **key && is_picture(f)));
        let Some(column) = column else {
            let reason = format!("no column of pictures (`{}`); found {}", PICTURE_KEYS.join("`, `"), names.join(", "));
            return Err(Error::picture(path, reason));
        };
        let caption = CAPTION_KEYS.iter().find(|key| names.contains(key));
        let wanted: Vec<&str> = std::iter::once(*column).chain(caption.copied()).collect();
        let table = Table { path: path.to_owned(), column: (*column).to_owned(), state: Mutex::default() };
        let table = Arc::new(table);
        let name: Arc<str> = file_name(path).into();
        let class = self.options.class.clone();
        for (index, row) in rows(path, Some(&wanted))?.enumerate() {
            let place = path.join(format!("row {index}"));
            let row = match row {
                Ok(row) => row,
                Err(error) => {
                    self.problem(&place, FindingKind::Unreadable, error)?;
                    break;
                }
            };
            let header = match picture_of(&row, column) {
                Some(bytes) => picture::header(&place, std::io::Cursor::new(bytes)),
                None => Err(Error::picture(&place, "the row has no picture")),
            };
            let lines = caption.and_then(|caption| text_of(&row, caption)).map(|text| caption_lines(&text));
            let caption = lines.map(|lines| (lines, CaptionSource::Archive));
            self.add(Stored::row(place, Arc::clone(&table), index), header, caption, &name, repeats, &class, None)?;
        }
        Ok(())
    }
}

/// The rows of a table as JSON objects.
pub(crate) fn json_rows(path: &Path) -> Result<impl Iterator<Item = Result<Value>>> {
    Ok(rows(path, None)?.map(|row| row.map(|row| json(&row))))
}

/// A row, or a struct in one, without its nulls: a column of structs has the keys of all rows, and those that a row did
/// not have are filled with null (TRL's `remove_none_values` takes them out too).
fn json(row: &Row) -> Value {
    let said = row.get_column_iter().filter(|(_, field)| !matches!(field, Field::Null));
    Value::Object(said.map(|(name, field)| (name.clone(), json_field(field))).collect())
}

fn json_field(field: &Field) -> Value {
    match field {
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(text) => text.clone().into(),
        Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into_owned().into(),
        Field::Group(group) => json(group),
        Field::ListInternal(list) => list.elements().iter().map(json_field).collect(),
        Field::MapInternal(map) => {
            let entries = map.entries().iter().map(|(key, value)| (key.to_string(), json_field(value)));
            Value::Object(entries.collect::<Map<_, _>>())
        }
        Field::Null => Value::Null,
        other => other.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rule of `remove_none_values` in TRL 1.16.
    #[test]
    fn nulls_that_fill_structs_up_are_left_out() {
        let named = |name: &str, field| (name.to_owned(), field);
        let arguments = Row::new(vec![named("x", Field::Str("1".into())), named("y", Field::Null)]);
        let row = Row::new(vec![named("arguments", Field::Group(arguments)), named("text", Field::Null)]);
        assert_eq!(json(&row), serde_json::json!({"arguments": {"x": "1"}}));
    }
}
