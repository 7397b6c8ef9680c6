//! Cutting a picture to a target size without squashing it: the smallest scaling that covers the target, then a crop.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::{U8, U8x3};
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeOptions, Resizer};

use crate::{Error, Result, RgbPicture};

/// How a picture is scaled and cut. Sizes in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CropPlan {
    /// Size after scaling, width and height.
    pub resized: (usize, usize),
    /// Left and top edge of the crop in the scaled picture.
    pub offset: (usize, usize),
    /// Size of the crop, width and height.
    pub target: (usize, usize),
}

impl CropPlan {
    /// The middle of the picture: scaled so that it just covers the target (sides rounded to the nearest pixel), then
    /// `trim / 2` cut off on the left and at the top. The same geometry as sd-scripts'.
    pub fn center(source: (usize, usize), target: (usize, usize)) -> Self {
        let scale = |from: usize, to: usize| to as f64 / from as f64;
        // The side that is proportionally shorter decides.
        let factor = scale(source.0, target.0).max(scale(source.1, target.1));
        let side = |from: usize, to: usize| ((from as f64 * factor + 0.5) as usize).max(to);
        Self::centered((side(source.0, target.0), side(source.1, target.1)), target)
    }

    /// The whole picture brought to the target, its aspect changed.
    pub(crate) fn squash(target: (usize, usize)) -> Self {
        Self { resized: target, offset: (0, 0), target }
    }

    /// The middle of a picture scaled to a size, which must not be smaller than the target.
    pub(crate) fn centered(resized: (usize, usize), target: (usize, usize)) -> Self {
        let offset = (resized.0.saturating_sub(target.0) / 2, resized.1.saturating_sub(target.1) / 2);
        Self { resized, offset, target }
    }

    /// Factor by which the picture is enlarged (above 1) or reduced.
    pub fn scale(&self, source: (usize, usize)) -> f64 {
        self.resized.0 as f64 / source.0 as f64
    }

    /// Share of the scaled picture that the crop cuts away.
    pub fn trimmed(&self) -> f64 {
        1.0 - (self.target.0 * self.target.1) as f64 / (self.resized.0 * self.resized.1) as f64
    }

    /// Scales and cuts in one pass, with a Lanczos filter that widens when it shrinks (so it averages, as area filters do).
    ///
    /// # Errors
    /// [`Error::Option`] where the box does not lie in the picture.
    pub fn apply(&self, picture: &RgbPicture) -> Result<RgbPicture> {
        self.apply_within(picture, (picture.width() as f64, picture.height() as f64))
    }

    /// The same where the picture ends within its last row or column, as one decoded at a fraction of its size does.
    pub(crate) fn apply_within(&self, picture: &RgbPicture, extent: (f64, f64)) -> Result<RgbPicture> {
        let size = (picture.width(), picture.height());
        if self.resized == size && self.target == size {
            return Ok(picture.clone());
        }
        let data = self.cut(picture.data(), size, extent, 3)?;
        RgbPicture::new(self.target.0, self.target.1, data).ok_or_else(|| self.failed("the target has no pixels"))
    }

