//! Arguments that commands of both programs have.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use clap::builder::{PathBufValueParser, TypedValueParser};
use lora_core::{DType, Strength};

use crate::Failure;

/// Element types on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Precision {
    /// 32 bits.
    Fp32,
    /// 16 bits, 5 of them exponent.
    Fp16,
    /// 16 bits, 8 of them exponent.
    Bf16,
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Fp32 => DType::F32,
            Precision::Fp16 => DType::F16,
            Precision::Bf16 => DType::BF16,
        }
    }
}

/// The parser of an argument that is a base model: a file, a folder, or the name of one that Hugging Face's programs
/// have fetched. A name that they have not is refused with the command that fetches it.
pub fn base() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| lora_io::hub::place(&path).map(Cow::into_owned))
}

/// `FILE`, `FILE:0.8`, `FILE:0.8:0.6`, `FILE:0.8:0.6:1,0,…`: the file, and how strongly it is applied.
///
/// # Errors
/// [`Failure::Usage`] where the numbers are no strength.
pub fn strength_of(argument: &str) -> Result<(&Path, Strength), Failure> {
    let split = Strength::split(argument);
    let (path, strength) = split.map_err(|error| Failure::Usage(format!("--lora {argument}: {error}")))?;
    Ok((Path::new(path), strength))
}
