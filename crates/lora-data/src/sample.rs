//! A picture on its way to training: its pixels, how much each of them counts, and which part of the file it shows. What
//! happens to it on that way is [`crate::processor`]'s.

use crate::crop::CropPlan;
use crate::{Error, Result, RgbPicture};

/// How much each pixel counts in the loss: 0 not at all, 255 in full.
#[derive(Clone, PartialEq, Eq)]
pub struct Mask {
    width: usize,
    height: usize,
    data: Vec<u8>,
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mask({}×{})", self.width, self.height)
    }
}

impl Mask {
    /// From one byte a pixel, row by row; `None` where their number does not fit the size.
    pub fn new(width: usize, height: usize, data: Vec<u8>) -> Option<Self> {
        (width > 0 && height > 0 && width.checked_mul(height)? == data.len()).then_some(Self { width, height, data })
    }

    /// Pixels in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// One byte a pixel, row by row.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// Means over squares of `factor` pixels, in [0, 1], `[height / factor, width / factor]`: what latents are weighted
    /// with. Sides are multiples of the factor; what is left over is not looked at.
    pub fn reduced(&self, factor: usize) -> Vec<f32> {
        let (width, height) = (self.width / factor, self.height / factor);
        let mean = |x: usize, y: usize| {
            let rows = (0..factor).map(|row| (y * factor + row) * self.width + x * factor);
            let sum: u32 =
                rows.flat_map(|start| &self.data[start..start + factor]).map(|&value| u32::from(value)).sum();
            sum as f32 / (255 * factor * factor) as f32
        };
        (0..height).flat_map(|y| (0..width).map(move |x| (x, y))).map(|(x, y)| mean(x, y)).collect()
    }

    /// A copy of another size, for a picture whose mask differs from it in size.
    pub(crate) fn resized(&self, width: usize, height: usize) -> Result<Self> {
        if (self.width, self.height) == (width, height) {
            return Ok(self.clone());
        }
        let plan = CropPlan { resized: (width, height), offset: (0, 0), target: (width, height) };
        self.cropped(&plan)
    }

    fn cropped(&self, plan: &CropPlan) -> Result<Self> {
        let extent = (self.width as f64, self.height as f64);
        let data = plan.cut(&self.data, (self.width, self.height), extent, 1)?;
        Ok(Self { width: plan.target.0, height: plan.target.1, data })
    }
}

/// Which part of a file a sample shows, in pixels: what SDXL is told beside the caption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Width and height of the picture in the file.
    pub source: (usize, usize),
    /// Its size after scaling.
    pub scaled: (usize, usize),
    /// Left and top edge of the part in the scaled picture.
    pub offset: (usize, usize),
    /// Whether it is mirrored left to right.
    pub mirrored: bool,
}

/// A picture with what belongs to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The pixels.
    pub picture: RgbPicture,
    /// How much each counts; of the picture's size.
    pub mask: Option<Mask>,
    /// The part of the file that it shows.
    pub frame: Frame,
    /// Where the picture ends, where that is within its last row or column.
    extent: Option<(f64, f64)>,
}

impl Sample {
    /// A whole picture. A mask of another size is scaled to the picture's.
    ///
    /// # Errors
    /// [`Error::Option`] where the mask cannot be scaled.
    pub fn new(picture: RgbPicture, mask: Option<Mask>) -> Result<Self> {
        let size = (picture.width(), picture.height());
        Self::of_source(picture, mask, size)
    }

    /// A whole picture of a file of the given size, at which it need not have been decoded.
    pub(crate) fn of_source(picture: RgbPicture, mask: Option<Mask>, source: (usize, usize)) -> Result<Self> {
        let size = (picture.width(), picture.height());
        let mask = mask.map(|mask| mask.resized(size.0, size.1)).transpose()?;
        let frame = Frame { source, scaled: size, offset: (0, 0), mirrored: false };
        // Decoded at 1/2, 1/4 or 1/8, sides were rounded up.
        let factor = (source.0 as f64 / size.0 as f64).round();
        let extent = (factor > 1.0).then_some((source.0 as f64 / factor, source.1 as f64 / factor));
        Ok(Self { picture, mask, frame, extent })
    }

