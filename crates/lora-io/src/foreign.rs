//! Names a file that is no model, by its first bytes: a failed download, an archive, a pickle.
//! Formats that are read here are told by their own readers.

/// Bytes that are enough to tell.
pub(crate) const SNIFFED: usize = 256;

/// Beginnings of binary files, and what such a file is.
const BINARY: &[(&[u8], &str)] = &[
    (b"\x1f\x8b", "this is packed with gzip; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "this is a 7-Zip archive; unpack it first"),
    (b"Rar!\x1a\x07", "this is a RAR archive; unpack it first"),
    (b"\xfd7zXZ\0", "this is packed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "this is packed with zstd; unpack it first"),
    (b"BZh", "this is packed with bzip2; unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "this is an HDF5 file (Keras, .h5); expected safetensors"),
    (b"\x89PNG\r\n\x1a\n", "this is a picture (PNG), not a model; the download took the preview, most likely"),
    (b"\xff\xd8\xff", "this is a picture (JPEG), not a model; the download took the preview, most likely"),
    (b"RIFF", "this is a picture or a sound (RIFF), not a model; the download took the preview, most likely"),
    (b"%PDF", "this is a PDF document, not a model"),
    (b"\0\x05\x16\x07", "this is what macOS keeps beside a file on foreign disks (`._NAME`), not the file itself"),
];

const PICKLE: &str = "this is a PyTorch pickle (.ckpt, .bin, .pt), which can run any code when it is read; convert it to \
                      safetensors first, for instance with the WebUI's checkpoint merger or diffusers' conversion scripts";

/// What a file is that begins so, with advice; `None` where that is not plain.
pub(crate) fn describe(start: &[u8]) -> Option<String> {
    let start = &start[..start.len().min(SNIFFED)];
    if let Some((_, what)) = BINARY.iter().find(|(magic, _)| start.starts_with(magic)) {
        return Some((*what).into());
    }
    if start.starts_with(b"PK\x03\x04") {
        // PyTorch's archives begin with the pickle, or with a folder's name and it.
        let pickle = start.windows(8).any(|window| window == b"data.pkl");
        return Some(if pickle { PICKLE.into() } else { "this is a ZIP archive; unpack it first".into() });
    }
    // Protocols 2 to 5.
    if start.len() > 1 && start[0] == 0x80 && (2..=5).contains(&start[1]) {
        return Some(PICKLE.into());
    }
    if start.len() >= 64 && start.iter().all(|&byte| byte == 0) {
        return Some("this file begins with zeros alone; the download was not finished, most likely".into());
    }
    as_text(start)
}

/// What a text is, which a server sends in place of a file.
fn as_text(start: &[u8]) -> Option<String> {
    let start = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start();
    let text = String::from_utf8_lossy(start);
    let shown: String = text.chars().take(80).take_while(|letter| *letter != char::REPLACEMENT_CHARACTER).collect();
    let shown = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    let lower = shown.to_ascii_lowercase();
    if lower.starts_with("version https://git-lfs") {
        return Some("this is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`".into());
    }
    if lower.starts_with("<?xml") {
        return Some(format!("this is XML, not a model; the download went wrong (it begins `{shown}`)"));
    }
    if ["<!doctype", "<html", "<head", "<body", "<!--", "<script", "<meta"].iter().any(|tag| lower.starts_with(tag)) {
        return Some("this is a web page, not a model; the download went wrong (a login page, most likely)".into());
    }
    if lower.starts_with(['{', '[']) && !lower.contains("dtype") {
        return Some(format!("this is JSON, not a model; the download went wrong, most likely (it begins `{shown}`)"));
    }
    // Words alone: `Access denied`. The length of a real header has zeros in it.
    let words = start.len() >= 8 && start.iter().all(|&byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
    words.then(|| format!("this is text, not a model; the download went wrong, most likely (it begins `{shown}`)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_downloads_are_named() {
        for (start, word) in [
            (&b"{\"error\":\"Unauthorized\"}"[..], "Unauthorized"),
            (b"<HTML><HEAD>", "web page"),
            (b"\xef\xbb\xbf\n\n  <!doctype html>", "web page"),
            (b"<?xml version=\"1.0\"?><Error>", "XML"),
            (b"Access denied\r\n", "text"),
            (b"\x1f\x8b\x08\0\0", "gzip"),
            (b"7z\xbc\xaf\x27\x1c\0", "7-Zip"),
            (b"PK\x03\x04\x14\0archive/data.pkl", "pickle"),
            (b"PK\x03\x04\x14\0lora.safetensors", "ZIP"),
            (b"\x80\x02}q\0.", "pickle"),
            (b"\x80\x04\x95", "pickle"),
            (&[0; 64], "zeros"),
            (b"version https://git-lfs.github.com/spec/v1", "git-lfs"),
            (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "macOS"),
        ] {
            let found = describe(start).unwrap_or_default();
            assert!(found.contains(word), "{word}: {found}");
        }
        assert_eq!(describe(b"\x40\0\0\0\0\0\0\0{\"__metadata__\":{"), None);
        assert_eq!(describe(b""), None);
    }
}
