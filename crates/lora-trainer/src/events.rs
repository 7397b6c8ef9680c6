//! `--events`: what happens in a run as lines of JSON for another program, which steers it by lines on standard input.

use std::fs::File;
use std::io::{self, Write};

use lora_cli::Failure;
use lora_train::callback::Callback;
use lora_train::event::EventLines;
use lora_train::{Command, Event};

/// Where the lines go: standard output, an open file descriptor by its number, or a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    StandardOutput,
    Descriptor(u32),
    File(String),
}

impl From<&str> for Target {
    fn from(text: &str) -> Self {
        match (text, text.parse()) {
            ("-" | "1", _) => Target::StandardOutput,
            (_, Ok(number)) => Target::Descriptor(number),
            _ => Target::File(text.to_owned()),
        }
    }
}

impl Target {
    fn open(&self) -> io::Result<Box<dyn Write>> {
        Ok(match self {
            Target::StandardOutput => Box::new(io::stdout()),
            Target::Descriptor(number) => Box::new(File::options().append(true).open(format!("/dev/fd/{number}"))?),
            Target::File(path) => Box::new(File::create(path)?),
        })
    }

    /// The callbacks that write the events and read the commands. Standard input is read from here on.
    pub(crate) fn callbacks(&self) -> Result<Vec<Box<dyn Callback>>, Failure> {
        let lines = EventLines::new(self.open().map_err(|error| {
            let place = match self {
                Target::StandardOutput => "standard output".to_owned(),
                Target::Descriptor(number) => format!("file descriptor {number}"),
                Target::File(path) => path.clone(),
            };
            Failure::Usage(format!("--events: {place} cannot be opened for writing: {error}"))
        })?);
        Ok(vec![Box::new(lines), Box::new(Command::from_lines(io::stdin()))])
    }
}

/// Tells of a failure before the run itself could.
pub(crate) fn tell_failure(callbacks: &mut [Box<dyn Callback>], failure: &Failure) {
    let (message, usage) = match failure {
        Failure::Work(message) => (message, false),
        Failure::Usage(message) => (message, true),
    };
    let event = Event::Failed { message: message.clone(), usage };
    callbacks.iter_mut().for_each(|callback| callback.on_event(&event));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_a_descriptor_and_anything_else_a_file() {
        let of = |text: &str| Target::from(text);
        assert_eq!(
            (of("-"), of("1"), of("3")),
            (Target::StandardOutput, Target::StandardOutput, Target::Descriptor(3))
        );
        assert_eq!(of("3.jsonl"), Target::File("3.jsonl".into()));
    }
}
