//! Folders: which files and folders are there, which of them belong together.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::captions::{Lists, Metadata, caption_lines, listed};
use super::encoding::read_text_in;
use super::{CaptionSource, EXTENSIONS, ImageDataset, Item, Stored, file_name, has_extension};
use crate::finding::{Finding, FindingKind};
use crate::picture::Header;
use crate::{Error, Result};

/// Endings of a mask's stem behind its picture's.
const MASKS: &[&str] = &["-mask", "-masklabel"];
/// Endings of pictures that belong to another one and are not trained on (OneTrainer).
const COMPANIONS: &[&str] = &["-condlabel"];

/// Pictures of formats that need a decoder in C.
const UNKNOWN: &[&str] = &["avif", "heic", "heif", "jxl"];

/// What is directly inside a folder, each kind sorted by name.
#[derive(Default)]
struct Listing {
    pictures: Vec<PathBuf>,
    folders: Vec<PathBuf>,
    containers: Vec<PathBuf>,
    /// Names of all other files.
    others: HashSet<OsString>,
}

/// Files beside pictures, found whichever case their extension has: cameras and Windows write capitals.
struct Others<'o>(HashMap<OsString, Vec<&'o OsStr>>);

impl<'o> Others<'o> {
    fn of(names: &'o HashSet<OsString>) -> Self {
        let mut by_name: HashMap<OsString, Vec<&OsStr>> = HashMap::new();
        for name in names {
            by_name.entry(name.to_ascii_lowercase()).or_default().push(name);
        }
        Self(by_name)
    }

    /// The file `stem.extension`; of several that differ in case, the one that is written so, then the first by name.
    fn find(&self, stem: &OsStr, extension: &str) -> Option<&'o OsStr> {
        let mut exact = stem.to_owned();
        exact.push(".");
        exact.push(extension);
        let starts = |name: &&OsStr| name.as_encoded_bytes().starts_with(stem.as_encoded_bytes());
        let found = self.0.get(&exact.to_ascii_lowercase())?.iter().copied().filter(starts);
        found.min_by_key(|name| (*name != exact, *name))
    }

    /// The file of a name in lower case, whichever case its own has.
    fn named(&self, name: &str) -> Option<&'o OsStr> {
        self.0.get(OsStr::new(name))?.iter().copied().min_by_key(|own| (*own != name, *own))
    }
}

/// What a picture's own files say.
type Read = (Result<Header>, Result<Option<(Vec<String>, CaptionSource)>>);

impl ImageDataset {
    /// The folder of a dataset; gives the number of files that are nothing of it.
    pub(super) fn root(&mut self, root: &Path) -> Result<usize> {
        let repeats = self.options.repeats;
        let class = self.options.class.clone();
        let listing = self.list(root)?;
        let others = listing.others.len();
        let own = !listing.pictures.is_empty() || !listing.containers.is_empty();
        let kohya = listing.folders.iter().any(|folder| repeats_of(&file_name(folder)).is_some());
        if !kohya {
            self.unused_number(root);
        }
        if self.options.recursive || !own && !kohya {
            self.tree(root, listing, repeats, &class)?;
        } else if !kohya {
            self.ignore(&listing.folders);
            self.folder(root, listing, repeats, &class)?;
        } else {
            // As sd-scripts has it, the data are in the folders, and what lies beside them is not among them.
            for picture in &listing.pictures {
                let beside = "it lies beside N_name folders, in which the pictures are";
                self.problem(picture, FindingKind::PictureIgnored, Error::picture(picture, beside))?;
            }
            for container in &listing.containers {
                self.container(container, repeats)?;
            }
            for folder in listing.folders {
                let Some((own, name)) = repeats_of(&file_name(&folder)) else {
                    self.ignore(&[folder]);
                    continue;
                };
                let Some(listing) = self.list_below(&folder)? else { continue };
                let class = if class.is_empty() { name } else { class.clone() };
                self.ignore(&listing.folders);
                self.folder(&folder, listing, repeats.saturating_mul(own), &class)?;
            }
        }
        Ok(others)
    }

    /// Says so where the folder that was given is itself an `N_name` folder whose number and name are not in force.
    fn unused_number(&mut self, root: &Path) {
        let real = root.canonicalize().unwrap_or_else(|_| root.to_owned());
        let Some((own, name)) = repeats_of(&file_name(&real)) else { return };
        if self.options.repeats == own || self.options.repeats > 1 && !self.options.class.is_empty() {
            return;
        }
        let used = self.options.repeats;
        let detail =
            format!("its {own} repeats and the caption `{name}` are not used: pictures are visited {used} times");
        self.note(root, FindingKind::FolderNumber, detail);
    }

