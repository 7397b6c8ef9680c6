//! Element types of GGUF tensors and what their blocks mean, value for value as ggml's reference dequantisation computes it
//! in f32. The other way round is [`super::quantise`]'s.
//!
//! | type | block | bytes | value |
//! |---|---|---|---|
//! | Q4_0 | 32 | d f16, 16 × 2 nibbles | `d (q - 8)` |
//! | Q4_1 | 32 | d, m f16, 16 × 2 nibbles | `d q + m` |
//! | Q5_0 | 32 | d f16, 32 fifth bits, 16 × 2 nibbles | `d (q - 16)` |
//! | Q5_1 | 32 | d, m f16, 32 fifth bits, 16 × 2 nibbles | `d q + m` |
//! | Q8_0 | 32 | d f16, 32 × i8 | `d q` |
//! | Q4_K | 256 | d, e f16, 8 × 6-bit scale s and minimum m, 128 × 2 nibbles | `d s q - e m` |
//! | Q5_K | 256 | the same, 256 fifth bits before the nibbles | `d s q - e m` |
//! | Q6_K | 256 | 4 low bits, 2 high bits, 16 × i8 scale s, d f16 | `d s (q - 32)` |
//!
//! Nibbles: the low ones are a (sub-)block's first half, the high ones its second.

use std::fmt;

use half::{bf16, f16};
use lora_core::blocks::BlockKind;
use lora_core::{HostData, HostTensor};

/// Element type of a tensor, as far as it is read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names that the format and its users know")]
pub enum TensorType {
    F32,
    F16,
    BF16,
    /// Quantised.
    Blocks(BlockKind),
}

impl TensorType {
    /// The type of a number in a file; none for types that are not read here.
    pub fn from_id(id: u32) -> Option<Self> {
        match id {
            0 => Some(TensorType::F32),
            1 => Some(TensorType::F16),
            30 => Some(TensorType::BF16),
            _ => BlockKind::from_gguf(id).map(TensorType::Blocks),
        }
    }

    /// Its number in files.
    pub fn id(self) -> u32 {
        match self {
            TensorType::F32 => 0,
            TensorType::F16 => 1,
            TensorType::BF16 => 30,
            TensorType::Blocks(kind) => kind.gguf(),
        }
    }

    /// Elements and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            TensorType::F32 => (1, 4),
            TensorType::F16 | TensorType::BF16 => (1, 2),
            TensorType::Blocks(kind) => kind.block(),
        }
    }

    /// The numbers of whole blocks: F32, F16 and BF16 as they are, the others in f32.
    pub(crate) fn decode(self, bytes: &[u8]) -> HostData {
        match self {
            TensorType::F32 => HostData::F32(each(bytes, f32::from_le_bytes)),
            TensorType::F16 => HostData::F16(each(bytes, f16::from_le_bytes)),
            TensorType::BF16 => HostData::BF16(each(bytes, bf16::from_le_bytes)),
            TensorType::Blocks(kind) => {
                let (elements, size) = kind.block();
                let mut values = vec![0.0; bytes.len() / size * elements];
                for (block, out) in bytes.chunks_exact(size).zip(values.chunks_exact_mut(elements)) {
                    decode_block(kind, block, out);
                }
                HostData::F32(values)
            }
        }
    }
}

