//! A table of magnitudes as a picture: one labelled row and column each, colours on a logarithmic scale.

use image::{Rgb, RgbImage};

use super::font;

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

/// Draws the table. Column labels are written downwards.
pub(super) fn draw(title: &str, rows: &[String], columns: &[String], cells: &[Cell]) -> RgbImage {
    let longest = |labels: &[String]| labels.iter().map(|label| font::width(label, 1)).max().unwrap_or(0);
    let left = GAP + longest(rows) + GAP;
    let top = 28 + longest(columns) + GAP;
    let width = (left + columns.len() as u32 * CELL.0 + GAP).max(left + font::width(title, 1)).max(420);
    let height = top + rows.len() as u32 * CELL.1 + LEGEND;
    let mut picture = RgbImage::from_pixel(width, height, BACKGROUND);
    font::draw(&mut picture, i64::from(GAP), 8, title, 1, TEXT);
    for (index, label) in rows.iter().enumerate() {
        let y = top + index as u32 * CELL.1 + 5;
        font::draw(&mut picture, i64::from(left - GAP - font::width(label, 1)), i64::from(y), label, 1, TEXT);
    }
    for (index, label) in columns.iter().enumerate() {
        let x = left + index as u32 * CELL.0 + CELL.0 / 2 - 4;
        let mut turned = RgbImage::from_pixel(font::width(label, 1).max(1), font::SIZE, BACKGROUND);
        font::draw(&mut turned, 0, 0, label, 1, TEXT);
        let turned = image::imageops::rotate270(&turned);
        image::imageops::overlay(&mut picture, &turned, i64::from(x), i64::from(top - 6 - turned.height()));
    }
    let corner =
        |row: usize, column: usize| (i64::from(left + column as u32 * CELL.0), i64::from(top + row as u32 * CELL.1));
    let inside = (CELL.0 - 1, CELL.1 - 1);
    for row in 0..rows.len() {
        (0..columns.len()).for_each(|column| font::fill(&mut picture, corner(row, column), inside, ABSENT));
    }
    let largest = cells.iter().map(|cell| cell.value).filter(|value| value.is_finite()).fold(0.0, f64::max);
    for cell in cells.iter().filter(|cell| cell.row < rows.len() && cell.column < columns.len()) {
        let (x, y) = corner(cell.row, cell.column);
        let color = color(cell.value, largest);
        font::fill(&mut picture, (x, y), inside, color);
        let text = if cell.value.is_finite() { short(cell.value) } else { "NaN".to_owned() };
        let ink = if u32::from(color.0[1]) > 120 { Rgb([20; 3]) } else { Rgb([240; 3]) };
        let indent = i64::from((CELL.0 - font::width(&text, 1).min(CELL.0)) / 2);
        font::draw(&mut picture, x + indent, y + 5, &text, 1, ink);
    }
    let y = i64::from(height - LEGEND + 14);
    for step in 0..160u32 {
        let value = largest * SPAN.powf(f64::from(step) / 159.0 - 1.0);
        font::fill(&mut picture, (i64::from(GAP + 60 + step), y), (1, 10), color(value, largest));
    }
    font::draw(&mut picture, i64::from(GAP), y + 1, &short(largest / SPAN), 1, TEXT);
    font::draw(&mut picture, i64::from(GAP + 226), y + 1, &format!("{} (logarithmic)", short(largest)), 1, TEXT);
    picture
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
        let left = GAP + font::width("a", 1) + GAP;
        let top = 28 + font::width("to_q", 1) + GAP;
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
            assert!(font::width(&short(value), 1) <= CELL.0 - 2, "{}", short(value));
        }
    }
}
