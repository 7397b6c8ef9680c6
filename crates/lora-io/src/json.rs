//! JSON files beside weights: configurations, indices of shards, tokenizers. What is in them is told where they are used.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

/// Longer files are no configurations or indices: those of the largest models have a few MiB.
const LONGEST: u64 = 64 << 20;

/// The value that a file holds, which may begin with a byte order mark, as editors of Windows write one.
///
/// # Errors
/// Where the file cannot be read, is longer than any such file, or is not JSON.
pub fn read(path: impl AsRef<Path>) -> Result<Value> {
    let path = path.as_ref();
    let length = fs::metadata(path).map_err(Error::io(path, "open"))?.len();
    if length > LONGEST {
        return Err(Error::format(path, format!("{length} bytes are no configuration and no index of weights")));
    }
    let bytes = fs::read(path).map_err(Error::io(path, "read"))?;
    serde_json::from_slice(without_mark(&bytes))
        .map_err(|error| Error::format(path, format!("is not valid JSON: {error}")))
}

/// Bytes of a text without the byte order mark in front, where there is one. JSON's parsers refuse it.
pub fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_value() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        fs::write(&path, b"\xef\xbb\xbf{\"model_type\": \"llama\"}").unwrap();
        assert_eq!(read(&path).unwrap()["model_type"], "llama");
        fs::write(&path, b"\xef\xbb\xbf").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("config.json"));
        // One is a mark, a second one is damage.
        fs::write(&path, b"\xef\xbb\xbf\xef\xbb\xbf{}").unwrap();
        assert!(read(&path).is_err());
    }
}
