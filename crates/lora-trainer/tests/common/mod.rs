//! The command `lora` with this crate's program behind it.

use std::path::Path;
use std::process::Command;

/// `lora`, which becomes the program under test. Cargo builds it beside that one with all of the workspace, or with
/// `cargo test -p lora-cli -p lora-trainer`.
pub(crate) fn lora() -> Command {
    let trainer = Path::new(env!("CARGO_BIN_EXE_lora-trainer"));
    let lora = trainer.with_file_name(format!("lora{}", std::env::consts::EXE_SUFFIX));
    assert!(lora.is_file(), "{} is missing: cargo test -p lora-cli -p lora-trainer", lora.display());
    let mut command = Command::new(lora);
    command.env("LORA_TRAINER", trainer).env_remove("LORA_API_KEY");
    command
}
