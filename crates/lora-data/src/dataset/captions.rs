//! Captions out of files: beside the picture, `metadata.csv`, `metadata.jsonl`, sd-scripts' metadata.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::{CaptionSource, EXTENSIONS};
use crate::{Error, Result};

const FILE_KEYS: &[&str] = &["filename", "file_name", "image_path"];
pub(super) const CAPTION_KEYS: &[&str] = &["prompt", "text", "caption"];

/// Captions by picture.
#[derive(Debug, Clone, Default)]
pub(super) struct Metadata {
    captions: HashMap<PathBuf, (String, CaptionSource)>,
}

impl Metadata {
    /// Captions of a folder's `metadata.csv` and `metadata.jsonl`, and whatever is wrong with them. `pictures` are the
    /// folder's, by name; `below` says that pictures of folders below may be named.
    pub(super) fn read(folder: &Path, pictures: &HashSet<OsString>, below: bool) -> (Self, Vec<Error>) {
        let mut reading = Reading { folder, pictures, below, metadata: Self::default(), problems: Vec::new() };
        let csv = folder.join("metadata.csv");
        if csv.is_file() {
            reading.csv(&csv);
        }
        let jsonl = folder.join("metadata.jsonl");
        if jsonl.is_file() {
            reading.jsonl(&jsonl);
        }
        (reading.metadata, reading.problems)
    }

    pub(super) fn get(&self, picture: &Path) -> Option<&(String, CaptionSource)> {
        self.captions.get(picture)
    }

    pub(super) fn absorb(&mut self, other: &Self) {
        self.captions.extend(other.captions.iter().map(|(path, caption)| (path.clone(), caption.clone())));
    }
}

struct Reading<'r> {
    folder: &'r Path,
    pictures: &'r HashSet<OsString>,
    below: bool,
    metadata: Metadata,
    problems: Vec<Error>,
}

impl Reading<'_> {
    fn csv(&mut self, path: &Path) {
        let text = match read_text(path) {
            Ok(text) => text,
            Err(error) => return self.problems.push(error),
        };
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::Headers).from_reader(text.as_bytes());
        let headers = match reader.headers() {
            Ok(headers) => headers.clone(),
            Err(error) => return self.problems.push(Error::caption(path, Some(1), error.to_string())),
        };
        let column = |names: &[&str]| {
            headers.iter().position(|header| names.contains(&header)).ok_or_else(|| {
                let found = headers.iter().collect::<Vec<_>>().join(", ");
                Error::caption(path, Some(1), format!("no column `{}`; found {found}", names.join("` or `")))
            })
        };
        let (file, caption) = match (column(FILE_KEYS), column(CAPTION_KEYS)) {
            (Ok(file), Ok(caption)) => (file, caption),
            (Err(error), _) | (_, Err(error)) => return self.problems.push(error),
        };
        for record in reader.records() {
            match record {
                Ok(record) => {
                    let line = record.position().map_or(0, |position| position.line() as usize);
                    self.insert(path, line, &record[file], &record[caption], CaptionSource::Csv);
                }
                Err(error) => {
                    let line = error.position().map(|position| position.line() as usize);
                    self.problems.push(Error::caption(path, line, error.to_string()));
                }
            }
        }
    }

    fn jsonl(&mut self, path: &Path) {
        let text = match read_text(path) {
            Ok(text) => text,
            Err(error) => return self.problems.push(error),
        };
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let number = index + 1;
            let row: Value = match serde_json::from_str(line) {
                Ok(row) => row,
                Err(error) => {
                    self.problems.push(Error::caption(path, Some(number), format!("not valid JSON: {error}")));
                    continue;
                }
            };
            let field = |names: &[&str]| {
                let found = names.iter().find_map(|name| row.get(name)).and_then(Value::as_str);
                found.ok_or_else(|| Error::caption(path, Some(number), format!("no text `{}`", names.join("` or `"))))
            };
            match (field(FILE_KEYS), field(CAPTION_KEYS)) {
                (Ok(file), Ok(caption)) => self.insert(path, number, file, caption, CaptionSource::Jsonl),
                (Err(error), _) | (_, Err(error)) => self.problems.push(error),
            }
        }
    }

    fn insert(&mut self, path: &Path, line: usize, file: &str, caption: &str, source: CaptionSource) {
        // Only pictures of this very folder, or of those below it: a name that leads elsewhere is a mistake or worse.
        let name = Path::new(file);
        let inside = name.components().all(|part| matches!(part, Component::Normal(_)));
        let known = if name.components().count() > 1 { self.below } else { self.pictures.contains(name.as_os_str()) };
        if !inside || !known {
            self.problems.push(Error::caption(path, Some(line), format!("`{file}` is no picture of this folder")));
            return;
        }
        let wanted = self.folder.join(name);
        match self.metadata.captions.get(&wanted) {
            Some((_, earlier)) if *earlier == source => {
                let reason = format!("`{file}` has a caption in this file already");
                self.problems.push(Error::caption(path, Some(line), reason));
            }
            // The CSV, read first, wins.
            Some(_) => {}
            None => {
                self.metadata.captions.insert(wanted, (caption.trim().to_owned(), source));
            }
        }
    }
}

