//! What each fuzz target does with its bytes. A target is a line in `fuzz_targets`; the files that it starts from are made by
//! `src/bin/seeds.rs`.
//!
//! A panic, an abort, an input that takes long and more memory than the allocator below gives out are failures.

#[cfg(feature = "train")]
pub mod config;
pub mod data;
pub mod io;
pub mod language;

use std::alloc::System;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cap::Cap;

/// No input of a target is larger than a few KiB; nothing that is read of it may take more than this.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 1 << 30);

/// The folder of this process. Inputs are written over those before, which is faster than a folder for each.
fn scratch() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        // Panics that the crates catch, of decoders on damaged files, are no failures.
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !lora_data::guard::is_guarded() {
                usual(panic);
            }
        }));
        tempfile::tempdir().expect("a temporary folder").keep()
    })
}

/// Bytes as a file of the scratch folder.
fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch().join(name);
    std::fs::write(&path, bytes).expect("written");
    path
}

/// A folder in the scratch folder, with nothing in it.
fn empty_folder(name: &str) -> PathBuf {
    let path = scratch().join(name);
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).expect("created");
    path
}

/// The first byte says which of several kinds the others are.
fn choose<'k, 'b>(bytes: &'b [u8], kinds: &[&'k str]) -> Option<(&'k str, &'b [u8])> {
    let (first, rest) = bytes.split_first()?;
    Some((kinds[*first as usize % kinds.len()], rest))
}
