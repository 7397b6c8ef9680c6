//! A run as one page of HTML that needs nothing else: pictures are in it, and no other file or server is asked for anything.
//! What it says is text to the browser, whatever it holds.

use std::fmt::{self, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use htmlize::escape_text;
use lora_data::figure::chart::{Curve, MAIN, Panel};
use lora_data::figure::loss_curve::{self, Point};
use lora_data::report::html;

use crate::bytes::show;
use crate::event::{Finding, Holds, Saved, Started};

/// Size of a curve's picture.
const CURVE: (u32, u32) = (520, 240);

/// Of the program's pages, and what only this one has.
const STYLE: &str = "<style>svg{width:100%;height:auto;background:#fff;border-radius:6px;margin:.4rem 0}\
                     .curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:.8rem}\
                     td,th{overflow-wrap:anywhere}td pre{max-height:20rem;overflow:auto}td img{max-width:100%}</style>";

/// What a page is made of.
#[derive(Debug, Clone, Default)]
pub(crate) struct RunPage {
    /// What the run is; nothing is known of it before it starts.
    pub started: Option<Started>,
    /// Its steps.
    pub steps: Vec<StepOf>,
    /// The held-out loss after so many steps.
    pub looks: Vec<(usize, f64)>,
    /// Prompts of the samples.
    pub prompts: Vec<String>,
    /// What was made of the prompts, by moment.
    pub samples: Vec<(String, Vec<SampleCell>)>,
    /// What may be wrong.
    pub findings: Vec<Finding>,
    /// What was done when memory ran out.
    pub out_of_memory: Vec<String>,
    /// What was written.
    pub saved: Vec<Saved>,
    /// How it ended; it goes on, where there is nothing.
    pub end: Option<String>,
    /// Seconds since it started.
    pub seconds: f64,
}

/// What the page shows of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StepOf {
    /// Step, loss and learning rate.
    pub point: Point,
    /// L2 norm of the gradients.
    pub gradient_norm: f64,
    /// Bytes.
    pub memory: u64,
    /// Seconds that it took.
    pub seconds: f64,
}

/// A sample as the page shows it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum SampleCell {
    /// A JPEG.
    Picture(Vec<u8>),
    /// A text.
    Text(String),
}

impl RunPage {
    /// The page.
    pub(crate) fn html(&self) -> String {
        let mut page = String::new();
        // Writing into a string cannot fail.
        let _ = self.write(&mut page);
        page
    }

    fn write(&self, page: &mut String) -> fmt::Result {
        let Some(started) = &self.started else { return Ok(()) };
        html::head(page, &started.name)?;
        write!(page, "{STYLE}<p>{}</p>", escape_text(self.status(started)))?;
        self.curves(page)?;
        self.samples(page)?;
        self.plan(page, started)?;
        self.findings(page)?;
        self.files(page)?;
        write!(page, "<h2>Configuration</h2><table><tr><th>key<th>value</tr>")?;
        for (key, value) in &started.config {
            write!(page, "<tr><td><code>{}</code><td>{}</tr>", escape_text(key), escape_text(value))?;
        }
        write!(page, "</table><h2>As it began</h2><pre>{}</pre></html>", escape_text(&started.summary))
    }

    fn status(&self, started: &Started) -> String {
        let done = self.steps.last().map_or(started.done, |step| step.point.step as usize);
        let end = self.end.as_deref().unwrap_or("it goes on");
        format!(
            "{done} of {} steps; {end}. On {} in {}, {} numbers trained, by {}.",
            started.steps, started.device, started.precision, started.parameters, started.program
        )
    }

