//! The files of a base model: which hold weights, which are copied beside them, which stay behind because they hold the
//! weights before the merge.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::adapter::parts;
use crate::safetensors::SafetensorsFile;
use crate::{Error, Result};

/// Folders below the base's own that are looked into.
const DEPTH: usize = 4;

/// Endings of files that hold weights in other formats.
const OTHER_WEIGHTS: &[&str] =
    &["bin", "ckpt", "pt", "pth", "msgpack", "h5", "onnx", "onnx_data", "gguf", "tflite", "ot", "mlmodel"];

/// An open base model.
#[derive(Debug)]
pub(super) struct Base {
    /// The file or folder.
    pub(super) path: PathBuf,
    /// Its weight files; of several copies of a layer the usual one comes first.
    pub(super) files: Vec<SafetensorsFile>,
    /// `config.json` of a language model's folder.
    pub(super) config: Option<Value>,
    /// Files of weights that are not merged.
    left_out: Vec<PathBuf>,
}

impl Base {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let folder = fs::metadata(path).map_err(Error::io(path, "open the base model"))?.is_dir();
        if !folder {
            let files = vec![SafetensorsFile::open(path)?];
            if !files[0].is_empty() && files[0].names().all(|name| parts::split(name).is_some()) {
                let found = "a LoRA, not a base model; are base and LoRA swapped?".into();
                return Err(Error::Family { path: path.to_owned(), found });
            }
            return Ok(Self { path: path.to_owned(), files, config: None, left_out: Vec::new() });
        }
        let (mut weights, mut left_out) = (Vec::new(), Vec::new());
        for file in walk(path)? {
            match is_weights(&file) {
                true if is_original(&file) => left_out.push(file),
                true => weights.push(file),
                false if is_other_weights(&file) => left_out.push(file),
                false => {}
            }
        }
        if weights.is_empty() {
            return Err(Error::format(path, "has no .safetensors files"));
        }
        // `model.safetensors` before `model.fp16.safetensors`.
        let length = |path: &PathBuf| path.file_name().map_or(0, |name| name.len());
        weights.sort_by(|a, b| (a.parent(), length(a), a).cmp(&(b.parent(), length(b), b)));
        let files = weights.iter().map(SafetensorsFile::open).collect::<Result<_>>()?;
        let config = path.join("config.json");
        let config = if config.is_file() { Some(crate::json::read(&config)?) } else { None };
        Ok(Self { path: path.to_owned(), files, config, left_out })
    }

    /// Whether it is a folder.
    pub(super) fn is_folder(&self) -> bool {
        self.path.is_dir()
    }

    /// A file's place in the base's folder.
    pub(super) fn relative<'p>(&self, file: &'p Path) -> &'p Path {
        file.strip_prefix(&self.path).unwrap_or(file)
    }

    /// Copies what is no weights; returns what was left behind, in words.
    pub(super) fn copy_others(&self, to: &Path) -> Result<Vec<String>> {
        for path in walk(&self.path)? {
            if is_weights(&path) || is_other_weights(&path) {
                continue;
            }
            let target = to.join(self.relative(&path));
            if let Some(folder) = target.parent() {
                fs::create_dir_all(folder).map_err(Error::io(folder, "create the folder"))?;
            }
            fs::copy(&path, &target).map_err(Error::io(&path, "copy"))?;
        }
        let note = |path: &PathBuf| {
            format!("{} was left out: it holds the weights before the merge", self.relative(path).display())
        };
        Ok(self.left_out.iter().map(note).collect())
    }
}

fn is_weights(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "safetensors")
}

/// The weights in the names of the model's author beside those of the folder's layout (Mistral's releases).
fn is_original(path: &Path) -> bool {
    let is_consolidated = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("consolidated"));
    let usual = |name: &str| path.with_file_name(name).exists();
    is_consolidated && (usual("model.safetensors") || usual("model.safetensors.index.json"))
}

/// Weights in other formats, and the indices of such.
fn is_other_weights(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".index.json").unwrap_or(&name);
    OTHER_WEIGHTS.iter().any(|ending| name.rsplit_once('.').is_some_and(|(_, own)| own == *ending))
}

/// Files of a folder and its folders, through links, without hidden ones: what file systems and download tools keep
/// beside a model (`._model.safetensors`, `.cache`) is no part of it.
pub(crate) fn walk(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut seen = BTreeSet::new();
    let mut folders = vec![(folder.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        // A link may lead back to where it is.
        let place = folder.canonicalize().map_err(Error::io(&folder, "list"))?;
        if !seen.insert(place) {
            continue;
        }
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder, "list"))? {
            let entry = entry.map_err(Error::io(&folder, "list"))?;
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            let path = entry.path();
            let is_folder = fs::metadata(&path).map_err(Error::io(&path, "open"))?.is_dir();
            if is_folder && depth < DEPTH {
                folders.push((path, depth + 1));
            } else if !is_folder {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}
