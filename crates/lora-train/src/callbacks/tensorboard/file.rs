//! Files that TensorBoard reads: records of TensorFlow's framing, each an `Event` of its protocol buffers, written field by
//! field. Of the crates that write them none is kept (the last versions are of 2022 and 2024, for protobuf 2 and prost
//! 0.12), and what is needed of the format is below.
//!
//! Sources: `tensorflow/core/lib/io/record_writer` (framing), `tensorboard/compat/proto/{event,summary,tensor}.proto`
//! (field numbers).

use std::io::{self, Write};

/// `SessionLog.START`: what an earlier file of the folder says from this step on is forgotten.
const START: u64 = 1;
/// `DT_STRING`.
const STRING: u64 = 7;

/// A file of events.
#[derive(Debug)]
pub(crate) struct EventFile<W> {
    out: W,
}

impl<W: Write> EventFile<W> {
    /// Begins a file at `time` (seconds since 1970). Steps from `first` on that other files of its folder have do not count.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(crate) fn new(out: W, time: f64, first: u64) -> io::Result<Self> {
        let mut file = Self { out };
        file.record(&Message::default().double(1, time).bytes(3, b"brain.Event:2"))?;
        let log = Message::default().number(1, START);
        file.record(&Message::default().double(1, time).number(2, first).message(7, &log))?;
        Ok(file)
    }

    /// Values of a step, by tag.
    ///
    /// # Errors
    /// Where they cannot be written.
    pub(crate) fn scalars<'t>(
        &mut self,
        time: f64,
        step: u64,
        values: impl IntoIterator<Item = (&'t str, f64)>,
    ) -> io::Result<()> {
        let value = |(tag, number): (&str, f64)| Message::default().bytes(1, tag.as_bytes()).float(2, number as f32);
        self.summary(time, step, values.into_iter().map(value))
    }

    /// A picture (PNG) of `width` by `height` pixels, and what is said of it.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(crate) fn image(
        &mut self,
        time: f64,
        step: u64,
        tag: &str,
        about: &str,
        (width, height): (usize, usize),
        png: &[u8],
    ) -> io::Result<()> {
        // 3: RGB.
        let image = Message::default().number(1, height as u64).number(2, width as u64).number(3, 3).bytes(4, png);
        let metadata = metadata(b"images", about);
        self.summary(time, step, [Message::default().bytes(1, tag.as_bytes()).message(4, &image).message(9, &metadata)])
    }

    /// A text, which is shown as Markdown, and what is said of it.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(crate) fn text(&mut self, time: f64, step: u64, tag: &str, about: &str, text: &str) -> io::Result<()> {
        let shape = Message::default().message(2, &Message::default().number(1, 1));
        let tensor = Message::default().number(1, STRING).message(2, &shape).bytes(8, text.as_bytes());
        let metadata = metadata(b"text", about);
        self.summary(
            time,
            step,
            [Message::default().bytes(1, tag.as_bytes()).message(8, &tensor).message(9, &metadata)],
        )
    }

    fn summary(&mut self, time: f64, step: u64, values: impl IntoIterator<Item = Message>) -> io::Result<()> {
        let summary = values.into_iter().fold(Message::default(), |summary, value| summary.message(1, &value));
        self.record(&Message::default().double(1, time).number(2, step).message(5, &summary))
    }

    /// A record: its length, the length's checksum, itself, its checksum; written in one piece.
    fn record(&mut self, Message(data): &Message) -> io::Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(data);
        record.extend(masked_crc(data).to_le_bytes());
        self.out.write_all(&record)?;
        self.out.flush()
    }
}

/// What shows a value, and what is said of it.
fn metadata(plugin: &[u8], about: &str) -> Message {
    Message::default().message(1, &Message::default().bytes(1, plugin)).bytes(3, about.as_bytes())
}

/// CRC32C, masked so that a checksum of data that holds checksums is one.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A message of protocol buffers (version 3): fields in the order in which they are added; numbers that are 0 are left out.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn number(mut self, field: u32, value: u64) -> Self {
        if value != 0 {
            self.key(field, 0);
            self.varint(value);
        }
        self
    }

    fn double(mut self, field: u32, value: f64) -> Self {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// One of a `oneof`, which is there whatever its value.
    fn float(mut self, field: u32, value: f32) -> Self {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u32, value: &[u8]) -> Self {
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    fn message(self, field: u32, value: &Self) -> Self {
        self.bytes(field, &value.0)
    }

    fn key(&mut self, field: u32, wire_type: u32) {
        self.varint(u64::from(field << 3 | wire_type));
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `tools/golden/make_tensorboard.py` writes the same with TensorBoard's own writer.
    #[test]
    fn a_file_is_what_tensorboards_own_writer_makes_of_it() {
        let mut bytes = Vec::new();
        let mut file = EventFile::new(&mut bytes, 1000.5, 0).unwrap();
        file.scalars(1001.0, 1, [("loss/current", 0.25), ("lr/unet", 1e-4), ("loss/nan", f64::NAN)]).unwrap();
        file.scalars(1002.0, 300, [("loss/current", 0.0)]).unwrap();
        file.image(1003.0, 300, "samples/1", "a cat, 猫", (2, 200), b"not really a PNG").unwrap();
        file.text(1004.0, 300, "samples/2", "a question", &"a long answer ".repeat(20)).unwrap();
        EventFile::new(&mut bytes, 2000.5, 301).unwrap();
        assert!(bytes == include_bytes!("../../../tests/golden/tensorboard.tfevents"), "{bytes:?}");
    }
}