    /// The same for one or three interleaved bytes a pixel.
    pub(crate) fn cut(
        &self,
        data: &[u8],
        size: (usize, usize),
        extent: (f64, f64),
        channels: usize,
    ) -> Result<Vec<u8>> {
        // The crop box in the source's own pixels: the scaled picture is never made in full.
        let (x, y) = (extent.0 / self.resized.0 as f64, extent.1 / self.resized.1 as f64);
        // Rounding may carry a box to the edge a hair beyond it, which the resizer refuses.
        let (left, top) = (self.offset.0 as f64 * x, self.offset.1 as f64 * y);
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3)).crop(
            left,
            top,
            (self.target.0 as f64 * x).min(size.0 as f64 - left),
            (self.target.1 as f64 * y).min(size.1 as f64 - top),
        );
        match channels {
            1 => self.resize::<U8>(data, size, &options),
            _ => self.resize::<U8x3>(data, size, &options),
        }
    }

    /// The pixel's type is chosen here because the resizer, left to choose, brings its thirteen types into this crate: megabytes
    /// of code and minutes of compiling.
    fn resize<P: PixelTrait>(&self, data: &[u8], size: (usize, usize), options: &ResizeOptions) -> Result<Vec<u8>> {
        let source = TypedImageRef::<P>::from_buffer(size.0 as u32, size.1 as u32, data);
        let source = source.map_err(|error| self.failed(error))?;
        let mut cut = vec![0; self.target.0 * self.target.1 * size_of::<P>()];
        let target = TypedImage::<P>::from_buffer(self.target.0 as u32, self.target.1 as u32, &mut cut);
        let mut target = target.map_err(|error| self.failed(error))?;
        Resizer::new().resize_typed(&source, &mut target, options).map_err(|error| self.failed(error))?;
        Ok(cut)
    }

    fn failed(&self, reason: impl std::fmt::Display) -> Error {
        Error::Option { key: "crop", value: format!("{self:?}"), reason: reason.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn geometry_is_sd_scripts() {
        // Its published rule worked out for three sizes at 512×512.
        for (source, resized, offset) in [
            ((640, 480), (683, 512), (85, 0)),
            ((1080, 1920), (512, 910), (0, 199)),
            ((513, 511), (514, 512), (1, 0)),
            ((100, 100), (512, 512), (0, 0)),
        ] {
            let plan = CropPlan::center(source, (512, 512));
            assert_eq!((plan.resized, plan.offset), (resized, offset), "{source:?}");
        }
    }

    #[test]
    fn the_middle_is_kept() {
        // Red left quarter, blue right quarter, green between.
        let pixel = |x: usize| {
            if x < 25 {
                [255, 0, 0]
            } else if x < 75 {
                [0, 255, 0]
            } else {
                [0, 0, 255]
            }
        };
        let data = (0..50).flat_map(|_| (0..100).flat_map(pixel)).collect();
        let picture = RgbPicture::new(100, 50, data).unwrap();
        let cut = CropPlan::center((100, 50), (32, 32)).apply(&picture).unwrap();
        let greenish = cut.data().as_chunks::<3>().0.iter().filter(|pixel| pixel[1] > 128).count();
        assert!(greenish >= 31 * 32, "{greenish}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_plan_can_be_carried_out(w in 1usize..700, h in 1usize..700, tw in 1usize..90, th in 1usize..90, edge: bool) {
            let picture = RgbPicture::new(w, h, vec![9; 3 * w * h]).unwrap();
            let mut plan = CropPlan::center((w, h), (tw, th));
            if edge {
                plan.offset = (plan.resized.0 - tw, plan.resized.1 - th);
            }
            prop_assert!(plan.apply(&picture).is_ok());
            prop_assert!(CropPlan::squash((tw, th)).apply(&picture).is_ok());
        }

        #[test]
        fn the_crop_lies_inside_and_nothing_is_squashed(w in 1usize..5000, h in 1usize..5000, tw in 1usize..200, th in 1usize..200) {
            let (tw, th) = (8 * tw, 8 * th);
            let plan = CropPlan::center((w, h), (tw, th));
            prop_assert!(plan.offset.0 + tw <= plan.resized.0 && plan.offset.1 + th <= plan.resized.1);
            // One side fits exactly; the other keeps the aspect to within a pixel of rounding.
            prop_assert!(plan.resized.0 == tw || plan.resized.1 == th);
            let factor = (tw as f64 / w as f64).max(th as f64 / h as f64);
            prop_assert!((plan.resized.0 as f64 - w as f64 * factor).abs() <= 1.0);
            prop_assert!((plan.resized.1 as f64 - h as f64 * factor).abs() <= 1.0);
        }
    }
}
