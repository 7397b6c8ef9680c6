//! Text on pictures, drawn by `plotters` in DejaVu Sans, which is in the program: no fonts are needed on the machine. The font
//! may be given on, alone and in programs (its licence is in the crate `dejavu`).

use std::sync::Once;

use image::{Rgb, RgbImage};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Height of a line in pixels.
pub(super) const SIZE: u32 = 14;

/// The family that `plotters` knows the font by.
pub(super) const FAMILY: &str = "sans-serif";

/// Gives `plotters` the font; to be called before anything is drawn.
pub(super) fn prepare() {
    static ONCE: Once = Once::new();
    // The font is one that can be read: without it labels would be left out.
    ONCE.call_once(|| drop(register_font(FAMILY, FontStyle::Normal, dejavu::sans::regular())));
}

/// A picture as something to draw on.
pub(super) fn canvas(picture: &mut RgbImage) -> DrawingArea<BitMapBackend<'_>, Shift> {
    prepare();
    let size = picture.dimensions();
    BitMapBackend::with_buffer(picture, size).into_drawing_area()
}

/// Width of a text in pixels.
pub(super) fn width(text: &str) -> u32 {
    prepare();
    (FAMILY, SIZE).into_font().box_size(text).map_or(0, |(width, _)| width)
}

/// Draws a text whose left end, right end or middle is at `x`, in the middle of `y`; what lies outside is cut.
pub(super) fn draw(picture: &mut RgbImage, (x, y): (u32, u32), text: &str, color: Rgb<u8>, from: HPos) {
    put(picture, (x, y), text, color, from, FontTransform::None);
}

/// Draws a text upwards, whose lower end is at `y`, in the middle of `x`.
pub(super) fn draw_upwards(picture: &mut RgbImage, (x, y): (u32, u32), text: &str, color: Rgb<u8>) {
    put(picture, (x, y), text, color, HPos::Left, FontTransform::Rotate270);
}

fn put(picture: &mut RgbImage, at: (u32, u32), text: &str, color: Rgb<u8>, from: HPos, turned: FontTransform) {
    let [red, green, blue] = color.0;
    let font = (FAMILY, SIZE).into_font().transform(turned);
    let style = font.color(&RGBColor(red, green, blue)).pos(Pos::new(from, VPos::Center));
    // A label that cannot be drawn is left out.
    if let (Ok(x), Ok(y)) = (i32::try_from(at.0), i32::try_from(at.1))
        && at.0 <= picture.width()
        && at.1 <= picture.height()
    {
        let _ = canvas(picture).draw_text(text, &style, (x, y));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_leaves_ink_where_it_is_put_and_never_leaves_the_picture() {
        let mut picture = RgbImage::new(60, 40);
        draw(&mut picture, (4, 20), "Ag é 猫 ж", Rgb([255; 3]), HPos::Left);
        let ink = |picture: &RgbImage, columns: std::ops::Range<u32>| {
            picture.enumerate_pixels().any(|(x, _, pixel)| columns.contains(&x) && pixel.0[0] > 200)
        };
        assert!(ink(&picture, 4..60) && !ink(&picture, 0..3));
        draw(&mut picture, (0, 0), "x", Rgb([255; 3]), HPos::Right);
        draw(&mut picture, (u32::MAX, 1000), "x", Rgb([255; 3]), HPos::Center);
        let mut picture = RgbImage::new(20, 80);
        draw_upwards(&mut picture, (10, 70), "upwards", Rgb([255; 3]));
        let rows: Vec<u32> =
            picture.enumerate_pixels().filter(|(.., pixel)| pixel.0[0] > 200).map(|(_, y, _)| y).collect();
        let (first, last) = (rows.iter().min().unwrap(), rows.iter().max().unwrap());
        assert!(*last <= 70 && *last > 60 && last - first > width("upwards") / 2, "{first} to {last}");
    }

    #[test]
    fn longer_texts_are_wider() {
        assert!(width("") == 0 && width("i") < width("m") && width("mm") > width("m"));
    }
}
