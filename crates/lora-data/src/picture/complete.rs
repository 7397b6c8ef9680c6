//! Whether a JPEG is all there. The general decoder fills what is missing with grey, as browsers do; a run would learn it.
//! The decoders themselves live in [`super`] and [`super::jpeg`].

use std::fmt;

use super::jpeg;

/// The file, or its compressed data, ends before the picture does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CutShort;

impl fmt::Display for CutShort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the JPEG is cut short: its data end before the picture does (an interrupted download or copy?)")
    }
}

/// Whether the segments of a file lead to the marker of its end, which PIL asks for too. A file that was cut short has
/// none: the ends of thumbnails lie within segments, and what comes behind the first end is not looked at.
pub(super) fn check_end(bytes: &[u8]) -> Result<(), CutShort> {
    reaches_its_end(bytes).ok_or(CutShort)
}

/// Whether, besides, there are data for every block of a picture of the kind that [`jpeg::decode`] reads. Others are left
/// to the general decoder.
pub(super) fn check_data(bytes: &[u8]) -> Result<(), CutShort> {
    jpeg::decode(bytes, 8).map(|_| ())
}

fn reaches_its_end(bytes: &[u8]) -> Option<()> {
    let mut rest = bytes.strip_prefix(&[0xff, 0xd8])?;
    loop {
        // Before a marker lie compressed data, with escaped bytes and restart markers, or stray bytes.
        let begins = |&at: &usize| !matches!(rest.get(at + 1), None | Some(0x00 | 0x01 | 0xd0..=0xd8 | 0xff));
        let at = memchr::memchr_iter(0xff, rest).find(begins)?;
        let (marker, after) = rest.get(at + 1..)?.split_first()?;
        if *marker == 0xd9 {
            return Some(());
        }
        let length = usize::from(u16::from_be_bytes(*after.first_chunk()?));
        rest = after.get(length.max(2)..)?;
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use image::ImageFormat;

    use super::super::{RgbPicture, decode_bytes};

    fn golden(name: &str) -> PathBuf {
        [env!("CARGO_MANIFEST_DIR"), "tests/golden/jpeg", name].iter().collect()
    }

    /// A copy with the damage that a line of `damaged.tsv` describes.
    fn damaged(whole: &[u8], edit: &str) -> Vec<u8> {
        let words: Vec<&str> = edit.split(' ').collect();
        let number = |index: usize| words[index].parse::<usize>().unwrap();
        let byte = |at: usize| u8::from_str_radix(&words[2][at..at + 2], 16).unwrap();
        let bytes = || (0..words[2].len()).step_by(2).map(byte).collect::<Vec<u8>>();
        let (at, mut data) = (number(1), whole.to_vec());
        match words[0] {
            "keep" => data.truncate(at),
            "remove" => drop(data.drain(at..at + number(2))),
            "zero" => data[at..at + number(2)].fill(0),
            "insert" => drop(data.splice(at..at, bytes())),
            "set" => drop(data.splice(at..at + bytes().len(), bytes())),
            other => panic!("{other}"),
        }
        data
    }

    /// At full size, and where a fifth of the size is enough.
    fn decoded(bytes: &[u8]) -> [Option<RgbPicture>; 2] {
        let decode = |enough| decode_bytes(Path::new("a.jpg"), bytes, [0; 3], enough).ok().map(|own| own.picture);
        [decode(None), decode(Some((30, 20)))]
    }

    /// Every cut is refused, as PIL refuses it, and what PIL reads as if nothing were the matter is read. Single bits that
    /// are wrong somewhere are a matter of luck in both; there few may come out otherwise.
    #[test]
    fn damage_is_judged_as_pil_judges_it() {
        let (mut flips, mut otherwise) = (0, Vec::new());
        for line in std::fs::read_to_string(golden("damaged.tsv")).unwrap().lines() {
            let [name, edit, outcome] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let whole = std::fs::read(golden(&format!("{name}.jpg"))).unwrap();
            let read = decoded(&damaged(&whole, edit)).map(|picture| picture.is_some());
            let changed = edit.strip_prefix("set ").and_then(|own| own.split(' ').nth(1)).map(|bytes| bytes.len() / 2);
            let agrees = match outcome {
                "refused" => read == [false, false],
                // PIL finds its way past wrong lengths of some segments; not every decoder does.
                "same" => read == [true, true] || changed == Some(2),
                _ => true,
            };
            let is_flip = changed == Some(1);
            flips += usize::from(is_flip);
            assert!(agrees || is_flip, "{line}: {read:?}");
            otherwise.extend((!agrees).then(|| line.to_owned()));
        }
        assert!(flips > 300 && otherwise.len() * 50 < flips, "{flips}: {otherwise:#?}");
    }

    /// Where PIL fills up with grey, because the end is marked but the data before it are not all there.
    #[test]
    fn data_that_end_before_the_last_block_are_refused() {
        for name in ["444", "422", "420", "grey", "restart", "optimised"] {
            let whole = std::fs::read(golden(&format!("{name}.jpg"))).unwrap();
            for share in [60, 80, 95] {
                let cut = [&whole[..whole.len() * share / 100], &[0xff, 0xd9]].concat();
                assert_eq!(decoded(&cut), [None, None], "{name} {share}");
            }
        }
    }

    /// The other formats: a file that is cut anywhere is refused, or its pixels are all there.
    #[test]
    fn a_cut_file_of_any_format_loses_no_pixels_silently() {
        let noisy = image::RgbImage::from_fn(23, 17, |x, y| image::Rgb([(x * 37 + y * 91) as u8, (x * y) as u8, 7]));
        for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Gif, ImageFormat::Tiff] {
            let mut bytes = std::io::Cursor::new(Vec::new());
            noisy.write_to(&mut bytes, format).unwrap();
            let bytes = bytes.into_inner();
            let decode = |bytes: &[u8]| decode_bytes(Path::new("a"), bytes, [0; 3], None).ok().map(|own| own.picture);
            let whole = decode(&bytes).unwrap();
            for length in 0..bytes.len() {
                let cut = decode(&bytes[..length]);
                assert!(cut.is_none_or(|cut| cut == whole), "{format:?}: {length} of {}", bytes.len());
            }
        }
    }
}
