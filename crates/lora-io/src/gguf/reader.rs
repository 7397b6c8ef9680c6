//! Reading GGUF: the file is mapped, its whole header checked against the file's real size before any tensor is handed out.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use lora_core::HostTensor;
use memmap2::Mmap;

use super::copy::Copied;
use super::{ALIGNMENT, MAGIC, TensorType};
use crate::{Error, Result, foreign, map};

/// A value of the header.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned type.
    Unsigned(u64),
    /// Any signed type.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    Text(String),
    /// An array, which stays in the file (a vocabulary has 100,000 texts); see [`GgufFile::texts`].
    Array {
        /// Number of elements.
        length: usize,
    },
}

/// An open GGUF file. It must not be truncated by another program while it is open.
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    values: BTreeMap<String, (Value, Range<usize>)>,
    tensors: BTreeMap<String, Location>,
}

#[derive(Debug, Clone)]
struct Location {
    /// The number of the type, known here or not.
    kind: u32,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// Numbers of value types.
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

impl GgufFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read; [`Error::Format`] where it is no GGUF file or a damaged one, with what
    /// was found.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        if !file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() > 0) {
            return Err(Error::format(path, "this is no file with content; expected GGUF"));
        }
        let map = map::open(path, &file)?;
        if let Some(other) = foreign::describe(&map).filter(|_| !map.starts_with(MAGIC)) {
            return Err(Error::format(path, other));
        }
        let (values, tensors) = parse(&map).map_err(|reason| Error::format(path, reason))?;
        Ok(Self { path: path.to_owned(), map, values, tensors })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header's keys and values, sorted.
    pub fn values(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, (value, _))| (key.as_str(), value))
    }

    /// A text of the header.
    pub fn text(&self, key: &str) -> Option<&str> {
        match &self.values.get(key)?.0 {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number of the header.
    pub fn number(&self, key: &str) -> Option<u64> {
        match self.values.get(key)?.0 {
            Value::Unsigned(number) => Some(number),
            Value::Signed(number) => number.try_into().ok(),
            _ => None,
        }
    }

    /// A floating-point number of the header.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.values.get(key)?.0 {
            Value::Float(number) => Some(number),
            _ => None,
        }
    }

    /// The elements of an array of the header, of which none is an array itself.
    pub fn elements(&self, key: &str) -> Option<Vec<Value>> {
        let (Value::Array { length }, range) = self.values.get(key)? else { return None };
        let mut cursor = Cursor { bytes: &self.map[..range.end], at: range.start };
        let kind = cursor.u32().ok().filter(|kind| *kind != ARRAY)?;
        cursor.u64().ok()?;
        (0..*length).map(|_| cursor.value(kind).ok()).collect()
    }

    /// A truth value of the header.
    pub fn truth(&self, key: &str) -> Option<bool> {
        match self.values.get(key)?.0 {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }

    /// An array of texts of the header.
    pub fn texts(&self, key: &str) -> Option<Vec<String>> {
        let (Value::Array { length }, range) = self.values.get(key)? else { return None };
        let mut cursor = Cursor { bytes: &self.map[..range.end], at: range.start };
        if cursor.u32().ok()? != TEXT {
            return None;
        }
        cursor.u64().ok()?;
        (0..*length).map(|_| cursor.text().ok()).collect()
    }

    /// Tensors begin at multiples of this.
    pub(super) fn alignment(&self) -> usize {
        self.number("general.alignment").and_then(|number| usize::try_from(number).ok()).unwrap_or(ALIGNMENT)
    }

    /// How many values the header has, and their bytes as they stand there; with another number of the file's type, where
    /// one is given and the header has one.
    pub(super) fn raw_values(&self, file_type: Option<u32>) -> (usize, Vec<u8>) {
        // After the magic, the version and two counts.
        const START: usize = 24;
        let end = self.values.values().map(|(_, range)| range.end).max().unwrap_or(START);
        let mut bytes = self.map[START..end].to_vec();
        let own = self.values.get("general.file_type").map(|(_, range)| range.clone());
        if let (Some(file_type), Some(range)) = (file_type, own.filter(|range| range.len() == 4)) {
            bytes[range.start - START..range.end - START].copy_from_slice(&file_type.to_le_bytes());
        }
        (self.values.len(), bytes)
    }

    /// All tensors in the order of the file, of types that are read here or not.
    pub(crate) fn stored(&self) -> Vec<Copied> {
        let mut places: Vec<_> = self.tensors.iter().collect();
        places.sort_by_key(|(name, tensor)| (tensor.bytes.start, tensor.bytes.end, *name));
        let ends = places.iter().skip(1).map(|(_, next)| next.bytes.start).chain([self.map.len()]);
        let copied = |((name, tensor), next): (&(&String, &Location), usize)| {
            // Of a type that is not known here all that lies before the next tensor is taken.
            let known = TensorType::from_id(tensor.kind).is_some();
            let bytes = if known { tensor.bytes.len() } else { next - tensor.bytes.start };
            Copied { name: (*name).clone(), shape: tensor.shape.clone(), kind: tensor.kind, bytes }
        };
        places.iter().zip(ends).map(copied).collect()
    }

    /// The bytes of a tensor of any type.
    pub(crate) fn raw(&self, tensor: &Copied) -> &[u8] {
        let start = self.tensors.get(&tensor.name).map_or(0, |own| own.bytes.start);
        self.map.get(start..start + tensor.bytes).unwrap_or_default()
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor, the slowest axis first (the file says it the other way round).
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|tensor| tensor.shape.as_slice())
    }

    /// The type of a tensor; none if it is not read here.
    pub fn tensor_type(&self, name: &str) -> Option<TensorType> {
        TensorType::from_id(self.tensors.get(name)?.kind)
    }

    /// A tensor: F32, F16 and BF16 as they are, quantised ones in f32.
    ///
    /// # Errors
    /// If there is no such tensor, or its type is not read here.
    pub fn tensor(&self, name: &str) -> Result<HostTensor> {
        let (kind, bytes) = self.blocks(name)?;
        let shape = self.shape(name).unwrap_or_default();
        HostTensor::new(shape, kind.decode(bytes)).map_err(|error| Error::tensor(&self.path, name, error.to_string()))
    }

    /// The type of a tensor and its bytes as they are stored, in whole blocks, row-major.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn blocks(&self, name: &str) -> Result<(TensorType, &[u8])> {
        let error = |reason: String| Error::tensor(&self.path, name, reason);
        let location = self.tensors.get(name).ok_or_else(|| error("is not in this file".into()))?;
        let Some(kind) = TensorType::from_id(location.kind) else {
            return Err(error(format!(
                "is of type {}, which is not read here; known are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, \
                 Q5_K and Q6_K: take the model in one of those",
                location.kind
            )));
        };
        Ok((kind, &self.map[location.bytes.clone()]))
    }

    /// Tells the kernel that a tensor's pages are not needed any more, so that resident memory while a model is loaded
    /// stays near one tensor. Reading it again is correct, only slower.
    pub fn release(&self, name: &str) {
        if let Some(Location { bytes, .. }) = self.tensors.get(name) {
            map::release(&self.map, bytes.clone());
        }
    }
}

