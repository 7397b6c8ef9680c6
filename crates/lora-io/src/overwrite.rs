//! No command replaces what it reads: outputs are held against inputs as files, whatever their names, links and the
//! file system's view of upper and lower case.

use std::path::{Path, PathBuf};

use same_file::Handle;

use crate::{Error, Result, merge};

/// Files of a PEFT folder, which a folder as an output stands for.
const OF_ADAPTER: &[&str] = &["adapter_config.json", "adapter_model.safetensors"];

/// Refuses an output that is, or holds, a file that is read: `inputs` are files and folders, of which all files count.
///
/// # Errors
/// If the output would replace one of them: names it.
pub fn refuse<'p>(inputs: impl IntoIterator<Item = &'p Path>, output: &Path) -> Result<()> {
    let written: Vec<(PathBuf, Handle)> = outputs(output).into_iter().filter_map(opened).collect();
    if written.is_empty() {
        return Ok(());
    }
    for input in inputs {
        for (path, handle) in files(input)?.into_iter().filter_map(opened) {
            if written.iter().any(|(_, other)| *other == handle) {
                let reason = format!("would replace {}, which is read; name another output", path.display());
                return Err(Error::format(output, reason));
            }
        }
    }
    Ok(())
}

fn opened(path: PathBuf) -> Option<(PathBuf, Handle)> {
    let handle = Handle::from_path(&path).ok()?;
    Some((path, handle))
}

/// The files that are there already and would be replaced.
fn outputs(output: &Path) -> Vec<PathBuf> {
    if !output.is_dir() {
        return vec![output.to_owned()];
    }
    // An adapter for several networks becomes a folder each.
    let below = std::fs::read_dir(output).into_iter().flatten().flatten().map(|entry| entry.path());
    let folders = std::iter::once(output.to_owned()).chain(below.filter(|path| path.is_dir()));
    folders.flat_map(|folder| OF_ADAPTER.iter().map(move |name| folder.join(name))).chain([output.to_owned()]).collect()
}

fn files(input: &Path) -> Result<Vec<PathBuf>> {
    let mut files = vec![input.to_owned()];
    if input.is_dir() {
        files.extend(merge::walk(input)?);
    } else if input.file_name().is_some_and(|name| name == OF_ADAPTER[1]) {
        files.push(input.with_file_name(OF_ADAPTER[0]));
    }
    Ok(files)
}
