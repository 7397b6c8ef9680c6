//! The loss curve: the raw loss thin, its running mean thick, the learning rate below in a frame of its own.

use image::{Rgb, RgbImage};

use super::chart::{BESIDE, Curve, MAIN, Panel, RAW};

/// One step of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// The step, from 1.
    pub step: u64,
    /// Its loss.
    pub loss: f64,
    /// Its learning rate.
    pub learning_rate: f64,
}

const WIDTH: u32 = 960;
const HEIGHT: u32 = 540;
/// Where the frame of the learning rate begins.
const BELOW: u32 = 400;

/// Draws the curve, 960×540.
pub fn draw(points: &[Point], title: &str) -> RgbImage {
    let mut picture = RgbImage::from_pixel(WIDTH, HEIGHT, Rgb([255; 3]));
    loss(points, title).draw_on(&mut picture, (0, BELOW));
    rate(points).draw_on(&mut picture, (BELOW, HEIGHT));
    picture
}

/// The losses with their mean, and how many there are none of.
pub fn loss(points: &[Point], title: &str) -> Panel {
    let finite: Vec<Point> = points.iter().copied().filter(|point| point.loss.is_finite()).collect();
    let means = running_means(&finite);
    let left_out = match points.len() - finite.len() {
        0 if !points.is_empty() => String::new(),
        _ if finite.is_empty() => " (no finite loss)".into(),
        count => format!(" ({count} steps without a finite loss)"),
    };
    let steps = || finite.iter().map(|point| point.step as f64);
    let raw = steps().zip(finite.iter().map(|point| point.loss)).collect();
    let mean = steps().zip(means.iter().copied()).collect();
    Panel {
        title: format!("{title}{left_out}"),
        range: Some(loss_range(&finite, &means)),
        curves: vec![
            Curve { name: "loss", color: RAW, width: 1, points: raw },
            Curve { name: "mean", color: MAIN, width: 2, points: mean },
        ],
    }
}

/// The learning rates.
pub fn rate(points: &[Point]) -> Panel {
    let rates = points.iter().map(|point| (point.step as f64, point.learning_rate)).collect();
    let curve = Curve { name: "learning rate", color: BESIDE, width: 1, points: rates };
    Panel { title: "learning rate".into(), range: None, curves: vec![curve] }
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
}