impl fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GgufFile({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

type Header = (BTreeMap<String, (Value, Range<usize>)>, BTreeMap<String, Location>);

fn parse(bytes: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4)? != MAGIC {
        return Err("this is no GGUF file".into());
    }
    let version = cursor.u32()?;
    if !matches!(version, 2 | 3) {
        let what = if version.swap_bytes() < 100 { "big-endian".to_owned() } else { format!("version {version}") };
        return Err(format!("this is GGUF of the kind {what}; expected little-endian of version 2 or 3"));
    }
    // The smallest tensor takes 24 bytes of the header, the smallest value 13.
    let tensor_count = cursor.count(24, "tensors")?;
    let value_count = cursor.count(13, "values")?;
    let mut values = BTreeMap::new();
    for _ in 0..value_count {
        let key = cursor.text()?;
        let kind = cursor.u32()?;
        let start = cursor.at;
        let value = cursor.value(kind).map_err(|reason| format!("value `{key}`: {reason}"))?;
        if values.insert(key.clone(), (value, start..cursor.at)).is_some() {
            return Err(format!("value `{key}` appears twice"));
        }
    }
    let alignment = match values.get("general.alignment") {
        None => ALIGNMENT,
        Some((Value::Unsigned(number), _)) if number.is_power_of_two() && *number <= 1 << 20 => *number as usize,
        Some((other, _)) => return Err(format!("`general.alignment` is {other:?}; expected a power of two")),
    };
    let mut raw = Vec::with_capacity(tensor_count);
    for _ in 0..tensor_count {
        let name = cursor.text()?;
        let axes = cursor.u32()?;
        if axes > 4 {
            return Err(format!("tensor `{name}` has {axes} axes; expected at most 4"));
        }
        let mut shape = Vec::with_capacity(axes as usize);
        for _ in 0..axes {
            let length = cursor.u64()?;
            shape.push(usize::try_from(length).map_err(|_| format!("tensor `{name}` has an axis of {length}"))?);
        }
        shape.reverse();
        raw.push((name, shape, cursor.u32()?, cursor.u64()?));
    }
    let data = cursor.at.next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    let mut ranges = Vec::new();
    for (name, shape, kind, offset) in raw {
        let failed = |reason: String| format!("tensor `{name}`: {reason}");
        let begin = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
        let begin = begin.filter(|_| offset.is_multiple_of(alignment as u64));
        let begin = begin.ok_or_else(|| failed(format!("begins at {offset}, which is no multiple of {alignment}")))?;
        let elements = shape.iter().try_fold(1usize, |product, &length| product.checked_mul(length));
        let elements = elements.ok_or_else(|| failed(format!("shape {shape:?} is larger than any memory")))?;
        let size = match TensorType::from_id(kind) {
            // Its size is not known here; only naming it is possible.
            None => 0,
            Some(kind) => {
                let (block, size) = kind.block();
                if !shape.last().copied().unwrap_or(1).is_multiple_of(block) {
                    return Err(failed(format!("rows of {shape:?} are no whole blocks of {kind} ({block})")));
                }
                let size = (elements / block).checked_mul(size);
                size.ok_or_else(|| failed(format!("shape {shape:?} is larger than any memory")))?
            }
        };
        let end = begin.checked_add(size).filter(|end| *end <= bytes.len());
        let end = end.ok_or_else(|| {
            failed(format!("{size} bytes at {begin} lie beyond the file's {}; is the download complete?", bytes.len()))
        })?;
        if size > 0 {
            ranges.push(begin..end);
        }
        if tensors.contains_key(&name) {
            return Err(failed("appears twice".into()));
        }
        tensors.insert(name, Location { kind, shape, bytes: begin..end });
    }
    ranges.sort_by_key(|range| range.start);
    if ranges.windows(2).any(|pair| pair[1].start < pair[0].end) {
        return Err("two tensors share bytes; the file is damaged".into());
    }
    Ok((values, tensors))
}

struct Cursor<'b> {
    bytes: &'b [u8],
    at: usize,
}

