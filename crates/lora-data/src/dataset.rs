//! Captioned pictures on disk.
//!
//! A folder of pictures (not searched recursively), or a folder of kohya's `N_name` folders (N repeats; the name is the
//! caption of pictures that have none). Captions come from, the first found winning: `picture.txt`, `picture.caption`,
//! `metadata.csv` (a header with `filename` or `file_name`, and `prompt`, `text` or `caption`), `metadata.jsonl`
//! (objects with the same keys). Of a caption file with several lines the first counts, as in
//! sd-scripts; the others are there for [`crate::caption`].

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, Result, picture};

/// Extensions that make a file a picture, in any case.
pub const EXTENSIONS: &[&str] = &["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"];

/// Where a caption came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum CaptionSource {
    /// A `.txt` of the same name.
    Txt,
    /// A `.caption` of the same name.
    Caption,
    /// `metadata.csv`.
    Csv,
    /// `metadata.jsonl`.
    Jsonl,
    /// The name of an `N_name` folder.
    Folder,
    /// There is none; the caption is empty.
    None,
}

impl CaptionSource {
    /// As people call it.
    pub fn name(self) -> &'static str {
        match self {
            CaptionSource::Txt => ".txt",
            CaptionSource::Caption => ".caption",
            CaptionSource::Csv => "metadata.csv",
            CaptionSource::Jsonl => "metadata.jsonl",
            CaptionSource::Folder => "folder name",
            CaptionSource::None => "none",
        }
    }
}

/// One picture with its caption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The file.
    pub path: PathBuf,
    /// Name of its folder.
    pub folder: String,
    /// Its caption, the first line of it, empty where there is none.
    pub caption: String,
    /// The caption file's lines behind the first.
    pub more_lines: Vec<String>,
    /// Where the caption came from.
    pub caption_source: CaptionSource,
    /// Width and height as seen.
    pub size: (usize, usize),
    /// Visits per epoch.
    pub repeats: usize,
}

impl Item {
    /// All lines of the caption; at least one.
    pub fn lines(&self) -> Vec<&str> {
        std::iter::once(self.caption.as_str()).chain(self.more_lines.iter().map(String::as_str)).collect()
    }
}

/// How to scan.
#[derive(Debug, Clone, Copy)]
pub struct ScanOptions {
    /// Visits of each picture per epoch, times the N of an `N_name` folder.
    pub repeats: usize,
    /// Unreadable pictures are errors instead of being skipped.
    pub strict: bool,
}

/// The pictures of a folder, sorted by name.
#[derive(Debug, Clone)]
pub struct ImageDataset {
    items: Vec<Item>,
    skipped: Vec<(PathBuf, String)>,
    multi_line: usize,
    ignored_folders: Vec<String>,
}

impl ImageDataset {
    /// Scans a folder: names, captions, and the size in every picture's header.
    pub fn scan(folder: impl AsRef<Path>, options: ScanOptions) -> Result<Self> {
        let root = folder.as_ref();
        if options.repeats == 0 {
            return Err(Error::Option {
                key: "repeats",
                value: "0".into(),
                reason: "a picture is visited at least once an epoch".into(),
            });
        }
        let (pictures, folders) = list(root)?;
        let mut dataset = Self { items: Vec::new(), skipped: Vec::new(), multi_line: 0, ignored_folders: Vec::new() };
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if pictures.is_empty() {
            for folder in &folders {
                match repeats_of(&name(folder)) {
                    Some((repeats, class)) => {
                        dataset.add(folder, list(folder)?.0, repeats * options.repeats, &class, options.strict)?
                    }
                    None => dataset.ignored_folders.push(name(folder)),
                }
            }
        } else {
            dataset.ignored_folders = folders.iter().map(|folder| name(folder)).collect();
            dataset.add(root, pictures, options.repeats, "", options.strict)?;
        }
        if dataset.items.is_empty() {
            return Err(empty(root, &dataset));
        }
        Ok(dataset)
    }

    /// The pictures.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// Pictures that were passed over, with the reason.
    pub fn skipped(&self) -> &[(PathBuf, String)] {
        &self.skipped
    }

    /// Caption files of several lines, of which only the first counts.
    pub fn multi_line_captions(&self) -> usize {
        self.multi_line
    }

    /// Folders below the dataset's that were not read.
    pub fn ignored_folders(&self) -> &[String] {
        &self.ignored_folders
    }

