//! What several examples share. The examples are in `examples/`, one file each.

use std::path::Path;

/// What an example answers.
pub type Answer<T> = Result<T, Box<dyn std::error::Error>>;

/// The first and the last loss of a run's `validation.jsonl`; `None` where nothing was held out.
///
/// # Errors
/// Where the file cannot be read, or a line of it is not JSON.
pub fn held_out_losses(path: &Path) -> Answer<Option<(f64, f64)>> {
    if !path.exists() {
        return Ok(None);
    }
    let mut losses = Vec::new();
    for line in std::fs::read_to_string(path)?.lines() {
        losses.extend(serde_json::from_str::<serde_json::Value>(line)?["loss"].as_f64());
    }
    Ok(losses.first().copied().zip(losses.last().copied()))
}
