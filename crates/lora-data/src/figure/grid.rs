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
    /// The picture as a grid shows it, so that no more of it has to be kept.
    pub fn reduced(&self) -> Self {
        match fit(self, scaled((self.width, self.height))) {
            Some(picture) if picture.width() < self.width as u32 || picture.height() < self.height as u32 => {
                let (width, height) = (picture.width() as usize, picture.height() as usize);
                Self { width, height, rgb: picture.into_raw() }
            }
            _ => self.clone(),
        }
    }

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
/// Pictures whose longer side is smaller are enlarged up to it, those beyond [`LARGEST`] reduced.
const SMALLEST: u32 = 128;
const LARGEST: u32 = 384;
const BACKGROUND: Rgb<u8> = Rgb([250, 250, 251]);
const EMPTY: Rgb<u8> = Rgb([232, 232, 236]);
const TEXT: Rgb<u8> = Rgb([50, 50, 56]);

/// Draws the grid.
pub fn draw(rows: &[GridRow], columns: &[String]) -> RgbImage {
    let largest =
        |side: fn(&GridPicture) -> usize| rows.iter().flat_map(|row| &row.pictures).map(side).max().unwrap_or(0);
    let (width, height) = scaled((largest(|picture| picture.width), largest(|picture| picture.height)));
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
            let fitted = row.pictures.get(column).and_then(|sample| fit(sample, (width, height)));
            match fitted {
                Some(sample) => overlay(&mut picture, &sample, left, top),
                None => overlay(&mut picture, &RgbImage::from_pixel(width, height, EMPTY), left, top),
            }
        }
    }
    picture
}

/// Width and height at which pictures of this size are shown; both sides change alike.
fn scaled((width, height): (usize, usize)) -> (u32, u32) {
    let (width, height, longer) = (width as u32, height as u32, width.max(height) as u32);
    let side = |side: u32| match longer {
        0 => SMALLEST,
        _ if longer < SMALLEST => side * (SMALLEST / longer),
        _ if longer > LARGEST => (u64::from(side) * u64::from(LARGEST)).div_ceil(u64::from(longer)) as u32,
        _ => side,
    };
    (side(width), side(height))
}

/// A sample as large as its cell has room for; `None` where its bytes do not fit its size.
fn fit(sample: &GridPicture, (width, height): (u32, u32)) -> Option<RgbImage> {
    let picture = RgbImage::from_raw(sample.width as u32, sample.height as u32, sample.rgb.clone())?;
    let (own_width, own_height) = picture.dimensions();
    if own_width.min(own_height) == 0 || (own_width, own_height) == (width, height) {
        return Some(picture);
    }
    let factor = (f64::from(width) / f64::from(own_width)).min(f64::from(height) / f64::from(own_height));
    let side = |own: u32| ((f64::from(own) * factor).round() as u32).max(1);
    // Enlarged pixels stay pixels; reduced pictures are smoothed.
    let filter = if factor > 1.0 { FilterType::Nearest } else { FilterType::CatmullRom };
    Some(resize(&picture, side(own_width), side(own_height), filter))
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
    fn pictures_keep_their_shape() {
        let wide = GridPicture { width: 1024, height: 768, rgb: [0, 0, 255].repeat(1024 * 768) };
        let small = wide.reduced();
        assert_eq!((small.width, small.height, small.rgb.len()), (384, 288, 384 * 288 * 3));
        let row = |pictures| [GridRow { label: "before".into(), pictures }];
        let columns = ["a".to_owned()];
        assert_eq!(draw(&row(vec![wide]), &columns), draw(&row(vec![small]), &columns), "as the whole one is drawn");
        let tiny = GridPicture { width: 32, height: 64, rgb: vec![9; 32 * 64 * 3] };
        assert_eq!((scaled((32, 64)), tiny.reduced()), ((64, 128), tiny));
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