    /// Width and height.
    pub fn size(&self) -> (usize, usize) {
        (self.picture.width(), self.picture.height())
    }

    /// Scaled and cut.
    ///
    /// # Errors
    /// As of [`CropPlan::apply`].
    pub fn crop(&self, plan: &CropPlan) -> Result<Self> {
        let frame = Frame { scaled: plan.resized, offset: plan.offset, ..self.frame };
        let mask = self.mask.as_ref().map(|mask| mask.cropped(plan)).transpose()?;
        let size = (self.picture.width(), self.picture.height());
        // A processor may have put a picture of another size in the place of the decoded one.
        let own = self.extent.filter(|extent| (extent.0.ceil() as usize, extent.1.ceil() as usize) == size);
        let extent = own.unwrap_or((size.0 as f64, size.1 as f64));
        Ok(Self { picture: plan.apply_within(&self.picture, extent)?, mask, frame, extent: None })
    }

    /// Mirrored left to right.
    pub fn mirror(mut self) -> Self {
        let width = self.picture.width();
        self.picture.data_mut().chunks_exact_mut(3 * width).for_each(|row| row.as_chunks_mut::<3>().0.reverse());
        if let Some(mask) = &mut self.mask {
            mask.data.chunks_exact_mut(width).for_each(<[u8]>::reverse);
        }
        self.frame.mirrored = !self.frame.mirrored;
        self
    }

    /// Every pixel changed on its own, red, green and blue.
    pub fn map(mut self, change: impl Fn([u8; 3]) -> [u8; 3]) -> Self {
        self.picture.data_mut().as_chunks_mut::<3>().0.iter_mut().for_each(|pixel| *pixel = change(*pixel));
        self
    }

    pub(crate) fn check(&self, processor: &str) -> Result<()> {
        match &self.mask {
            Some(mask) if (mask.width, mask.height) != self.size() => Err(Error::Option {
                key: "processors",
                value: processor.to_owned(),
                reason: format!(
                    "it left a picture of {}×{} pixels with a mask of {}×{}; `Sample::crop` changes both",
                    self.picture.width(),
                    self.picture.height(),
                    mask.width,
                    mask.height
                ),
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_goes_where_its_picture_goes() {
        let data = (0..6u8).flat_map(|value| [40 * value; 3]).collect::<Vec<_>>().repeat(2);
        let picture = RgbPicture::new(6, 2, data).unwrap();
        let mask = Mask::new(6, 2, [0, 40, 80, 120, 160, 200].repeat(2)).unwrap();
        let sample = Sample::new(picture, Some(mask)).unwrap();
        let plan = CropPlan { resized: (6, 2), offset: (1, 0), target: (4, 2) };
        let cut = sample.crop(&plan).unwrap().mirror();
        let mask = cut.mask.as_ref().unwrap();
        assert_eq!(&mask.data()[..4], [160, 120, 80, 40]);
        let red: Vec<u8> = cut.picture.data().iter().step_by(3).copied().collect();
        assert_eq!(red, mask.data());
        assert_eq!(cut.frame, Frame { source: (6, 2), scaled: (6, 2), offset: (1, 0), mirrored: true });
        assert_eq!(mask.reduced(2), [140.0 / 255.0, 60.0 / 255.0]);
    }

    #[test]
    fn a_mask_of_another_size_is_scaled() {
        let picture = RgbPicture::new(4, 4, vec![9; 48]).unwrap();
        let half = Mask::new(2, 1, vec![255, 255]).unwrap();
        let sample = Sample::new(picture, Some(half)).unwrap();
        assert_eq!(sample.mask.unwrap().data(), [255; 16]);
        assert!(Mask::new(2, 2, vec![0; 3]).is_none());
    }
}
