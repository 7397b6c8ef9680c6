//! Curves over the steps of a run, drawn by `plotters`: as SVG, where whoever shows it brings the fonts, or onto a picture,
//! in the embedded font. Neither needs a font on the machine.

use image::RgbImage;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::label;

/// The colour of single values.
pub const RAW: RGBColor = RGBColor(178, 205, 240);
/// The colour of what is looked at first.
pub const MAIN: RGBColor = RGBColor(30, 90, 190);
/// The colour of what stands beside it.
pub const BESIDE: RGBColor = RGBColor(214, 130, 40);

const TEXT: RGBColor = RGBColor(60, 60, 66);
const GRID: RGBColor = RGBColor(232, 232, 236);
/// Points of a curve that are drawn: more than there are pixels show nothing more.
const MOST: usize = 2000;

/// A curve: steps and values, of which those that are not finite are left out.
#[derive(Debug, Clone)]
pub struct Curve {
    /// What it is called.
    pub name: &'static str,
    /// Its colour.
    pub color: RGBColor,
    /// Its width in pixels.
    pub width: u32,
    /// Its points, by step.
    pub points: Vec<(f64, f64)>,
}

/// Curves in one frame.
#[derive(Debug, Clone, Default)]
pub struct Panel {
    /// What stands above.
    pub title: String,
    /// The values that are shown; all, where it is left out. What lies outside is drawn at the edge.
    pub range: Option<(f64, f64)>,
    /// The curves, the first at the back.
    pub curves: Vec<Curve>,
}

impl Panel {
    /// Draws it as an SVG element of `width` by `height`. What cannot be drawn is left out.
    pub fn to_svg(&self, width: u32, height: u32) -> String {
        label::prepare();
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
            // Writing into a string cannot fail.
            let _ = self.draw(&area, 13, 62).and_then(|()| area.present());
        }
        svg
    }

    /// Draws it onto a picture between two rows.
    pub fn draw_on(&self, picture: &mut RgbImage, rows: (u32, u32)) {
        let area = label::canvas(picture);
        let (width, _) = area.dim_in_pixel();
        let area = area.shrink((0, rows.0), (width, rows.1.saturating_sub(rows.0)));
        let _ = self.draw(&area, label::SIZE, 64);
    }

    fn draw<DB: DrawingBackend>(
        &self,
        area: &DrawingArea<DB, Shift>,
        size: u32,
        left: u32,
    ) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
        let font = (label::FAMILY, size).into_font().color(&TEXT);
        let (steps, range) = (self.steps(), self.range.unwrap_or_else(|| self.values()));
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .caption(&self.title, font.clone())
            .x_label_area_size(size + 12)
            .y_label_area_size(left)
            .build_cartesian_2d(steps.0..steps.1, range.0..range.1)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(TEXT)
            .x_labels(8)
            .y_labels(5)
            .x_label_formatter(&|step| if step.fract() == 0.0 { step.to_string() } else { String::new() })
            .y_label_formatter(&|value| number(*value))
            .label_style(font.clone())
            .draw()?;
        for Curve { name, color, width, points } in &self.curves {
            let style = color.stroke_width(*width);
            let shown = thin(points).into_iter().map(|(step, value)| (step, value.clamp(range.0, range.1)));
            chart
                .draw_series(LineSeries::new(shown, style))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style.stroke_width(2)));
        }
        if self.curves.len() > 1 {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .background_style(WHITE.mix(0.8))
                .label_font(font)
                .draw()?;
        }
        Ok(())
    }

    fn points(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        self.curves.iter().flat_map(|curve| curve.points.iter().copied()).filter(|(_, value)| value.is_finite())
    }

    fn steps(&self) -> (f64, f64) {
        let (low, high) = extent(self.points().map(|(step, _)| step)).unwrap_or((0.0, 1.0));
        if low == high { (low - 1.0, high.max(1.0)) } else { (low, high) }
    }

    /// A range that holds all values. Values that are not negative and come near 0 have it in sight.
    fn values(&self) -> (f64, f64) {
        let (low, high) = extent(self.points().map(|(_, value)| value)).unwrap_or((0.0, 1.0));
        let margin = ((high - low) * 0.06).max(high.abs() * 1e-3).max(1e-12);
        let bottom = if low >= 0.0 && low < 0.35 * high { 0.0 } else { low - margin };
        (bottom, high + margin)
    }
}

fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |extent, value| {
        let (low, high) = extent.unwrap_or((value, value));
        Some((low.min(value), high.max(value)))
    })
}

/// The finite points of a curve, or where there are too many the lowest and the highest of each of so many parts of it.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|(_, value)| value.is_finite()).collect();
    if finite.len() <= MOST {
        return finite;
    }
    let extremes = |part: &[(f64, f64)]| {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (low, high) = (part.iter().min_by(by_value).copied(), part.iter().max_by(by_value).copied());
        let mut both: Vec<(f64, f64)> = low.into_iter().chain(high).collect();
        both.sort_by(|a, b| a.0.total_cmp(&b.0));
        both.dedup();
        both
    };
    finite.chunks(finite.len().div_ceil(MOST / 2)).flat_map(extremes).collect()
}

/// A number as short as it reads well.
fn number(value: f64) -> String {
    if value.abs() < 1e-15 {
        "0".into()
    } else if (1e-3..1e4).contains(&value.abs()) {
        let text = format!("{value:.4}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        format!("{value:.1e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(points: Vec<(f64, f64)>) -> Panel {
        let curve = |name| Curve { name, color: MAIN, width: 2, points: points.clone() };
        Panel { title: "a < b & \"c\"".into(), range: None, curves: vec![curve("one"), curve("two")] }
    }

    #[test]
    fn odd_curves_are_drawn_too() {
        let values = [0.0, 1.0, -1.0, f64::NAN, f64::INFINITY, 1e-30, 1e30, f64::MAX / 4.0];
        for count in 0..4 {
            for value in values {
                let points = (0..count).map(|step| (f64::from(step), value * (1.0 + f64::from(step)))).collect();
                let panel = panel(points);
                let svg = panel.to_svg(400, 200);
                assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{count} {value}: {svg}");
                panel.draw_on(&mut RgbImage::new(300, 200), (0, 200));
            }
        }
    }

    #[test]
    fn a_title_is_text_and_not_markup() {
        let svg = panel(vec![(1.0, 2.0), (2.0, 1.0)]).to_svg(400, 200);
        assert!(svg.contains("a &lt; b &amp; ") && !svg.contains("a < b"), "{svg}");
        assert_eq!(svg.matches("<polyline").count(), svg.matches("<polyline").count().max(2), "{svg}");
    }

    #[test]
    fn long_runs_keep_their_spikes() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|step| (f64::from(step), 1.0)).collect();
        points[77_777].1 = 9.0;
        let shown = thin(&points);
        assert!(shown.len() <= MOST && shown.contains(&(77_777.0, 9.0)) && shown.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn numbers_are_short() {
        let shown = [0.25, 1e-4, 0.0, 1e-17, 12_345.0].map(number);
        assert_eq!(shown, ["0.25", "1.0e-4", "0", "0", "1.2e4"]);
    }
}
