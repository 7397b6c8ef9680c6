//! Text onto pictures, with an embedded bitmap font: no fonts are needed on the machine.

use font8x8::{BASIC_FONTS, LATIN_FONTS, UnicodeFonts};
use image::{Rgb, RgbImage};

/// Side of a character at scale 1.
pub(super) const SIZE: u32 = 8;

/// Width of a text in pixels.
pub(super) fn width(text: &str, scale: u32) -> u32 {
    text.chars().count() as u32 * SIZE * scale
}

/// Draws a text with its top left corner at `(x, y)`; what lies outside is cut, unknown characters become a box.
pub(super) fn draw(picture: &mut RgbImage, x: i64, y: i64, text: &str, scale: u32, color: Rgb<u8>) {
    for (index, character) in text.chars().enumerate() {
        let rows = BASIC_FONTS
            .get(character)
            .or_else(|| LATIN_FONTS.get(character))
            .unwrap_or([0, 126, 66, 66, 66, 66, 126, 0]);
        let left = x + i64::from(index as u32 * SIZE * scale);
        for (row, bits) in rows.into_iter().enumerate() {
            for column in (0..8).filter(|column| bits >> column & 1 == 1) {
                let corner = (left + i64::from(column * scale), y + i64::from(row as u32 * scale));
                fill(picture, corner, (scale, scale), color);
            }
        }
    }
}

/// Fills a rectangle, cut at the picture's edges.
pub(super) fn fill(picture: &mut RgbImage, (x, y): (i64, i64), (width, height): (u32, u32), color: Rgb<u8>) {
    let range = |start: i64, length: u32, limit: u32| {
        start.clamp(0, i64::from(limit)) as u32..(start + i64::from(length)).clamp(0, i64::from(limit)) as u32
    };
    for row in range(y, height, picture.height()) {
        for column in range(x, width, picture.width()) {
            picture.put_pixel(column, row, color);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_leaves_ink_and_never_leaves_the_picture() {
        let mut picture = RgbImage::new(40, 20);
        draw(&mut picture, -4, -4, "Ag é 猫", 2, Rgb([255; 3]));
        draw(&mut picture, 1000, 1000, "x", 1, Rgb([255; 3]));
        assert!(picture.pixels().any(|pixel| pixel.0[0] == 255));
        assert_eq!(width("abc", 2), 48);
    }
}
