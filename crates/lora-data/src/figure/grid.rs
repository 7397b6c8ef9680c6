//! Samples side by side: rows are moments of training or strengths, columns prompts or seeds.

use std::path::Path;

use image::imageops::{FilterType, overlay, resize};
use image::{ImageFormat, Rgb, RgbImage};
use lora_io::Result;
use plotters::style::text_anchor::HPos;

use super::label;
use crate::RgbPicture;

/// One row of the grid.
#[derive(Debug, Clone, PartialEq)]
pub struct GridRow {
    /// What stands before it.
    pub label: String,
    /// Its pictures, one for each column; missing ones leave their cell empty.
    pub pictures: Vec<GridPicture>,
}

/// A picture: interleaved RGB bytes, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GridPicture {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `width · height · 3` bytes.
    pub rgb: Vec<u8>,
}

impl From<&RgbPicture> for GridPicture {
    fn from(picture: &RgbPicture) -> Self {
        Self { width: picture.width(), height: picture.height(), rgb: picture.data().to_vec() }
    }
}

impl GridPicture {
    /// Writes the picture as PNG; a file that is there is replaced once the new one is whole.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn save(self, path: &Path) -> Result<()> {
        save(path, &RgbImage::from_raw(self.width as u32, self.height as u32, self.rgb).unwrap_or_default())
    }
}

/// Writes the grid as PNG, in the same way.
///
/// # Errors
/// Where the file cannot be written.
pub fn write(path: &Path, rows: &[GridRow], columns: &[String]) -> Result<()> {
    save(path, &draw(rows, columns))
}

fn save(path: &Path, picture: &RgbImage) -> Result<()> {
    let png = |file: &mut _| picture.write_to(file, ImageFormat::Png).map_err(std::io::Error::other);
    lora_io::atomic::write(path, png)
}

const GAP: u32 = 8;
const LABEL: u32 = 92;
const HEADER: u32 = 34;
/// Small pictures are enlarged up to this side, large ones reduced to [`LARGEST`].
const SMALLEST: u32 = 128;
const LARGEST: u32 = 384;
const BACKGROUND: Rgb<u8> = Rgb([250, 250, 251]);
const EMPTY: Rgb<u8> = Rgb([232, 232, 236]);
const TEXT: Rgb<u8> = Rgb([50, 50, 56]);

/// Draws the grid.
pub fn draw(rows: &[GridRow], columns: &[String]) -> RgbImage {
    let cell = |side: fn(&GridPicture) -> usize| {
        let largest = rows.iter().flat_map(|row| &row.pictures).map(side).max().unwrap_or(0) as u32;
        match largest {
            0 => SMALLEST,
            side if side < SMALLEST => side * (SMALLEST / side).max(1),
            side => side.min(LARGEST),
        }
    };
    let (width, height) = (cell(|picture| picture.width), cell(|picture| picture.height));
    let (columns_count, rows_count) = (columns.len() as u32, rows.len() as u32);
    let size = (LABEL + columns_count * (width + GAP) + GAP, HEADER + rows_count * (height + GAP) + GAP);
    let mut picture = RgbImage::from_pixel(size.0, size.1, BACKGROUND);
    for (index, prompt) in columns.iter().enumerate() {
        let left = LABEL + index as u32 * (width + GAP);
        for (line, text) in wrap(prompt, width).iter().enumerate() {
            label::draw(&mut picture, (left, 10 + 15 * line as u32), text, TEXT, HPos::Left);
        }
    }
    for (index, row) in rows.iter().enumerate() {
        let top = i64::from(HEADER + index as u32 * (height + GAP));
        let middle = HEADER + index as u32 * (height + GAP) + height / 2;
        label::draw(&mut picture, (GAP, middle), &row.label, TEXT, HPos::Left);
        for column in 0..columns.len() {
            let left = i64::from(LABEL + column as u32 * (width + GAP));
            let fitted = row.pictures.get(column).and_then(|sample| fit(sample, width, height));
            match fitted {
                Some(sample) => overlay(&mut picture, &sample, left, top),
                None => overlay(&mut picture, &RgbImage::from_pixel(width, height, EMPTY), left, top),
            }
        }
    }
    picture
}

/// A sample at the size of its cell; `None` where its bytes do not fit its size.
fn fit(sample: &GridPicture, width: u32, height: u32) -> Option<RgbImage> {
    let picture = RgbImage::from_raw(sample.width as u32, sample.height as u32, sample.rgb.clone())?;
    if picture.dimensions() == (width, height) {
        return Some(picture);
    }
    // Enlarged pixels stay pixels; reduced pictures are smoothed.
    let filter = if picture.width() < width { FilterType::Nearest } else { FilterType::CatmullRom };
    Some(resize(&picture, width, height, filter))
}

/// At most two lines of at most `width` pixels.
fn wrap(text: &str, width: u32) -> Vec<String> {
    if label::width(text) <= width {
        return vec![text.to_owned()];
    }
    let characters: Vec<char> = text.chars().collect();
    let fits = |part: &[char], end: &str| label::width(&(part.iter().collect::<String>() + end)) <= width;
    let longest = |part: &[char], end: &str| (0..=part.len()).rev().find(|&at| fits(&part[..at], end)).unwrap_or(0);
    let most = longest(&characters, "");
    let space = characters[..most].iter().rposition(|c| c.is_whitespace());
    // A first line that is mostly empty is worth it only where the second then holds the rest.
    let cut = space.filter(|&at| at > most / 2 || fits(&characters[at + 1..], "")).unwrap_or(most);
    let first: String = characters[..cut].iter().collect();
    let rest: Vec<char> = characters[cut..].iter().copied().skip_while(|c| c.is_whitespace()).collect();
    let second = match fits(&rest, "") {
        true => rest.iter().collect(),
        false => rest[..longest(&rest, "…")].iter().collect::<String>() + "…",
    };
    vec![first, second]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_stands_in_its_cell() {
        let red = GridPicture { width: 64, height: 64, rgb: [255, 0, 0].repeat(64 * 64) };
        let rows = [
            GridRow { label: "before".into(), pictures: vec![red.clone()] },
            GridRow {
                label: "step 100".into(),
                pictures: vec![red, GridPicture { width: 4, height: 4, rgb: vec![1] }],
            },
        ];
        let picture =
            draw(&rows, &["a".into(), "a long prompt that does not fit into one line of the grid at all".into()]);
        let middle = |row: u32, column: u32| *picture.get_pixel(LABEL + column * 136 + 64, HEADER + row * 136 + 64);
        assert_eq!(middle(0, 0), Rgb([255, 0, 0]));
        assert_eq!(middle(1, 0), Rgb([255, 0, 0]));
        assert_eq!(middle(0, 1), EMPTY);
        assert_eq!(middle(1, 1), EMPTY, "bytes that do not fit leave the cell empty");
        draw(&[], &[]);
    }

    #[test]
    fn prompts_wrap_and_are_cut() {
        let wide = |text: &str| label::width(text);
        assert_eq!(wrap("a red apple", wide("a red apple")), ["a red apple"]);
        assert_eq!(wrap("a red apple on a table", wide("a red apple o")), ["a red apple", "on a table"]);
        assert_eq!(wrap("avocado, vegetable", wide("avocado, vege")), ["avocado,", "vegetable"]);
        assert_eq!(wrap("mmmmmmmmmmmmmmmmmmmmmmmm", wide("mmmmmmmm")), ["mmmmmmmm", "mmmmmm…"]);
        assert_eq!(wrap("abc", 0), ["", "…"], "a cell without room");
    }
}
