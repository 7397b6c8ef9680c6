//! Why a command ends without what it was asked for, and the exit status that this is.

use std::process::ExitCode;

use crate::progress;

/// A failure on its way to the exit status.
#[derive(Debug)]
pub enum Failure {
    /// The work failed: 1.
    Work(String),
    /// The arguments or the configuration are wrong: 2.
    Usage(String),
}

impl Failure {
    /// Says what failed on standard error.
    pub fn tell(&self) -> ExitCode {
        let (message, status) = match self {
            Failure::Work(message) => (message, 1),
            Failure::Usage(message) => (message, 2),
        };
        eprintln!("{}error: {message}", progress::rank());
        ExitCode::from(status)
    }
}

impl From<lora_caption::Error> for Failure {
    fn from(error: lora_caption::Error) -> Self {
        let message = error.to_string();
        if error.is_usage() { Failure::Usage(message) } else { Failure::Work(message) }
    }
}

impl From<lora_io::Error> for Failure {
    fn from(error: lora_io::Error) -> Self {
        Failure::Work(error.to_string())
    }
}

impl From<lora_data::Error> for Failure {
    fn from(error: lora_data::Error) -> Self {
        Failure::Work(error.to_string())
    }
}

impl From<lora_import::Problems> for Failure {
    fn from(problems: lora_import::Problems) -> Self {
        Failure::Usage(problems.to_string())
    }
}
