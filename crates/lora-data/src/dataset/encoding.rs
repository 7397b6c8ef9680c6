//! From the bytes of text files to text: byte order marks, UTF-8, and one other encoding where it is stated. An encoding is
//! never guessed.

use std::fmt;
use std::fs;
use std::path::Path;

use encoding_rs::{Encoding, UTF_8};

use crate::{Error, Result};

/// An encoding of text files from before UTF-8.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TextEncoding(&'static Encoding);

impl TextEncoding {
    /// By its name on the web (WHATWG's labels: `windows-1252`, `latin1`, `shift_jis`, `gbk`, `euc-kr`, …), in any case.
    pub fn named(name: &str) -> Option<Self> {
        Encoding::for_label(name.as_bytes()).map(Self)
    }

    /// Its usual name.
    pub fn name(self) -> &'static str {
        self.0.name()
    }
}

impl fmt::Debug for TextEncoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text file without its byte order mark, which says UTF-8 or UTF-16; anything but UTF-8 without a mark is an error that
/// says where.
///
/// # Errors
/// That, and where the file cannot be read.
pub fn read_text(path: &Path) -> Result<String> {
    read_text_in(path, None)
}

/// As [`read_text`]; what is not UTF-8 is in another encoding, where one is stated.
pub(super) fn read_text_in(path: &Path, encoding: Option<TextEncoding>) -> Result<String> {
    decode_text(path, fs::read(path).map_err(Error::io(path, "read"))?, encoding)
}

/// The text of bytes; `path` is for errors.
pub(super) fn decode_text(path: &Path, bytes: Vec<u8>, encoding: Option<TextEncoding>) -> Result<String> {
    let refused = |at: usize, reason: String| {
        let line = bytes[..at].iter().filter(|&&byte| byte == b'\n').count() + 1;
        Error::caption(path, Some(line), reason)
    };
    let stated = |encoding: &'static Encoding| {
        let (text, _, damaged) = encoding.decode(&bytes);
        match damaged {
            false => Ok(text.into_owned()),
            true => Err(refused(0, format!("not {}; save it as UTF-8", encoding.name()))),
        }
    };
    if let Some((marked, _)) = Encoding::for_bom(&bytes)
        && marked != UTF_8
    {
        return stated(marked);
    }
    match (std::str::from_utf8(&bytes), encoding) {
        (Ok(text), _) => Ok(text.strip_prefix('\u{feff}').unwrap_or(text).to_owned()),
        (Err(_), Some(TextEncoding(encoding))) => stated(encoding),
        (Err(error), None) => {
            let at = error.valid_up_to();
            Err(refused(at, format!("not UTF-8 at byte {at}; save it as UTF-8, or state caption_encoding")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes by Python's codecs: `"…".encode(name)`.
    #[test]
    fn text_is_read_in_the_encoding_that_is_marked_or_stated() {
        let cases: [(&[u8], Option<&str>, &str); 8] = [
            (b"\xef\xbb\xbfcaf\xc3\xa9", None, "café"),
            (b"\xff\xfec\x00a\x00f\x00\xe9\x00", None, "café"),
            (b"\xfe\xff\x00c\x00a\x00f\x00\xe9", None, "café"),
            (b"caf\xe9 \x80", Some("windows-1252"), "café €"),
            (b"caf\xe9", Some("Latin1"), "café"),
            (b"\x90\xd4\x82\xa2\x94L", Some("shift_jis"), "赤い猫"),
            (b"\xc4\xe3\xba\xc3", Some("gbk"), "你好"),
            // What is UTF-8 already stays.
            (b"caf\xc3\xa9", Some("windows-1252"), "café"),
        ];
        for (bytes, name, expected) in cases {
            let encoding = name.map(|name| TextEncoding::named(name).unwrap());
            assert_eq!(decode_text(Path::new("a.txt"), bytes.to_vec(), encoding).unwrap(), expected, "{name:?}");
        }
        assert_eq!(TextEncoding::named("klingon"), None);
        let error = |bytes: &[u8], name: Option<&str>| {
            let encoding = name.and_then(TextEncoding::named);
            decode_text(Path::new("a.txt"), bytes.to_vec(), encoding).unwrap_err().to_string()
        };
        let unstated = error(b"one\ncaf\xe9", None);
        assert!(unstated.contains("a.txt, line 2: not UTF-8 at byte 7") && unstated.contains("caption_encoding"));
        assert!(error(b"\x81\xff", Some("shift_jis")).contains("not Shift_JIS"));
    }
}
