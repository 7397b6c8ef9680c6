//! A cache on disk of what is costly to make from pictures and captions (latents, text states), keyed by content and
//! settings: a changed file, setting or model has another key, so nothing stale is ever served.
//!
//! An entry is one safetensors file, put into place whole by a rename; two runs may share a folder. An entry that is
//! damaged (a full disk, a crash) is noticed by its checksum and made again. Nothing is synced: after a power failure
//! entries are missing or damaged, which costs time and nothing else.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use lora_core::HostTensor;
use lora_io::atomic::{self, Durability};
use lora_io::safetensors::{self, SafetensorsFile, TensorSource, in_file_order};
use sha2::{Digest, Sha256};

use crate::dataset::Stored;
use crate::{Error, Result};

/// Part of every key: another layout of entries must not meet old ones.
const FORMAT: &str = "lora-cache-1";
/// Where an entry's file says what its bytes hash to.
const CHECKSUM: &str = "sha256";
/// Hexadecimal digits of a checksum.
const CHECKSUM_LENGTH: usize = 64;
/// Hashes of files by what the file system says of them.
const INDEX: &str = "contents.tsv";
/// A file this young may change again without its times changing.
const SETTLED: Duration = Duration::from_secs(2);

/// Named tensors of an entry.
pub type Tensors = BTreeMap<String, HostTensor>;

/// A folder of entries.
#[derive(Debug)]
pub struct DiskCache {
    folder: PathBuf,
    index: Mutex<Index>,
}

#[derive(Debug, Default)]
struct Index {
    contents: HashMap<PathBuf, (Stamp, String)>,
    changed: bool,
}

/// What the file system says of a file; as long as it is the same, so is the content.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp(String);

/// The name of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(String);

fn digest<'p>(parts: impl IntoIterator<Item = &'p [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        // Lengths keep parts apart: ("ab", "c") is not ("a", "bc").
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(hash)
}

impl DiskCache {
    /// Opens a folder, made if it is not there.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be made. A damaged index only means that files are hashed again.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        fs::create_dir_all(&folder).map_err(Error::io(&folder, "create the folder"))?;
        let mut contents = HashMap::new();
        // A damaged index only means that files are hashed again.
        for line in fs::read_to_string(folder.join(INDEX)).unwrap_or_default().lines() {
            if let Some((hash, (stamp, path))) =
                line.split_once('\t').and_then(|(hash, rest)| Some((hash, rest.split_once('\t')?)))
            {
                contents.insert(PathBuf::from(path), (Stamp(stamp.to_owned()), hash.to_owned()));
            }
        }
        Ok(Self { folder, index: Mutex::new(Index { contents, changed: false }) })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// SHA-256 of a stored picture. A file of its own is read again only if its size, times or place on the disk changed.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Picture`] where it cannot be read.
    pub fn content(&self, stored: &Stored) -> Result<String> {
        let Some(path) = stored.own_file() else { return Ok(digest([stored.read()?.as_slice()])) };
        let stamp = stamp(path);
        if let Some(stamp) = &stamp {
            let index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, hash)) = index.contents.get(path).filter(|(own, _)| own == stamp) {
                return Ok(hash.clone());
            }
        }
        let hash = digest([stored.read()?.as_slice()]);
        if let Some(stamp) = stamp.filter(|_| path.to_str().is_some_and(|name| !name.contains(['\n', '\t']))) {
            let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
            index.contents.insert(path.to_owned(), (stamp, hash.clone()));
            index.changed = true;
        }
        Ok(hash)
    }

    /// The key of what is made of some content under some settings.
    pub fn key(&self, parts: &[&str]) -> Key {
        Key(digest(std::iter::once(FORMAT).chain(parts.iter().copied()).map(str::as_bytes)))
    }

    /// An entry; `None` where there is none or it is damaged.
    pub fn get(&self, key: &Key) -> Option<Tensors> {
        let file = SafetensorsFile::open(self.path(key)).ok()?;
        if file.metadata().get(CHECKSUM)? != &digest([file.data()]) {
            return None;
        }
        let names: Vec<String> = file.names().map(str::to_owned).collect();
        names.into_iter().map(|name| Some((name.clone(), file.get(&name).ok()?.to_host().ok()?))).collect()
    }

    /// Puts an entry into place.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be written.
    pub fn put(&self, key: &Key, tensors: &Tensors) -> Result<()> {
        let path = self.path(key);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(Error::io(folder, "create the folder"))?;
        let metadata = BTreeMap::from([(CHECKSUM.to_owned(), checksum(tensors))]);
        safetensors::write_with(&path, Durability::Unsynced, tensors, &metadata)?;
        Ok(())
    }

    /// An entry that is no tensors; `None` where there is none or it is damaged.
    pub(crate) fn get_bytes(&self, key: &Key) -> Option<Vec<u8>> {
        let whole = fs::read(self.path(key).with_extension("bin")).ok()?;
        let (checksum, bytes) = whole.split_at_checked(CHECKSUM_LENGTH)?;
        (checksum == digest([bytes]).as_bytes()).then(|| bytes.to_vec())
    }

    /// Puts an entry into place that is no tensors: its checksum, then its bytes.
    pub(crate) fn put_bytes(&self, key: &Key, bytes: &[u8]) -> Result<()> {
        let path = self.path(key).with_extension("bin");
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(Error::io(folder, "create the folder"))?;
        let checksum = digest([bytes]);
        Ok(atomic::write_with(&path, Durability::Unsynced, |file| {
            file.write_all(checksum.as_bytes())?;
            file.write_all(bytes)
        })?)
    }

    /// Keeps the hashes of files for the next run.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be written.
    pub fn flush(&self) -> Result<()> {
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        if !index.changed {
            return Ok(());
        }
        let mut text = String::new();
        for (path, (stamp, hash)) in &index.contents {
            text.push_str(&format!("{hash}\t{}\t{}\n", stamp.0, path.display()));
        }
        index.changed = false;
        let path = self.folder.join(INDEX);
        Ok(atomic::write_with(&path, Durability::Unsynced, |file| file.write_all(text.as_bytes()))?)
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(&key.0[..2]).join(format!("{}.safetensors", &key.0[2..]))
    }
}

