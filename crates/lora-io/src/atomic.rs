//! Files that appear whole or not at all: written beside their place, synced, renamed. A full disk or a kill leaves what
//! was there before.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::{Error, Result};

/// Writes `path` through `fill`; the file is there, complete and synced, when this returns `Ok`, and untouched otherwise.
pub fn write(path: impl AsRef<Path>, fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<()> {
    let path = path.as_ref();
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut beside = tempfile::Builder::new();
    beside.prefix(".lora-partial-");
    #[cfg(unix)]
    {
        // As any program's new file: the umask decides. The default would be readable by the owner alone.
        use std::os::unix::fs::PermissionsExt;
        beside.permissions(fs::Permissions::from_mode(0o666));
    }
    let partial = beside.tempfile_in(folder).map_err(Error::io(folder, "create a file in it"))?;
    let mut writer =
        BufWriter::with_capacity(1 << 20, partial.as_file().try_clone().map_err(Error::io(path, "write"))?);
    fill(&mut writer).map_err(Error::io(path, "write"))?;
    writer.flush().map_err(Error::io(path, "write"))?;
    partial.as_file().sync_all().map_err(Error::io(path, "sync"))?;
    partial.persist(path).map_err(|error| Error::io(path, "put into place")(error.error))?;
    #[cfg(unix)]
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder, "sync"))?;
    Ok(())
}

/// Makes sure that a folder exists and takes files, before hours of work depend on it.
pub fn check_writable(folder: impl AsRef<Path>) -> Result<()> {
    let folder = folder.as_ref();
    fs::create_dir_all(folder).map_err(Error::io(folder, "create the folder"))?;
    tempfile::Builder::new()
        .prefix(".lora-partial-")
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
    fn unwritable_folders_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(check_writable(file.join("below")).unwrap_err().to_string().contains("below"));
        check_writable(folder.path().join("a/b")).unwrap();
    }
}