    /// How many captions came from where.
    pub fn captions_by_source(&self) -> BTreeMap<CaptionSource, usize> {
        let mut counts = BTreeMap::new();
        for item in &self.items {
            *counts.entry(item.caption_source).or_default() += 1;
        }
        counts
    }

    /// Leaves pictures out that turned out unreadable later, with the reason.
    pub fn skip(&mut self, path: &Path, reason: impl Into<String>) {
        self.items.retain(|item| item.path != path);
        self.skipped.push((path.to_owned(), reason.into()));
    }

    /// Per folder: how often each comma-separated tag, trimmed and in lower case, occurs.
    pub fn tag_frequency(&self) -> BTreeMap<String, BTreeMap<String, usize>> {
        let mut folders: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
        for item in &self.items {
            let tags = folders.entry(item.folder.clone()).or_default();
            for tag in item.caption.split(',').map(|tag| tag.trim().to_lowercase()).filter(|tag| !tag.is_empty()) {
                *tags.entry(tag).or_default() += 1;
            }
        }
        folders
    }

    fn add(&mut self, folder: &Path, pictures: Vec<PathBuf>, repeats: usize, class: &str, strict: bool) -> Result<()> {
        let metadata = Metadata::read(folder, &pictures)?;
        let folder_name = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        let folder_name = folder_name.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        for path in pictures {
            let size = match picture::dimensions(&path) {
                Ok(size) => size,
                Err(error) if strict => return Err(error),
                Err(error) => {
                    self.skipped.push((path, error.to_string()));
                    continue;
                }
            };
            let (lines, caption_source) = match self.caption_file(&path)? {
                Some((lines, source)) => (lines, source),
                None => match metadata.captions.get(&path) {
                    Some((caption, source)) => (vec![caption.clone()], *source),
                    None if !class.is_empty() => (vec![class.to_owned()], CaptionSource::Folder),
                    None => (Vec::new(), CaptionSource::None),
                },
            };
            let mut lines = lines.into_iter();
            let (caption, more_lines) = (lines.next().unwrap_or_default(), lines.collect());
            let folder = folder_name.clone();
            self.items.push(Item { path, folder, caption, more_lines, caption_source, size, repeats });
        }
        Ok(())
    }

    fn caption_file(&mut self, picture: &Path) -> Result<Option<(Vec<String>, CaptionSource)>> {
        for (extension, source) in [("txt", CaptionSource::Txt), ("caption", CaptionSource::Caption)] {
            let path = picture.with_extension(extension);
            if path.is_file() {
                let text = read_text(&path)?;
                let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
                let lines: Vec<String> = lines.map(str::to_owned).collect();
                self.multi_line += usize::from(lines.len() > 1);
                return Ok(Some((lines, source)));
            }
        }
        Ok(None)
    }
}

/// Captions of a folder's `metadata.csv` and `metadata.jsonl`, by picture.
#[derive(Debug, Default)]
struct Metadata {
    captions: BTreeMap<PathBuf, (String, CaptionSource)>,
}

impl Metadata {
    fn read(folder: &Path, pictures: &[PathBuf]) -> Result<Self> {
        let mut metadata = Self::default();
        let csv = folder.join("metadata.csv");
        if csv.is_file() {
            metadata.read_csv(&csv, pictures)?;
        }
        let jsonl = folder.join("metadata.jsonl");
        if jsonl.is_file() {
            metadata.read_jsonl(&jsonl, pictures)?;
        }
        Ok(metadata)
    }

