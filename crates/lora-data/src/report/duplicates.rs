//! The same picture again: equal files by their SHA-256, nearly equal ones by a perceptual hash (the signs of the lowest
//! frequencies of the brightness, Zauner 2010) and a second look at small colour copies.

use std::collections::HashMap;

use super::measure::luminance;
use super::{Looked, PictureReport};
use crate::crop::CropPlan;
use crate::finding::{Finding, FindingKind};
use crate::{Result, RgbPicture};

/// Side of the copy that frequencies are taken of, and number of them each way.
const SIDE: usize = 32;
const FREQUENCIES: usize = 8;
/// Side of the colour copy.
const COLOURS: usize = 8;
/// Mean difference of the colour copies, of 255, that near duplicates may have.
const DIFFERENCE: u32 = 10;

/// What nearly equal pictures have nearly in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fingerprint {
    hash: u64,
    colours: Vec<u8>,
}

impl Fingerprint {
    pub(super) fn of(picture: &RgbPicture) -> Result<Self> {
        let small = CropPlan::squash((SIDE, SIDE)).apply(picture)?;
        let grey: Vec<f32> = small.data().as_chunks::<3>().0.iter().map(|&pixel| luminance(pixel)).collect();
        let cosine = |frequency: usize, at: usize| {
            (std::f32::consts::PI * (at as f32 + 0.5) * frequency as f32 / SIDE as f32).cos()
        };
        // Rows first, then columns; without the constant, so that brightness does not matter.
        let rows: Vec<f32> = (0..SIDE)
            .flat_map(|y| (1..=FREQUENCIES).map(move |u| (u, y)))
            .map(|(u, y)| (0..SIDE).map(|x| grey[y * SIDE + x] * cosine(u, x)).sum())
            .collect();
        let values: Vec<f32> = (1..=FREQUENCIES)
            .flat_map(|v| (0..FREQUENCIES).map(move |u| (u, v)))
            .map(|(u, v)| (0..SIDE).map(|y| rows[y * FREQUENCIES + u] * cosine(v, y)).sum())
            .collect();
        let mut sorted = values.clone();
        sorted.sort_by(f32::total_cmp);
        let median = sorted[values.len() / 2];
        let hash = values.iter().fold(0, |hash, &value| hash << 1 | u64::from(value > median));
        let colours = CropPlan::squash((COLOURS, COLOURS)).apply(&small)?.data().to_vec();
        Ok(Self { hash, colours })
    }

    fn is_near(&self, other: &Self, bits: u32) -> bool {
        let pairs = self.colours.iter().zip(&other.colours);
        (self.hash ^ other.hash).count_ones() <= bits
            && pairs.map(|(a, b)| u32::from(a.abs_diff(*b))).sum::<u32>() <= DIFFERENCE * self.colours.len() as u32
    }
}