    fn ignore(&mut self, folders: &[PathBuf]) {
        for folder in folders {
            self.note(folder, FindingKind::FolderIgnored, "it was not read");
        }
    }

    /// A folder with all that are below it.
    fn tree(&mut self, folder: &Path, mut listing: Listing, repeats: usize, class: &str) -> Result<()> {
        let folders = std::mem::take(&mut listing.folders);
        self.folder(folder, listing, repeats, class)?;
        for folder in folders {
            let Some(listing) = self.list_below(&folder)? else { continue };
            match repeats_of(&file_name(&folder)) {
                Some((own, name)) => {
                    let given = !self.options.class.is_empty();
                    self.tree(&folder, listing, repeats.saturating_mul(own), if given { class } else { &name })?;
                }
                None => self.tree(&folder, listing, repeats, class)?,
            }
        }
        Ok(())
    }

    /// A listing of a folder below the root, which may be unreadable or lead back.
    fn list_below(&mut self, folder: &Path) -> Result<Option<Listing>> {
        match self.list(folder) {
            Ok(listing) => Ok(Some(listing)),
            Err(error) => {
                let kind = match error {
                    Error::Option { .. } => FindingKind::FolderLoop,
                    _ => FindingKind::UnreadableFolder,
                };
                self.problem(folder, kind, error)?;
                Ok(None)
            }
        }
    }

    fn list(&mut self, folder: &Path) -> Result<Listing> {
        let real = fs::canonicalize(folder).map_err(Error::io(folder, "read the folder"))?;
        if !self.visited.insert(real) {
            return Err(Error::Option {
                key: "train_data_dir",
                value: folder.display().to_string(),
                reason: "it leads back to a folder that was read already".into(),
            });
        }
        let mut listing = Listing::default();
        for entry in fs::read_dir(folder).map_err(Error::io(folder, "read the folder"))? {
            let entry = entry.map_err(Error::io(folder, "read the folder"))?;
            let path = entry.path();
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            // The directory says what a file is, without a look at the file; only a link needs one.
            let is_folder = match entry.file_type() {
                Ok(kind) if !kind.is_symlink() => kind.is_dir(),
                _ => match fs::metadata(&path) {
                    Ok(target) => target.is_dir(),
                    Err(error) => {
                        let error = Error::io(&path, "follow the link")(error);
                        self.problem(&path, FindingKind::Unreadable, error)?;
                        continue;
                    }
                },
            };
            if is_folder {
                listing.folders.push(path);
            } else if has_extension(&path, EXTENSIONS) {
                if path.file_name().is_some_and(|name| name.to_str().is_none()) {
                    self.note(&path, FindingKind::NameEncoding, "its name is not UTF-8");
                }
                listing.pictures.push(path);
            } else if has_extension(&path, &["tar", "parquet"]) {
                listing.containers.push(path);
            } else if has_extension(&path, UNKNOWN) {
                let error =
                    Error::picture(&path, "AVIF, HEIC and JPEG XL cannot be decoded; convert it to PNG or WebP");
                self.problem(&path, FindingKind::Unreadable, error)?;
            } else {
                listing.others.insert(entry.file_name());
            }
        }
        listing.pictures.sort();
        listing.folders.sort();
        listing.containers.sort();
        Ok(listing)
    }

    /// The pictures, archives and tables of one folder.
    fn folder(&mut self, folder: &Path, listing: Listing, repeats: usize, class: &str) -> Result<()> {
        for container in &listing.containers {
            self.container(container, repeats)?;
        }
        let others = Others::of(&listing.others);
        let list = |name: &str| others.named(name).map(|name| folder.join(name));
        let lists = Lists { csv: list("metadata.csv"), jsonl: list("metadata.jsonl") };
        if listing.pictures.is_empty() && lists.csv.is_none() && lists.jsonl.is_none() {
            return Ok(());
        }
        let (pictures, mut masks) = self.divide(listing.pictures);
        let names = pictures.iter().filter_map(|path| path.file_name().map(OsStr::to_owned)).collect();
        let below = self.options.recursive || pictures.is_empty();
        let (metadata, problems) = Metadata::read(folder, &lists, &names, below, self.options.caption_encoding);
        for error in problems {
            let path = error.path().unwrap_or(folder).to_owned();
            self.problem(&path, FindingKind::CaptionFile, error)?;
        }
        self.inherited.absorb(&metadata);
        if let Some(from) = &self.options.mask_dir {
            masks = masks_for(from, folder, &self.root)?;
        }
        self.orphans(folder, &pictures, &listing.others);

        let (extensions, encoding) = (self.caption_extensions(), self.options.caption_encoding);
        let read = |path: &PathBuf| -> Read {
            let header = Stored::file(path).header();
            let caption = extensions.iter().find_map(|(extension, source)| {
                let beside = path.with_file_name(others.find(path.file_stem()?, extension)?);
                Some(read_text_in(&beside, encoding).map(|text| (caption_lines(&text), *source)))
            });
            (header, caption.transpose())
        };
        let all: Vec<Read> = pictures.par_iter().map(read).collect();
        let real = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        let name: Arc<str> = file_name(&real).into();
        for (path, (header, caption)) in pictures.into_iter().zip(all) {
            let mask = path.file_stem().and_then(|stem| masks.get(stem)).map(Stored::file);
            let caption = match caption {
                Ok(caption) => caption,
                Err(error) => {
                    let file = error.path().unwrap_or(&path).to_owned();
                    self.problem(&file, FindingKind::CaptionFile, error)?;
                    None
                }
            };
            let caption = caption.or_else(|| {
                let (caption, source) = self.inherited.get(&path)?;
                Some((vec![caption.clone()], *source))
            });
            self.add(Stored::file(path), header, caption, &name, repeats, class, mask)?;
        }
        Ok(())
    }

