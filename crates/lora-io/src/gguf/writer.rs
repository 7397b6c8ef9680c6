//! Writing small GGUF files of plain numbers, atomically, with bytes that depend on the content alone.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use lora_core::{DType, HostTensor};

use super::{ALIGNMENT, MAGIC, TensorType, Value};
use crate::{Error, Result, atomic};

/// Writes values and tensors, both in the order of their names; `general.architecture` comes first, as readers expect.
/// Floats are written as f32, whole numbers as u32 where they fit.
///
/// # Errors
/// [`Error::Format`] for a value that is an array, [`Error::Tensor`] for a number type other than f32 and f16, [`Error::Io`]
/// where the file cannot be written.
pub fn write(
    path: impl AsRef<Path>,
    values: &BTreeMap<String, Value>,
    tensors: &BTreeMap<String, HostTensor>,
) -> Result<()> {
    let path = path.as_ref();
    let mut header = Vec::from(MAGIC);
    header.extend(3u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((values.len() as u64).to_le_bytes());
    let first = values.get_key_value("general.architecture");
    let others = values.iter().filter(|(key, _)| *key != "general.architecture");
    for (key, value) in first.into_iter().chain(others) {
        put_text(&mut header, key);
        match value {
            Value::Unsigned(number) => match u32::try_from(*number) {
                Ok(number) => put(&mut header, 4, &number.to_le_bytes()),
                Err(_) => put(&mut header, 10, &number.to_le_bytes()),
            },
            Value::Signed(number) => put(&mut header, 11, &number.to_le_bytes()),
            Value::Float(number) => put(&mut header, 6, &(*number as f32).to_le_bytes()),
            Value::Bool(value) => put(&mut header, 7, &[u8::from(*value)]),
            Value::Text(text) => {
                header.extend(8u32.to_le_bytes());
                put_text(&mut header, text);
            }
            Value::Array { .. } => {
                return Err(Error::format(path, format!("`{key}` is an array, which is not written here")));
            }
        }
    }
    let mut offset = 0;
    for (name, tensor) in tensors {
        put_text(&mut header, name);
        header.extend((tensor.shape().len() as u32).to_le_bytes());
        tensor.shape().iter().rev().for_each(|length| header.extend((*length as u64).to_le_bytes()));
        let kind = match tensor.dtype() {
            DType::F32 => TensorType::F32,
            DType::F16 => TensorType::F16,
            DType::BF16 => TensorType::BF16,
            other => return Err(Error::tensor(path, name, format!("{other} is not written here"))),
        };
        header.extend(kind.id().to_le_bytes());
        header.extend((offset as u64).to_le_bytes());
        offset += tensor.bytes().len().next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    atomic::write(path, |file| {
        file.write_all(&header)?;
        for tensor in tensors.values() {
            let bytes = tensor.bytes();
            file.write_all(bytes)?;
            file.write_all(&[0; ALIGNMENT][..bytes.len().next_multiple_of(ALIGNMENT) - bytes.len()])?;
        }
        Ok(())
    })
}

fn put(header: &mut Vec<u8>, kind: u32, bytes: &[u8]) {
    header.extend(kind.to_le_bytes());
    header.extend(bytes);
}

fn put_text(header: &mut Vec<u8>, text: &str) {
    header.extend((text.len() as u64).to_le_bytes());
    header.extend(text.as_bytes());
}
