//! The configuration, in each of its formats, and sd-scripts' files of datasets. Needs libtorch, as lora-train does.

use lora_train::config::{Format, TrainConfig};

use crate::{choose, file};

/// Any bytes as a configuration: an error, or a configuration.
pub fn config(bytes: &[u8]) {
    let kinds = ["a.yaml", "a.toml", "a.json", "set", "datasets.toml", "datasets.json"];
    let Some((kind, bytes)) = choose(bytes, &kinds) else { return };
    match kind {
        "set" => {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            let _ = TrainConfig::from_text("", Format::Yaml, &text.lines().collect::<Vec<_>>());
        }
        name => {
            let path = file(name, bytes);
            let given = format!("dataset_config={}", path.display());
            let _ = match name.starts_with("datasets") {
                true => TrainConfig::from_text("", Format::Yaml, &[given]),
                false => TrainConfig::from_file::<&str>(&path, &[]),
            };
        }
    }
}
