//! Models by their names on Hugging Face (`owner/name`), where its programs have fetched them: found in their cache,
//! never fetched here. Layout: huggingface_hub's documentation, "Understand caching".

use std::borrow::Cow;
use std::env;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The place of a model: the path itself where something is there, else what the cache has of that name.
///
/// # Errors
/// [`Error::NotFetched`] for a name of a model that is not in the cache. A path that is no such name comes back as it is.
pub fn place(path: &Path) -> Result<Cow<'_, Path>> {
    place_in(path, cache().as_deref())
}

fn place_in<'p>(path: &'p Path, cache: Option<&Path>) -> Result<Cow<'p, Path>> {
    let Some(name) = name(path) else { return Ok(path.into()) };
    match cache.and_then(|cache| snapshot(&cache.join(format!("models--{}", name.replace('/', "--"))))) {
        Some(folder) => Ok(folder.into()),
        None => {
            let cache = cache.map_or_else(|| "unknown".to_owned(), |cache| cache.display().to_string());
            Err(Error::NotFetched { name: name.to_owned(), cache })
        }
    }
}

/// The path as the name of a model, where nothing is at it and it can be one.
pub fn name(path: &Path) -> Option<&str> {
    path.to_str().filter(|name| is_name(name) && !path.exists())
}

/// Whether a text can be the name of a model, rather than a file's.
fn is_name(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let is_file = ["safetensors", "sft", "ckpt", "pt", "pth", "bin", "gguf", "json"]
        .iter()
        .any(|extension| Path::new(text).extension().is_some_and(|own| own.eq_ignore_ascii_case(extension)));
    !is_file && text.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

/// What was fetched last of a model.
fn snapshot(model: &Path) -> Option<PathBuf> {
    let revision = std::fs::read_to_string(model.join("refs").join("main")).ok()?;
    let folder = model.join("snapshots").join(revision.trim());
    folder.is_dir().then_some(folder)
}

/// The folder that fetched models are in, which need not be there.
fn cache() -> Option<PathBuf> {
    let of = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(|value| expanded(value.into()));
    let own = || of("HF_HUB_CACHE").or_else(|| of("HUGGINGFACE_HUB_CACHE"));
    let home = || {
        let shared = || of("XDG_CACHE_HOME").or_else(|| env::home_dir().map(|home| home.join(".cache")));
        of("HF_HOME").or_else(|| shared().map(|shared| shared.join("huggingface"))).map(|home| home.join("hub"))
    };
    own().or_else(home)
}

/// A path whose first part is `~`, as their programs understand it, whatever the shell did.
fn expanded(path: PathBuf) -> PathBuf {
    match (path.strip_prefix("~"), env::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_fetched_model_is_found_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path();
        let model = cache.join("models--some-one--a.model_2");
        fs::create_dir_all(model.join("refs")).unwrap();
        fs::create_dir_all(model.join("snapshots/0123")).unwrap();
        fs::create_dir_all(model.join("snapshots/4567")).unwrap();
        fs::write(model.join("refs/main"), "4567").unwrap();
        let found = |name: &str| place_in(Path::new(name), Some(cache)).map(Cow::into_owned);
        assert_eq!(found("some-one/a.model_2").unwrap(), model.join("snapshots/4567"));
        let error = found("some-one/other").unwrap_err().to_string();
        assert!(error.contains("hf download some-one/other") && error.contains(cache.to_str().unwrap()), "{error}");
        // Fetched in part: the revision is known, its files are not there.
        fs::write(model.join("refs/main"), "89ab").unwrap();
        assert!(matches!(found("some-one/a.model_2"), Err(Error::NotFetched { .. })));
    }

    #[test]
    fn a_tilde_is_the_home_folder() {
        let home = env::home_dir().unwrap();
        assert_eq!(expanded("~/hf".into()), home.join("hf"));
        assert_eq!(expanded("/a/~/hf".into()), Path::new("/a/~/hf"));
    }

    #[test]
    fn paths_stay_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("x");
        for path in [
            "model.safetensors",
            "models/base.safetensors",
            "models/base.GGUF",
            "models/base.sft",
            "./models/base",
            "/a/b",
            "a/b/c",
            "base",
        ]
        .map(Path::new)
        .into_iter()
        .chain([there.as_path(), folder.path()])
        {
            assert_eq!(place_in(path, None).unwrap(), path);
        }
    }
}
