//! The loss curve: the raw loss thin, its running mean thick, the learning rate below in its own scale.

use image::imageops::{FilterType, resize};
use image::{Rgb, RgbImage};

use super::font;

/// One step of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// The step, from 1.
    pub step: u64,
    /// The loss; points that are not finite are left out.
    pub loss: f64,
    /// The learning rate.
    pub learning_rate: f64,
}

const WIDTH: u32 = 960;
const HEIGHT: u32 = 540;
/// Drawn this many times larger and reduced, which smooths the lines.
const OVERSAMPLING: u32 = 3;
/// Edges of the plot: left, top, right, bottom.
const PLOT: [f64; 4] = [84.0, 44.0, 880.0, 490.0];

const BACKGROUND: Rgb<u8> = Rgb([255, 255, 255]);
const TEXT: Rgb<u8> = Rgb([60, 60, 66]);
const GRID: Rgb<u8> = Rgb([232, 232, 236]);
const RAW: Rgb<u8> = Rgb([178, 205, 240]);
const MEAN: Rgb<u8> = Rgb([30, 90, 190]);
const RATE: Rgb<u8> = Rgb([214, 130, 40]);

/// Draws the curve, 960×540.
pub fn draw(points: &[Point], title: &str) -> RgbImage {
    let finite: Vec<Point> = points.iter().copied().filter(|point| point.loss.is_finite()).collect();
    let means = running_means(&finite);
    let steps = (
        finite.first().map_or(0.0, |point| point.step as f64),
        finite.last().map_or(1.0, |point| point.step as f64).max(1.0),
    );
    let steps = if steps.0 == steps.1 { (steps.0 - 1.0, steps.1) } else { steps };
    let range = loss_range(&finite, &means);
    let top_rate = finite.iter().map(|point| point.learning_rate).filter(|rate| rate.is_finite()).fold(0.0, f64::max);

    let mut canvas = RgbImage::from_pixel(WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING, BACKGROUND);
    let x = |step: f64| PLOT[0] + (step - steps.0) / (steps.1 - steps.0) * (PLOT[2] - PLOT[0]);
    let y = |loss: f64| PLOT[3] - (loss - range.0) / (range.1 - range.0) * (PLOT[3] - PLOT[1]);
    let loss_ticks = ticks(range.0, range.1, 6);
    let step_ticks: Vec<f64> = ticks(steps.0, steps.1, 8).into_iter().filter(|tick| tick.fract() == 0.0).collect();
    for &tick in &loss_ticks {
        line(&mut canvas, (PLOT[0], y(tick)), (PLOT[2], y(tick)), 1.0, GRID);
    }
    for &tick in &step_ticks {
        line(&mut canvas, (x(tick), PLOT[1]), (x(tick), PLOT[3]), 1.0, GRID);
    }
    // The learning rate takes the lowest quarter, so that it does not hide the loss.
    let rate = |value: f64| PLOT[3] - if top_rate > 0.0 { value / top_rate } else { 0.0 } * 0.22 * (PLOT[3] - PLOT[1]);
    polyline(&mut canvas, finite.iter().map(|point| (x(point.step as f64), rate(point.learning_rate))), 1.3, RATE);
    let clamp = |value: f64| y(value.clamp(range.0, range.1));
    polyline(&mut canvas, finite.iter().map(|point| (x(point.step as f64), clamp(point.loss))), 1.0, RAW);
    polyline(
        &mut canvas,
        finite.iter().zip(&means).map(|(point, mean)| (x(point.step as f64), clamp(*mean))),
        2.4,
        MEAN,
    );
    line(&mut canvas, (PLOT[0], PLOT[1]), (PLOT[0], PLOT[3]), 1.2, TEXT);
    line(&mut canvas, (PLOT[0], PLOT[3]), (PLOT[2], PLOT[3]), 1.2, TEXT);

    let mut picture = resize(&canvas, WIDTH, HEIGHT, FilterType::Triangle);
    let right_aligned = |picture: &mut RgbImage, right: f64, middle: f64, text: &str, color| {
        font::draw(picture, right as i64 - i64::from(font::width(text, 1)), middle as i64 - 4, text, 1, color);
    };
    for tick in loss_ticks {
        right_aligned(&mut picture, PLOT[0] - 8.0, y(tick), &number(tick), TEXT);
    }
    for tick in step_ticks {
        let text = format!("{tick}");
        font::draw(
            &mut picture,
            x(tick) as i64 - i64::from(font::width(&text, 1) / 2),
            PLOT[3] as i64 + 8,
            &text,
            1,
            TEXT,
        );
    }
    font::draw(&mut picture, PLOT[0] as i64, 14, title, 2, TEXT);
    font::draw(&mut picture, (PLOT[0] + PLOT[2]) as i64 / 2 - 16, PLOT[3] as i64 + 26, "step", 1, TEXT);
    let mut legend = PLOT[2] as i64 - 400;
    for (text, color) in [("loss", RAW), ("mean", MEAN), ("learning rate", RATE)] {
        font::fill(&mut picture, (legend, 26), (18, 3), color);
        font::draw(&mut picture, legend + 24, 23, text, 1, TEXT);
        legend += 24 + i64::from(font::width(text, 1)) + 24;
    }
    if top_rate > 0.0 {
        font::draw(&mut picture, PLOT[2] as i64 + 6, rate(top_rate) as i64 - 4, &number(top_rate), 1, RATE);
    }
    let left_out = points.len() - finite.len();
    if finite.is_empty() || left_out > 0 {
        let text = if finite.is_empty() {
            "no finite loss".to_owned()
        } else {
            format!("{left_out} steps without a finite loss")
        };
        font::draw(&mut picture, PLOT[0] as i64 + 12, PLOT[1] as i64 + 10, &text, 1, RATE);
    }
    picture
}