    fn curves(&self, page: &mut String) -> fmt::Result {
        let points: Vec<Point> = self.steps.iter().map(|step| step.point).collect();
        let of = |title: &'static str, value: &dyn Fn(&StepOf) -> f64| {
            let points = self.steps.iter().map(|step| (step.point.step as f64, value(step))).collect();
            panel(title, points)
        };
        let looks = self.looks.iter().map(|(step, loss)| (*step as f64, *loss)).collect::<Vec<_>>();
        let validation = (!looks.is_empty()).then(|| panel("validation loss", looks));
        let memory = |step: &StepOf| step.memory as f64 / f64::from(1 << 30);
        let panels = [Some(loss_curve::loss(&points, "loss")), validation, Some(loss_curve::rate(&points))];
        let others = [of("gradient norm", &|step| step.gradient_norm), of("memory in GiB", &memory)];
        write!(page, "<h2>Curves</h2><div class=\"curves\">")?;
        for panel in panels.into_iter().flatten().chain(others) {
            write!(page, "<div>{}</div>", panel.to_svg(CURVE.0, CURVE.1))?;
        }
        write!(page, "</div>")
    }

    fn samples(&self, page: &mut String) -> fmt::Result {
        if self.samples.is_empty() {
            return Ok(());
        }
        write!(page, "<h2>Samples</h2><table><tr><th>")?;
        for prompt in &self.prompts {
            write!(page, "<th>{}", escape_text(prompt))?;
        }
        write!(page, "</tr>")?;
        for (label, cells) in &self.samples {
            write!(page, "<tr><th>{}", escape_text(label))?;
            for cell in cells {
                match cell {
                    SampleCell::Picture(jpeg) => {
                        write!(page, "<td><img alt=\"\" src=\"data:image/jpeg;base64,{}\">", STANDARD.encode(jpeg))?;
                    }
                    SampleCell::Text(text) => write!(page, "<td><pre>{}</pre>", escape_text(text))?,
                }
            }
            write!(page, "</tr>")?;
        }
        write!(page, "</table>")
    }

    /// What was planned against what happened.
    fn plan(&self, page: &mut String, started: &Started) -> fmt::Result {
        let peak = self.steps.iter().map(|step| step.memory).max();
        let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "–".to_owned(), show);
        let training: f64 = self.steps.iter().map(|step| step.seconds).sum();
        let mean = training / self.steps.len().max(1) as f64;
        let done = self.steps.last().map_or(started.done, |step| step.point.step as usize);
        write!(page, "<h2>Plan and what happened</h2><table><tr><th><th>planned<th>happened</tr>")?;
        write!(page, "<tr><td>memory at the peak<td>{}<td>{}</tr>", bytes(started.planned_peak), bytes(peak))?;
        write!(page, "<tr><td>steps<td>{}<td>{done}</tr>", started.steps)?;
        let whole = time(mean * started.steps as f64);
        write!(page, "<tr><td>time in steps<td>{whole} at {mean:.2} s a step<td>{}</tr>", time(training))?;
        write!(page, "<tr><td>time in all, of this part of the run<td>–<td>{}</tr></table>", time(self.seconds))
    }

    fn findings(&self, page: &mut String) -> fmt::Result {
        write!(page, "<h2>Findings</h2>")?;
        if self.findings.is_empty() && self.out_of_memory.is_empty() {
            return write!(page, "<p>Nothing is the matter.</p>");
        }
        write!(page, "<table><tr><th>about<th class=\"n\">after step<th>what was seen, and what helps</tr>")?;
        for Finding { step, about, message, .. } in &self.findings {
            let about = format!("{about:?}").to_lowercase();
            let message = escape_text(message);
            write!(page, "<tr><td class=\"warning\">{about}<td class=\"n\">{step}<td>{message}</tr>")?;
        }
        for message in &self.out_of_memory {
            write!(page, "<tr><td class=\"lost\">memory<td><td>{}</tr>", escape_text(message))?;
        }
        write!(page, "</table>")
    }

    fn files(&self, page: &mut String) -> fmt::Result {
        write!(page, "<h2>Files</h2><table><tr><th class=\"n\">step<th>file<th class=\"n\">size<th>SHA-256</tr>")?;
        for Saved { step, holds, path, bytes, sha256 } in &self.saved {
            let hash = match (sha256, holds) {
                (Some(hash), _) => hash.as_str(),
                (None, Holds::State) => "the state, to go on from",
                (None, Holds::Weights) => "–",
            };
            let path = escape_text(path.to_string_lossy());
            let size = show(*bytes);
            write!(page, "<tr><td class=\"n\">{step}<td>{path}<td class=\"n\">{size}<td><code>{hash}</code></tr>")?;
        }
        write!(page, "</table>")
    }
}

/// One curve in its frame.
fn panel(title: &'static str, points: Vec<(f64, f64)>) -> Panel {
    let curves = vec![Curve { name: title, color: MAIN, width: 1, points }];
    Panel { title: title.to_owned(), range: None, curves }
}

/// Seconds as people read them.
fn time(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 60.0 => format!("{seconds:.1} s"),
        seconds if seconds < 3600.0 => format!("{:.0} min {:02.0} s", (seconds / 60.0).floor(), seconds % 60.0),
        seconds => format!("{:.0} h {:02.0} min", (seconds / 3600.0).floor(), (seconds % 3600.0) / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::About;

    const EVIL: &str = "</pre><script>alert(1)</script>&<img src=x onerror=alert(2)>\"'";

    fn page() -> RunPage {
        let step = |step: u64| StepOf {
            point: Point { step, loss: 1.0 / step as f64, learning_rate: 1e-4 },
            gradient_norm: if step == 3 { f64::NAN } else { 0.5 },
            memory: (1 << 30) + step,
            seconds: 0.5,
        };
        RunPage {
            started: Some(Started {
                name: EVIL.into(),
                config: [(EVIL.to_owned(), EVIL.repeat(1000))].into(),
                summary: EVIL.into(),
                steps: 20,
                planned_peak: Some(2 << 30),
                ..Started::default()
            }),
            steps: (1..=10).map(step).collect(),
            looks: vec![(0, 1.0), (10, 0.5)],
            prompts: vec![EVIL.into()],
            samples: vec![(EVIL.into(), vec![SampleCell::Text(EVIL.into())])],
            findings: vec![Finding::new(3, About::Health, "spike", EVIL)],
            out_of_memory: vec![EVIL.into()],
            saved: vec![Saved {
                step: 5,
                holds: Holds::Weights,
                path: EVIL.into(),
                bytes: 1 << 20,
                sha256: Some("ab".repeat(32)),
            }],
            end: Some(EVIL.into()),
            seconds: 3700.0,
        }
    }

    #[test]
    fn nothing_that_it_says_is_markup_and_nothing_is_fetched() {
        let html = page().html();
        assert!(!html.contains("<script") && !html.contains("<img src=x"));
        let fetched = ["http:", "https:", "href=", "url(", "@import", "<link", "<iframe"];
        let namespace = html.replace("http://www.w3.org/2000/svg", "");
        assert_eq!(fetched.iter().filter(|what| namespace.contains(**what)).collect::<Vec<_>>(), [&""; 0]);
        assert_eq!(html.matches("<svg").count(), 5);
    }

    #[test]
    fn it_says_what_was_planned_and_what_happened() {
        let html = page().html();
        for text in [
            "10 of 20 steps",
            "memory at the peak<td>2.00 GiB<td>1.00 GiB",
            "time in steps<td>10.0 s at 0.50 s a step<td>5.0 s",
            "1 h 02 min",
            "<td class=\"n\">5<td>",
            &"ab".repeat(32),
        ] {
            assert!(html.contains(text), "{text}");
        }
        assert_eq!(RunPage::default().html(), "", "nothing is known yet");
    }
}
