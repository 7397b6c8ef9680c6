//! Sharpness and exposure of one picture.

use serde::Serialize;

use crate::crop::CropPlan;
use crate::{Result, RgbPicture};

/// Longest side of the copy that is measured: detail finer than training sees does not count.
const SIDE: usize = 512;

/// What is measured of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Measures {
    /// The strongest twentieth of the edges, each by the share of its height that falls within one pixel: near 1 for hard
    /// edges, 0 for a gradient. Does not depend on contrast; 1 where there are no edges at all.
    pub sharpness: f64,
    /// Mean brightness, from 0 to 1.
    pub brightness: f64,
    /// Share of the pixels at full brightness; a plain background that reaches the border does not count.
    pub burnt: f64,
}

impl Measures {
    /// Measures a picture.
    pub(crate) fn of(picture: &RgbPicture) -> Result<Self> {
        let (width, height) = (picture.width(), picture.height());
        let side = |side: usize| (side * SIDE / width.max(height).max(SIDE)).max(1);
        let size = (side(width), side(height));
        let small = CropPlan::squash(size).apply(picture)?;
        let grey: Vec<f32> = small.data().as_chunks::<3>().0.iter().map(|&pixel| luminance(pixel)).collect();
        let brightness = grey.iter().map(|&value| f64::from(value)).sum::<f64>() / (255.0 * grey.len() as f64);
        Ok(Self { sharpness: sharpness(&grey, size), brightness, burnt: burnt(&small) })
    }
}

pub(super) fn luminance([red, green, blue]: [u8; 3]) -> f32 {
    0.299 * f32::from(red) + 0.587 * f32::from(green) + 0.114 * f32::from(blue)
}

/// The variance of the Laplacian, the usual measure, falls with contrast and with plain areas; divided by the energy of the
/// first differences it is a frequency and does not.
fn sharpness(grey: &[f32], (width, height): (usize, usize)) -> f64 {
    if width < 3 || height < 3 {
        return 1.0;
    }
    let (mut second, mut first) = (0.0f64, 0.0f64);
    for y in 1..height - 1 {
        let row = |y: usize| &grey[y * width..(y + 1) * width];
        let (above, own, below) = (row(y - 1), row(y), row(y + 1));
        for x in 1..width - 1 {
            let (across, down) = (own[x + 1] - own[x - 1], below[x] - above[x]);
            let slope = across * across + down * down;
            // Grain of the sensor is no edge.
            if slope < 36.0 {
                continue;
            }
            let laplacian = own[x - 1] + own[x + 1] + above[x] + below[x] - 4.0 * own[x];
            second += f64::from(laplacian * laplacian);
            first += f64::from(slope);
        }
    }
    if first == 0.0 { 1.0 } else { second / first }
}

fn burnt(picture: &RgbPicture) -> f64 {
    let (width, height) = (picture.width(), picture.height());
    let pixels = picture.data().as_chunks::<3>().0;
    let white = |pixel: &[u8; 3]| pixel.iter().all(|&value| value >= 250);
    let all = pixels.iter().filter(|pixel| white(pixel)).count();
    // White that reaches the border through white is a background: filled from there.
    let mut seen = vec![false; pixels.len()];
    let mut open: Vec<usize> = (0..width)
        .flat_map(|x| [x, (height - 1) * width + x])
        .chain((0..height).flat_map(|y| [y * width, y * width + width - 1]))
        .filter(|&place| white(&pixels[place]))
        .collect();
    let border = 2 * (width + height);
    if open.len() * 2 < border {
        // Less than half of the border is white: a bright sky or lamp, no background.
        return all as f64 / pixels.len() as f64;
    }
    let mut background = 0;
    while let Some(place) = open.pop() {
        if std::mem::replace(&mut seen[place], true) {
            continue;
        }
        background += 1;
        let (x, y) = (place % width, place / width);
        let near = [
            (x > 0).then(|| place - 1),
            (x + 1 < width).then(|| place + 1),
            (y > 0).then(|| place - width),
            (y + 1 < height).then(|| place + width),
        ];
        open.extend(near.into_iter().flatten().filter(|&next| !seen[next] && white(&pixels[next])));
    }
    (all - background) as f64 / (pixels.len() - background).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: usize, height: usize, value: impl Fn(usize, usize) -> u8) -> RgbPicture {
        let data = (0..height).flat_map(|y| (0..width).map(move |x| (x, y))).flat_map(|(x, y)| [value(x, y); 3]);
        RgbPicture::new(width, height, data.collect()).unwrap()
    }

    #[test]
    fn blur_lowers_sharpness_and_contrast_does_not() {
        let disk = |edge: f64, contrast: f64| {
            Measures::of(&picture(256, 256, |x, y| {
                let away = 80.0 - (x as f64 - 128.0).hypot(y as f64 - 128.0);
                (128.0 + contrast * (away / edge).clamp(-1.0, 1.0)) as u8
            }))
            .unwrap()
            .sharpness
        };
        let (hard, soft, blurred) = (disk(1.0, 100.0), disk(4.0, 100.0), disk(16.0, 100.0));
        assert!(hard > 4.0 * soft && soft > 2.5 * blurred, "{hard} {soft} {blurred}");
        assert!((disk(1.0, 50.0) / hard - 1.0).abs() < 0.2);
        assert_eq!(Measures::of(&picture(64, 64, |_, _| 90)).unwrap().sharpness, 1.0, "nothing to judge");
    }

    #[test]
    fn a_white_background_is_not_burnt_out() {
        let on_white = picture(100, 100, |x, y| if x.abs_diff(50) < 20 && y.abs_diff(50) < 20 { 120 } else { 255 });
        assert_eq!(Measures::of(&on_white).unwrap().burnt, 0.0);
        let lamp = picture(100, 100, |x, y| if x.abs_diff(50) < 40 && y.abs_diff(50) < 40 { 255 } else { 120 });
        assert!((Measures::of(&lamp).unwrap().burnt - 0.62).abs() < 0.02);
        let dark = Measures::of(&picture(20, 20, |_, _| 13)).unwrap();
        assert!((dark.brightness - 13.0 / 255.0).abs() < 1e-3);
    }
}