/// Exponential means over about a twentieth of the run, corrected for their start.
fn running_means(points: &[Point]) -> Vec<f64> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 20.0).clamp(1.0, 200.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mean = |point: &Point| {
        sum = keep * sum + (1.0 - keep) * point.loss;
        weight = keep * weight + (1.0 - keep);
        sum / weight
    };
    points.iter().map(mean).collect()
}

/// A range of losses that holds the mean and all but the wildest points.
fn loss_range(points: &[Point], means: &[f64]) -> (f64, f64) {
    let mut losses: Vec<f64> = points.iter().map(|point| point.loss).collect();
    losses.sort_by(f64::total_cmp);
    let at = |share: f64| losses.get(((losses.len().max(1) - 1) as f64 * share) as usize).copied();
    let low = means.iter().copied().fold(at(0.0).unwrap_or(0.0), f64::min);
    let high = means.iter().copied().fold(at(0.99).unwrap_or(1.0), f64::max);
    let margin = ((high - low) * 0.06).max(high.abs() * 1e-3).max(1e-9);
    // Losses are not negative: a range that nearly reaches 0 starts there.
    let bottom = if low >= 0.0 && low < 0.35 * high { 0.0 } else { low - margin };
    (bottom, high + margin)
}

/// About `count` round numbers between two.
fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|unit| unit * power)
        .find(|&step| step >= rough * 0.999)
        .unwrap_or(10.0 * power);
    let first = (low / step).ceil() as i64;
    // Bounded, whatever the range.
    (0..=2 * count as i64)
        .map(|index| (first + index) as f64 * step)
        .take_while(|&tick| tick <= high * (1.0 + 1e-12))
        .collect()
}

/// A number as short as it reads well.
fn number(value: f64) -> String {
    if value == 0.0 {
        "0".into()
    } else if (1e-3..1e4).contains(&value.abs()) {
        let text = format!("{value:.4}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        format!("{value:.1e}")
    }
}

fn polyline(canvas: &mut RgbImage, points: impl Iterator<Item = (f64, f64)>, width: f64, color: Rgb<u8>) {
    let mut last = None;
    for point in points {
        line(canvas, last.unwrap_or(point), point, width, color);
        last = Some(point);
    }
}

/// A line of round dots, dense enough to touch; coordinates and width in pixels of the finished picture.
fn line(canvas: &mut RgbImage, from: (f64, f64), to: (f64, f64), width: f64, color: Rgb<u8>) {
    let scale = f64::from(OVERSAMPLING);
    let radius = (width * scale / 2.0).max(0.6);
    let length = ((to.0 - from.0).powi(2) + (to.1 - from.1).powi(2)).sqrt() * scale;
    let dots = (length.ceil() as usize).clamp(1, 20_000);
    for dot in 0..=dots {
        let share = dot as f64 / dots as f64;
        let (cx, cy) = ((from.0 + (to.0 - from.0) * share) * scale, (from.1 + (to.1 - from.1) * share) * scale);
        for y in (cy - radius).floor() as i64..=(cy + radius).ceil() as i64 {
            for x in (cx - radius).floor() as i64..=(cx + radius).ceil() as i64 {
                let inside = (x as f64 - cx).powi(2) + (y as f64 - cy).powi(2) <= radius * radius;
                if inside && x >= 0 && y >= 0 && x < i64::from(canvas.width()) && y < i64::from(canvas.height()) {
                    canvas.put_pixel(x as u32, y as u32, color);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(loss: impl Fn(u64) -> f64, count: u64) -> Vec<Point> {
        (1..=count).map(|step| Point { step, loss: loss(step), learning_rate: 1e-4 }).collect()
    }

    #[test]
    fn odd_runs_are_drawn_too() {
        for points in [
            vec![],
            points(|_| 0.5, 1),
            points(|_| 0.0, 10),
            points(|_| f64::NAN, 5),
            points(|step| if step == 3 { f64::INFINITY } else { 1.0 }, 9),
            points(|step| 1e-30 * step as f64, 50),
            points(|step| 1e30 * step as f64, 3),
        ] {
            assert_eq!(draw(&points, "t").dimensions(), (WIDTH, HEIGHT));
        }
    }

    #[test]
    fn the_mean_falls_with_the_loss() {
        let picture = draw(&points(|step| 1.0 - step as f64 / 500.0, 400), "falling");
        let height_at =
            |x: u32| (0..HEIGHT).find(|&y| picture.get_pixel(x, y).0[0] < 90 && picture.get_pixel(x, y).0[2] > 150);
        let (left, right) = (height_at(110).unwrap(), height_at(800).unwrap());
        assert!(right > left + 100, "{left} {right}");
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 1.0, 5), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert!(ticks(3.0, 3.0 + 1e-12, 5).len() < 12);
        assert_eq!(number(0.25), "0.25");
        assert_eq!(number(1e-4), "1.0e-4");
    }
}