impl Drop for DiskCache {
    fn drop(&mut self) {
        // The next run hashes again what is lost here.
        let _ = self.flush();
    }
}

/// The checksum of an entry: of its tensors' bytes as its file has them, one behind the other.
fn checksum(tensors: &Tensors) -> String {
    let bytes: Vec<&[u8]> = in_file_order(tensors.entries()).iter().map(|entry| tensors[&entry.name].bytes()).collect();
    let mut hash = Sha256::new();
    hash.update((bytes.iter().map(|bytes| bytes.len() as u64).sum::<u64>()).to_le_bytes());
    bytes.iter().for_each(|bytes| hash.update(bytes));
    hex(hash)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the file system says of a file; `None` where that is not enough to trust, or it is too young.
fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = fs::metadata(path).ok()?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        // The time of change cannot be set back by a program, as that of modification can.
        let changed =
            SystemTime::UNIX_EPOCH + Duration::new(metadata.ctime().try_into().ok()?, metadata.ctime_nsec() as u32);
        if SystemTime::now().duration_since(changed).ok()? < SETTLED {
            return None;
        }
        let parts = [metadata.dev(), metadata.ino(), metadata.len()].map(|part| part.to_string()).join(" ");
        let times = [metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()];
        Some(Stamp(format!("{parts} {}", times.map(|part| part.to_string()).join(" "))))
    }
    #[cfg(not(unix))]
    {
        // Elsewhere files are always hashed.
        let _ = (metadata, SystemTime::now(), SETTLED);
        None
    }
}

#[cfg(test)]
mod tests {
    use lora_core::DType;

    use super::*;

    fn tensors(value: f32) -> Tensors {
        let mean = HostTensor::from_f32([2, 3], vec![value; 6]).unwrap();
        let small = HostTensor::from_f32([1], vec![0.5]).unwrap().to_dtype(DType::BF16);
        [("mean".to_owned(), mean), ("a".to_owned(), small)].into()
    }

