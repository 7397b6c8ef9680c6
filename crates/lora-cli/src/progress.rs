//! Progress for people: a bar where there is a terminal, a line now and then where there is none.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use lora_train::callback::Callback;
use lora_train::event::Step;
use lora_train::{Event, Preparing};

/// The bar on screen, so that log lines can go above it.
static BAR: OnceLock<Mutex<Option<ProgressBar>>> = OnceLock::new();

fn bar() -> &'static Mutex<Option<ProgressBar>> {
    BAR.get_or_init(Mutex::default)
}

/// Puts a bar on screen, or takes it off.
fn put(new: Option<ProgressBar>) {
    if let Ok(mut bar) = bar().lock()
        && let Some(old) = std::mem::replace(&mut *bar, new)
    {
        old.finish();
    }
}

/// A bar of so many steps in this program's style.
fn new_bar(steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64);
    let style = ProgressStyle::with_template("{bar:32} {pos}/{len} [{elapsed} < {eta}] {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// Brings the bar on screen up to date.
fn advance(done: usize, message: String) {
    if let Ok(bar) = bar().lock()
        && let Some(bar) = &*bar
    {
        bar.set_position(done as u64);
        bar.set_message(message);
    }
}

/// Log lines on standard error, above the bar where there is one.
pub(crate) struct Writer;

impl<'w> tracing_subscriber::fmt::MakeWriter<'w> for Writer {
    type Writer = Self;

    fn make_writer(&'w self) -> Self {
        Self
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match bar().lock().ok().and_then(|bar| bar.clone()) {
            Some(bar) => bar.suspend(|| io::stderr().write_all(bytes))?,
            None => io::stderr().write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

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

/// The bar of captions: how many have failed, pictures a second, time left.
pub(crate) struct CaptionBar {
    terminal: bool,
    start: Instant,
    printed: Instant,
    failed: usize,
}

impl Default for CaptionBar {
    fn default() -> Self {
        let now = Instant::now();
        Self { terminal: io::stderr().is_terminal(), start: now, printed: now, failed: 0 }
    }
}

impl CaptionBar {
    /// One more picture is done.
    pub(crate) fn show(&mut self, done: usize, of: usize, failed: bool) {
        self.failed += usize::from(failed);
        let elapsed = self.start.elapsed().as_secs_f64();
        let failures = if self.failed > 0 { format!(" {} without", self.failed) } else { String::new() };
        let message = format!("{:.2} img/s{failures}", done as f64 / elapsed.max(1e-3));
        if self.terminal {
            if done == 1 {
                put(Some(new_bar(of)));
            }
            advance(done, message);
        } else if done == of || self.printed.elapsed() > Duration::from_secs(10) {
            self.printed = Instant::now();
            let left = elapsed / done as f64 * (of - done) as f64;
            eprintln!("caption {done}/{of} {message}, {left:.0} s left");
        }
    }
}

impl Drop for CaptionBar {
    fn drop(&mut self) {
        put(None);
    }
}