/// One picture that sd-scripts' metadata lists, with its caption and tags joined.
pub(super) struct Listed {
    pub(super) picture: PathBuf,
    pub(super) caption: String,
}

/// What a metadata file of sd-scripts lists: an object of objects by path or name, or a JSON object per line. Relative
/// paths lie in `folder`; a name without extension is that of a picture there.
pub(super) fn listed(path: &Path, folder: &Path) -> Result<Vec<Listed>> {
    let text = read_text(path)?;
    let whole: Result<BTreeMap<String, Value>, _> = serde_json::from_str(&text);
    let is_lines = path.extension().is_some_and(|extension| extension == "jsonl");
    let rows: Vec<(usize, String, Value)> = match whole {
        Ok(rows) if !is_lines => rows.into_iter().map(|(name, row)| (0, name, row)).collect(),
        Err(error) if !is_lines => {
            let reason = format!("expected an object of pictures by path: {error}");
            return Err(Error::caption(path, Some(error.line()), reason));
        }
        _ => {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let row = |(index, line): (usize, &str)| {
                let row: Value = serde_json::from_str(line)
                    .map_err(|error| Error::caption(path, Some(index + 1), format!("not valid JSON: {error}")))?;
                let name = FILE_KEYS.iter().find_map(|key| row.get(key)).and_then(Value::as_str).map(str::to_owned);
                let name = name.ok_or_else(|| Error::caption(path, Some(index + 1), "no text `image_path`"))?;
                Ok((index + 1, name, row))
            };
            lines.map(row).collect::<Result<_>>()?
        }
    };
    // Names without extension are looked up once for all.
    let mut by_stem: HashMap<PathBuf, PathBuf> = HashMap::new();
    if let Ok(entries) = fs::read_dir(folder) {
        for path in entries.flatten().map(|entry| entry.path()).filter(|path| super::has_extension(path, EXTENSIONS)) {
            by_stem.entry(path.with_extension("")).or_insert(path);
        }
    }
    let listed = |(line, name, row): (usize, String, Value)| {
        let text = |key: &str| match row.get(key) {
            None | Some(Value::Null) => Ok(String::new()),
            Some(Value::String(text)) => Ok(text.trim().to_owned()),
            Some(other) => {
                let line = (line > 0).then_some(line);
                Err(Error::caption(path, line, format!("`{name}`: expected text for `{key}`, found {other}")))
            }
        };
        let parts = [text("caption")?, text("tags")?];
        let caption = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ");
        let picture = folder.join(&name);
        let picture = if super::has_extension(&picture, EXTENSIONS) {
            picture
        } else {
            by_stem.get(&picture).cloned().unwrap_or(picture)
        };
        Ok(Listed { picture, caption })
    };
    rows.into_iter().map(listed).collect()
}

/// The lines of a caption file that are not empty.
pub(super) fn caption_lines(text: &str) -> Vec<String> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// A text file without its byte-order mark.
///
/// # Errors
/// Where it cannot be read, and where it is anything but UTF-8, which says where.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(Error::io(path, "read"))?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text)),
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            let line = error.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count() + 1;
            Err(Error::caption(path, Some(line), format!("not UTF-8 at byte {at}; save it as UTF-8")))
        }
    }
}