fn decode_block(kind: BlockKind, block: &[u8], out: &mut [f32]) {
    match kind {
        BlockKind::Q4_0 => {
            let d = half(block, 0);
            nibbles(&block[2..18], out, |q, _| (f32::from(q) - 8.0) * d);
        }
        BlockKind::Q4_1 => {
            let (d, m) = (half(block, 0), half(block, 2));
            nibbles(&block[4..20], out, |q, _| f32::from(q) * d + m);
        }
        BlockKind::Q5_0 => {
            let (d, high) = (half(block, 0), bits(block, 2));
            nibbles(&block[6..22], out, |q, place| (f32::from(q | fifth(high, place)) - 16.0) * d);
        }
        BlockKind::Q5_1 => {
            let (d, m, high) = (half(block, 0), half(block, 2), bits(block, 4));
            nibbles(&block[8..24], out, |q, place| f32::from(q | fifth(high, place)) * d + m);
        }
        BlockKind::Q8_0 => {
            let d = half(block, 0);
            out.iter_mut().zip(&block[2..]).for_each(|(out, &q)| *out = f32::from(q as i8) * d);
        }
        BlockKind::Q4_K | BlockKind::Q5_K => {
            let (d, e, scales) = (half(block, 0), half(block, 2), &block[4..16]);
            let (high, low) = match kind {
                BlockKind::Q5_K => (Some(&block[16..48]), &block[48..176]),
                _ => (None, &block[16..144]),
            };
            for (pair, (low, out)) in low.chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
                let [first, second] = [2 * pair, 2 * pair + 1].map(|j| {
                    let (scale, minimum) = scale_and_minimum(scales, j);
                    (d * f32::from(scale), e * f32::from(minimum))
                });
                nibbles(low, out, |q, place| {
                    let half = place / 32;
                    let bit = high.map_or(0, |high| high[place % 32] >> (2 * pair + half) & 1);
                    let (scale, minimum) = if half == 0 { first } else { second };
                    scale * f32::from(q | bit << 4) - minimum
                });
            }
        }
        BlockKind::Q6_K => {
            let d = half(block, 208);
            for (part, out) in out.chunks_exact_mut(128).enumerate() {
                let (low, high) = (&block[64 * part..][..64], &block[128 + 32 * part..][..32]);
                let scales = &block[192 + 8 * part..][..8];
                for (place, out) in out.iter_mut().enumerate() {
                    let (quarter, at) = (place / 32, place % 32);
                    let nibble = low[at + 32 * (quarter % 2)] >> (4 * (quarter / 2)) & 15;
                    let q = nibble | (high[at] >> (2 * quarter) & 3) << 4;
                    *out = d * f32::from(scales[place / 16] as i8) * (f32::from(q) - 32.0);
                }
            }
        }
    }
}

/// The numbers of whole blocks, in f32; none if there is a rest.
pub fn values(kind: TensorType, blocks: &[u8]) -> Option<Vec<f32>> {
    if !blocks.len().is_multiple_of(kind.block().1) {
        return None;
    }
    let data = kind.decode(blocks);
    let count = blocks.len() / kind.block().1 * kind.block().0;
    HostTensor::new([count], data).ok().map(|tensor| tensor.to_f32().into_owned())
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TensorType::Blocks(kind) => fmt::Debug::fmt(kind, f),
            _ => fmt::Debug::fmt(self, f),
        }
    }
}

fn each<const N: usize, T>(bytes: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| from(*chunk)).collect()
}

/// Low nibbles to the first half, high ones to the second; `value` is told the place.
fn nibbles(bytes: &[u8], out: &mut [f32], value: impl Fn(u8, usize) -> f32) {
    let half = bytes.len();
    for (place, &byte) in bytes.iter().enumerate() {
        out[place] = value(byte & 15, place);
        out[place + half] = value(byte >> 4, place + half);
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

fn fifth(high: u32, place: usize) -> u8 {
    ((high >> place & 1) as u8) << 4
}

/// The 6-bit scale and minimum of sub-block `j` out of 12 bytes: the first four of each lie in the low bits of bytes 0–3
/// and 4–7, the others in nibbles of bytes 8–11 with their upper bits on top of the first.
fn scale_and_minimum(scales: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        return (scales[j] & 63, scales[j + 4] & 63);
    }
    let (scale, minimum) = (scales[j + 4] & 15, scales[j + 4] >> 4);
    (scale | scales[j - 4] >> 6 << 4, minimum | scales[j] >> 6 << 4)
}
