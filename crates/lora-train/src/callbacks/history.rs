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
    #[serde(default)]
    pub(super) seconds: f64,
    #[serde(default)]
    pub(super) memory: u64,
}

/// The file of held-out losses.
pub(super) const VALIDATION: &str = "validation.jsonl";

/// A line of it.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct Look {
    pub(super) step: usize,
    pub(super) loss: f64,
}

/// Reads lines of JSON, those that belong to a run.
pub(super) fn json<T: DeserializeOwned>(belongs: impl Fn(&T) -> bool) -> impl Fn(&str) -> Option<T> {
    move |line| serde_json::from_str(line).ok().filter(&belongs)
}

/// The lines of a file up to the first that `parse` does not take, with what it makes of them. Where the folder has no such file,
/// the one beside the state is taken. A last line that a kill cut short is left out.
fn lines<T>(folder: &Path, file: &str, resumed: &ResumedFrom, parse: impl Fn(&str) -> Option<T>) -> Vec<(String, T)> {
    let (path, beside) = (folder.join(file), resumed.path.with_file_name(file));
    let text = std::fs::read_to_string(path).or_else(|_| std::fs::read_to_string(beside)).unwrap_or_default();
    let whole = text.split_inclusive('\n').map_while(|line| line.strip_suffix('\n'));
    whole.map_while(|line| parse(line).map(|parsed| (line.to_owned(), parsed))).collect()
}

/// The metrics of the steps before the state.
pub(super) fn metrics(folder: &Path, resumed: &ResumedFrom) -> Vec<Line> {
    let own = lines(folder, METRICS, resumed, json(|line: &Line| line.step <= resumed.step));
    own.into_iter().map(|(_, line)| line).collect()
}

/// The held-out losses of the steps before the state. Its own step is looked at again.
pub(super) fn looks(folder: &Path, resumed: &ResumedFrom) -> Vec<(usize, f64)> {
    let own = lines(folder, VALIDATION, resumed, json(|look: &Look| look.step < resumed.step));
    own.into_iter().map(|(_, look)| (look.step, look.loss)).collect()
}

/// Leaves in a folder's file only the lines that belong to the steps before the state, as `parse` says, and opens it for those
/// to come; returns what the lines say.
pub(super) fn go_on<T>(
    folder: &Path,
    file: &str,
    resumed: &ResumedFrom,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<(File, Vec<T>)> {
    let path = folder.join(file);
    let (lines, parsed): (Vec<String>, Vec<T>) = lines(folder, file, resumed, parse).into_iter().unzip();
    lora_io::atomic::write(&path, |file| lines.iter().try_for_each(|line| writeln!(file, "{line}")))?;
    let file = File::options().append(true).open(&path);
    Ok((file.map_err(|source| lora_io::Error::Io { path, action: "open", source })?, parsed))
}

/// A file that begins anew.
pub(super) fn begin(folder: &Path, file: &str) -> Result<File> {
    let path = folder.join(file);
    Ok(File::create(&path).map_err(|source| lora_io::Error::Io { path, action: "create", source })?)
}
