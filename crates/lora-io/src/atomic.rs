//! Files and folders that appear whole or not at all: written beside their place, synced where they could not be made again,
//! renamed. A full disk or a kill leaves what was there before; what a killed program had begun beside it is cleared away by
//! the next one.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::{Error, Result};

/// How files that are being written are called.
const PARTIAL: &str = ".lora-partial-";
/// Files younger than this may be another program's that has not locked them yet.
const YOUNG: Duration = Duration::from_secs(60);

/// Whether a write waits until the disk has the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// It waits: what is there afterwards is there after a power failure too.
    Synced,
    /// It does not: for what can be made again, and is checked when it is read. A power failure may leave it damaged.
    Unsynced,
}

/// Writes `path` through `fill`; the file is there, complete and synced, when this returns `Ok`, and untouched otherwise.
///
/// # Errors
/// Where the folder takes no file, `fill` fails, or the disk is full.
pub fn write(path: impl AsRef<Path>, fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<()> {
    write_with(path.as_ref(), Durability::Synced, fill)
}

/// As [`write()`], with or without waiting for the disk.
///
/// # Errors
/// As [`write()`].
pub fn write_with(
    path: &Path,
    durability: Durability,
    fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<()> {
    let synced = durability == Durability::Synced;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut beside = tempfile::Builder::new();
    beside.prefix(PARTIAL);
    #[cfg(unix)]
    {
        // As any program's new file: the umask decides. The default would be readable by the owner alone.
        use std::os::unix::fs::PermissionsExt;
        beside.permissions(fs::Permissions::from_mode(0o666));
    }
    let partial = beside.tempfile_in(folder).map_err(Error::io(folder, "create a file in it"))?;
    // The lock ends with the process, so that what a killed one leaves can be told. A file system without locks goes without.
    let _ = partial.as_file().try_lock();
    let mut writer =
        BufWriter::with_capacity(1 << 20, partial.as_file().try_clone().map_err(Error::io(path, "write"))?);
    fill(&mut writer).map_err(Error::io(path, "write"))?;
    writer.flush().map_err(Error::io(path, "write"))?;
    if synced {
        partial.as_file().sync_all().map_err(Error::io(path, "sync"))?;
    }
    partial.persist(path).map_err(|error| Error::io(path, "put into place")(error.error))?;
    #[cfg(unix)]
    if synced {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder, "sync"))?;
    }
    Ok(())
}

/// A folder that appears whole or not at all: filled beside its place, then renamed. Dropped before, it is removed.
pub(crate) struct NewFolder {
    partial: tempfile::TempDir,
    /// Tells that somebody is at work in it, as with files.
    _lock: Option<File>,
}

impl NewFolder {
    /// Begins one in the folder where it will be.
    pub(crate) fn begin(parent: &Path) -> Result<Self> {
        let partial = tempfile::Builder::new().prefix(PARTIAL).tempdir_in(parent);
        let partial = partial.map_err(Error::io(parent, "create a folder in it"))?;
        let lock = File::open(partial.path()).ok().filter(|folder| folder.try_lock().is_ok());
        Ok(Self { partial, _lock: lock })
    }

    /// Where it is filled.
    pub(crate) fn path(&self) -> &Path {
        self.partial.path()
    }

    /// Puts it into its place, which must be free.
    pub(crate) fn finish(self, place: &Path) -> Result<()> {
        fs::rename(self.partial.path(), place).map_err(Error::io(place, "put into place"))?;
        let _ = self.partial.keep();
        Ok(())
    }
}

/// Removes what killed programs left half-written in a folder and in the folders directly in it, as adapters in PEFT's layout
/// are. What is being written is locked and stays; so does whatever cannot be looked at or removed, as it does no harm.
pub fn clear_partial(folder: impl AsRef<Path>) {
    clear(folder.as_ref(), true);
}

fn clear(folder: &Path, and_below: bool) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let (path, is_folder) = (entry.path(), entry.file_type().is_ok_and(|kind| kind.is_dir()));
        if !entry.file_name().to_string_lossy().starts_with(PARTIAL) {
            if is_folder && and_below {
                clear(&path, false);
            }
            continue;
        }
        let Ok(file) = File::open(&path) else { continue };
        let age = file.metadata().and_then(|data| data.modified()).map(|time| SystemTime::now().duration_since(time));
        if matches!(age, Ok(Ok(age)) if age >= YOUNG) && file.try_lock().is_ok() {
            let _ = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}

/// Makes sure that a folder exists and takes files, before hours of work depend on it.
///
/// # Errors
/// [`Error::Io`] where it does not.
pub fn check_writable(folder: impl AsRef<Path>) -> Result<()> {
    let folder = folder.as_ref();
    fs::create_dir_all(folder).map_err(Error::io(folder, "create the folder"))?;
    tempfile::Builder::new()
        .prefix(PARTIAL)
        .tempfile_in(folder)
        .and_then(|mut file| file.write_all(&[0; 4096]))
        .map_err(Error::io(folder, "write into it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write(&path, |file| file.write_all(b"old")).unwrap();
        let error = write(&path, |file| {
            file.write_all(b"new, but")?;
            Err(io::Error::new(io::ErrorKind::StorageFull, "no space left on device"))
        });
        assert!(error.unwrap_err().to_string().contains("no space left"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_program_left_is_cleared_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(SystemTime::now() - 2 * YOUNG).unwrap();
            file
        };
        let written = file(".lora-partial-written");
        written.try_lock().unwrap();
        drop((file("mine.safetensors"), file(".lora-partial-left")));
        file(".lora-partial-new").set_modified(SystemTime::now()).unwrap();
        clear_partial(folder.path());
        let mut names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [".lora-partial-new", ".lora-partial-written", "mine.safetensors"]);
        // A file that `write` is at work on is locked.
        write(folder.path().join("a"), |_| {
            let own = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
            let own = own.filter(|path| path.to_string_lossy().contains(PARTIAL));
            assert_eq!(own.filter(|path| File::open(path).unwrap().try_lock().is_err()).count(), 2);
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn unwritable_folders_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(check_writable(file.join("below")).unwrap_err().to_string().contains("below"));
        check_writable(folder.path().join("a/b")).unwrap();
    }
    #[cfg(unix)]
    #[test]
    fn what_was_left_in_folders_is_cleared_and_folders_that_were_begun_are() {
        let folder = tempfile::tempdir().unwrap();
        let old = |path: &Path| File::open(path).unwrap().set_modified(SystemTime::now() - 2 * YOUNG).unwrap();
        let adapter = folder.path().join("lora/deeper");
        fs::create_dir_all(&adapter).unwrap();
        let (left, mine, below) = (
            folder.path().join("lora/.lora-partial-left"),
            folder.path().join("lora/mine"),
            adapter.join(".lora-partial-x"),
        );
        for path in [&left, &mine, &below] {
            fs::write(path, "text").unwrap();
            old(path);
        }
        let killed = folder.path().join(".lora-partial-killed");
        fs::create_dir(&killed).unwrap();
        fs::write(killed.join("model.safetensors"), "half").unwrap();
        old(&killed);
        let at_work = NewFolder::begin(folder.path()).unwrap();
        fs::write(at_work.path().join("a"), "half").unwrap();
        old(at_work.path());
        clear_partial(folder.path());
        let there = [&left, &mine, &below, &killed].map(|path| path.exists());
        assert_eq!(there, [false, true, true, false]);
        let place = folder.path().join("whole");
        at_work.finish(&place).unwrap();
        assert_eq!(fs::read(place.join("a")).unwrap(), b"half");
        drop(NewFolder::begin(folder.path()).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
