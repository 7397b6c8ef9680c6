//! Lists of captions in a folder: `metadata.csv` and `metadata.jsonl`. What is in them already, other columns and keys
//! included, stays. Caption files beside pictures are written in [`super`].

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::recorded::{Kept, lines, name_of, normal};
use crate::tags::Probabilities;
use crate::{Error, Result};

/// A list that captions are written to; the file is written as a whole.
#[derive(Debug)]
pub(super) enum List {
    Csv(Csv),
    Jsonl(Jsonl),
}

impl List {
    pub(super) fn csv(folder: &Path) -> Result<Self> {
        Csv::read(folder.join("metadata.csv")).map(List::Csv)
    }

    pub(super) fn jsonl(folder: &Path) -> Result<Self> {
        Jsonl::read(folder.join("metadata.jsonl")).map(List::Jsonl)
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            List::Csv(list) => &list.path,
            List::Jsonl(list) => &list.path,
        }
    }

    /// Puts a caption in, in the place of the one that the picture has.
    pub(super) fn set(&mut self, name: &str, caption: &str, tags: Option<(&Probabilities, f32)>) {
        match self {
            List::Csv(list) => list.set(name, caption),
            List::Jsonl(list) => list.set(name, caption, tags),
        }
    }

    /// Writes the file, whole or not at all.
    pub(super) fn write(&self) -> Result<()> {
        let bytes = match self {
            List::Csv(list) => list.bytes(),
            List::Jsonl(list) => list.bytes(),
        };
        Ok(lora_io::atomic::write(self.path(), |file| file.write_all(&bytes))?)
    }
}

/// `metadata.csv`.
#[derive(Debug)]
pub(super) struct Csv {
    path: PathBuf,
    header: Vec<String>,
    /// Columns of the picture's name and of its caption.
    columns: [usize; 2],
    rows: Vec<Vec<String>>,
    by_name: HashMap<String, usize>,
}

impl Csv {
    fn read(path: PathBuf) -> Result<Self> {
        let header = ["filename", "prompt"].map(str::to_owned).to_vec();
        if !path.exists() {
            return Ok(Self { path, header, columns: [0, 1], rows: Vec::new(), by_name: HashMap::new() });
        }
        let text = lora_data::dataset::read_text(&path)?;
        let refused = |line: usize, reason: String| Error::List { path: path.clone(), line, reason };
        let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(text.as_bytes());
        let mut rows = Vec::new();
        for record in reader.records() {
            let record = record.map_err(|error| {
                let line = error.position().map_or(1, |place| place.line() as usize);
                refused(line, error.to_string())
            })?;
            rows.push(record.iter().map(str::to_owned).collect::<Vec<_>>());
        }
        let header = if rows.is_empty() { header } else { rows.remove(0) };
        let column = |names: &[&str]| {
            let position = header.iter().position(|own| names.contains(&own.trim()));
            position.ok_or_else(|| refused(1, format!("no column `{}`", names.join("` or `"))))
        };
        let columns = [column(&["filename", "file_name", "image_path"])?, column(&["prompt", "text", "caption"])?];
        let by_name = rows.iter().enumerate().map(|(index, row)| (normal(&row[columns[0]]), index)).collect();
        Ok(Self { path, header, columns, rows, by_name })
    }

    fn set(&mut self, name: &str, caption: &str) {
        let index = *self.by_name.entry(name.to_owned()).or_insert_with(|| {
            let mut row = vec![String::new(); self.header.len()];
            row[self.columns[0]] = name.to_owned();
            self.rows.push(row);
            self.rows.len() - 1
        });
        self.rows[index][self.columns[1]] = caption.to_owned();
    }

    fn bytes(&self) -> Vec<u8> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        for row in std::iter::once(&self.header).chain(&self.rows) {
            // Rows have the header's length, and memory takes them all.
            let _ = writer.write_record(row);
        }
        writer.into_inner().unwrap_or_default()
    }
}

/// `metadata.jsonl`.
#[derive(Debug)]
pub(super) struct Jsonl {
    path: PathBuf,
    rows: Vec<Map<String, Value>>,
    by_name: HashMap<String, usize>,
}

