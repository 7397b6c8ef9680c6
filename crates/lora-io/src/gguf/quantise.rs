//! Numbers into the blocks of GGUF's types, the other way round from [`super::blocks`].
//!
//! F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 have the bytes of llama.cpp's reference quantiser. Of Q4_K, Q5_K and Q6_K
//! the reference searches scales; the search here is another one, whose squared error is at most that of scales from the
//! extremes and rounding to nearest.

use half::{bf16, f16};
use lora_core::blocks::BlockKind;
use rayon::prelude::*;

use super::TensorType;

/// Bytes of numbers that one thread works on at once.
const CHUNK: usize = 64 << 10;

/// Whole blocks of the numbers, whose count must be a multiple of a block's; what is left over is not stored.
pub fn quantise(kind: TensorType, values: &[f32]) -> Vec<u8> {
    let (elements, bytes) = kind.block();
    let mut blocks = vec![0; values.len() / elements * bytes];
    let many = (CHUNK / elements).max(1);
    let pairs = blocks.par_chunks_mut(many * bytes).zip(values.par_chunks(many * elements));
    pairs.for_each(|(blocks, values)| {
        for (block, values) in blocks.chunks_exact_mut(bytes).zip(values.chunks_exact(elements)) {
            encode(kind, values, block);
        }
    });
    blocks
}

fn encode(kind: TensorType, values: &[f32], block: &mut [u8]) {
    match kind {
        TensorType::F32 => block.copy_from_slice(&values[0].to_le_bytes()),
        TensorType::F16 => block.copy_from_slice(&f16::from_f32(values[0]).to_le_bytes()),
        TensorType::BF16 => block.copy_from_slice(&bf16::from_f32(values[0]).to_le_bytes()),
        TensorType::Blocks(BlockKind::Q4_0) => symmetric(values, block, 16, None),
        TensorType::Blocks(BlockKind::Q5_0) => symmetric(values, block, 32, Some(2)),
        TensorType::Blocks(BlockKind::Q4_1) => affine(values, block, 15, None),
        TensorType::Blocks(BlockKind::Q5_1) => affine(values, block, 31, Some(4)),
        TensorType::Blocks(BlockKind::Q8_0) => {
            let largest = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            let d = largest / 127.0;
            put_half(block, 0, d);
            let inverse = inverse(d);
            block[2..].iter_mut().zip(values).for_each(|(q, value)| *q = (value * inverse).round() as i8 as u8);
        }
        TensorType::Blocks(BlockKind::Q4_K) => sub_blocks(values, block, 15),
        TensorType::Blocks(BlockKind::Q5_K) => sub_blocks(values, block, 31),
        TensorType::Blocks(BlockKind::Q6_K) => signed_sub_blocks(values, block),
    }
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn put_half(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// Nibbles from both halves of the numbers side by side; fifth bits at `high`, where there are any.
fn put_nibbles(block: &mut [u8], at: usize, high: Option<usize>, q: &[u8]) {
    let half = q.len() / 2;
    for place in 0..half {
        block[at + place] = (q[place] & 15) | (q[place + half] & 15) << 4;
    }
    if let Some(high) = high {
        let bits = q.iter().enumerate().fold(0u32, |bits, (place, q)| bits | u32::from(q >> 4 & 1) << place);
        block[high..high + 4].copy_from_slice(&bits.to_le_bytes());
    }
}

/// `d (q - levels / 2)`: the number of the largest magnitude is the lowest level.
fn symmetric(values: &[f32], block: &mut [u8], levels: u8, high: Option<usize>) {
    let extreme = values.iter().fold(0.0f32, |most, &value| if value.abs() > most.abs() { value } else { most });
    let middle = levels / 2;
    let d = extreme / -f32::from(middle);
    put_half(block, 0, d);
    let inverse = f64::from(inverse(d));
    let level = |value: &f32| {
        // The reference adds in f64 and cuts off in f32.
        let level = (f64::from(*value) * inverse + f64::from(middle) + 0.5) as f32;
        (level as u8).min(levels - 1)
    };
    let q: Vec<u8> = values.iter().map(level).collect();
    put_nibbles(block, high.map_or(2, |high| high + 4), high, &q);
}

/// `d q + m`.
fn affine(values: &[f32], block: &mut [u8], most: u8, high: Option<usize>) {
    let (low, top) = values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, top), v| (low.min(*v), top.max(*v)));
    let d = (top - low) / f32::from(most);
    put_half(block, 0, d);
    put_half(block, 2, low);
    let inverse = inverse(d);
    let q: Vec<u8> = values.iter().map(|value| (((value - low) * inverse + 0.5) as u8).min(most)).collect();
    put_nibbles(block, high.map_or(4, |high| high + 4), high, &q);
}

