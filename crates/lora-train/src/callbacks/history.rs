//! The lines that a run logged before it was resumed, read back up to the step of the state that it goes on from.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::Result;
use crate::session::ResumedFrom;

/// The file of metrics.
pub(super) const METRICS: &str = "metrics.jsonl";

/// What a line of the metrics says; a loss that JSON cannot hold is left out of it.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct Line {
    pub(super) step: usize,
    pub(super) loss: Option<f64>,
    pub(super) learning_rate: f64,
    pub(super) gradient_norm: Option<f64>,
    pub(super) skipped: bool,
}

/// The lines of a file up to the first that `belongs` refuses, with what they say. Where the folder has no such file, the one
/// beside the state is taken. A last line that a kill cut short is left out.
fn lines<T: DeserializeOwned>(
    folder: &Path,
    file: &str,
    resumed: &ResumedFrom,
    belongs: impl Fn(&T) -> bool,
) -> Vec<(String, T)> {
    let (path, beside) = (folder.join(file), resumed.path.with_file_name(file));
    let text = std::fs::read_to_string(path).or_else(|_| std::fs::read_to_string(beside)).unwrap_or_default();
    let parse = |line: &str| serde_json::from_str(line).ok().filter(&belongs).map(|parsed| (line.to_owned(), parsed));
    text.lines().map_while(parse).collect()
}

/// The metrics of the steps before the state.
pub(super) fn metrics(folder: &Path, resumed: &ResumedFrom) -> Vec<Line> {
    let own = lines(folder, METRICS, resumed, |line: &Line| line.step <= resumed.step);
    own.into_iter().map(|(_, line)| line).collect()
}

/// Leaves in a folder's file only the lines that belong to the steps before the state, and opens it for those to come;
/// returns what the lines say.
pub(super) fn go_on<T: DeserializeOwned>(
    folder: &Path,
    file: &str,
    resumed: &ResumedFrom,
    belongs: impl Fn(&T) -> bool,
) -> Result<(File, Vec<T>)> {
    let path = folder.join(file);
    let (lines, parsed): (Vec<String>, Vec<T>) = lines(folder, file, resumed, belongs).into_iter().unzip();
    lora_io::atomic::write(&path, |file| lines.iter().try_for_each(|line| writeln!(file, "{line}")))?;
    let file = File::options().append(true).open(&path);
    Ok((file.map_err(|source| lora_io::Error::Io { path, action: "open", source })?, parsed))
}

/// A file that begins anew.
pub(super) fn begin(folder: &Path, file: &str) -> Result<File> {
    let path = folder.join(file);
    Ok(File::create(&path).map_err(|source| lora_io::Error::Io { path, action: "create", source })?)
}
