//! Progress for people: the bar on a terminal, and log lines that go above it. What a bar shows is in the programs.

use std::io::{self, Write};
use std::sync::{Mutex, OnceLock};

use indicatif::{ProgressBar, ProgressStyle};

/// The bar on screen, so that log lines can go above it.
static BAR: OnceLock<Mutex<Option<ProgressBar>>> = OnceLock::new();

fn bar() -> &'static Mutex<Option<ProgressBar>> {
    BAR.get_or_init(Mutex::default)
}

/// What stands before each line of this process, where others write to the same terminal.
static RANK: OnceLock<String> = OnceLock::new();

/// Has the number of this process among those that train together stand before its messages.
pub fn name_rank(rank: usize) {
    // The first name stays.
    let _ = RANK.set(format!("rank {rank}: "));
}

/// What stands before messages: the rank, where there are several.
pub fn rank() -> &'static str {
    RANK.get().map_or("", String::as_str)
}

/// Puts a bar on screen, or takes it off.
pub fn put(new: Option<ProgressBar>) {
    if let Ok(mut bar) = bar().lock()
        && let Some(old) = std::mem::replace(&mut *bar, new)
    {
        old.finish();
    }
}

/// A bar of so many steps in the style of both programs.
pub fn new_bar(steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64);
    let style = ProgressStyle::with_template("{bar:32} {pos}/{len} [{elapsed} < {eta}] {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// Brings the bar on screen up to date.
pub fn advance(done: usize, message: String) {
    if let Ok(bar) = bar().lock()
        && let Some(bar) = &*bar
    {
        bar.set_position(done as u64);
        bar.set_message(message);
    }
}

/// Log lines on standard error, above the bar where there is one.
#[derive(Debug)]
pub struct Writer;

impl<'w> tracing_subscriber::fmt::MakeWriter<'w> for Writer {
    type Writer = Self;

    fn make_writer(&'w self) -> Self {
        Self
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // In one piece, as others write there too.
        let line = [rank().as_bytes(), bytes].concat();
        match bar().lock().ok().and_then(|bar| bar.clone()) {
            Some(bar) => bar.suspend(|| io::stderr().write_all(&line))?,
            None => io::stderr().write_all(&line)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