    fn caption_extensions(&self) -> Vec<(String, CaptionSource)> {
        match self.options.caption_extension.as_deref().map(|extension| extension.trim_start_matches('.')) {
            Some("txt") => vec![("txt".into(), CaptionSource::Txt)],
            Some("caption") => vec![("caption".into(), CaptionSource::Caption)],
            Some(other) => vec![(other.to_owned(), CaptionSource::File)],
            None => vec![("txt".into(), CaptionSource::Txt), ("caption".into(), CaptionSource::Caption)],
        }
    }

    /// Masks and companions told apart from pictures: only where the picture that they belong to is there.
    fn divide(&mut self, paths: Vec<PathBuf>) -> (Vec<PathBuf>, HashMap<OsString, PathBuf>) {
        let stems: HashSet<OsString> = paths.iter().filter_map(|path| path.file_stem().map(OsStr::to_owned)).collect();
        let base = |path: &Path, endings: &[&str]| {
            let stem = path.file_stem()?.to_str()?;
            let base = endings.iter().find_map(|ending| {
                let (base, own) = stem.split_at_checked(stem.len().checked_sub(ending.len())?)?;
                own.eq_ignore_ascii_case(ending).then_some(base)
            })?;
            stems.contains(OsStr::new(base)).then(|| OsString::from(base))
        };
        let (mut pictures, mut masks) = (Vec::with_capacity(paths.len()), HashMap::new());
        for path in paths {
            if let Some(base) = base(&path, MASKS) {
                masks.insert(base, path);
            } else if base(&path, COMPANIONS).is_none() {
                pictures.push(path);
            }
        }
        let mut seen: HashMap<OsString, PathBuf> = HashMap::new();
        for path in &pictures {
            let stem = path.file_stem().map(OsStr::to_owned).unwrap_or_default();
            match seen.get(&stem) {
                Some(first) => {
                    let detail = format!("shares its caption file with {}", file_name(first));
                    self.note(path, FindingKind::DuplicateStem, detail);
                }
                None => {
                    seen.insert(stem, path.clone());
                }
            }
        }
        (pictures, masks)
    }

    /// Captions whose picture is not there.
    fn orphans(&mut self, folder: &Path, pictures: &[PathBuf], others: &HashSet<OsString>) {
        let stems: HashSet<&OsStr> = pictures.iter().filter_map(|path| path.file_stem()).collect();
        let extensions = self.caption_extensions();
        let mut orphans: Vec<&OsString> = others
            .iter()
            .filter(|name| {
                let path = Path::new(name);
                let is_caption = path
                    .extension()
                    .is_some_and(|own| extensions.iter().any(|(extension, _)| own.eq_ignore_ascii_case(extension)));
                is_caption && path.file_stem().is_some_and(|stem| !stems.contains(stem))
            })
            .collect();
        orphans.sort();
        for name in orphans {
            self.note(&folder.join(name), FindingKind::OrphanCaption, "there is no picture of this name");
        }
    }

