//! Where the subject of a picture is, as far as pixels tell: the crop that holds the most salience.
//!
//! Salience of a pixel is the strength of its edges (the gradient of its brightness) plus how far its colour is from the
//! mean colour of the picture's border, both on a copy of at most 96 pixels a side. It knows nothing of faces or
//! things: it finds what stands out from a plain or blurred background, and stays near the middle where nothing does.

use crate::RgbPicture;
use crate::crop::CropPlan;

/// Longest side of the copy that is looked at.
const SIDE: usize = 96;

/// The plan with its crop moved to where it holds the most salience; of equal places the one nearest to the middle.
pub(crate) fn focus(picture: &RgbPicture, plan: &CropPlan) -> CropPlan {
    let room = (plan.resized.0 - plan.target.0, plan.resized.1 - plan.target.1);
    if room == (0, 0) {
        return *plan;
    }
    let longest = picture.width().max(picture.height());
    let scaled = |side: usize| (side * SIDE / longest.max(SIDE)).max(1);
    let size = (scaled(picture.width()), scaled(picture.height()));
    let Ok(small) = CropPlan::centered(size, size).apply(picture) else { return *plan };
    let sums = integral(&salience(&small), size);
    // The crop on the small copy, moved in steps of a pixel of the copy or of the scaled picture, whichever is coarser.
    let ratio = (size.0 as f64 / plan.resized.0 as f64, size.1 as f64 / plan.resized.1 as f64);
    let inside = |x: usize, y: usize| {
        let edge = |at: usize, ratio: f64, most: usize| ((at as f64 * ratio).round() as usize).min(most);
        let (left, right) = (edge(x, ratio.0, size.0), edge(x + plan.target.0, ratio.0, size.0));
        let (top, bottom) = (edge(y, ratio.1, size.1), edge(y + plan.target.1, ratio.1, size.1));
        let at = |x: usize, y: usize| sums[y * (size.0 + 1) + x];
        at(right, bottom) + at(left, top) - at(left, bottom) - at(right, top)
    };
    let places = |room: usize, ratio: f64| {
        let step = ((1.0 / ratio) as usize).max(1);
        (0..=room).step_by(step).chain([room / 2, room])
    };
    let middle = (room.0 as f64 / 2.0, room.1 as f64 / 2.0);
    let away = |(x, y): (usize, usize)| (x as f64 - middle.0).abs() + (y as f64 - middle.1).abs();
    let all = places(room.0, ratio.0).flat_map(|x| places(room.1, ratio.1).map(move |y| (x, y)));
    let best = all
        .map(|place| (inside(place.0, place.1), place))
        .max_by(|a, b| a.0.total_cmp(&b.0).then_with(|| away(b.1).total_cmp(&away(a.1))));
    CropPlan { offset: best.map_or(plan.offset, |(_, place)| place), ..*plan }
}

fn salience(picture: &RgbPicture) -> Vec<f64> {
    let (width, height) = (picture.width(), picture.height());
    let pixels = picture.data().as_chunks::<3>().0;
    let at = |x: usize, y: usize| pixels[y * width + x].map(f64::from);
    let grey = |x: usize, y: usize| {
        let [red, green, blue] = at(x, y);
        0.299 * red + 0.587 * green + 0.114 * blue
    };
    let border: Vec<[f64; 3]> = (0..width)
        .flat_map(|x| [(x, 0), (x, height - 1)])
        .chain((0..height).flat_map(|y| [(0, y), (width - 1, y)]))
        .map(|(x, y)| at(x, y))
        .collect();
    let mean: [f64; 3] =
        std::array::from_fn(|channel| border.iter().map(|pixel| pixel[channel]).sum::<f64>() / border.len() as f64);
    let value = |x: usize, y: usize| {
        let across = grey((x + 1).min(width - 1), y) - grey(x.saturating_sub(1), y);
        let down = grey(x, (y + 1).min(height - 1)) - grey(x, y.saturating_sub(1));
        let colour = at(x, y).iter().zip(mean).map(|(value, mean)| (value - mean).powi(2)).sum::<f64>().sqrt();
        // Grain and gradients of a background are not what a picture is of.
        (across.hypot(down) - 8.0).max(0.0) + (colour - 24.0).max(0.0)
    };
    (0..height).flat_map(|y| (0..width).map(move |x| (x, y))).map(|(x, y)| value(x, y)).collect()
}

/// Sums over all rectangles from the top left corner, `[height + 1, width + 1]`.
fn integral(values: &[f64], (width, height): (usize, usize)) -> Vec<f64> {
    let mut sums = vec![0.0; (width + 1) * (height + 1)];
    for y in 0..height {
        let mut row = 0.0;
        for x in 0..width {
            row += values[y * width + x];
            sums[(y + 1) * (width + 1) + x + 1] = sums[y * (width + 1) + x + 1] + row;
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A grey picture with a red disc.
    fn disc(width: usize, height: usize, center: (usize, usize), radius: usize) -> RgbPicture {
        let pixel = |x: usize, y: usize| {
            let inside = x.abs_diff(center.0).pow(2) + y.abs_diff(center.1).pow(2) <= radius * radius;
            if inside { [200, 30, 30] } else { [120, 120, 120] }
        };
        let data = (0..height).flat_map(|y| (0..width).flat_map(move |x| pixel(x, y))).collect();
        RgbPicture::new(width, height, data).unwrap()
    }

    #[test]
    fn the_subject_stays_in_the_crop() {
        for (size, center) in [((600, 200), (90, 100)), ((600, 200), (510, 100)), ((200, 700), (100, 620))] {
            let picture = disc(size.0, size.1, center, 70);
            let plan = CropPlan::center(size, (200, 200));
            let found = focus(&picture, &plan);
            let (left, top) = found.offset;
            // All of the disc, but for a pixel of the small copy.
            let inside = |from: usize, center: usize| from <= center - 70 + 8 && center + 70 <= from + 208;
            assert!(inside(left, center.0) && inside(top, center.1), "{found:?}");
        }
    }

    #[test]
    fn where_nothing_stands_out_the_middle_is_taken() {
        let plain = RgbPicture::new(300, 100, vec![77; 90_000]).unwrap();
        let plan = CropPlan::center((300, 100), (100, 100));
        assert_eq!(focus(&plain, &plan), plan);
        let exact = CropPlan::center((300, 100), (300, 100));
        assert_eq!(focus(&plain, &exact), exact);
        let pixel = RgbPicture::new(1, 1, vec![1, 2, 3]).unwrap();
        focus(&pixel, &CropPlan::center((1, 1), (8, 16)));
    }
}
