//! Aspect-ratio buckets: which size a picture is trained at, how it is scaled to it and cut, by sd-scripts' rule (v0.10.1,
//! `BucketManager`), so that a dataset falls into the same buckets here as there. How pictures are cut is
//! [`crate::crop`]'s; batches of one bucket are [`crate::sampler`]'s.
//!
//! With upscaling (the default) there is a list: the square of the area's side, and for every width in steps between the
//! limits the largest height whose area does not exceed the resolution's, both ways round. A picture goes to the bucket of
//! the nearest aspect ratio, scaled so that it covers it. Without upscaling there is no list: a picture that is too large
//! is reduced to the area, and its sides are cut down to multiples of the step.

use crate::crop::CropPlan;
use crate::{Error, Result};

/// The limits of buckets, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketOptions {
    /// Width and height whose product no bucket exceeds.
    pub resolution: (usize, usize),
    /// Shortest side.
    pub min: usize,
    /// Longest side.
    pub max: usize,
    /// Sides are multiples of this.
    pub step: usize,
    /// Pictures are never enlarged; `min` and `max` do not count then.
    pub no_upscale: bool,
}

/// The buckets that pictures are put into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buckets {
    options: BucketOptions,
    list: Vec<(usize, usize)>,
}

impl Buckets {
    /// Buckets of these limits. The resolution's sides must lie between them, and the step must be a multiple of 8.
    ///
    /// # Errors
    /// [`Error::Option`], which names the key and what it may be.
    pub fn new(options: BucketOptions) -> Result<Self> {
        let BucketOptions { resolution: (width, height), step, .. } = options;
        let wrong = |key, value: usize, reason: String| Err(Error::Option { key, value: value.to_string(), reason });
        if step == 0 || step % 8 != 0 {
            return wrong("bucket_reso_steps", step, "expected a multiple of 8, as latents have an eighth".into());
        }
        let (min, max) = (options.min / step * step, options.max.next_multiple_of(step));
        if options.no_upscale {
            if width.min(height) < step {
                return wrong("bucket_reso_steps", step, format!("is more than a side of {width}×{height}"));
            }
            return Ok(Self { options, list: Vec::new() });
        }
        if min == 0 || width.min(height) < min {
            let reason = format!("expected at least {step} and at most a side of {width}×{height}");
            return wrong("min_bucket_reso", options.min, reason);
        }
        if width.max(height) > max {
            return wrong("max_bucket_reso", options.max, format!("expected at least a side of {width}×{height}"));
        }
        let area = width * height;
        let square = area.isqrt() / step * step;
        let mut list = vec![(square, square)];
        for width in (min..=max).step_by(step) {
            let height = (area / width / step * step).min(max);
            if height >= min {
                list.extend([(width, height), (height, width)]);
            }
        }
        list.sort_unstable();
        list.dedup();
        Ok(Self { options, list })
    }

    /// Their limits.
    pub fn options(&self) -> &BucketOptions {
        &self.options
    }

    /// All buckets, sorted; empty without upscaling.
    pub fn list(&self) -> &[(usize, usize)] {
        &self.list
    }

    /// How a picture of this size is scaled and cut from the middle; `target` is its bucket. `None` where a side is
    /// shorter than the step, which only happens without upscaling.
    pub fn plan(&self, size: (usize, usize)) -> Option<CropPlan> {
        let ratio = size.0 as f64 / size.1 as f64;
        if self.options.no_upscale {
            let resized = self.reduced(size, ratio);
            let down = |side: usize| side / self.options.step * self.options.step;
            let target = (down(resized.0), down(resized.1));
            return (target.0 > 0 && target.1 > 0).then(|| CropPlan::centered(resized, target));
        }
        let apart = |bucket: &(usize, usize)| (bucket.0 as f64 / bucket.1 as f64 - ratio).abs();
        // The first of equally near ones.
        let nearest = self.list.iter().min_by(|a, b| apart(a).total_cmp(&apart(b)));
        let target = if self.list.contains(&size) { size } else { *nearest? };
        Some(CropPlan::center(size, target))
    }

    /// The size after reducing a picture to the area; of two roundings the one that keeps the aspect better.
    fn reduced(&self, size: (usize, usize), ratio: f64) -> (usize, usize) {
        let (area, step) = (self.options.resolution.0 * self.options.resolution.1, self.options.step);
        if size.0 * size.1 <= area {
            return size;
        }
        let round = |value: f64| (value + 0.5) as usize;
        let down = |value: f64| round(value) / step * step;
        let width = (area as f64 * ratio).sqrt();
        let by_width = down(width);
        let by_height = down(area as f64 / width);
        let error = |width: usize, height: usize| match height {
            0 => f64::INFINITY,
            _ => (width as f64 / height as f64 - ratio).abs(),
        };
        let first = error(by_width, down(by_width as f64 / ratio));
        let second = error(down(by_height as f64 * ratio), by_height);
        if first < second {
            (by_width, round(by_width as f64 / ratio))
        } else {
            (round(by_height as f64 * ratio), by_height)
        }
    }
}

/// The size that each picture is brought to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Framing {
    /// One size for all.
    Fixed((usize, usize)),
    /// Its bucket's.
    Buckets(Buckets),
}

impl Framing {
    /// Width and height of one size for all; those that buckets have the area of.
    pub fn resolution(&self) -> (usize, usize) {
        match self {
            Framing::Fixed(size) => *size,
            Framing::Buckets(buckets) => buckets.options().resolution,
        }
    }

