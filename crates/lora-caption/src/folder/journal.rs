//! Where an interrupted run stood. A run that leaves captions alone needs no such note; one that changes them must not change
//! a picture's twice.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::Result;

/// The note's name. Scans of folders pass over names that begin with a dot.
const NAME: &str = ".lora-caption";

/// The pictures that a run is done with: a line each, behind one that says which run that is.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    done: HashSet<String>,
}

impl Journal {
    /// Goes on with the note of a run of this identity, or begins one.
    pub(super) fn open(folder: &Path, identity: &str) -> Result<Self> {
        let path = folder.join(NAME);
        let identity: String = Sha256::digest(identity).iter().map(|byte| format!("{byte:02x}")).collect();
        let failed = |error: io::Error| lora_io::Error::Io { path: path.clone(), action: "write", source: error };
        let mut done = HashSet::new();
        let same = File::open(&path).is_ok_and(|file| {
            let mut lines = BufReader::new(file).lines().map_while(std::result::Result::ok);
            let same = lines.next().is_some_and(|line| line == identity);
            done.extend(lines.filter(|_| same).map(|line| line.trim_end_matches('\r').to_owned()));
            same
        });
        let mut file = OpenOptions::new().create(true).append(true).open(&path).map_err(failed)?;
        match same {
            // A line that a kill cut short is not taken for the beginning of the next.
            true => file.write_all(b"\n").map_err(failed)?,
            false => {
                file.set_len(0).map_err(failed)?;
                file.write_all(format!("{identity}\n").as_bytes()).map_err(failed)?;
            }
        }
        Ok(Self { path, file, done })
    }

    pub(super) fn is_done(&self, name: &str) -> bool {
        self.done.contains(name)
    }

    /// Notes pictures whose captions are written.
    pub(super) fn note(&mut self, names: impl IntoIterator<Item = String>) -> Result<()> {
        let lines: String = names.into_iter().map(|name| name + "\n").collect();
        let failed = |error| lora_io::Error::Io { path: self.path.clone(), action: "write", source: error };
        Ok(self.file.write_all(lines.as_bytes()).map_err(failed)?)
    }

    /// The run is over.
    pub(super) fn remove(self) {
        // One that stays is another run's, or this one's with nothing left to do.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_of_one_run_and_lasts_until_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(folder.path(), "one").unwrap();
        journal.note(["a.png".to_owned(), "b/c.png".to_owned()]).unwrap();
        drop(journal);
        let journal = Journal::open(folder.path(), "one").unwrap();
        assert!(journal.is_done("a.png") && journal.is_done("b/c.png") && !journal.is_done("d.png"));
        drop(journal);
        let other = Journal::open(folder.path(), "two").unwrap();
        assert!(!other.is_done("a.png"));
        other.remove();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