    fn read_csv(&mut self, path: &Path, pictures: &[PathBuf]) -> Result<()> {
        let text = read_text(path)?;
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::Headers).from_reader(text.as_bytes());
        let headers = reader.headers().map_err(|error| Error::caption(path, Some(1), error.to_string()))?.clone();
        let column = |names: &[&str]| {
            headers.iter().position(|header| names.contains(&header)).ok_or_else(|| {
                let reason = format!(
                    "no column `{}`; found {}",
                    names.join("` or `"),
                    headers.iter().collect::<Vec<_>>().join(", ")
                );
                Error::caption(path, Some(1), reason)
            })
        };
        let (file, caption) = (column(FILE_KEYS)?, column(CAPTION_KEYS)?);
        for record in reader.records() {
            let record = record.map_err(|error| {
                let line = error.position().map(|position| position.line() as usize);
                Error::caption(path, line, error.to_string())
            })?;
            let line = record.position().map_or(0, |position| position.line() as usize);
            self.insert(path, line, &record[file], &record[caption], CaptionSource::Csv, pictures)?;
        }
        Ok(())
    }

    fn read_jsonl(&mut self, path: &Path, pictures: &[PathBuf]) -> Result<()> {
        let text = read_text(path)?;
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let number = index + 1;
            let row: serde_json::Value = serde_json::from_str(line)
                .map_err(|error| Error::caption(path, Some(number), format!("not valid JSON: {error}")))?;
            let field = |names: &[&str]| {
                let found = names.iter().find_map(|name| row.get(name)).and_then(serde_json::Value::as_str);
                found.ok_or_else(|| Error::caption(path, Some(number), format!("no text `{}`", names.join("` or `"))))
            };
            self.insert(path, number, field(FILE_KEYS)?, field(CAPTION_KEYS)?, CaptionSource::Jsonl, pictures)?;
        }
        Ok(())
    }

    fn insert(
        &mut self,
        path: &Path,
        line: usize,
        file: &str,
        caption: &str,
        source: CaptionSource,
        pictures: &[PathBuf],
    ) -> Result<()> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let wanted = folder.join(file);
        // Only pictures of this very folder: a name that leads elsewhere is a mistake or worse.
        if !pictures.contains(&wanted) {
            return Err(Error::caption(path, Some(line), format!("`{file}` is no picture of this folder")));
        }
        match self.captions.get(&wanted) {
            Some((_, earlier)) if *earlier == source => {
                Err(Error::caption(path, Some(line), format!("`{file}` has a caption in this file already")))
            }
            // The CSV, read first, wins.
            Some(_) => Ok(()),
            None => {
                self.captions.insert(wanted, (caption.trim().to_owned(), source));
                Ok(())
            }
        }
    }
}

const FILE_KEYS: &[&str] = &["filename", "file_name"];
const CAPTION_KEYS: &[&str] = &["prompt", "text", "caption"];

/// Pictures and folders directly inside a folder, each sorted by name.
fn list(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut pictures, mut folders) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(Error::io(folder, "read the folder"))? {
        let path = entry.map_err(Error::io(folder, "read the folder"))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() {
            folders.push(path);
        } else if path
            .extension()
            .is_some_and(|extension| EXTENSIONS.contains(&extension.to_string_lossy().to_lowercase().as_str()))
        {
            pictures.push(path);
        }
    }
    pictures.sort();
    folders.sort();
    Ok((pictures, folders))
}

/// `10_red apple` as 10 and `red apple`.
fn repeats_of(folder: &str) -> Option<(usize, String)> {
    let (number, name) = folder.split_once('_')?;
    Some((number.parse().ok().filter(|&repeats| repeats > 0)?, name.trim().to_owned()))
}

