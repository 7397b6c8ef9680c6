//! What commands say on standard output and standard error. The macros here stand before the standard library's of the
//! same names in both programs: those panic where nobody reads, as in `lora keys | head`.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

/// Where a command speaks.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Output,
    /// Standard error.
    Errors,
}

/// Writes as far as somebody reads. A closed pipe takes nothing more, and the work and its exit status go on without
/// it. An output that fails otherwise, as on a full disk, ends the program with status 1, because what was asked for is
/// not there.
#[doc(hidden)]
pub fn say(stream: Stream, text: Arguments<'_>) {
    let written = match stream {
        Stream::Output => io::stdout().lock().write_fmt(text),
        Stream::Errors => io::stderr().lock().write_fmt(text),
    };
    if let Err(error) = written
        && stream == Stream::Output
        && error.kind() != ErrorKind::BrokenPipe
    {
        say(Stream::Errors, format_args!("error: standard output cannot be written: {error}\n"));
        std::process::exit(1);
    }
}

/// As the standard library's, without its panic.
#[macro_export]
macro_rules! print {
    ($($text:tt)*) => { $crate::output::say($crate::output::Stream::Output, ::std::format_args!($($text)*)) };
}

/// As the standard library's, without its panic.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($text:tt)*) => { $crate::print!("{}\n", ::std::format_args!($($text)*)) };
}

/// As the standard library's, without its panic.
#[macro_export]
macro_rules! eprint {
    ($($text:tt)*) => { $crate::output::say($crate::output::Stream::Errors, ::std::format_args!($($text)*)) };
}

/// As the standard library's, without its panic.
#[macro_export]
macro_rules! eprintln {
    () => { $crate::eprint!("\n") };
    ($($text:tt)*) => { $crate::eprint!("{}\n", ::std::format_args!($($text)*)) };
}
