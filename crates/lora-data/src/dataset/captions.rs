//! Captions out of files: beside the picture, `metadata.csv`, `metadata.jsonl`, sd-scripts' metadata.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::encoding::{TextEncoding, read_text_in};
use super::{CaptionSource, EXTENSIONS};
use crate::{Error, Result};

const FILE_KEYS: &[&str] = &["filename", "file_name", "image_path"];
pub(super) const CAPTION_KEYS: &[&str] = &["prompt", "text", "caption"];

/// The lists of captions in a folder.
#[derive(Debug, Default)]
pub(super) struct Lists {
    /// `metadata.csv`.
    pub(super) csv: Option<PathBuf>,
    /// `metadata.jsonl`.
    pub(super) jsonl: Option<PathBuf>,
}

/// Captions by picture.
#[derive(Debug, Clone, Default)]
pub(super) struct Metadata {
    captions: HashMap<PathBuf, (String, CaptionSource)>,
}

impl Metadata {
    /// Captions of a folder's lists, and whatever is wrong with them. `pictures` are the folder's, by name; `below` says that
    /// pictures of folders below may be named.
    pub(super) fn read(
        folder: &Path,
        lists: &Lists,
        pictures: &HashSet<OsString>,
        below: bool,
        encoding: Option<TextEncoding>,
    ) -> (Self, Vec<Error>) {
        let (metadata, problems) = (Self::default(), Vec::new());
        let mut reading = Reading { folder, pictures, below, encoding, metadata, problems };
        if let Some(csv) = &lists.csv {
            reading.csv(csv);
        }
        if let Some(jsonl) = &lists.jsonl {
            reading.jsonl(jsonl);
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
    encoding: Option<TextEncoding>,
    metadata: Metadata,
    problems: Vec<Error>,
}

impl Reading<'_> {
    fn csv(&mut self, path: &Path) {
        let text = match read_text_in(path, self.encoding) {
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
        let text = match read_text_in(path, self.encoding) {
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
        let Some(wanted) = self.picture(file) else {
            let reason = format!("`{file}` is no picture of this folder; names count from the folder of this list");
            self.problems.push(Error::caption(path, Some(line), reason));
            return;
        };
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

impl Reading<'_> {
    /// The picture of this folder, or of one below it, that a list names: by its name, its path from here, with `./` or the
    /// folder's own name in front, its whole path, and any of these as Windows writes it. A name that leads elsewhere is a
    /// mistake or worse.
    fn picture(&self, file: &str) -> Option<PathBuf> {
        let slashes = file.replace('\\', "/");
        [file, slashes.as_str()].into_iter().find_map(|file| {
            let path: PathBuf = Path::new(file).components().filter(|part| *part != Component::CurDir).collect();
            let inside = path.strip_prefix(self.folder).unwrap_or(&path);
            let own_name = self.folder.file_name().and_then(|name| inside.strip_prefix(name).ok());
            [Some(inside), own_name].into_iter().flatten().find_map(|name| self.known(name))
        })
    }

    fn known(&self, name: &Path) -> Option<PathBuf> {
        let parts: Vec<Component<'_>> = name.components().collect();
        if !parts.iter().all(|part| matches!(part, Component::Normal(_))) {
            return None;
        }
        match parts.as_slice() {
            [] => None,
            [only] => self.pictures.contains(only.as_os_str()).then(|| self.folder.join(only)),
            _ => {
                let path = self.folder.join(parts.iter().collect::<PathBuf>());
                (self.below && path.is_file()).then_some(path)
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
pub(super) fn listed(path: &Path, folder: &Path, encoding: Option<TextEncoding>) -> Result<Vec<Listed>> {
    let text = read_text_in(path, encoding)?;
    let whole: Result<BTreeMap<String, Value>, _> = serde_json::from_str(&text);
    let is_lines = super::has_extension(path, &["jsonl"]);
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
