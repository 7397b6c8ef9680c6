//! The tokenizer inside a GGUF file.
use super::language::Parts;
use crate::{Error, Result};
use lora_io::gguf::GgufFile;
pub(super) fn read(file: &GgufFile) -> Result<Parts> {
    Err(Error::tokenizer(file.path(), "not read yet"))
}