    /// Pictures that a metadata file of sd-scripts lists.
    pub(super) fn listed(&mut self, metadata: &Path, folder: &Path) -> Result<()> {
        let rows = listed(metadata, folder, self.options.caption_encoding)?;
        let mut masks: HashMap<PathBuf, HashMap<OsString, PathBuf>> = HashMap::new();
        if let Some(from) = &self.options.mask_dir {
            for own in rows.iter().filter_map(|row| row.picture.parent()) {
                if !masks.contains_key(own) {
                    masks.insert(own.to_owned(), masks_for(from, own, folder)?);
                }
            }
        }
        let headers: Vec<_> = rows.par_iter().map(|row| Stored::file(&row.picture).header()).collect();
        let name: Arc<str> = file_name(folder).into();
        let (repeats, class) = (self.options.repeats, self.options.class.clone());
        for (row, header) in rows.into_iter().zip(headers) {
            let beside = row.picture.parent().and_then(|own| masks.get(own));
            let mask = beside.zip(row.picture.file_stem()).and_then(|(all, stem)| all.get(stem)).map(Stored::file);
            let caption = Some((caption_lines(&row.caption), CaptionSource::Metadata));
            self.add(Stored::file(row.picture), header, caption, &name, repeats, &class, mask)?;
        }
        Ok(())
    }

    /// Says so where pictures of several folders have one mask because they have one name.
    pub(super) fn shared_masks(&mut self) {
        let mut first: HashMap<&Path, &Path> = HashMap::new();
        let mut shared = Vec::new();
        for item in &self.items {
            let Some(mask) = item.mask.as_ref().filter(|_| self.options.mask_dir.is_some()) else { continue };
            let other = *first.entry(&mask.path).or_insert(&item.file.path);
            if other.parent() != item.file.path.parent() {
                let detail = format!("its mask {} is that of {}, too", mask.path.display(), other.display());
                shared.push(Finding::new(&item.file.path, FindingKind::SharedMask, detail));
            }
        }
        self.findings.extend(shared);
    }

    /// One picture with what was read of it.
    #[allow(clippy::too_many_arguments, reason = "all that is known of a picture")]
    pub(super) fn add(
        &mut self,
        file: Stored,
        header: Result<Header>,
        caption: Option<(Vec<String>, CaptionSource)>,
        folder: &Arc<str>,
        repeats: usize,
        class: &str,
        mask: Option<Stored>,
    ) -> Result<()> {
        let header = match header {
            Ok(header) => header,
            Err(error) => return self.problem(&file.path.clone(), FindingKind::Unreadable, error),
        };
        let extension = file.path.extension().map(|own| own.to_string_lossy().to_lowercase()).unwrap_or_default();
        if file.own_file().is_some() && !header.extensions.contains(&extension.as_str()) {
            let detail =
                format!("the content is {}", header.extensions.first().unwrap_or(&"another format").to_uppercase());
            self.note(&file.path, FindingKind::WrongExtension, detail);
        }
        if self.options.mask_dir.is_some() && mask.is_none() {
            self.note(&file.path, FindingKind::MissingMask, "no file of its name in mask_dir");
        }
        let (lines, caption_source) = match caption {
            Some((lines, source)) => (lines, source),
            None if !class.is_empty() => (vec![class.to_owned()], CaptionSource::Folder),
            None => (Vec::new(), CaptionSource::None),
        };
        let mut lines = lines.into_iter();
        self.items.push(Item {
            file,
            folder: Arc::clone(folder),
            caption: lines.next().unwrap_or_default(),
            more_lines: lines.collect(),
            caption_source,
            size: header.size,
            repeats,
            mask,
            role: self.options.role,
        });
        Ok(())
    }
}

/// The masks of a folder of pictures, by stem: those at the same place below the folder of masks, then those directly
/// in it, where sd-scripts and ai-toolkit look.
fn masks_for(masks: &Path, folder: &Path, root: &Path) -> Result<HashMap<OsString, PathBuf>> {
    let mut found = masks_by_stem(masks)?;
    let same = folder.strip_prefix(root).ok().filter(|below| !below.as_os_str().is_empty());
    if let Some(same) = same.map(|below| masks.join(below)).filter(|same| same.is_dir()) {
        found.extend(masks_by_stem(&same)?);
    }
    Ok(found)
}

/// The pictures of a folder of masks, by stem.
fn masks_by_stem(folder: &Path) -> Result<HashMap<OsString, PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io(folder, "read the folder of masks"))?;
    let paths = entries.flatten().map(|entry| entry.path()).filter(|path| has_extension(path, EXTENSIONS));
    Ok(paths.filter_map(|path| Some((path.file_stem()?.to_owned(), path))).collect())
}

/// `10_red apple` as 10 and `red apple`.
fn repeats_of(folder: &str) -> Option<(usize, String)> {
    let (number, name) = folder.split_once('_')?;
    Some((number.parse().ok().filter(|&repeats| repeats > 0)?, name.trim().to_owned()))
}
