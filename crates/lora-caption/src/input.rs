//! From a picture to a tagger's input: white squares, size, order of channels, numbers. Decoding is `lora-data`'s business.

use lora_data::RgbPicture;

use crate::bicubic::scaled;

/// The most pixels of a padded square; a larger picture is scaled down before it is padded, so that a panorama does not take
/// gigabytes.
const MAX_SQUARE: usize = 8_192;

/// Order of the colours of a pixel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Channels {
    /// Blue first, as WD taggers and models of OpenCV's time have it.
    #[default]
    Bgr,
    /// Red first.
    Rgb,
}

/// What becomes of 8-bit pixels. The default is that of WD taggers: BGR, from 0 to 255.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preprocessing {
    /// Order of the channels.
    pub channels: Channels,
    /// Subtracted from each channel, in their order, before the division.
    pub mean: [f32; 3],
    /// Each channel is divided by this.
    pub deviation: [f32; 3],
}

impl Default for Preprocessing {
    fn default() -> Self {
        Self { channels: Channels::Bgr, mean: [0.0; 3], deviation: [1.0; 3] }
    }
}

/// Where the channels of a model's input stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[batch, height, width, channels]`.
    Last,
    /// `[batch, channels, height, width]`.
    First,
}

impl Preprocessing {
    /// The numbers of one picture, `[side, side, 3]` or `[3, side, side]`: padded with white to a square, the picture in its
    /// middle, then scaled with a bicubic filter that averages where it shrinks.
    ///
    /// `None` where the picture cannot be scaled.
    pub(crate) fn numbers(&self, picture: &RgbPicture, side: usize, layout: Layout) -> Option<Vec<f32>> {
        let square = square(picture)?;
        let pixels = scaled(square.data(), square.width(), side);
        let count = side * side;
        let mut numbers = vec![0.0; 3 * count];
        for (index, pixel) in pixels.as_chunks::<3>().0.iter().enumerate() {
            for channel in 0..3 {
                let colour = match self.channels {
                    Channels::Bgr => 2 - channel,
                    Channels::Rgb => channel,
                };
                let value = (f32::from(pixel[colour]) - self.mean[channel]) / self.deviation[channel];
                let place = match layout {
                    Layout::Last => 3 * index + channel,
                    Layout::First => channel * count + index,
                };
                numbers[place] = value;
            }
        }
        Some(numbers)
    }
}

/// The picture in the middle of a white square; where the margin is odd, the smaller half stands left or above.
fn square(picture: &RgbPicture) -> Option<RgbPicture> {
    let longest = picture.width().max(picture.height());
    if longest > MAX_SQUARE {
        return square(&picture.scaled_to(MAX_SQUARE).ok()?);
    }
    let (width, height) = (picture.width(), picture.height());
    if width == height {
        return Some(picture.clone());
    }
    let (left, top) = ((longest - width) / 2, (longest - height) / 2);
    let mut data = vec![255; 3 * longest * longest];
    for (row, line) in picture.data().chunks_exact(3 * width).enumerate() {
        let start = 3 * ((top + row) * longest + left);
        data[start..start + line.len()].copy_from_slice(line);
    }
    RgbPicture::new(longest, longest, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_stands_in_the_middle_of_a_white_square_blue_first() {
        let picture = RgbPicture::new(1, 4, [[10, 20, 30]; 4].concat()).unwrap();
        let numbers = Preprocessing::default().numbers(&picture, 4, Layout::Last).unwrap();
        let row = [255.0, 255.0, 255.0, 30.0, 20.0, 10.0, 255.0, 255.0, 255.0, 255.0, 255.0, 255.0];
        assert_eq!(numbers, [row; 4].concat());
    }

    #[test]
    fn channels_mean_deviation_and_layout_are_as_the_model_has_them() {
        let picture = RgbPicture::new(2, 2, [[100, 50, 0]; 4].concat()).unwrap();
        let options = Preprocessing { channels: Channels::Rgb, mean: [0.0, 50.0, 10.0], deviation: [2.0, 1.0, 5.0] };
        let first = options.numbers(&picture, 2, Layout::First).unwrap();
        assert_eq!(first, [[50.0; 4], [0.0; 4], [-2.0; 4]].concat());
        assert_eq!(options.numbers(&picture, 2, Layout::Last).unwrap(), [[50.0, 0.0, -2.0]; 4].concat());
    }

    #[test]
    fn a_panorama_takes_no_square_of_its_length() {
        let picture = RgbPicture::new(40_000, 2, vec![0; 3 * 80_000]).unwrap();
        let numbers = Preprocessing::default().numbers(&picture, 8, Layout::Last).unwrap();
        assert!(numbers.iter().all(|number| *number > 250.0), "{numbers:?}");
    }
}