/// Each later picture is reported with the first one that it repeats.
pub(super) fn find(reports: &[PictureReport], all: &[Option<Looked>], bits: u32, findings: &mut Vec<Finding>) {
    let name = |index: usize| {
        reports[index].path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let mut exact: HashMap<[u8; 32], usize> = HashMap::new();
    let mut bands = Bands::new(bits);
    for (index, looked) in all.iter().enumerate() {
        let Some(looked) = looked else { continue };
        if let Some(&first) = exact.get(&looked.sha256) {
            let detail = format!("the same file as {}", name(first));
            findings.push(Finding::new(&reports[index].path, FindingKind::ExactDuplicate, detail));
            continue;
        }
        exact.insert(looked.sha256, index);
        let near = bands.candidates(looked.fingerprint.hash).into_iter().find(|&first| {
            all[first].as_ref().is_some_and(|other| other.fingerprint.is_near(&looked.fingerprint, bits))
        });
        if let Some(first) = near {
            let detail = format!("nearly the same as {}", name(first));
            findings.push(Finding::new(&reports[index].path, FindingKind::NearDuplicate, detail));
        }
        bands.insert(looked.fingerprint.hash, index);
    }
}

/// Hashes that differ in at most `bits` bits are equal in at least one of `bits + 1` bands, so that only those need to be
/// compared.
struct Bands {
    count: u32,
    places: HashMap<(u32, u64), Vec<usize>>,
}

impl Bands {
    fn new(bits: u32) -> Self {
        Self { count: (bits + 1).min(64), places: HashMap::new() }
    }

    fn of(&self, hash: u64) -> impl Iterator<Item = (u32, u64)> + use<> {
        let count = self.count;
        (0..count).map(move |band| {
            let (start, end) = (64 * band / count, 64 * (band + 1) / count);
            (band, hash >> start & (u64::MAX >> (64 - (end - start))))
        })
    }

    fn candidates(&self, hash: u64) -> Vec<usize> {
        let mut found: Vec<usize> =
            self.of(hash).filter_map(|band| self.places.get(&band)).flatten().copied().collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    fn insert(&mut self, hash: u64, index: usize) {
        for band in self.of(hash) {
            self.places.entry(band).or_default().push(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_core::random::Stream;
    use proptest::prelude::*;

    use super::*;

    /// Smooth random blobs, as a photograph has.
    fn blobs(seed: u64, width: usize, height: usize) -> RgbPicture {
        let mut random = Stream::new(seed);
        let mut number = || f64::from(random.uniform());
        let spots: Vec<[f64; 6]> = (0..12).map(|_| std::array::from_fn(|_| number())).collect();
        let at = |x: usize, y: usize| {
            let (x, y) = (x as f64 / width as f64, y as f64 / height as f64);
            let mut colour = [120.0; 3];
            for [cx, cy, red, green, blue, size] in &spots {
                let near = (-((x - cx).powi(2) + (y - cy).powi(2)) / (0.01 + 0.05 * size)).exp();
                for (own, toward) in colour.iter_mut().zip([red, green, blue]) {
                    *own += near * (255.0 * toward - *own);
                }
            }
            colour.map(|value| value as u8)
        };
        let data = (0..height).flat_map(|y| (0..width).map(move |x| (x, y))).flat_map(|(x, y)| at(x, y));
        RgbPicture::new(width, height, data.collect()).unwrap()
    }

    #[test]
    fn scaled_brightened_and_compressed_copies_are_near_and_others_are_not() {
        let of = |picture: &RgbPicture| Fingerprint::of(picture).unwrap();
        let originals: Vec<_> = (0..40).map(|seed| blobs(seed, 200, 150)).collect();
        for (index, picture) in originals.iter().enumerate() {
            let own = of(picture);
            let smaller = CropPlan::squash((90, 68)).apply(picture).unwrap();
            let brighter: Vec<u8> = picture.data().iter().map(|&value| value.saturating_add(6)).collect();
            let brighter = RgbPicture::new(200, 150, brighter).unwrap();
            let compressed = image::load_from_memory(&picture.to_jpeg(80)).unwrap().into_rgb8();
            let compressed = RgbPicture::new(200, 150, compressed.into_raw()).unwrap();
            for copy in [smaller, brighter, compressed] {
                assert!(own.is_near(&of(&copy), 6), "{index}: {}", (own.hash ^ of(&copy).hash).count_ones());
            }
            let others = originals.iter().enumerate().filter(|(other, _)| *other != index);
            assert!(others.into_iter().all(|(_, other)| !own.is_near(&of(other), 6)), "{index}");
        }
    }

    proptest! {
        #[test]
        fn bands_miss_nothing(hash: u64, flips in proptest::collection::vec(0u32..64, 0..6)) {
            let mut bands = Bands::new(6);
            bands.insert(hash, 7);
            let other = flips.iter().fold(hash, |hash, bit| hash ^ 1 << bit);
            prop_assert_eq!(bands.candidates(other), vec![7]);
        }
    }
}