/// Q4_K and Q5_K: `d s q - e m` with a scale and a minimum of 6 bits for each of 8 sub-blocks.
fn sub_blocks(values: &[f32], block: &mut [u8], most: u8) {
    let ranges: Vec<(f32, f32)> = values
        .chunks_exact(32)
        .map(|own| {
            // A minimum is never above zero.
            let (low, top) = own.iter().fold((0.0f32, 0.0f32), |(low, top), v| (low.min(*v), top.max(*v)));
            ((top - low) / f32::from(most), -low)
        })
        .collect();
    let largest = |of: fn(&(f32, f32)) -> f32| ranges.iter().map(of).fold(0.0f32, f32::max) / 63.0;
    put_half(block, 0, largest(|range| range.0));
    put_half(block, 2, largest(|range| range.1));
    let stored = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let (d, e) = (stored(0), stored(2));
    let level = |value: f32, unit: f32| (value * inverse(unit)).round().clamp(0.0, 63.0) as i32;
    let (mut scales, mut q) = ([0u8; 12], [0u8; 256]);
    for (j, (own, &(scale, minimum))) in values.chunks_exact(32).zip(&ranges).enumerate() {
        let (scale, minimum) = (level(scale, d), level(minimum, e));
        // The plain choice comes first and stays where no other is better.
        let nearby = [0, -1, 1, -2, -3].iter().flat_map(|by| [0, -1, 1, -2].map(|shift| (scale + by, minimum + shift)));
        let mut best = (f32::INFINITY, 0, 0);
        for (scale, minimum) in nearby.filter(|(scale, minimum)| (0..64).contains(scale) && (0..64).contains(minimum)) {
            let error = error_of(own, d * scale as f32, e * minimum as f32, most);
            if error < best.0 {
                best = (error, scale, minimum);
            }
        }
        let (_, scale, minimum) = best;
        put_scale(&mut scales, j, scale as u8, minimum as u8);
        let (scale, minimum) = (d * scale as f32, e * minimum as f32);
        for (q, value) in q[32 * j..].iter_mut().zip(own) {
            *q = nearest(*value + minimum, inverse(scale), most);
        }
    }
    block[4..16].copy_from_slice(&scales);
    let (high, low) = if most == 31 { (Some(16), 48) } else { (None, 16) };
    for (pair, q) in q.chunks_exact(64).enumerate() {
        for place in 0..32 {
            block[low + 32 * pair + place] = (q[place] & 15) | (q[place + 32] & 15) << 4;
            if let Some(high) = high {
                let bits = (q[place] >> 4) << (2 * pair) | (q[place + 32] >> 4) << (2 * pair + 1);
                block[high + place] |= bits;
            }
        }
    }
}

fn nearest(value: f32, inverse: f32, most: u8) -> u8 {
    (value * inverse).round().clamp(0.0, f32::from(most)) as u8
}

/// The squared error of a sub-block with this scale and minimum.
fn error_of(values: &[f32], scale: f32, minimum: f32, most: u8) -> f32 {
    let inverse = inverse(scale);
    values.iter().map(|v| (scale * f32::from(nearest(v + minimum, inverse, most)) - minimum - v).powi(2)).sum()
}

/// The other way round from `scale_and_minimum` of [`super::blocks`].
fn put_scale(scales: &mut [u8; 12], j: usize, scale: u8, minimum: u8) {
    if j < 4 {
        scales[j] |= scale;
        scales[j + 4] |= minimum;
    } else {
        scales[j + 4] = scale & 15 | (minimum & 15) << 4;
        scales[j - 4] |= (scale >> 4) << 6;
        scales[j] |= (minimum >> 4) << 6;
    }
}

/// Q6_K: `d s (q - 32)` with a scale of 8 bits for each of 16 sub-blocks.
fn signed_sub_blocks(values: &[f32], block: &mut [u8]) {
    let extreme = |own: &[f32]| own.iter().fold(0.0f32, |most, &v| if v.abs() > most.abs() { v } else { most });
    let wanted: Vec<f32> = values.chunks_exact(16).map(|own| extreme(own) / -32.0).collect();
    put_half(block, 208, extreme(&wanted) / -128.0);
    let d = f16::from_le_bytes([block[208], block[209]]).to_f32();
    let level = |value: f32, scale: f32| (value * inverse(scale)).round().clamp(-32.0, 31.0);
    let error = |own: &[f32], scale: f32| own.iter().map(|v| (scale * level(*v, scale) - v).powi(2)).sum::<f32>();
    let mut q = [0u8; 256];
    for (j, (own, wanted)) in values.chunks_exact(16).zip(&wanted).enumerate() {
        let plain = (wanted * inverse(d)).round().clamp(-128.0, 127.0) as i32;
        let mut best = (f32::INFINITY, 0);
        for scale in [0, -1, 1, -2, 2, -3, 3].map(|by| plain + by).into_iter().filter(|s| (-128..128).contains(s)) {
            let error = error(own, d * scale as f32);
            if error < best.0 {
                best = (error, scale);
            }
        }
        block[192 + j] = best.1 as i8 as u8;
        let scale = d * best.1 as f32;
        q[16 * j..].iter_mut().zip(own).for_each(|(q, value)| *q = (level(*value, scale) + 32.0) as u8);
    }
    for (place, q) in q.iter().enumerate() {
        let (part, place) = (place / 128, place % 128);
        let (quarter, at) = (place / 32, place % 32);
        block[64 * part + at + 32 * (quarter % 2)] |= (q & 15) << (4 * (quarter / 2));
        block[128 + 32 * part + at] |= (q >> 4) << (2 * quarter);
    }
}
