//! The configuration that a command names, which may be another trainer's.

use std::path::Path;

use lora_cli::Failure;
use lora_import::{Import, Options, Problems, Source};
use lora_train::config::{Format, TrainConfig};

use crate::failure::failure;

/// The configuration of a file, of this program or of another trainer. What became of another's keys is told first.
pub(crate) fn read(path: &Path, set: &[String]) -> Result<TrainConfig, Failure> {
    let Some(imported) = foreign(path)? else {
        return TrainConfig::from_file(path, set).map_err(failure);
    };
    eprint!("{imported}");
    TrainConfig::from_text(&imported.config(), Format::Toml, set)
        .map_err(|error| Failure::Usage(format!("of {}, translated: {error}", path.display())))
}

/// Another trainer's configuration, translated. What cannot be read is left to the reader of this program's own.
fn foreign(path: &Path) -> Result<Option<Import>, Problems> {
    let source = Source::file(path);
    match lora_import::recognise(&source) {
        Ok(Some(tool)) => {
            let options = Options { tool: Some(tool), ..Options::default() };
            lora_import::import(&source, &options).map(Some)
        }
        Ok(None) | Err(_) => Ok(None),
    }
}
