//! A folder that one program at a time writes into: two runs would mix their metrics, samples and states.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::{Error, Result};

/// What this program has claimed: its own sessions, as one and the next that goes on from it, share a folder.
static CLAIMED: Mutex<BTreeMap<PathBuf, Weak<File>>> = Mutex::new(BTreeMap::new());

/// Held as long as a session lasts; the system lets go of it however the program ends.
#[derive(Debug)]
pub(super) struct Claim {
    folder: Option<Arc<File>>,
}

impl Claim {
    /// Claims a folder that is there. Where the system or the file system knows no locks of folders, nothing is claimed.
    ///
    /// # Errors
    /// [`Error::OutputInUse`] where a run of another program has it.
    pub(super) fn of(folder: &Path) -> Result<Self> {
        let Ok(path) = folder.canonicalize() else { return Ok(Self { folder: None }) };
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        claimed.retain(|_, own| own.strong_count() > 0);
        if let Some(own) = claimed.get(&path).and_then(Weak::upgrade) {
            return Ok(Self { folder: Some(own) });
        }
        let Ok(opened) = File::open(&path) else { return Ok(Self { folder: None }) };
        if let Err(TryLockError::WouldBlock) = opened.try_lock() {
            return Err(Error::OutputInUse { path: folder.to_owned() });
        }
        let opened = Arc::new(opened);
        claimed.insert(path, Arc::downgrade(&opened));
        Ok(Self { folder: Some(opened) })
    }
}

impl Drop for Claim {
    /// No other thread looks while the last one lets go, which would find a folder that is locked and nobody's.
    fn drop(&mut self) {
        let _claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        self.folder = None;
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_one_programs_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let of_another = File::open(folder.path()).unwrap();
        of_another.try_lock().unwrap();
        let error = Claim::of(folder.path()).unwrap_err();
        assert!(error.to_string().contains("another run"), "{error}");
        drop(of_another);
        let claims = [folder.path(), &folder.path().join(".")].map(|own| Claim::of(own).unwrap());
        let of_another = File::open(folder.path()).unwrap();
        assert!(of_another.try_lock().is_err());
        drop(claims);
        of_another.try_lock().unwrap();
    }
}
