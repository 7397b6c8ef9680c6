//! The hashes by which the field's tools know files.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of a whole file, 64 digits; its first 10 are the WebUI's AutoV2.
///
/// # Errors
/// [`Error::Io`] where the file cannot be read.
pub fn file_sha256(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    digest(path, File::open(path).map_err(Error::io(path, "open"))?)
}

/// AutoV1, the "legacy" model hash: SHA-256 of the 64 KiB at offset 1 MiB, first 8 digits.
///
/// # Errors
/// [`Error::Io`] where the file cannot be read.
pub fn auto_v1(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let mut file = File::open(path).map_err(Error::io(path, "open"))?;
    file.seek(SeekFrom::Start(0x10_0000)).map_err(Error::io(path, "read"))?;
    Ok(digest(path, file.take(0x1_0000))?[..8].to_owned())
}

/// AutoV1 of a file that is in memory in parts.
pub(crate) fn auto_v1_of<'p>(parts: impl IntoIterator<Item = &'p [u8]>) -> String {
    let mut hash = Sha256::new();
    let (begin, end) = (0x10_0000usize, 0x11_0000usize);
    let mut offset = 0usize;
    for part in parts {
        let from = begin.saturating_sub(offset).min(part.len());
        let to = end.saturating_sub(offset).min(part.len());
        hash.update(&part[from..to]);
        offset += part.len();
    }
    hex(&hash.finalize())[..8].to_owned()
}

/// SHA-256 of bytes, 64 digits.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of bytes in parts.
pub(crate) fn sha256_of<'p>(parts: impl IntoIterator<Item = &'p [u8]>) -> String {
    let mut hash = Sha256::new();
    parts.into_iter().for_each(|part| hash.update(part));
    hex(&hash.finalize())
}

fn digest(path: &Path, mut reader: impl Read) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer).map_err(Error::io(path, "read"))? {
            0 => return Ok(hex(&hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_files_have_the_empty_auto_v1() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc").unwrap();
        assert_eq!(auto_v1(file.path()).unwrap(), "e3b0c442");
        assert_eq!(
            file_sha256(file.path()).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn auto_v1_in_memory_is_that_of_the_file() {
        let bytes: Vec<u8> = (0..0x11_1000u32).map(|index| (index / 7) as u8).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        for cut in [0, 10, 0x10_0010, bytes.len()] {
            assert_eq!(auto_v1_of([&bytes[..cut], &bytes[cut..]]), auto_v1(file.path()).unwrap());
        }
    }
}
