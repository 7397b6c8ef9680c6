//! A table of magnitudes as a picture: one labelled row and column each, colours on a logarithmic scale.

use image::imageops::overlay;
use image::{Rgb, RgbImage};
use plotters::style::text_anchor::HPos;

use super::label;

/// A cell's place and value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cell {
    /// Index of its row.
    pub(super) row: usize,
    /// Index of its column.
    pub(super) column: usize,
    /// 0 or more; anything else is drawn as damaged.
    pub(super) value: f64,
}

const CELL: (u32, u32) = (52, 18);
const INSIDE: (u32, u32) = (CELL.0 - 1, CELL.1 - 1);
const GAP: u32 = 10;
const LEGEND: u32 = 40;
const BACKGROUND: Rgb<u8> = Rgb([250, 250, 251]);
const ABSENT: Rgb<u8> = Rgb([236, 236, 240]);
const ZERO: Rgb<u8> = Rgb([200, 200, 206]);
const DAMAGED: Rgb<u8> = Rgb([220, 20, 140]);
const TEXT: Rgb<u8> = Rgb([50, 50, 56]);
/// From the smallest shown to the largest: dark blue, teal, yellow (lightness rises, so it reads in grey too).
const SCALE: [[f64; 3]; 4] = [[40.0, 30.0, 95.0], [40.0, 110.0, 142.0], [90.0, 190.0, 110.0], [250.0, 225.0, 50.0]];
/// Values below the largest by more than this factor have the lowest colour.
const SPAN: f64 = 1000.0;

/// Draws the table. Column labels are written upwards.
pub(super) fn draw(title: &str, rows: &[String], columns: &[String], cells: &[Cell]) -> RgbImage {
    let longest = |labels: &[String]| labels.iter().map(|label| label::width(label)).max().unwrap_or(0);
    let left = GAP + longest(rows) + GAP;
    let top = 28 + longest(columns) + GAP;
    let width = (left + columns.len() as u32 * CELL.0 + GAP).max(left + label::width(title)).max(420);
    let height = top + rows.len() as u32 * CELL.1 + LEGEND;
    let mut picture = RgbImage::from_pixel(width, height, BACKGROUND);
    label::draw(&mut picture, (GAP, 14), title, TEXT, HPos::Left);
    for (index, name) in rows.iter().enumerate() {
        let middle = top + index as u32 * CELL.1 + CELL.1 / 2;
        label::draw(&mut picture, (left - GAP, middle), name, TEXT, HPos::Right);
    }
    for (index, name) in columns.iter().enumerate() {
        let middle = left + index as u32 * CELL.0 + CELL.0 / 2;
        label::draw_upwards(&mut picture, (middle, top - 6), name, TEXT);
    }
    let corner = |row: usize, column: usize| (left + column as u32 * CELL.0, top + row as u32 * CELL.1);
    for row in 0..rows.len() {
        (0..columns.len()).for_each(|column| fill(&mut picture, corner(row, column), INSIDE, ABSENT));
    }
    let largest = cells.iter().map(|cell| cell.value).filter(|value| value.is_finite()).fold(0.0, f64::max);
    for cell in cells.iter().filter(|cell| cell.row < rows.len() && cell.column < columns.len()) {
        let (x, y) = corner(cell.row, cell.column);
        let color = color(cell.value, largest);
        fill(&mut picture, (x, y), INSIDE, color);
        let text = if cell.value.is_finite() { short(cell.value) } else { "NaN".to_owned() };
        let ink = if u32::from(color.0[1]) > 120 { Rgb([20; 3]) } else { Rgb([240; 3]) };
        label::draw(&mut picture, (x + CELL.0 / 2, y + CELL.1 / 2), &text, ink, HPos::Center);
    }
    legend(&mut picture, largest);
    picture
}

/// The scale of colours, at the picture's foot.
fn legend(picture: &mut RgbImage, largest: f64) {
    let top = picture.height() - LEGEND + 14;
    for step in 0..160u32 {
        let value = largest * SPAN.powf(f64::from(step) / 159.0 - 1.0);
        fill(picture, (GAP + 60 + step, top), (1, 10), color(value, largest));
    }
    label::draw(picture, (GAP, top + 5), &short(largest / SPAN), TEXT, HPos::Left);
    label::draw(picture, (GAP + 226, top + 5), &format!("{} (logarithmic)", short(largest)), TEXT, HPos::Left);
}

fn fill(picture: &mut RgbImage, (x, y): (u32, u32), (width, height): (u32, u32), color: Rgb<u8>) {
    overlay(picture, &RgbImage::from_pixel(width, height, color), i64::from(x), i64::from(y));
}

/// At most six characters.
fn short(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value if !(0.001..1000.0).contains(&value) => format!("{value:.0e}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.3}"),
    }
}

fn color(value: f64, largest: f64) -> Rgb<u8> {
    if !value.is_finite() || value < 0.0 {
        return DAMAGED;
    }
    if value == 0.0 || largest == 0.0 {
        return ZERO;
    }
    let place = (1.0 + (value / largest).ln() / SPAN.ln()).clamp(0.0, 1.0) * (SCALE.len() - 1) as f64;
    let index = (place as usize).min(SCALE.len() - 2);
    let (from, to, share) = (SCALE[index], SCALE[index + 1], place - index as f64);
    Rgb(std::array::from_fn(|channel| (from[channel] + share * (to[channel] - from[channel])).round() as u8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_have_the_colour_of_their_value() {
        let labels = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let cell = |row, column, value| Cell { row, column, value };
        let cells = [cell(0, 0, 1.0), cell(0, 1, 0.0), cell(1, 0, f64::NAN), cell(1, 1, 1e-9), cell(9, 9, 1.0)];
        let picture = draw("norms", &labels(&["a", "b", "c"]), &labels(&["to_q", "to_k"]), &cells);
        let left = GAP + ["a", "b", "c"].map(label::width).into_iter().max().unwrap() + GAP;
        let top = 28 + label::width("to_q").max(label::width("to_k")) + GAP;
        let at = |row: u32, column: u32| *picture.get_pixel(left + column * CELL.0 + 1, top + row * CELL.1 + 1);
        assert_eq!(at(0, 0), Rgb([250, 225, 50]));
        assert_eq!(at(0, 1), ZERO);
        assert_eq!(at(1, 0), DAMAGED);
        assert_eq!(at(1, 1), Rgb([40, 30, 95]));
        assert_eq!(at(2, 0), ABSENT);
        draw("", &[], &[], &[]);
    }

    #[test]
    fn numbers_fit_their_cells() {
        for value in [0.0, 1e-12, 0.001, 0.5, 12.3456, 999.96, 123_456.0] {
            assert!(label::width(&short(value)) <= CELL.0 - 2, "{}", short(value));
        }
    }
}