    #[test]
    fn entries_come_back_and_keys_keep_them_apart() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path().join("new")).unwrap();
        let (one, two) = (cache.key(&["ab", "c"]), cache.key(&["a", "bc"]));
        assert_ne!(one, two);
        assert!(cache.get(&one).is_none());
        cache.put(&one, &tensors(1.0)).unwrap();
        cache.put(&two, &tensors(2.0)).unwrap();
        assert_eq!(cache.get(&one).unwrap(), tensors(1.0));
        assert_eq!(cache.get(&two).unwrap(), tensors(2.0));
        assert!(SafetensorsFile::open(cache.path(&one)).is_ok(), "any tool can read it");
    }

    /// Computed apart from this program, from the format's description: a folder of an older version stays of use.
    #[test]
    fn names_and_bytes_of_entries_stay_what_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path()).unwrap();
        let key = cache.key(&["ab", "c"]);
        assert_eq!(key.0, "1476781e52d10b4ff0943a41155bd45624a5afd8fb3d390ae193e7a6a071ab37");
        cache.put(&key, &tensors(1.0)).unwrap();
        let bytes = fs::read(cache.path(&key)).unwrap();
        assert_eq!(
            (bytes.len(), lora_io::hash::sha256(&bytes).as_str()),
            (250, "c7c752fb7e95c88e058652eb2535e7e206cfb18f599ed18b0975111c47481701")
        );
    }

    #[test]
    fn damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path()).unwrap();
        let key = cache.key(&["x"]);
        cache.put(&key, &tensors(1.0)).unwrap();
        let whole = fs::read(cache.path(&key)).unwrap();
        let mut zeroed = whole.clone();
        let end = zeroed.len();
        zeroed[end - 4..].fill(0);
        for damaged in [&whole[..whole.len() - 1], &whole[..3], b"", &zeroed] {
            fs::write(cache.path(&key), damaged).unwrap();
            assert!(cache.get(&key).is_none());
        }
        cache.put(&key, &tensors(1.0)).unwrap();
        assert!(cache.get(&key).is_some());
    }

    #[test]
    fn entries_of_bytes_come_back_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path()).unwrap();
        let key = cache.key(&["bytes"]);
        assert_eq!(cache.get_bytes(&key), None);
        cache.put_bytes(&key, b"tokens").unwrap();
        assert_eq!(cache.get_bytes(&key).as_deref(), Some(b"tokens".as_slice()));
        let path = cache.path(&key).with_extension("bin");
        let whole = fs::read(&path).unwrap();
        for damaged in [&whole[..whole.len() - 1], &whole[..10], b""] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(cache.get_bytes(&key), None);
        }
    }

    #[test]
    fn a_changed_file_has_another_content_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let content = |cache: &DiskCache| cache.content(&Stored::file(&path)).unwrap();
        fs::write(&path, b"one").unwrap();
        let cache = DiskCache::open(folder.path().join("cache")).unwrap();
        let one = content(&cache);
        // The same length within the same tick of the clock.
        fs::write(&path, b"two").unwrap();
        assert_ne!(content(&cache), one);
        fs::write(&path, b"one").unwrap();
        assert_eq!(content(&cache), one);
        // A settled file is not read again, by this run or the next; the stamp alone decides.
        let stamp = Stamp("settled".into());
        cache.index.lock().unwrap().contents.insert(path.clone(), (stamp.clone(), "known".into()));
        cache.index.lock().unwrap().changed = true;
        drop(cache);
        let next = DiskCache::open(folder.path().join("cache")).unwrap();
        assert_eq!(next.index.lock().unwrap().contents[&path], (stamp, "known".to_owned()));
        assert_eq!(content(&next), one, "the stamp differs, so it is hashed");
    }

    #[test]
    fn two_runs_share_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let cache = DiskCache::open(folder.path()).unwrap();
                    for round in 0..50u8 {
                        let key = cache.key(&[&(round % 5).to_string()]);
                        match cache.get(&key) {
                            Some(found) => assert_eq!(found, tensors(f32::from(round % 5))),
                            None => cache.put(&key, &tensors(f32::from(round % 5))).unwrap(),
                        }
                    }
                });
            }
        });
    }
}
