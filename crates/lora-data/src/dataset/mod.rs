//! Captioned pictures on disk: which there are, how large they are, and what is written about them.
//!
//! **Layouts.** A folder of pictures; a folder of kohya's `N_name` folders (N repeats; the name is the caption of pictures
//! that have none; pictures beside such folders are left out and reported); a folder of other folders, read in full; a
//! `.tar` in WebDataset's form; a `.parquet` table; or what a metadata file of sd-scripts lists.
//!
//! **Captions** come from, the first found winning: `picture.txt`, `picture.caption`, `metadata.csv` (a header with
//! `filename` or `file_name`, and `prompt`, `text` or `caption`), `metadata.jsonl` (objects with the same keys;
//! `image_path` too), the folder's `N_name`. What counts of a caption file with several lines says
//! [`crate::caption`].
//!
//! **Masks** lie beside their picture as `picture-mask.png` or `picture-masklabel.png` (OneTrainer), or in a folder
//! of their own under the picture's name, at the picture's place below the root or directly in it (ai-toolkit,
//! sd-scripts).

mod archive;
mod captions;
mod encoding;
mod folder;
mod footer;
mod regularisation;
mod stored;
#[cfg(feature = "parquet")]
pub(crate) mod table;

pub use encoding::{TextEncoding, read_text};
pub use regularisation::balance;
pub use stored::Stored;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::caption::CaptionOptions;
use crate::finding::{Finding, FindingKind, Severity};
use crate::{Error, Result};

/// Extensions that make a file a picture, in any case.
pub(crate) const EXTENSIONS: &[&str] = &["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"];

/// The most visits of an epoch: their order takes memory for each.
const MAX_VISITS: usize = 50_000_000;

/// Where a caption came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum CaptionSource {
    /// A `.txt` of the same name.
    Txt,
    /// A `.caption` of the same name.
    Caption,
    /// A file of the same name with the extension that was asked for.
    File,
    /// `metadata.csv`.
    Csv,
    /// `metadata.jsonl`.
    Jsonl,
    /// A metadata file of sd-scripts.
    Metadata,
    /// A member of the archive or a column of the table that the picture is in.
    Archive,
    /// The name of an `N_name` folder, or the class that was given.
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
            CaptionSource::File => "caption files",
            CaptionSource::Csv => "metadata.csv",
            CaptionSource::Jsonl => "metadata.jsonl",
            CaptionSource::Metadata => "metadata file",
            CaptionSource::Archive => "archive",
            CaptionSource::Folder => "folder name",
            CaptionSource::None => "none",
        }
    }
}

/// What pictures are there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// To learn.
    #[default]
    Training,
    /// To keep what the model knows of the class (DreamBooth's prior preservation).
    Regularisation,
}

/// One picture with its caption.
#[derive(Debug, Clone)]
pub struct Item {
    /// Where it is.
    pub file: Stored,
    /// Name of its folder or archive.
    pub folder: Arc<str>,
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
    /// Its mask, where there is one.
    pub mask: Option<Stored>,
    /// What it is there for.
    pub role: Role,
}

impl Item {
    /// All lines of the caption; at least one.
    pub fn lines(&self) -> Vec<&str> {
        std::iter::once(self.caption.as_str()).chain(self.more_lines.iter().map(String::as_str)).collect()
    }

    /// The comma-separated tags, trimmed and in lower case, of the lines that count.
    pub(crate) fn tags(&self, captions: &CaptionOptions) -> impl Iterator<Item = String> {
        let lines = if captions.takes_all_lines() { self.lines() } else { vec![self.caption.as_str()] };
        let tags = lines.into_iter().flat_map(|line| line.split(','));
        tags.map(|tag| tag.trim().to_lowercase()).filter(|tag| !tag.is_empty())
    }
}

/// What happens when something cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strictness {
    /// Whatever would be lost is an error.
    Strict,
    /// Unreadable pictures are left out and reported; damaged captions are errors.
    #[default]
    Normal,
    /// Everything is reported, nothing is an error.
    Inspect,
}

/// How to scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanOptions {
    /// Visits of each picture per epoch, times the N of an `N_name` folder.
    pub repeats: usize,
    /// What happens when something cannot be used.
    pub strictness: Strictness,
    /// Folders below one with pictures are read too.
    pub recursive: bool,
    /// Captions have this extension instead of `.txt` or `.caption`.
    pub caption_extension: Option<String>,
    /// Captions and lists of them that are not UTF-8 are in this encoding.
    pub caption_encoding: Option<TextEncoding>,
    /// Caption of pictures that have none.
    pub class: String,
    /// Metadata of sd-scripts (JSON by path, or JSON lines): pictures are those that it lists.
    pub metadata_file: Option<PathBuf>,
    /// Folder of masks, each of its picture's name: in the folders that pictures are in, or directly in it.
    pub mask_dir: Option<PathBuf>,
    /// What the pictures are there for.
    pub role: Role,
}

impl Default for ScanOptions {
    fn default() -> Self {
        Self {
            repeats: 1,
            strictness: Strictness::Normal,
            recursive: false,
            caption_extension: None,
            caption_encoding: None,
            class: String::new(),
            metadata_file: None,
            mask_dir: None,
            role: Role::Training,
        }
    }
}

