//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//!
//! A draw is a pure function of a key and a counter, so noise, timesteps, crops and dropout masks can be derived from
//! *what they are for* (seed, epoch, item, step) instead of from the order of calls. Resuming, another micro-batch or
//! another device then give the same draws. Nothing here keeps global state.

use std::f64::consts::TAU;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// One Philox4x32-10 block: four 32-bit words from a 128-bit counter and a 64-bit key.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..ROUNDS {
        let left = u64::from(MULTIPLIERS[0]) * u64::from(c0);
        let right = u64::from(MULTIPLIERS[1]) * u64::from(c2);
        (c0, c1, c2, c3) = ((right >> 32) as u32 ^ c1 ^ k0, right as u32, (left >> 32) as u32 ^ c3 ^ k1, left as u32);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// FNV-1a, 64 bits: a stable hash of names for keys (not for security).
pub fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

/// A stream of numbers addressed by what they are for.
///
/// ```
/// use lora_core::random::Stream;
/// let mut noise = Stream::new(42).at("noise").with(3).with(17); // seed 42, epoch 3, item 17
/// let again = noise.clone().normals(4);
/// assert_eq!(noise.normals(4), again);
/// ```
#[derive(Debug, Clone)]
pub struct Stream {
    key: u64,
    block: u64,
    words: [u32; 4],
    used: usize,
}

impl Stream {
    /// The stream of a key; equal keys give equal streams.
    pub fn new(key: u64) -> Self {
        Self { key, block: 0, words: [0; 4], used: 4 }
    }

    /// The stream for a named purpose below this one ("noise", "crop"), from its start.
    #[must_use]
    pub fn at(&self, purpose: &str) -> Self {
        self.with(fnv1a64(purpose.as_bytes()))
    }

    /// The stream for a number below this one (an epoch, an item, a step), from its start.
    #[must_use]
    pub fn with(&self, index: u64) -> Self {
        // A block in a counter range that draws never reach mixes key and index without a second hash function.
        let counter = [index as u32, (index >> 32) as u32, u32::MAX, u32::MAX];
        let [low, high, ..] = philox4x32(counter, split(self.key));
        Self::new(u64::from(high) << 32 | u64::from(low))
    }

    /// The key that stands for this stream; `Stream::new(key)` gives it back from its start.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// The next 32 uniform bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = philox4x32([self.block as u32, (self.block >> 32) as u32, 0, 0], split(self.key));
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// The next 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// Uniform in `[0, 1)` with 24 bits.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    /// Uniform in `0..bound` without bias (Lemire's multiplication with rejection). 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 {
            return 0;
        }
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// `count` draws of the standard normal distribution: Box-Muller in f64 on pairs of words, rounded to f32.
    pub fn normals(&mut self, count: usize) -> Vec<f32> {
        let mut values = Vec::with_capacity(count + 1);
        while values.len() < count {
            // (word + 1) / 2^32 lies in (0, 1]: the logarithm is finite.
            let radius = (-2.0 * ((f64::from(self.next_u32()) + 1.0) / 4_294_967_296.0).ln()).sqrt();
            let (sine, cosine) = (TAU * (f64::from(self.next_u32()) / 4_294_967_296.0)).sin_cos();
            values.push((radius * cosine) as f32);
            values.push((radius * sine) as f32);
        }
        values.truncate(count);
        values
    }

    /// A uniformly random permutation, in place (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

fn split(key: u64) -> [u32; 2] {
    [key as u32, (key >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_answers() {
        // Known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 10).
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn normals_have_the_right_moments_and_never_change() {
        let values = Stream::new(1).normals(100_000);
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / 1e5;
        let variance = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / 1e5 - mean * mean;
        assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
        // Saved runs must resume with the same draws in every later version.
        let first = Stream::new(7).at("noise").with(1).normals(2);
        assert_eq!(first.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), FROZEN);
    }
    const FROZEN: [u32; 2] = [0x3F86_3D94, 0x3FB8_A710];

    #[test]
    fn below_is_in_range_and_even() {
        let mut stream = Stream::new(3);
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[stream.below(7) as usize] += 1;
        }
        assert!(counts.iter().all(|&count| (9_500..10_500).contains(&count)), "{counts:?}");
        assert_eq!(stream.below(0), 0);
    }

    #[test]
    fn substreams_differ_and_do_not_depend_on_position() {
        let mut used = Stream::new(5);
        used.next_u64();
        assert_eq!(used.with(1).next_u64(), Stream::new(5).with(1).next_u64());
        assert_ne!(Stream::new(5).with(1).next_u64(), Stream::new(5).with(2).next_u64());
        assert_ne!(Stream::new(5).at("a").next_u64(), Stream::new(5).at("b").next_u64());
    }
}
