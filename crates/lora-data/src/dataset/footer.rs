//! Whether the footer of a Parquet table can be what it claims to be. The `parquet` crate makes room for as many columns and
//! groups of rows as a list says that it has, before it reads the first; a damaged footer claims thousands of millions, and
//! memory that is not there ends the program. Here lists are held against the bytes that are left for them. What a footer
//! means is the crate's business.
//!
//! The footer is a structure in Thrift's compact protocol, its length and `PAR1` behind it (Apache Parquet, "File format";
//! Apache Thrift, "Compact protocol").

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// Structures within each other at most; Parquet's are a handful.
const DEPTH: usize = 32;

/// Whether each list in the footer has no more elements than bytes are left. Files that are no tables, or encrypted ones, are
/// left to the reader, which says so.
///
/// # Errors
/// Where the file cannot be read.
pub(super) fn is_plausible(file: &mut File) -> std::io::Result<bool> {
    let length = file.seek(SeekFrom::End(0))?;
    let mut tail = [0; 8];
    if length < 12 {
        return Ok(true);
    }
    file.seek(SeekFrom::End(-8))?;
    file.read_exact(&mut tail)?;
    let footer = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    if &tail[4..] != b"PAR1" || footer > length - 8 {
        return Ok(true);
    }
    file.seek(SeekFrom::End(-8 - footer as i64))?;
    let mut bytes = Vec::new();
    file.take(footer).read_to_end(&mut bytes)?;
    Ok(structure(&mut bytes.as_slice(), DEPTH).is_some())
}

/// Passes over a structure; `None` where it breaks off or claims too much.
fn structure(bytes: &mut &[u8], depth: usize) -> Option<()> {
    loop {
        let header = take(bytes, 1)?[0];
        if header == 0 {
            return Some(());
        }
        // The field's number is the last one's and this much more, or stands behind.
        if header >> 4 == 0 {
            number(bytes)?;
        }
        // A field that is true or false has no value behind it.
        if !matches!(header & 15, 1 | 2) {
            value(bytes, header & 15, depth)?;
        }
    }
}

/// Passes over a value of a type.
fn value(bytes: &mut &[u8], kind: u8, depth: usize) -> Option<()> {
    let depth = depth.checked_sub(1)?;
    match kind {
        1..=3 => drop(take(bytes, 1)?),
        4..=6 => drop(number(bytes)?),
        7 => drop(take(bytes, 8)?),
        8 => {
            let length = usize::try_from(number(bytes)?).ok()?;
            take(bytes, length)?;
        }
        9 | 10 => {
            let header = take(bytes, 1)?[0];
            let count = if header >> 4 == 15 { number(bytes)? } else { u64::from(header >> 4) };
            elements(bytes, count, &[header & 15], depth)?;
        }
        11 => {
            let count = number(bytes)?;
            if count > 0 {
                let kinds = take(bytes, 1)?[0];
                elements(bytes, count, &[kinds >> 4, kinds & 15], depth)?;
            }
        }
        12 => structure(bytes, depth)?,
        13 => drop(take(bytes, 16)?),
        _ => return None,
    }
    Some(())
}

/// Passes over elements, each of values of these types: a byte each at least.
fn elements(bytes: &mut &[u8], count: u64, kinds: &[u8], depth: usize) -> Option<()> {
    if count > bytes.len() as u64 {
        return None;
    }
    for _ in 0..count {
        kinds.iter().try_for_each(|&kind| value(bytes, kind, depth))?;
    }
    Some(())
}

/// A whole number in as many bytes as it takes, seven bits each.
fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        number |= u64::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

fn take<'b>(bytes: &mut &'b [u8], count: usize) -> Option<&'b [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A file that ends with this footer.
    fn table(footer: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        let length = (footer.len() as u32).to_le_bytes();
        [b"PAR1", footer, &length, b"PAR1"].iter().for_each(|part| file.write_all(part).unwrap());
        file
    }

    #[test]
    fn lists_hold_no_more_than_there_are_bytes_for() {
        // Field 1, a number; field 2, a list of structures that are empty; the end.
        let plausible = |footer: &[u8]| is_plausible(&mut table(footer)).unwrap();
        assert!(plausible(&[0x15, 0x02, 0x19, 0x2C, 0x00, 0x00, 0x00]));
        // The same list, of two thousand million.
        assert!(!plausible(&[0x15, 0x02, 0x19, 0xFC, 0xFF, 0xFF, 0xFF, 0xFF, 0x07, 0x00, 0x00, 0x00]));
        // A text beyond the end, a type that there is not, structures without end.
        assert!(!plausible(&[0x18, 0x7F, b'a', 0x00]));
        assert!(!plausible(&[0x1F, 0x00]));
        assert!(!plausible(&[0x1C; 64]));
        assert!(!plausible(&[]));
        // True and false in a structure have no bytes, in a list one each; a field's number of its own; a map; a real number.
        assert!(plausible(&[
            0x11, 0x12, 0x19, 0x21, 1, 2, 0x05, 0x80, 0x01, 0x03, 0x1B, 1, 0x88, 1, b'a', 1, b'b', 0x17, 0, 0, 0, 0, 0,
            0, 0, 0, 0
        ]));
    }
}