impl Jsonl {
    fn read(path: PathBuf) -> Result<Self> {
        let mut rows = Vec::new();
        if path.exists() {
            for line in lines(&path)? {
                rows.push(line?.1);
            }
        }
        let by_name = rows.iter().enumerate().filter_map(|(index, row)| Some((name_of(row)?, index))).collect();
        Ok(Self { path, rows, by_name })
    }

    fn set(&mut self, name: &str, caption: &str, tags: Option<(&Probabilities, f32)>) {
        let index = *self.by_name.entry(name.to_owned()).or_insert_with(|| {
            self.rows.push(Map::from_iter([("file_name".to_owned(), json!(name))]));
            self.rows.len() - 1
        });
        let row = &mut self.rows[index];
        let key = ["prompt", "text", "caption"].into_iter().find(|key| row.contains_key(*key)).unwrap_or("text");
        row.insert(key.to_owned(), json!(caption));
        if let Some((probabilities, from)) = tags {
            row.insert("tags".to_owned(), kept(probabilities, from));
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let lines = self.rows.iter().map(|row| Value::Object(row.clone()).to_string() + "\n");
        lines.collect::<String>().into_bytes()
    }
}

/// A tagger's answer as it is kept. Numbers have the few digits that tell one fp32 from the next.
fn kept(probabilities: &Probabilities, from: f32) -> Value {
    fn shorten(value: &mut Value) {
        match value {
            Value::Object(map) => map.values_mut().for_each(shorten),
            Value::Number(number) => {
                let short = number.as_f64().and_then(|own| (own as f32).to_string().parse::<f64>().ok());
                if let Some(short) = short.and_then(serde_json::Number::from_f64) {
                    *number = short;
                }
            }
            _ => {}
        }
    }
    let kept = Kept { from, probabilities: probabilities.clone() };
    let mut value = serde_json::to_value(kept).unwrap_or_default();
    shorten(&mut value);
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_keeps_what_it_has_and_takes_captions_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.csv");
        std::fs::write(&path, "id,file_name,text\n7,./a.png,old\n8,b.png,\"kept, as it is\"\n").unwrap();
        let mut list = List::csv(folder.path()).unwrap();
        list.set("a.png", "new, \"quoted\"", None);
        list.set("c/d.png", "more", None);
        list.write().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "id,file_name,text\n7,./a.png,\"new, \"\"quoted\"\"\"\n8,b.png,\"kept, as it is\"\n,c/d.png,more\n"
        );

        let path = folder.path().join("metadata.jsonl");
        std::fs::write(&path, "{\"file_name\":\"a.png\",\"text\":\"old\",\"seed\":3}\n").unwrap();
        let mut list = List::jsonl(folder.path()).unwrap();
        let probabilities = Probabilities { general: [("sky".to_owned(), 0.99f32)].into(), ..Default::default() };
        list.set("a.png", "sky", Some((&probabilities, 0.05)));
        list.set("b.png", "b", None);
        list.write().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let tags = "{\"from\":0.05,\"rating\":{},\"character\":{},\"general\":{\"sky\":0.99}}";
        assert_eq!(
            text,
            format!(
                "{{\"file_name\":\"a.png\",\"text\":\"sky\",\"seed\":3,\"tags\":{tags}}}\n{{\"file_name\":\"b.png\",\"text\":\"b\"}}\n"
            )
        );
    }

    #[test]
    fn a_list_that_cannot_be_read_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("metadata.csv"), "name,text\na,b\n").unwrap();
        let error = List::csv(folder.path()).unwrap_err().to_string();
        assert!(error.contains("metadata.csv, line 1: no column `filename`"), "{error}");
        std::fs::write(folder.path().join("metadata.csv"), "filename,text\na,b\nc\n").unwrap();
        assert!(List::csv(folder.path()).unwrap_err().to_string().contains("line 3"));
        std::fs::write(folder.path().join("metadata.jsonl"), "{\"file_name\":\"a\"}\n[1]\n").unwrap();
        assert!(List::jsonl(folder.path()).unwrap_err().to_string().contains("line 2: expected a JSON object"));
    }
}
