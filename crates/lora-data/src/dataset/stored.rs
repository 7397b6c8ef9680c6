//! Where the bytes of a picture or a mask are: a file, a member of an archive, a row of a table.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::picture::{self, Header, MAX_FILE_BYTES};
use crate::{Error, Result};

/// Bytes with a name.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The file; a member of an archive has the archive's path before its own name.
    pub path: PathBuf,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    File,
    Member {
        archive: Arc<Path>,
        offset: u64,
        length: u64,
    },
    #[cfg(feature = "parquet")]
    Row {
        table: Arc<super::table::Table>,
        row: usize,
    },
}

impl Stored {
    /// A file of its own.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), place: Place::File }
    }

    pub(super) fn member(path: PathBuf, archive: Arc<Path>, offset: u64, length: u64) -> Self {
        Self { path, place: Place::Member { archive, offset, length } }
    }

    #[cfg(feature = "parquet")]
    pub(super) fn row(path: PathBuf, table: Arc<super::table::Table>, row: usize) -> Self {
        Self { path, place: Place::Row { table, row } }
    }

    /// The file on disk, where it is one of its own.
    pub fn own_file(&self) -> Option<&Path> {
        matches!(self.place, Place::File).then_some(self.path.as_path())
    }

    /// How many bytes there are, where the directory of the disk or of the archive says so.
    pub(crate) fn length(&self) -> Option<u64> {
        match &self.place {
            Place::File => std::fs::metadata(&self.path).ok().map(|file| file.len()),
            Place::Member { length, .. } => Some(*length),
            #[cfg(feature = "parquet")]
            Place::Row { .. } => None,
        }
    }

    /// All bytes.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read; [`Error::Picture`] where it is larger than any picture, or its archive is
    /// cut short.
    pub fn read(&self) -> Result<Vec<u8>> {
        match &self.place {
            Place::File => picture::read_file(&self.path),
            Place::Member { archive, offset, length } => {
                if *length > MAX_FILE_BYTES {
                    return Err(Error::picture(&self.path, format!("{length} bytes are more than any picture has")));
                }
                let mut bytes = Vec::with_capacity(*length as usize);
                let mut section = Section::open(archive, *offset, *length).map_err(Error::io(archive, "open"))?;
                section.read_to_end(&mut bytes).map_err(Error::io(&self.path, "read"))?;
                if bytes.len() as u64 != *length {
                    return Err(Error::picture(&self.path, "the archive ends in the middle of it"));
                }
                Ok(bytes)
            }
            #[cfg(feature = "parquet")]
            Place::Row { table, row } => table.picture(*row),
        }
    }

    /// What the picture's header says.
    pub(super) fn header(&self) -> Result<Header> {
        match &self.place {
            Place::File => {
                let file = File::open(&self.path).map_err(Error::io(&self.path, "open"))?;
                picture::header(&self.path, BufReader::with_capacity(2048, file))
            }
            Place::Member { archive, offset, length } => {
                let section = Section::open(archive, *offset, *length).map_err(Error::io(archive, "open"))?;
                picture::header(&self.path, BufReader::new(section))
            }
            #[cfg(feature = "parquet")]
            Place::Row { .. } => picture::header(&self.path, io::Cursor::new(self.read()?)),
        }
    }
}

/// A part of a file that reads as a file of its own.
struct Section {
    file: File,
    start: u64,
    length: u64,
    at: u64,
}

impl Section {
    fn open(path: &Path, start: u64, length: u64) -> io::Result<Self> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(start))?;
        Ok(Self { file, start, length, at: 0 })
    }
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.length - self.at).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read(&mut buffer[..left])?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Section {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let wanted = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        let wanted = wanted.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.at = wanted.min(self.length);
        self.file.seek(SeekFrom::Start(self.start + self.at))?;
        Ok(self.at)
    }
}
