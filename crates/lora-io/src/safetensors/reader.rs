//! Reading: the file is mapped, the header checked in full before any tensor is handed out.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use lora_core::{HostData, HostTensor};
use memmap2::Mmap;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::float8::{from_e4m3, from_e5m2};
use super::{MAX_HEADER, StoredDType};
use crate::family::tree::Share;
use crate::{Error, Result, foreign, map};

/// An open safetensors file.
///
/// The file must not be truncated by another program while it is open: reading past its new end would end the process,
/// as with every memory map.
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    data_start: usize,
    tensors: BTreeMap<String, Location>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
struct Location {
    dtype: StoredDType,
    shape: Vec<usize>,
    /// From the start of the data.
    begin: usize,
    end: usize,
}

/// One tensor of an open file.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'f> {
    path: &'f Path,
    name: &'f str,
    dtype: StoredDType,
    shape: &'f [usize],
    bytes: &'f [u8],
}

impl SafetensorsFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read; [`Error::Format`] or [`Error::Tensor`] where it is none, is cut short or
    /// its header is damaged, with what was found.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut file = File::open(path).map_err(Error::io(path, "open"))?;
        let length = file.metadata().map_err(Error::io(path, "read the size"))?.len();
        if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            return Err(Error::format(path, "this is a folder; expected a safetensors file"));
        }
        let mut start = Vec::new();
        file.by_ref().take(foreign::SNIFFED as u64).read_to_end(&mut start).map_err(Error::io(path, "read"))?;
        if start.starts_with(crate::gguf::MAGIC) {
            let reason =
                "this is a GGUF file; expected safetensors. `lora dequantise` writes a model's weights as safetensors";
            return Err(Error::format(path, reason));
        }
        let header_length = start.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
        let fits = |header: &u64| *header <= MAX_HEADER && *header <= length.saturating_sub(8);
        // Any two bytes may begin the length of a header: what comes after them counts first.
        let plain = header_length.is_some_and(|header| fits(&header)) && start.get(8) == Some(&b'{');
        if let Some(other) = foreign::describe(&start).filter(|_| !plain) {
            return Err(Error::format(path, other));
        }
        let Some(header_length) = header_length else {
            return Err(Error::format(
                path,
                format!("{length} bytes are no safetensors file; is the download complete?"),
            ));
        };
        if !fits(&header_length) {
            return Err(Error::format(
                path,
                format!(
                    "the header claims {header_length} bytes in a file of {length}; it is truncated or no safetensors file"
                ),
            ));
        }
        let map = map::open(path, &file)?;
        let data_start = 8 + header_length as usize;
        let header = parse_header(path, &map[8..data_start])?;
        check_tiling(path, &header.tensors, map.len() - data_start)?;
        Ok(Self { path: path.to_owned(), map, data_start, tensors: header.tensors, metadata: header.metadata })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Names of the tensors in the order of their bytes, in which other programs go through a file.
    pub(crate) fn names_in_file_order(&self) -> Vec<&str> {
        let mut order: Vec<_> = self.tensors.iter().collect();
        order.sort_by_key(|(_, location)| (location.begin, location.end));
        order.into_iter().map(|(name, _)| name.as_str()).collect()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Whether there is a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The free text of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensor bytes, in file order.
    pub fn data(&self) -> &[u8] {
        &self.map[self.data_start..]
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|location| location.shape.as_slice())
    }

    /// A tensor.
    ///
    /// # Errors
    /// [`Error::Tensor`] where there is none of this name.
    pub fn get(&self, name: &str) -> Result<TensorView<'_>> {
        let (name, location) =
            self.tensors.get_key_value(name).ok_or_else(|| Error::tensor(&self.path, name, "is not in this file"))?;
        Ok(TensorView {
            path: &self.path,
            name,
            dtype: location.dtype,
            shape: &location.shape,
            bytes: &self.map[self.data_start + location.begin..self.data_start + location.end],
        })
    }

    /// Tells the kernel that a tensor's pages are not needed any more, so that resident memory while loading a model
    /// stays near one tensor. Reading it again is correct, only slower.
    pub fn release(&self, name: &str) {
        self.release_part(name, Share::one(0, 1));
    }

    /// The same for one of several equal parts of a tensor's bytes.
    pub(crate) fn release_part(&self, name: &str, share: Share) {
        let Some(location) = self.tensors.get(name) else { return };
        let part = (location.end - location.begin) / share.of;
        let (size, start) = (share.count * part, self.data_start + location.begin + share.first * part);
        map::release(&self.map, start..start + size);
    }
}

