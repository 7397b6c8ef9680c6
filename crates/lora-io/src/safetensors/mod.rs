//! The safetensors format: a memory-mapped reader that trusts nothing, and a writer whose bytes depend only on content.
//!
//! Layout: a little-endian u64 with the length of the header, the header in JSON (tensor name → dtype, shape and byte
//! range; `__metadata__` → free text), then the tensors' bytes, which must tile the rest of the file.

mod float8;
mod reader;
pub(crate) mod scale;
mod writer;

pub(crate) use float8::{from_e4m3, from_e5m2};
pub use reader::{SafetensorsFile, TensorView};
pub(crate) use writer::header;
pub(crate) use writer::verify;
pub use writer::{Entry, TensorSource, in_file_order, write, write_with};

use std::fmt;

use lora_core::DType;

/// Longest header that is read, as the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

macro_rules! stored_dtypes {
    ($($variant:ident $name:literal $bits:literal),* $(,)?) => {
        /// Element types that safetensors files hold.
        #[allow(missing_docs, reason = "the format's own names")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum StoredDType { $($variant),* }

        impl StoredDType {
            /// The name in the file.
            pub fn name(self) -> &'static str {
                match self { $(StoredDType::$variant => $name),* }
            }

            /// From the name in the file.
            pub(crate) fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(StoredDType::$variant),)* _ => None }
            }

            /// Bits of one element.
            pub fn bits(self) -> usize {
                match self { $(StoredDType::$variant => $bits),* }
            }
        }
    };
}

stored_dtypes! {
    Bool "BOOL" 8, F4 "F4" 4, F6E2M3 "F6_E2M3" 6, F6E3M2 "F6_E3M2" 6, U8 "U8" 8, I8 "I8" 8,
    F8E5M2 "F8_E5M2" 8, F8E4M3 "F8_E4M3" 8, F8E8M0 "F8_E8M0" 8, F8E4M3Fnuz "F8_E4M3FNUZ" 8, F8E5M2Fnuz "F8_E5M2FNUZ" 8,
    I16 "I16" 16, U16 "U16" 16, F16 "F16" 16, BF16 "BF16" 16, I32 "I32" 32, U32 "U32" 32, F32 "F32" 32,
    C64 "C64" 64, F64 "F64" 64, I64 "I64" 64, U64 "U64" 64,
}

impl StoredDType {
    /// Bytes of `elements` elements; `None` on overflow or where they do not fill whole bytes.
    pub(crate) fn bytes(self, elements: usize) -> Option<usize> {
        let bits = elements.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl From<DType> for StoredDType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F16 => StoredDType::F16,
            DType::BF16 => StoredDType::BF16,
            _ => StoredDType::F32,
        }
    }
}

impl fmt::Display for StoredDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
