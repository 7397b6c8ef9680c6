//! Adapters by name, as prompts give them (`<lora:ink:0.8>`): the file of that name in a folder.

use std::fs;
use std::path::{Path, PathBuf};

use super::peft;
use crate::{Error, Result};

/// How deep folders within the folder are looked into.
const DEPTH: usize = 4;

/// Names that are shown where none fits.
const SHOWN: usize = 3;

/// The adapter of a name in a folder or in the folders within it: `NAME.safetensors`, `NAME.gguf`, or a folder of PEFT's.
/// Capitals count only where names differ in nothing else; of several the one that lies least deep is meant.
///
/// # Errors
///
/// [`Error::Io`] where the folder cannot be read, [`Error::Format`] where there is no such adapter, which names those that are
/// nearest, or there are several.
pub fn find(folder: impl AsRef<Path>, name: &str) -> Result<PathBuf> {
    let folder = folder.as_ref();
    let mut all = Vec::new();
    collect(folder, DEPTH, &mut all)?;
    all.sort_by_key(|(_, path)| (path.components().count(), path.clone()));
    let of = |same: &dyn Fn(&str) -> bool| -> Vec<&PathBuf> {
        all.iter().filter(|(known, _)| same(known)).map(|(_, path)| path).collect()
    };
    let exact = of(&|known| known == name);
    let found = if exact.is_empty() { of(&|known| known.to_lowercase() == name.to_lowercase()) } else { exact };
    let depth = |path: &Path| path.components().count();
    match found.as_slice() {
        [one] => Ok((*one).clone()),
        [first, second, ..] if depth(first) < depth(second) => Ok((*first).clone()),
        [] => Err(Error::format(folder, format!("holds no adapter `{name}`; {}", nearest(name, &all)))),
        [first, second, ..] => Err(Error::format(
            folder,
            format!("holds several adapters `{name}`: {} and {}", first.display(), second.display()),
        )),
    }
}

/// The adapters of a folder with their names.
fn collect(folder: &Path, depth: usize, all: &mut Vec<(String, PathBuf)>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io(folder, "list"))?.flatten() {
        let path = entry.path();
        let name = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if path.join(peft::CONFIG).exists() {
                all.push((name(path.file_name()), path));
            } else if depth > 0 {
                // A folder that cannot be listed holds nothing for this person.
                let _ = collect(&path, depth - 1, all);
            }
        } else if path.extension().is_some_and(|end| end == "safetensors" || end == "gguf") {
            all.push((name(path.file_stem()), path));
        }
    }
    Ok(())
}

fn nearest(name: &str, all: &[(String, PathBuf)]) -> String {
    let mut scored: Vec<_> = all.iter().map(|(known, _)| (strsim::jaro_winkler(name, known), known)).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.dedup_by_key(|(_, known)| *known);
    let shown: Vec<String> = scored.iter().take(SHOWN).map(|(_, known)| format!("`{known}`")).collect();
    if shown.is_empty() { "it holds none at all".into() } else { format!("the nearest are {}", shown.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_found_by_name_and_others_are_shown() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        fs::create_dir_all(at("styles/voice")).unwrap();
        for file in ["ink.safetensors", "styles/Chalk.safetensors", "styles/voice/adapter_config.json", "notes.txt"] {
            fs::write(at(file), "").unwrap();
        }
        let find = |name: &str| find(folder.path(), name).map_err(|error| error.to_string());
        assert_eq!(find("ink"), Ok(at("ink.safetensors")));
        assert_eq!(find("chalk"), Ok(at("styles/Chalk.safetensors")));
        assert_eq!(find("voice"), Ok(at("styles/voice")));
        let error = find("inc").unwrap_err();
        assert!(error.contains("no adapter `inc`; the nearest are `ink`"), "{error}");
        fs::write(at("styles/ink.safetensors"), "").unwrap();
        assert_eq!(find("ink"), Ok(at("ink.safetensors")));
        fs::write(at("ink.gguf"), "").unwrap();
        assert!(find("ink").unwrap_err().contains("several"));
    }
}