impl fmt::Debug for SafetensorsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SafetensorsFile({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

impl<'f> TensorView<'f> {
    /// Its name in the file.
    pub fn name(&self) -> &'f str {
        self.name
    }

    /// Its element type.
    pub fn dtype(&self) -> StoredDType {
        self.dtype
    }

    /// Its shape.
    pub fn shape(&self) -> &'f [usize] {
        self.shape
    }

    /// Its bytes, little-endian, row-major, possibly misaligned.
    pub fn bytes(&self) -> &'f [u8] {
        self.bytes
    }

    /// The same bytes under another shape of equal size.
    pub(crate) fn with_shape(self, shape: &'f [usize]) -> Self {
        debug_assert_eq!(self.shape.iter().product::<usize>(), shape.iter().product::<usize>());
        Self { shape, ..self }
    }

    /// Some of its rows, in their shape.
    pub(super) fn rows(self, rows: &Range<usize>, shape: &'f [usize]) -> Self {
        let row = self.bytes.len() / self.shape.first().map_or(1, |all| (*all).max(1));
        Self { bytes: &self.bytes[rows.start * row..rows.end * row], shape, ..self }
    }

    /// The file.
    pub(super) fn path(&self) -> &'f Path {
        self.path
    }

    /// A share of its rows, in the share's shape.
    pub(crate) fn part(self, share: Share, shape: &'f [usize]) -> Self {
        let part = self.bytes.len() / share.of;
        Self { bytes: &self.bytes[share.first * part..(share.first + share.count) * part], shape, ..self }
    }

    /// The same tensor with its bytes in another order.
    pub(crate) fn with_bytes(self, bytes: &'f [u8], shape: &'f [usize]) -> Self {
        debug_assert_eq!(self.bytes.len(), bytes.len());
        Self { bytes, shape, ..self }
    }

    /// A copy as floating-point numbers: F32, F16 and BF16 as they are, F64 rounded to F32, F8_E4M3 and F8_E5M2 as F16,
    /// which holds all of their numbers.
    ///
    /// # Errors
    /// [`Error::Tensor`] for whole numbers and other types.
    pub fn to_host(&self) -> Result<HostTensor> {
        let data = match self.dtype {
            StoredDType::F32 => HostData::F32(self.chunks().map(f32::from_le_bytes).collect()),
            StoredDType::F16 => HostData::F16(self.chunks().map(f16::from_le_bytes).collect()),
            StoredDType::BF16 => HostData::BF16(self.chunks().map(bf16::from_le_bytes).collect()),
            StoredDType::F64 => HostData::F32(self.chunks().map(|bytes| f64::from_le_bytes(bytes) as f32).collect()),
            StoredDType::F8E4M3 => {
                HostData::F16(self.bytes.iter().map(|&byte| f16::from_f32(from_e4m3(byte))).collect())
            }
            StoredDType::F8E5M2 => {
                HostData::F16(self.bytes.iter().map(|&byte| f16::from_f32(from_e5m2(byte))).collect())
            }
            other => {
                return Err(Error::tensor(
                    self.path,
                    self.name,
                    format!("is stored as {other}; expected F32, F16, BF16, F64, F8_E4M3 or F8_E5M2"),
                ));
            }
        };
        HostTensor::new(self.shape, data).map_err(|error| Error::tensor(self.path, self.name, error.to_string()))
    }

    /// The value of a tensor with one element, of a float type or a whole number (how some tools write alpha).
    ///
    /// # Errors
    /// [`Error::Tensor`] for more than one element, or another type.
    pub fn scalar(&self) -> Result<f64> {
        if self.shape.iter().product::<usize>() != 1 {
            return Err(Error::tensor(
                self.path,
                self.name,
                format!("expected one value, found shape {:?}", self.shape),
            ));
        }
        match self.dtype {
            StoredDType::F64 => Ok(self.chunks().map(f64::from_le_bytes).sum()),
            StoredDType::I64 => Ok(self.chunks().map(i64::from_le_bytes).sum::<i64>() as f64),
            StoredDType::I32 => Ok(self.chunks().map(i32::from_le_bytes).map(f64::from).sum()),
            StoredDType::I16 => Ok(self.chunks().map(i16::from_le_bytes).map(f64::from).sum()),
            StoredDType::I8 => Ok(self.chunks().map(i8::from_le_bytes).map(f64::from).sum()),
            StoredDType::U8 => Ok(self.chunks().map(u8::from_le_bytes).map(f64::from).sum()),
            _ => Ok(f64::from(self.to_host()?.to_f32()[0])),
        }
    }

    /// Whether all elements are finite; integers are.
    pub(crate) fn is_finite(&self) -> bool {
        // NaN and the infinities are what has all bits of the exponent set. Without a branch on each, so that it is
        // done many at a time; a file that was just written is read back at the speed of memory.
        fn any<const N: usize>(view: &TensorView<'_>, set: impl Fn([u8; N]) -> bool) -> bool {
            let blocks = view.bytes.chunks(4096 * N);
            blocks.map(|block| block.as_chunks::<N>().0).any(|block| block.iter().fold(false, |any, &x| any | set(x)))
        }
        match self.dtype {
            StoredDType::F16 => !any(self, |bytes| u16::from_le_bytes(bytes) & 0x7C00 == 0x7C00),
            StoredDType::BF16 => !any(self, |bytes| u16::from_le_bytes(bytes) & 0x7F80 == 0x7F80),
            StoredDType::F32 => !any(self, |bytes| u32::from_le_bytes(bytes) & 0x7F80_0000 == 0x7F80_0000),
            StoredDType::F64 => !any(self, |bytes| u64::from_le_bytes(bytes) >> 52 & 0x7FF == 0x7FF),
            StoredDType::F8E4M3 => !any(self, |[byte]: [u8; 1]| byte & 0x7F == 0x7F),
            StoredDType::F8E5M2 => !any(self, |[byte]: [u8; 1]| byte & 0x7C == 0x7C),
            _ => true,
        }
    }

    fn chunks<const N: usize>(&self) -> impl Iterator<Item = [u8; N]> {
        self.bytes.as_chunks::<N>().0.iter().copied()
    }
}

