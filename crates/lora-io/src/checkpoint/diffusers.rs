//! Reading diffusers' layout: a folder with a folder of weights and their `config.json` for each component.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component as PathPart, Path, PathBuf};
use std::sync::Arc;

use lora_core::Component;

use super::file::WeightFile;
use super::{Checkpoint, Group, refused};
use crate::error::listed;
use crate::family::{BaseNames, Family, language};
use crate::{Error, Result};

/// The files of a component's folder.
struct Folder {
    name: &'static str,
    files: Vec<Arc<WeightFile>>,
}

/// The names of the folders that components of these families have.
fn component_folders(families: &[&'static Family]) -> BTreeSet<&'static str> {
    let components = families.iter().flat_map(|family| family.components);
    components.filter_map(|names| Some(names.folder?.place)).collect()
}

pub(super) fn open(path: &Path, families: &[&'static Family]) -> Result<Checkpoint> {
    let known = component_folders(families);
    let folders: Vec<Folder> = known
        .into_iter()
        .filter(|name| path.join(name).is_dir())
        .map(|name| Ok(Folder { name, files: open_files(&path.join(name))? }))
        .collect::<Result<_>>()?;
    if folders.is_empty() {
        return without_components(path, families);
    }
    let mut names = BaseNames::default();
    for folder in &folders {
        folder.files.iter().for_each(|file| names.add(Some(folder.name), file.shapes()));
    }
    let Some(family) = Family::of_base(&names, families) else {
        let files: Vec<_> = folders.iter().flat_map(|folder| folder.files.iter().cloned()).collect();
        return Err(refused(path, Err(families), &names, &files));
    };
    let mut checkpoint = Checkpoint::new(path, family);
    for folder in &folders {
        let Some((component, own)) = family.in_folder(folder.name) else { continue };
        let at = path.join(folder.name);
        for file in &folder.files {
            let tensors = file.names().into_iter().map(|name| (name, name)).collect();
            checkpoint.add(&at, file, &Group::new(component, own.tree, tensors))?;
        }
        checkpoint.set_config(component, crate::json::read(at.join("config.json"))?);
    }
    let read = |file: PathBuf| file.exists().then(|| crate::json::read(&file)).transpose();
    checkpoint.scheduler = read(path.join("scheduler").join("scheduler_config.json"))?;
    checkpoint.index = read(path.join("model_index.json"))?;
    checkpoint.complete()
}

impl Checkpoint {
    fn set_config(&mut self, component: Component, config: serde_json::Value) {
        if let Some(weights) = self.components.get_mut(&component) {
            weights.config = Some(config);
        }
    }
}

/// A folder that holds no component's folder: a language model, or an error that says what it is.
fn without_components(path: &Path, families: &[&'static Family]) -> Result<Checkpoint> {
    if path.join("adapter_config.json").exists() {
        return Err(Error::Family { path: path.to_owned(), found: "a PEFT adapter, not a base model".into() });
    }
    let has_weights = fs::read_dir(path).map_err(Error::io(path, "list"))?.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.contains("model") && ["safetensors", ".index.json", ".bin"].iter().any(|end| name.ends_with(end))
    });
    if !has_weights {
        let folders: Vec<&str> = component_folders(families).into_iter().collect();
        let found = format!("a folder without weights and without any of the folders {}", folders.join(", "));
        return Err(Error::Family { path: path.to_owned(), found });
    }
    let files = open_files(path)?;
    let mut names = BaseNames::default();
    files.iter().for_each(|file| names.add(None, file.shapes()));
    match Family::of_base(&names, families) {
        Some(family) if *family == language::FAMILY => super::language::open_folder(path, &files),
        other => Err(refused(path, other.ok_or(families), &names, &files)),
    }
}

pub(super) fn open_files(folder: &Path) -> Result<Vec<Arc<WeightFile>>> {
    weight_files(folder)?.into_iter().map(|file| Ok(Arc::new(WeightFile::open(&file)?))).collect()
}

/// The weight files of a folder: one file, or the shards of an index.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    for stem in ["diffusion_pytorch_model", "model"] {
        for variant in ["", ".fp16"] {
            let single = folder.join(format!("{stem}{variant}.safetensors"));
            if single.exists() {
                return Ok(vec![single]);
            }
            let index = folder.join(format!("{stem}.safetensors.index{variant}.json"));
            if index.exists() {
                return shards(folder, &index);
            }
        }
    }
    let pickled = ["diffusion_pytorch_model.bin", "pytorch_model.bin"].iter().any(|name| folder.join(name).exists());
    let reason = if pickled {
        "holds PyTorch pickles only, which can run any code when they are read; save it again with safe_serialization=True"
    } else {
        "has no diffusion_pytorch_model.safetensors or model.safetensors"
    };
    Err(Error::format(folder, reason))
}

fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let json = crate::json::read(index)?;
    let map = json["weight_map"].as_object().ok_or_else(|| Error::format(index, "has no object `weight_map`"))?;
    let mut files = BTreeSet::new();
    for file in map.values() {
        let name = file.as_str().ok_or_else(|| Error::format(index, "`weight_map` names a file that is no text"))?;
        // A name may not lead out of the folder.
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(PathPart::Normal(_)), None)) {
            return Err(Error::format(index, format!("shard `{name}` is not a file of this folder")));
        }
        files.insert(folder.join(name));
    }
    let missing: Vec<String> = files
        .iter()
        .filter(|file| !file.exists())
        .map(|file| format!("`{}`", file.file_name().unwrap_or_default().to_string_lossy()))
        .collect();
    if !missing.is_empty() {
        let reason = format!(
            "names {} of {} files that are not there: {}; is the download complete?",
            missing.len(),
            files.len(),
            listed(&missing)
        );
        return Err(Error::format(index, reason));
    }
    Ok(files.into_iter().collect())
}
