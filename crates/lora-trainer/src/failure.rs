//! Errors of a run as failures of a command.

use lora_cli::Failure;
use lora_train::Error;

/// The failure that an error is, with what helps where memory runs out.
pub(crate) fn failure(error: impl Into<Error>) -> Failure {
    let error = error.into();
    let usage = error.is_usage();
    // Where more is known, the error says it itself.
    let advised = matches!(error, Error::OutOfMemory { .. });
    let message = if error.is_out_of_memory() && !advised {
        format!(
            "{error}\nwhat helps: less at once (batch_size, max_resolution, max_seq_length), precision = \"bf16\", base_storage = \"int8\" or \"nf4\""
        )
    } else {
        error.to_string()
    };
    if usage { Failure::Usage(message) } else { Failure::Work(message) }
}