/// A text file without its byte-order mark; anything but UTF-8 is an error that says where.
fn read_text(path: &Path) -> Result<String> {
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

fn empty(root: &Path, dataset: &ImageDataset) -> Error {
    let found = if let Some((path, reason)) = dataset.skipped.first() {
        format!("{} file(s) could not be read, the first: {}: {reason}", dataset.skipped.len(), path.display())
    } else if !dataset.ignored_folders.is_empty() {
        format!(
            "there are folders ({}); name one of them, or call them N_name (N repeats) to use them all",
            dataset.ignored_folders.iter().take(3).cloned().collect::<Vec<_>>().join(", ")
        )
    } else {
        let count = fs::read_dir(root).map_or(0, Iterator::count);
        if count == 0 { "the folder is empty".into() } else { format!("{count} other file(s) are there") }
    };
    Error::Empty { path: root.to_owned(), looked_for: EXTENSIONS.join(", "), found }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: ScanOptions = ScanOptions { repeats: 1, strict: false };

    fn folder(pictures: &[&str], files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in pictures {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            image::RgbImage::new(9, 7).save_with_format(path, image::ImageFormat::Png).unwrap();
        }
        for (name, content) in files {
            fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    #[test]
    fn captions_by_precedence() {
        let folder = folder(
            &["a.png", "b.JPG", "c.webp", "d.png", "e.png"],
            &[
                ("a.txt", "\u{feff}from txt\r\nsecond line".as_bytes()),
                ("a.caption", b"from caption"),
                ("b.caption", b"  from caption \n"),
                ("metadata.csv", b"filename,prompt\na.png,from csv\nc.webp,\"from csv, quoted\"\n"),
                (
                    "metadata.jsonl",
                    b"{\"file_name\":\"c.webp\",\"text\":\"x\"}\n\n{\"file_name\":\"d.png\",\"text\":\"from jsonl\"}\n",
                ),
            ],
        );
        let dataset = ImageDataset::scan(folder.path(), OPTIONS).unwrap();
        let captions: Vec<_> = dataset.items().iter().map(|item| item.caption.as_str()).collect();
        assert_eq!(captions, ["from txt", "from caption", "from csv, quoted", "from jsonl", ""]);
        assert_eq!(dataset.multi_line_captions(), 1);
        assert_eq!(dataset.items()[0].size, (9, 7));
        assert_eq!(dataset.captions_by_source()[&CaptionSource::None], 1);
        assert_eq!(dataset.tag_frequency().into_values().next().unwrap()["quoted"], 1);
    }

    #[test]
    fn kohya_folders_repeat_and_name() {
        let folder = folder(
            &["3_red apple/a.png", "3_red apple/b.png", "1_x/c.png", "logs/d.png"],
            &[("3_red apple/b.txt", b"own")],
        );
        let dataset = ImageDataset::scan(folder.path(), ScanOptions { repeats: 2, strict: true }).unwrap();
        let seen: Vec<_> = dataset.items().iter().map(|item| (item.caption.as_str(), item.repeats)).collect();
        assert_eq!(seen, [("x", 2), ("red apple", 6), ("own", 6)]);
        assert_eq!(dataset.ignored_folders(), ["logs"]);
    }

    #[test]
    fn broken_pictures_are_skipped_or_refused() {
        let folder = folder(&["a.png"], &[("b.png", b"no picture"), ("c.jpg", b"")]);
        let dataset = ImageDataset::scan(folder.path(), OPTIONS).unwrap();
        assert_eq!((dataset.items().len(), dataset.skipped().len()), (1, 2));
        assert!(dataset.skipped()[0].1.contains("b.png"));
        let error = ImageDataset::scan(folder.path(), ScanOptions { repeats: 1, strict: true }).unwrap_err();
        assert!(error.to_string().contains("b.png"));
    }

    #[test]
    fn errors_name_file_and_line() {
        let scan = |pictures: &[&str], files: &[(&str, &[u8])]| {
            ImageDataset::scan(folder(pictures, files).path(), OPTIONS).unwrap_err().to_string()
        };
        let cases: [(String, &[&str]); 11] = [
            (scan(&[], &[]), &["folder is empty", "webp"]),
            (scan(&[], &[("notes.md", b"x")]), &["1 other file"]),
            (scan(&["sub/a.png"], &[]), &["sub", "N_name"]),
            (scan(&[], &[("a.png", b"x")]), &["could not be read", "a.png"]),
            (scan(&["a.png"], &[("a.txt", b"one\ntwo \xff")]), &["a.txt, line 2", "UTF-8"]),
            (
                scan(&["a.png"], &[("metadata.csv", b"file,words\na.png,x\n")]),
                &["metadata.csv, line 1", "filename", "words"],
            ),
            (scan(&["a.png"], &[("metadata.csv", b"filename,prompt\nb.png,x\n")]), &["metadata.csv, line 2", "b.png"]),
            (scan(&["a.png"], &[("metadata.csv", b"filename,prompt\na.png,x\na.png,y\n")]), &["line 3", "already"]),
            (scan(&["a.png"], &[("metadata.csv", b"filename,prompt\na.png,x,y\n")]), &["metadata.csv, line 2"]),
            (
                scan(&["a.png"], &[("metadata.jsonl", b"{\"file_name\":\"../a.png\",\"text\":\"x\"}")]),
                &["metadata.jsonl, line 1", "../a.png"],
            ),
            (scan(&["a.png"], &[("metadata.jsonl", b"{\"file_name\":")]), &["metadata.jsonl, line 1", "JSON"]),
        ];
        for (error, fragments) in cases {
            for fragment in fragments {
                assert!(error.contains(fragment), "`{error}` lacks `{fragment}`");
            }
        }
        assert!(ImageDataset::scan("does/not/exist", OPTIONS).unwrap_err().to_string().contains("does/not/exist"));
    }
}