    /// How a picture of this size is scaled and cut from the middle; `None` where it is too small for any bucket.
    pub fn plan(&self, size: (usize, usize)) -> Option<CropPlan> {
        match self {
            Framing::Fixed(target) => Some(CropPlan::center(size, *target)),
            Framing::Buckets(buckets) => buckets.plan(size),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Size = (usize, usize);
    type Framed = (Size, Size, Size);

    fn buckets(side: usize, max: usize, no_upscale: bool) -> Buckets {
        Buckets::new(BucketOptions { resolution: (side, side), min: 256, max, step: 64, no_upscale }).unwrap()
    }

    #[test]
    fn the_lists_are_sd_scripts() {
        let list = [
            (256, 832),
            (256, 896),
            (256, 960),
            (256, 1024),
            (320, 704),
            (320, 768),
            (384, 640),
            (448, 576),
            (512, 512),
            (576, 448),
            (640, 384),
            (704, 320),
            (768, 320),
            (832, 256),
            (896, 256),
            (960, 256),
            (1024, 256),
        ];
        assert_eq!(buckets(512, 1024, false).list(), list);
        assert_eq!(buckets(768, 1024, false).list().len(), 19);
        let large = buckets(1024, 2048, false);
        assert_eq!(large.list().len(), 41);
        for size in [(832, 1216), (896, 1152), (960, 1088), (1024, 1024), (1344, 768), (1536, 640)] {
            assert!(large.list().contains(&size), "{size:?}");
        }
    }

    /// Bucket, size after scaling and corner of the crop of pictures at 512×512, 256 to 1024 in steps of 64: with
    /// upscaling and without, worked out from sd-scripts' rule by a program of its own.
    const WORKED: [(Size, [Framed; 2]); 14] = [
        ((512, 512), [((512, 512), (512, 512), (0, 0)), ((512, 512), (512, 512), (0, 0))]),
        ((500, 500), [((512, 512), (512, 512), (0, 0)), ((448, 448), (500, 500), (26, 26))]),
        ((640, 480), [((576, 448), (597, 448), (10, 0)), ((512, 384), (512, 384), (0, 0))]),
        ((1920, 1080), [((640, 384), (683, 384), (21, 0)), ((640, 384), (683, 384), (21, 0))]),
        ((1080, 1920), [((384, 640), (384, 683), (0, 21)), ((384, 640), (384, 683), (0, 21))]),
        ((1000, 667), [((640, 384), (640, 427), (0, 21)), ((576, 384), (576, 384), (0, 0))]),
        ((832, 1216), [((384, 640), (438, 640), (27, 0)), ((384, 576), (394, 576), (5, 0))]),
        ((1024, 1024), [((512, 512), (512, 512), (0, 0)), ((512, 512), (512, 512), (0, 0))]),
        ((3000, 1000), [((832, 256), (832, 277), (0, 10)), ((768, 256), (768, 256), (0, 0))]),
        ((300, 200), [((640, 384), (640, 427), (0, 21)), ((256, 192), (300, 200), (22, 4))]),
        ((256, 1024), [((256, 1024), (256, 1024), (0, 0)), ((256, 1024), (256, 1024), (0, 0))]),
        ((768, 512), [((640, 384), (640, 427), (0, 21)), ((576, 384), (576, 384), (0, 0))]),
        ((4000, 500), [((1024, 256), (2048, 256), (512, 0)), ((1024, 128), (1024, 128), (0, 0))]),
        ((513, 511), [((512, 512), (514, 512), (1, 0)), ((512, 448), (513, 511), (0, 31))]),
    ];

    #[test]
    fn pictures_are_framed_as_by_sd_scripts() {
        for (size, expected) in WORKED {
            for (no_upscale, (target, resized, offset)) in [false, true].into_iter().zip(expected) {
                let plan = buckets(512, 1024, no_upscale).plan(size).unwrap();
                assert_eq!(
                    (plan.target, plan.resized, plan.offset),
                    (target, resized, offset),
                    "{size:?} {no_upscale}"
                );
            }
        }
        assert_eq!(buckets(512, 1024, true).plan((60, 500)), None, "shorter than a step");
    }

    #[test]
    fn limits_that_cannot_work_are_refused() {
        let options = BucketOptions { resolution: (512, 512), min: 256, max: 1024, step: 64, no_upscale: false };
        for (options, key) in [
            (BucketOptions { step: 12, ..options }, "bucket_reso_steps"),
            (BucketOptions { min: 600, ..options }, "min_bucket_reso"),
            (BucketOptions { min: 10, ..options }, "min_bucket_reso"),
            (BucketOptions { max: 500, step: 8, ..options }, "max_bucket_reso"),
            (BucketOptions { resolution: (32, 512), no_upscale: true, ..options }, "bucket_reso_steps"),
        ] {
            assert!(Buckets::new(options).unwrap_err().to_string().contains(key), "{key}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_bucket_is_larger_than_the_area_and_no_crop_leaves_the_picture(w in 1usize..6000, h in 1usize..6000, no_upscale: bool) {
            let Some(plan) = buckets(512, 1024, no_upscale).plan((w, h)) else {
                prop_assert!(no_upscale);
                return Ok(());
            };
            prop_assert!(plan.target.0 * plan.target.1 <= 512 * 512 || no_upscale);
            prop_assert!(plan.target.0 % 64 == 0 && plan.target.1 % 64 == 0);
            prop_assert!(plan.offset.0 + plan.target.0 <= plan.resized.0 && plan.offset.1 + plan.target.1 <= plan.resized.1);
            prop_assert!(!no_upscale || plan.resized.0 <= w.max(64) && plan.resized.1 <= h.max(64));
        }
    }
}
