//! The events of a run as lines of JSON, for another program.

use std::io::{self, Write};

use super::Event;
use crate::callback::Callback;

/// The version of the stream. Fields and events may be added within a version; none changes its meaning or goes.
pub const VERSION: u32 = 1;

/// Writes each event as a line of JSON, after a first line `{"event":"stream","version":1,"program":"lora …"}`.
///
/// A line is written and flushed as a whole. A reader that goes away does not end the run; one that does not read holds it
/// up once the pipe is full.
#[derive(Debug)]
pub struct EventLines<W> {
    out: W,
    failed: bool,
}

impl<W: Write> EventLines<W> {
    /// Begins a stream with its first line.
    pub fn new(out: W) -> Self {
        let mut lines = Self { out, failed: false };
        let program = concat!("lora ", env!("CARGO_PKG_VERSION"));
        lines.write(&serde_json::json!({ "event": "stream", "version": VERSION, "program": program }));
        lines
    }

    fn write(&mut self, value: &impl serde::Serialize) {
        if self.failed {
            return;
        }
        let written = serde_json::to_vec(value).map_err(io::Error::other).and_then(|mut line| {
            line.push(b'\n');
            self.out.write_all(&line)?;
            self.out.flush()
        });
        if let Err(error) = written {
            tracing::warn!("events cannot be written ({error}); training goes on without them");
            self.failed = true;
        }
    }
}

impl<W: Write> Callback for EventLines<W> {
    fn on_event(&mut self, event: &Event) {
        self.write(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line_whatever_it_says() {
        let mut lines = EventLines::new(Vec::new());
        lines.on_event(&Event::Failed { message: "one\nline\u{2028}\0".into(), usage: false });
        let text = String::from_utf8(lines.out).unwrap();
        let parsed: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((parsed.len(), &parsed[0]["version"]), (2, &1.into()));
        assert_eq!(parsed[1]["message"], "one\nline\u{2028}\0");
    }

    #[test]
    fn a_reader_that_goes_away_is_not_written_to_again() {
        struct Gone(usize);
        impl Write for Gone {
            fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
                self.0 += 1;
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut lines = EventLines::new(Gone(0));
        (0..3).for_each(|step| lines.on_event(&Event::Paused { step }));
        assert_eq!(lines.out.0, 1);
    }
}
