//! A GGUF file with some of its tensors replaced: all values of the header and all other tensors keep their bytes.

use std::borrow::Cow;
use std::io::Write;
use std::path::Path;

use super::{GgufFile, MAGIC, TensorType};
use crate::{Result, atomic};

/// A tensor of the new file.
#[derive(Debug, Clone)]
pub(crate) struct Copied {
    /// Its name.
    pub(crate) name: String,
    /// Its shape, the slowest axis first.
    pub(crate) shape: Vec<usize>,
    /// The number of its type, read here or not.
    pub(crate) kind: u32,
    /// Its size in bytes.
    pub(crate) bytes: usize,
}

impl Copied {
    /// One of another type.
    pub(crate) fn of(name: &str, shape: &[usize], kind: TensorType) -> Self {
        let (elements, bytes) = kind.block();
        let bytes = shape.iter().product::<usize>() / elements * bytes;
        Self { name: name.to_owned(), shape: shape.to_vec(), kind: kind.id(), bytes }
    }
}

/// Writes the header of `file` with these tensors, whose bytes `bytes` gives in their order. `file_type` is what the header
/// says of the types of most tensors (`general.file_type`), where that has changed.
///
/// # Errors
/// If `bytes` fails, or the file cannot be written.
pub(crate) fn copy<'f>(
    path: &Path,
    file: &GgufFile,
    tensors: &[Copied],
    file_type: Option<u32>,
    mut bytes: impl FnMut(&Copied) -> Result<Cow<'f, [u8]>>,
) -> Result<()> {
    let alignment = file.alignment();
    let (count, values) = file.raw_values(file_type);
    let mut header = Vec::from(MAGIC);
    header.extend(3u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((count as u64).to_le_bytes());
    header.extend(values);
    let mut offset = 0u64;
    for tensor in tensors {
        header.extend((tensor.name.len() as u64).to_le_bytes());
        header.extend(tensor.name.as_bytes());
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|length| header.extend((*length as u64).to_le_bytes()));
        header.extend(tensor.kind.to_le_bytes());
        header.extend(offset.to_le_bytes());
        offset += tensor.bytes.next_multiple_of(alignment) as u64;
    }
    header.resize(header.len().next_multiple_of(alignment), 0);
    let mut failed = None;
    let written = atomic::write(path, |target| {
        target.write_all(&header)?;
        for tensor in tensors {
            let bytes = bytes(tensor).map_err(|error| {
                failed = Some(error);
                std::io::Error::other("a tensor could not be made")
            })?;
            target.write_all(&bytes)?;
            let padding = tensor.bytes.next_multiple_of(alignment) - bytes.len();
            target.write_all(&vec![0; padding])?;
        }
        Ok(())
    });
    match failed {
        Some(error) => Err(error),
        None => written,
    }
}