#[derive(Debug, Default)]
struct Header {
    tensors: BTreeMap<String, Location>,
    metadata: BTreeMap<String, String>,
}

/// Parses the header by hand over serde, because a JSON map read the usual way keeps the last of two equal keys in
/// silence.
fn parse_header(path: &Path, bytes: &[u8]) -> Result<Header> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        Error::format(path, format!("the header is not UTF-8 at its byte {}; the file is damaged", error.valid_up_to()))
    })?;
    let mut parser = serde_json::Deserializer::from_str(text);
    let header =
        parser.deserialize_map(HeaderVisitor).map_err(|error| Error::format(path, format!("header: {error}")))?;
    parser.end().map_err(|error| Error::format(path, format!("header: {error}")))?;
    Ok(header)
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header::default();
        let mut seen_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if std::mem::replace(&mut seen_metadata, true) {
                    return Err(A::Error::custom("`__metadata__` appears twice"));
                }
                // Some writers leave null there, which the safetensors package takes for none.
                header.metadata = map.next_value::<Option<UniqueStrings>>()?.unwrap_or_default().0;
                continue;
            }
            let raw: RawLocation =
                map.next_value().map_err(|error| A::Error::custom(format!("tensor `{name}`: {error}")))?;
            let location = raw.check().map_err(|reason| A::Error::custom(format!("tensor `{name}`: {reason}")))?;
            if header.tensors.insert(name.clone(), location).is_some() {
                return Err(A::Error::custom(format!("tensor `{name}` appears twice")));
            }
        }
        Ok(header)
    }
}

#[derive(serde::Deserialize)]
struct RawLocation {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl RawLocation {
    fn check(self) -> Result<Location, String> {
        let dtype = StoredDType::from_name(&self.dtype).ok_or_else(|| format!("unknown dtype `{}`", self.dtype))?;
        let (begin, end) = self.data_offsets;
        let found =
            end.checked_sub(begin).ok_or_else(|| format!("its bytes end ({end}) before they begin ({begin})"))?;
        let elements = self.shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side));
        let expected = elements.and_then(|elements| dtype.bytes(elements));
        if expected != Some(found) {
            let expected = expected.map_or_else(|| "more than can be".to_owned(), |bytes| bytes.to_string());
            return Err(format!("shape {:?} of {dtype} takes {expected} bytes, {found} are given", self.shape));
        }
        Ok(Location { dtype, shape: self.shape, begin, end })
    }
}

/// A string map in which no key may appear twice.
#[derive(Default)]
struct UniqueStrings(BTreeMap<String, String>);

impl<'de> serde::Deserialize<'de> for UniqueStrings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = UniqueStrings;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings as `__metadata__`")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueStrings, A::Error> {
                let mut strings = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if strings.contains_key(&key) {
                        return Err(A::Error::custom(format!("metadata key `{key}` appears twice")));
                    }
                    strings.insert(key, value);
                }
                Ok(UniqueStrings(strings))
            }
        }
        deserializer.deserialize_map(Strings)
    }
}

/// The tensors must cover the data exactly: no overlap, no hole, nothing behind the last.
fn check_tiling(path: &Path, tensors: &BTreeMap<String, Location>, data: usize) -> Result<()> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(_, location)| (location.begin, location.end));
    let mut covered = 0;
    for (name, location) in order {
        if location.end > data {
            return Err(Error::tensor(
                path,
                name,
                format!("ends at byte {} of {data}; the file is truncated or its header lies", location.end),
            ));
        }
        if location.begin != covered {
            let what =
                if location.begin < covered { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(Error::tensor(
                path,
                name,
                format!("{what}: begins at byte {}, expected {covered}", location.begin),
            ));
        }
        covered = location.end;
    }
    if covered != data {
        return Err(Error::format(
            path,
            format!("{} bytes follow the last tensor; the header does not describe them", data - covered),
        ));
    }
    Ok(())
}
