//! Progress of a run: a bar where there is a terminal, a line now and then where there is none.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use lora_cli::progress::{advance, new_bar, put};
use lora_train::callback::{Callback, Control};
use lora_train::{Preparing, Session, StepReport};

/// Shows how far preparing has come.
pub(crate) fn preparing() -> impl FnMut(Preparing) {
    let mut last = None;
    move |stage| {
        let (what, done, of) = match stage {
            Preparing::Loading(part) => {
                eprintln!("loading the {part}");
                return;
            }
            Preparing::Labels(done, of) => ("giving captions", done, of),
            Preparing::Examples(done, of) => ("encoding examples", done, of),
            Preparing::Captions(done, of) => ("encoding captions", done, of),
            // A stage that this program does not know is passed over.
            _ => return,
        };
        let due = last.is_none_or(|last: Instant| last.elapsed() > Duration::from_secs(2));
        if due || done == of {
            last = Some(Instant::now());
            let end = if io::stderr().is_terminal() && done < of { '\r' } else { '\n' };
            eprint!("{what} {done}/{of}{end}");
        }
    }
}

/// The bar of a run: loss, learning rate, what is trained on per second, memory, time left.
pub(crate) struct TrainingBar {
    terminal: bool,
    mean: Option<f64>,
    start: Instant,
    measured: f64,
    printed: Instant,
}

impl Default for TrainingBar {
    fn default() -> Self {
        let now = Instant::now();
        Self { terminal: io::stderr().is_terminal(), mean: None, start: now, measured: 0.0, printed: now }
    }
}

impl Callback for TrainingBar {
    fn on_start(&mut self, session: &mut Session) -> lora_train::Result<Control> {
        eprintln!("{}", session.summary());
        self.start = Instant::now();
        if self.terminal {
            put(Some(new_bar(session.plan().steps)));
        }
        Ok(Control::Continue)
    }

    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> lora_train::Result<Control> {
        self.measured += report.measure;
        if report.loss.is_finite() {
            self.mean = Some(self.mean.map_or(report.loss, |mean| mean + (report.loss - mean) * 0.05));
        }
        let elapsed = self.start.elapsed().as_secs_f64();
        let message = format!(
            "loss {:.4} lr {:.2e} {:.2} {}/s {:.1} GiB{}",
            self.mean.unwrap_or(f64::NAN),
            report.learning_rate,
            self.measured / elapsed,
            session.data().unit,
            report.memory as f64 / f64::from(1 << 30),
            if report.skipped_steps > 0 { format!(" skipped {}", report.skipped_steps) } else { String::new() }
        );
        if self.terminal {
            advance(report.step, message);
        } else if report.step == 1 || report.step == report.steps || self.printed.elapsed() > Duration::from_secs(10) {
            self.printed = Instant::now();
            let left = elapsed / report.step as f64 * (report.steps - report.step) as f64;
            eprintln!("step {}/{} {message}, {left:.0} s left", report.step, report.steps);
        }
        Ok(Control::Continue)
    }

    fn on_end(&mut self, _session: &mut Session) -> lora_train::Result<()> {
        put(None);
        Ok(())
    }
}

impl Drop for TrainingBar {
    fn drop(&mut self) {
        put(None);
    }
}
