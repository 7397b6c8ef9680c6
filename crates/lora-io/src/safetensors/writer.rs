//! Writing: streamed tensor by tensor, atomic, and with bytes that depend on content alone: tensors by alignment
//! (descending) then name, as the reference implementation orders them, metadata keys sorted.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use lora_core::HostTensor;

use super::{SafetensorsFile, StoredDType};
use crate::atomic::{self, Durability};
use crate::{Error, Result};

/// What a file will say of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: StoredDType,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// Tensors to be written, asked for one at a time.
pub trait TensorSource {
    /// All tensors, in any order.
    fn entries(&self) -> Vec<Entry>;
    /// The bytes of one of them, little-endian and row-major.
    ///
    /// # Errors
    /// What reading or computing it gives; nothing is written then.
    fn bytes(&self, entry: &Entry) -> Result<Cow<'_, [u8]>>;
}

impl TensorSource for BTreeMap<String, HostTensor> {
    fn entries(&self) -> Vec<Entry> {
        let entry = |(name, tensor): (&String, &HostTensor)| Entry {
            name: name.clone(),
            dtype: tensor.dtype().into(),
            shape: tensor.shape().to_vec(),
        };
        self.iter().map(entry).collect()
    }

    fn bytes(&self, entry: &Entry) -> Result<Cow<'_, [u8]>> {
        Ok(Cow::Borrowed(self[&entry.name].bytes()))
    }
}

/// Writes a file, whole or not at all; returns its size in bytes.
///
/// # Errors
/// Where a name stands twice, a tensor cannot be had, or the file system refuses.
pub fn write(path: impl AsRef<Path>, source: &dyn TensorSource, metadata: &BTreeMap<String, String>) -> Result<u64> {
    write_with(path.as_ref(), Durability::Synced, source, metadata)
}

/// As [`write()`], with or without waiting for the disk.
///
/// # Errors
/// As [`write()`].
pub fn write_with(
    path: &Path,
    durability: Durability,
    source: &dyn TensorSource,
    metadata: &BTreeMap<String, String>,
) -> Result<u64> {
    let (header, entries) = header(path, source.entries(), metadata)?;
    let mut bytes = header.len() as u64;
    let mut failed = None;
    let result = atomic::write_with(path, durability, |file| {
        file.write_all(&header)?;
        for entry in &entries {
            match source.bytes(entry) {
                Ok(data) => {
                    bytes += data.len() as u64;
                    file.write_all(&data)?;
                }
                Err(error) => {
                    failed = Some(error);
                    return Err(std::io::Error::other("a tensor could not be produced"));
                }
            }
        }
        Ok(())
    });
    match failed {
        Some(error) => Err(error),
        None => result.map(|()| bytes),
    }
}

/// Tensors in the order in which a file has them: by alignment (descending), then name.
pub fn in_file_order(mut entries: Vec<Entry>) -> Vec<Entry> {
    entries.sort_by(|a, b| b.dtype.bits().cmp(&a.dtype.bits()).then_with(|| a.name.cmp(&b.name)));
    entries
}

/// The length, the header and its padding for these tensors; and the tensors in file order.
pub(crate) fn header(
    path: &Path,
    entries: Vec<Entry>,
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, Vec<Entry>)> {
    let entries = in_file_order(entries);
    let mut names = BTreeSet::new();
    let mut fields = Vec::new();
    if !metadata.is_empty() {
        fields.push(format!("\"__metadata__\":{}", json(metadata)));
    }
    let mut offset = 0usize;
    for entry in &entries {
        if entry.name == "__metadata__" || !names.insert(&entry.name) {
            return Err(Error::tensor(path, &entry.name, "is to be written twice"));
        }
        let size = entry.dtype.bytes(entry.shape.iter().product());
        let end = size.and_then(|size| offset.checked_add(size));
        let end = end.ok_or_else(|| Error::tensor(path, &entry.name, "has no size that a file can hold"))?;
        fields.push(format!(
            "{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{offset},{end}]}}",
            json(&entry.name),
            entry.dtype,
            json(&entry.shape)
        ));
        offset = end;
    }
    let mut text = format!("{{{}}}", fields.join(","));
    // Blanks up to a multiple of 8 keep the tensors aligned for readers that map the file.
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    Ok((bytes, entries))
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("strings and numbers always serialise")
}

/// Reads a file back: the same tensors with the same shapes, every element finite.
pub(crate) fn verify(path: impl AsRef<Path>, expected: &[Entry]) -> Result<()> {
    let path = path.as_ref();
    let file = SafetensorsFile::open(path)?;
    if file.len() != expected.len() {
        return Err(Error::format(path, format!("{} tensors were written, {} read back", expected.len(), file.len())));
    }
    for entry in expected {
        let view = file.get(&entry.name)?;
        if view.shape() != entry.shape || view.dtype() != entry.dtype {
            return Err(Error::tensor(path, &entry.name, "reads back with another shape or dtype than was written"));
        }
        if !view.is_finite() {
            return Err(Error::tensor(path, &entry.name, "holds NaN or infinity"));
        }
    }
    Ok(())
}