impl<'b> Cursor<'b> {
    fn take(&mut self, count: usize) -> Result<&'b [u8], String> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end =
            end.ok_or_else(|| format!("the header ends at byte {}, in the middle of something", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let taken = self.take(N)?;
        Ok(*taken.first_chunk().unwrap_or(&[0; N]))
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of things that take at least `least` bytes each, so that a wrong one cannot make anyone reserve memory.
    fn count(&mut self, least: usize, what: &str) -> Result<usize, String> {
        let count = self.u64()?;
        let most = (self.bytes.len() - self.at) / least;
        usize::try_from(count)
            .ok()
            .filter(|count| *count <= most)
            .ok_or_else(|| format!("the header claims {count} {what}, for which the rest of the file has no room"))
    }

    fn text(&mut self) -> Result<String, String> {
        let length = self.count(1, "bytes of a text")?;
        let bytes = self.take(length)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("the text before byte {} is not UTF-8", self.at))
    }

    fn value(&mut self, kind: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>()?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => match self.array()? {
                [byte @ (0 | 1)] => Value::Bool(byte == 1),
                [byte] => return Err(format!("{byte} is no truth value")),
            },
            TEXT => Value::Text(self.text()?),
            ARRAY => {
                let kind = self.u32()?;
                let size = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    TEXT | 10..=12 => 8,
                    _ => return Err(format!("an array of type {kind}, which the format does not have")),
                };
                let length = self.count(size, "elements")?;
                if kind == TEXT {
                    for _ in 0..length {
                        // Checked for its place only: vocabularies hold texts that are not UTF-8.
                        let length = self.count(1, "bytes of a text")?;
                        self.take(length)?;
                    }
                } else {
                    self.take(length * size)?;
                }
                Value::Array { length }
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(format!("type {kind}, which the format does not have")),
        })
    }
}
