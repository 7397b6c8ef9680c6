//! ONNX Runtime: where its shared library is looked for, and how it is opened. Nothing is linked or fetched by a build.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The variable that names the library, or the folder that it is in.
const VARIABLE: &str = "ORT_DYLIB_PATH";

/// Opens the library, once in a process: as `ORT_DYLIB_PATH` says; else as `make setup-onnx` left it in the user's cache
/// folder; else beside the program; else as the system finds it.
///
/// Gives the library's path, or its bare name where the system found it.
///
/// # Errors
/// [`Error::Runtime`] where there is none that can be opened.
pub fn onnx_runtime() -> Result<PathBuf> {
    let path = match std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        Some(value) => stated(&value)?,
        None => found().unwrap_or_else(|| PathBuf::from(name())),
    };
    match ort::init_from(&path) {
        // Another part of the program may have made its own environment: then that one serves.
        Ok(environment) => {
            environment.with_name("lora").commit();
            Ok(path)
        }
        Err(error) => Err(Error::Runtime { reason: error.to_string() }),
    }
}

fn name() -> String {
    format!("{}onnxruntime{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX)
}

/// What the variable names: a library, or a folder with one, as Python's package has it.
fn stated(value: &OsString) -> Result<PathBuf> {
    let refused = |what: &str| Error::Runtime { reason: format!("{VARIABLE}: {} {what}", Path::new(value).display()) };
    let path = std::path::absolute(value).map_err(|error| refused(&error.to_string()))?;
    if !path.is_dir() {
        return path.is_file().then_some(path).ok_or_else(|| refused("is no file"));
    }
    let entries = std::fs::read_dir(&path).map_err(|error| refused(&error.to_string()))?;
    let is_library =
        |path: &PathBuf| path.file_name().is_some_and(|own| own.to_string_lossy().starts_with(name().as_str()));
    let libraries = entries.flatten().map(|entry| entry.path()).filter(is_library);
    libraries.min().ok_or_else(|| refused(&format!("has no {}", name())))
}

/// The library in the user's cache folder or beside the program.
fn found() -> Option<PathBuf> {
    let of_home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let cache =
        std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()).map(PathBuf::from).or_else(of_home);
    let beside = || Some(std::env::current_exe().ok()?.parent()?.to_owned());
    let folders = [cache.map(|cache| cache.join("lora/onnxruntime")), beside()];
    folders.into_iter().flatten().map(|folder| folder.join(name())).find(|path| path.is_file())
}
