//! Files mapped into memory, and giving back what has been read of them.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;

use crate::{Error, Result};

/// Pages have this size or a divisor of it.
#[cfg(unix)]
const PAGE: usize = if cfg!(target_arch = "x86_64") { 4096 } else { 65536 };

/// Maps a file, read-only. It must not be truncated by another program while the map is there: reading past its new end would end
/// the process.
pub(crate) fn open(path: &Path, file: &File) -> Result<Mmap> {
    // SAFETY: the map is read-only; types that hold one document what other programs must not do to the file.
    unsafe { Mmap::map(file) }.map_err(Error::io(path, "map into memory"))
}

/// Tells the kernel that some bytes are not needed any more, so that resident memory while a model is loaded stays near one tensor.
/// Reading them again is correct, only slower. Where systems have no such call, they find unused pages themselves.
pub(crate) fn release(map: &Mmap, bytes: Range<usize>) {
    #[cfg(unix)]
    {
        // Whole pages inside alone: their neighbours may be in use.
        let (begin, end) = (bytes.start.next_multiple_of(PAGE), bytes.end / PAGE * PAGE);
        if begin < end {
            // SAFETY: the map is private to this process, read-only and backed by the file, so dropped pages come back with the
            // same content. A refusal costs memory only.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, begin, end - begin) };
        }
    }
    #[cfg(not(unix))]
    let _ = (map, bytes);
}