/// The pictures of a folder, an archive or a table, sorted by name.
#[derive(Debug)]
pub struct ImageDataset {
    options: ScanOptions,
    /// The folder, archive or table.
    root: PathBuf,
    items: Vec<Item>,
    findings: Vec<Finding>,
    /// Captions that cannot be used; all are told together.
    refused: Vec<Error>,
    /// Captions that a metadata file has for pictures in folders below its own.
    inherited: captions::Metadata,
    /// Folders read so far, by their real paths.
    visited: HashSet<PathBuf>,
}

impl ImageDataset {
    /// Scans: names, captions, and the size in every picture's header.
    ///
    /// # Errors
    /// [`Error::Captions`] with all captions that cannot be used, [`Error::Picture`] for a damaged picture (unless
    /// [`ScanOptions::strictness`] is milder), [`Error::Empty`] where there is none, [`Error::Option`] for impossible
    /// repeats, [`Error::Io`] where the folder cannot be read.
    pub fn scan(root: impl AsRef<Path>, options: &ScanOptions) -> Result<Self> {
        let root = root.as_ref();
        if options.repeats == 0 {
            return Err(Error::Option {
                key: "repeats",
                value: "0".into(),
                reason: "a picture is visited at least once an epoch".into(),
            });
        }
        let mut dataset = Self {
            options: options.clone(),
            root: root.to_owned(),
            items: Vec::new(),
            findings: Vec::new(),
            refused: Vec::new(),
            inherited: captions::Metadata::default(),
            visited: HashSet::new(),
        };
        let others = match &options.metadata_file {
            Some(metadata) => {
                dataset.listed(metadata, root)?;
                0
            }
            None if root.is_file() => {
                dataset.container(root, options.repeats)?;
                0
            }
            None => dataset.root(root)?,
        };
        if !dataset.refused.is_empty() {
            return Err(Error::captions(dataset.refused));
        }
        dataset.shared_masks();
        let visits = dataset.items.iter().try_fold(0usize, |sum, item| sum.checked_add(item.repeats));
        if visits.is_none_or(|visits| visits > MAX_VISITS) {
            let most = dataset.items.iter().map(|item| item.repeats).max().unwrap_or(0);
            return Err(Error::Option {
                key: "repeats",
                value: most.to_string(),
                reason: format!(
                    "{} pictures would be visited more than {MAX_VISITS} times an epoch; lower repeats or the number before `_` in folders' names, and take more epochs",
                    dataset.items.len()
                ),
            });
        }
        if dataset.items.is_empty() && options.strictness != Strictness::Inspect {
            return Err(dataset.empty(root, others));
        }
        Ok(dataset)
    }

    /// The pictures.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// What was found on the way.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    pub(crate) fn into_parts(self) -> (Vec<Item>, Vec<Finding>) {
        (self.items, self.findings)
    }

    /// An archive or a table.
    fn container(&mut self, path: &Path, repeats: usize) -> Result<()> {
        match path.extension().and_then(|extension| extension.to_str()).map(str::to_lowercase).as_deref() {
            Some("tar") => self.archive(path, repeats),
            #[cfg(feature = "parquet")]
            Some("parquet") => self.table(path, repeats),
            _ => Err(Error::Option {
                key: "train_data_dir",
                value: path.display().to_string(),
                reason:
                    "expected a folder, a .tar or a .parquet (unpack a .tar.gz with gunzip first: its members cannot \
                         be read in any order)"
                        .into(),
            }),
        }
    }

    /// Notes what cannot be used, or passes the error on, as the strictness says.
    fn problem(&mut self, path: &Path, kind: FindingKind, error: Error) -> Result<()> {
        match (self.options.strictness, kind) {
            (Strictness::Inspect, _) => {}
            (Strictness::Strict, _) if kind.severity() == Severity::Lost && kind != FindingKind::CaptionFile => {
                return Err(error);
            }
            (_, FindingKind::CaptionFile) => {
                self.refused.push(error);
                return Ok(());
            }
            _ => {}
        }
        self.findings.push(Finding::new(path, kind, error.reason()));
        Ok(())
    }

    fn note(&mut self, path: &Path, kind: FindingKind, detail: impl Into<String>) {
        self.findings.push(Finding::new(path, kind, detail));
    }

    fn empty(&self, root: &Path, others: usize) -> Error {
        let lost: Vec<_> = self.findings.iter().filter(|finding| finding.kind.severity() == Severity::Lost).collect();
        let ignored = self.findings.iter().filter(|finding| finding.kind == FindingKind::FolderIgnored);
        let ignored: Vec<_> = ignored.take(3).map(|finding| file_name(&finding.path)).collect();
        let found = if let Some(first) = lost.first() {
            format!("{} file(s) could not be read, the first: {first}", lost.len())
        } else if !ignored.is_empty() {
            format!("there are folders ({}) that were not read; set recursive = true", ignored.join(", "))
        } else if others > 0 {
            format!("{others} other file(s) are there")
        } else {
            "the folder is empty".into()
        };
        Error::Empty { path: root.to_owned(), looked_for: EXTENSIONS.join(", "), found }
    }
}

/// Per folder: how often each comma-separated tag, trimmed and in lower case, occurs in the lines that count.
pub fn tag_frequency<'i>(
    items: impl IntoIterator<Item = (&'i Item, &'i CaptionOptions)>,
) -> BTreeMap<String, BTreeMap<String, usize>> {
    let mut folders: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
    for (item, captions) in items {
        let tags = folders.entry(item.folder.to_string()).or_default();
        for tag in item.tags(captions) {
            *tags.entry(tag).or_default() += 1;
        }
    }
    folders
}

pub(crate) fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|own| extensions.contains(&own.to_string_lossy().to_lowercase().as_str()))
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
