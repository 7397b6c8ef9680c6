//! Progress of a run: a bar where there is a terminal, a line now and then where there is none.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use lora_cli::progress::{advance, new_bar, put};
use lora_train::callback::Callback;
use lora_train::event::Step;
use lora_train::{Event, Preparing};

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
    printed: Instant,
    /// No step was shown yet.
    first: bool,
}

impl Default for TrainingBar {
    fn default() -> Self {
        Self { terminal: io::stderr().is_terminal(), printed: Instant::now(), first: true }
    }
}

impl TrainingBar {
    fn show(&mut self, Step { report, mean_loss, rate, unit, seconds_left, .. }: &Step) {
        let message = format!(
            "loss {:.4} lr {:.2e} {rate:.2} {unit}/s {:.1} GiB{}",
            mean_loss.unwrap_or(f64::NAN),
            report.learning_rate,
            report.memory as f64 / f64::from(1 << 30),
            if report.skipped_steps > 0 { format!(" skipped {}", report.skipped_steps) } else { String::new() }
        );
        let due = std::mem::take(&mut self.first) || self.printed.elapsed() > Duration::from_secs(10);
        if self.terminal {
            advance(report.step, message);
        } else if due || report.step == report.steps {
            self.printed = Instant::now();
            eprintln!("step {}/{} {message}, {seconds_left:.0} s left", report.step, report.steps);
        }
    }
}

impl Callback for TrainingBar {
    fn on_event(&mut self, event: &Event) {
        match event {
            Event::Started(started) => {
                eprintln!("{}", started.summary);
                if self.terminal {
                    put(Some(new_bar(started.steps)));
                }
            }
            Event::Step(step) => self.show(step),
            Event::Paused { step } => eprintln!("paused after step {step}"),
            Event::Finished(_) | Event::Failed { .. } => put(None),
            _ => {}
        }
    }
}

impl Drop for TrainingBar {
    fn drop(&mut self) {
        put(None);
    }
}
