//! What surrounds a command: the log, panics, the exit status.

use std::io::IsTerminal;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use crate::{Failure, progress};

/// Runs a command, with its log on standard error, up to the exit status: 0 done, 1 the work failed, 2 the arguments or the
/// configuration are wrong.
pub fn run(command: impl FnOnce() -> Result<(), Failure>) -> ExitCode {
    // What a decoder's panic on a damaged file becomes is an error that is told; the panic itself is not.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !lora_data::guard::is_guarded() {
            usual(panic);
        }
    }));
    let filter = EnvFilter::try_from_env("LORA_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .with_writer(progress::Writer)
        .finish();
    // Not by `init`, which takes in what libraries give to the crate `log`, too: at its finest an HTTP client's has the bytes of
    // requests, and a server's key among them. Nothing is set before this, so that it cannot fail.
    let _ = tracing::subscriber::set_global_default(subscriber);
    match command() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.tell(),
    }
}
