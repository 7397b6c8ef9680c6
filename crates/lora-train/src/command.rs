//! What a run can be told to do while it goes on. Who tells it is a callback
//! ([`Callback::commands`](crate::callback::Callback::commands)).

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, channel};

/// Done between two steps, and answered by [`Event::Command`](crate::event::Event::Command).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command {
    /// Hold before the next step.
    Pause,
    /// Go on.
    Resume,
    /// Make samples of the configuration's prompts now.
    Sample,
    /// Save what is trained as it is now, and the state where the configuration asks for states.
    Save,
    /// End the run as if it were complete.
    Stop,
    /// Something else, which is answered with what there is.
    Unknown(String),
}

/// Bytes of a line that are read; a longer one is no command.
const LONGEST: u64 = 256;

impl Command {
    /// All commands that there are.
    pub const ALL: [Command; 5] = [Command::Pause, Command::Resume, Command::Sample, Command::Save, Command::Stop];

    /// The command of a name.
    pub fn named(name: &str) -> Self {
        let known = Self::ALL.into_iter().find(|command| command.to_string() == name);
        known.unwrap_or_else(|| Command::Unknown(name.to_owned()))
    }

    /// The commands of a text, one a line, as they come: a thread reads them until the text ends. Empty lines are none.
    pub fn from_lines(text: impl Read + Send + 'static) -> Receiver<Command> {
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            let mut text = BufReader::new(text);
            while let Ok(Some(line)) = next_line(&mut text) {
                if !line.is_empty() && sender.send(Command::named(&line)).is_err() {
                    return;
                }
            }
        });
        receiver
    }

    /// What is said of something that is no command.
    pub(crate) fn advice() -> String {
        let known = Self::ALL.map(|command| command.to_string());
        format!("there is no such command; known are {}", known.join(", "))
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Command::Pause => "pause",
            Command::Resume => "resume",
            Command::Sample => "sample",
            Command::Save => "save",
            Command::Stop => "stop",
            Command::Unknown(text) => text,
        })
    }
}

/// The next line without white space around it, cut where it is too long for any command; `None` at the end.
fn next_line(text: &mut impl BufRead) -> std::io::Result<Option<String>> {
    let mut line = Vec::new();
    if text.by_ref().take(LONGEST).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.len() as u64 == LONGEST && line.last() != Some(&b'\n') {
        text.skip_until(b'\n')?;
    }
    Ok(Some(String::from_utf8_lossy(&line).trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_a_command_and_a_long_one_none() {
        let text = format!("pause\r\n\n  save \nsta\u{fffd}rt\n{}\nstop", "x".repeat(1 << 20));
        let commands: Vec<Command> = Command::from_lines(std::io::Cursor::new(text)).iter().collect();
        let [Command::Pause, Command::Save, Command::Unknown(other), Command::Unknown(long), Command::Stop] =
            &commands[..]
        else {
            panic!("{commands:?}")
        };
        assert_eq!((other.as_str(), long.len() as u64), ("sta\u{fffd}rt", LONGEST));
        assert!(Command::ALL.iter().all(|command| Command::named(&command.to_string()) == *command));
    }
}
