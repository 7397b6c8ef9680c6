//! Archives in WebDataset's form: members of one name up to the first dot belong together, as `0001.jpg`, `0001.txt` and
//! `0001.mask.png`. Members are read in place; nothing is unpacked.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::captions::{CAPTION_KEYS, caption_lines};
use super::encoding::{TextEncoding, decode_text};
use super::{CaptionSource, EXTENSIONS, ImageDataset, Stored, file_name, has_extension};
use crate::finding::FindingKind;
use crate::{Error, Result};

/// The most bytes that a caption member may have.
const MAX_TEXT: u64 = 1 << 20;

#[derive(Default)]
struct Group {
    picture: Option<Stored>,
    mask: Option<Stored>,
    /// Rank of the caption's kind, the lowest wins, and its lines.
    caption: Option<(usize, Vec<String>)>,
}

impl ImageDataset {
    pub(super) fn archive(&mut self, path: &Path, repeats: usize) -> Result<()> {
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        let length = file.metadata().map_err(Error::io(path, "read"))?.len();
        let shared: Arc<Path> = path.into();
        let mut archive = tar::Archive::new(file);
        let mut groups: BTreeMap<PathBuf, Group> = BTreeMap::new();
        for entry in archive.entries_with_seek().map_err(Error::io(path, "read"))? {
            let mut entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    // What comes behind damage cannot be found any more; what came before it can be used.
                    let error = Error::picture(path, format!("the archive is damaged: {error}"));
                    self.problem(path, FindingKind::Unreadable, error)?;
                    break;
                }
            };
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let Ok(name) = entry.path().map(|name| name.into_owned()) else { continue };
            let base = file_name(&name);
            let stem = base.split('.').next().unwrap_or_default();
            if stem.is_empty() {
                continue;
            }
            let key = name.with_file_name(stem);
            let rest = base[stem.len()..].to_lowercase();
            // Where members are skipped rather than read, only their place tells that the file is shorter.
            if entry.raw_file_position().saturating_add(entry.size()) > length {
                let error = Error::picture(path, "the archive ends in the middle of it");
                self.problem(&path.join(&name), FindingKind::Unreadable, error)?;
                break;
            }
            let group = groups.entry(key).or_default();
            let stored = Stored::member(path.join(&name), Arc::clone(&shared), entry.raw_file_position(), entry.size());
            let rank = [".txt", ".caption", ".json"].iter().position(|extension| rest == *extension);
            if let Some(rank) = rank {
                match text(&mut entry, path, &name, rank == 2, self.options.caption_encoding) {
                    Ok(Some(lines)) if group.caption.as_ref().is_none_or(|(own, _)| rank < *own) => {
                        group.caption = Some((rank, lines));
                    }
                    Ok(_) => {}
                    Err(error) => self.problem(&stored.path, FindingKind::CaptionFile, error)?,
                }
            } else if has_extension(&name, EXTENSIONS) {
                match rest.starts_with(".mask.") {
                    true => group.mask = Some(stored),
                    false => group.picture = Some(stored),
                }
            }
        }
        let name: Arc<str> = file_name(path).into();
        let class = self.options.class.clone();
        for (key, group) in groups {
            let caption = group.caption.map(|(_, lines)| (lines, CaptionSource::Archive));
            match group.picture {
                Some(picture) => {
                    let header = picture.header();
                    self.add(picture, header, caption, &name, repeats, &class, group.mask)?;
                }
                None if caption.is_some() => {
                    self.note(&path.join(key), FindingKind::OrphanCaption, "there is no picture of this name");
                }
                None => {}
            }
        }
        Ok(())
    }
}

/// The lines of a text member, or the caption in a JSON one.
fn text(
    entry: &mut impl Read,
    archive: &Path,
    name: &Path,
    json: bool,
    encoding: Option<TextEncoding>,
) -> Result<Option<Vec<String>>> {
    let path = archive.join(name);
    let mut bytes = Vec::new();
    entry.take(MAX_TEXT).read_to_end(&mut bytes).map_err(Error::io(&path, "read"))?;
    let text = decode_text(&path, bytes, encoding)?;
    if !json {
        return Ok(Some(caption_lines(&text)));
    }
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| Error::caption(&path, None, format!("not valid JSON: {error}")))?;
    let caption = CAPTION_KEYS.iter().find_map(|key| value.get(key)).and_then(serde_json::Value::as_str);
    Ok(caption.map(caption_lines))
}
