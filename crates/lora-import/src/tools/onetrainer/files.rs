//! OneTrainer's files before their keys are read: older forms, and concepts and samples in files of their own.

use serde_json::Value;

use crate::input::tree::{Content, Entry, Node};
use crate::input::{self, Document, Problem, Source};

use crate::values;

/// Old forms, and the concepts and samples of other files.
pub(super) fn with_files(document: Document) -> Result<Document, Problem> {
    let Document { place, root, script } = document;
    let mut entries = root.entries().to_vec();
    if let Some(entry) = entries.iter_mut().find(|entry| entry.key == "optimizer")
        && matches!(entry.node.content, Content::Scalar(Value::String(_)))
    {
        let named = Entry { key: "optimizer".to_owned(), line: entry.line, node: entry.node.clone() };
        entry.node = Node::table(entry.line, vec![named]);
    }
    let mut entries = nested(entries);
    for (list, file) in [("concepts", "concept_file_name"), ("samples", "sample_definition_file_name")] {
        let given = entries.iter().any(|entry| entry.key == list && !entry.node.is_empty());
        let named = entries.iter().find(|entry| entry.key == file).and_then(|entry| values::text(&entry.node.value()));
        let Some(name) = named.filter(|name| !given && std::path::Path::new(name).is_file()) else { continue };
        let node = input::read(&Source::file(name))?.root;
        entries.retain(|entry| entry.key != list);
        entries.push(Entry { key: list.to_owned(), line: 0, node });
    }
    Ok(Document { place, root: Node::table(1, entries), script })
}

/// Keys of parts that stood at the top in old files, in the tables of their parts.
fn nested(entries: Vec<Entry>) -> Vec<Entry> {
    let place = |key: &str| -> Option<(String, String)> {
        if key == "weight_decay" {
            return Some(("optimizer".to_owned(), key.to_owned()));
        }
        if let Some(own) = key.strip_prefix("optimizer_").filter(|own| *own != "defaults") {
            return Some(("optimizer".to_owned(), own.to_owned()));
        }
        for part in ["text_encoder_2", "text_encoder", "unet", "vae"] {
            let own = match key.strip_prefix("train_").and_then(|rest| rest.strip_prefix(part)) {
                Some("") => Some("train"),
                Some("_epochs") => Some("stop_training_after"),
                _ => key.strip_prefix(part).and_then(|rest| rest.strip_prefix('_')),
            };
            if let Some(own @ ("train" | "stop_training_after" | "learning_rate" | "weight_dtype" | "model_name")) = own
            {
                return Some((part.to_owned(), own.to_owned()));
            }
        }
        None
    };
    let mut all: Vec<Entry> = Vec::new();
    let mut moved: Vec<(String, Entry)> = Vec::new();
    for entry in entries {
        match place(&entry.key) {
            Some((part, key)) => moved.push((part, Entry { key, ..entry })),
            None => all.push(entry),
        }
    }
    for (part, entry) in moved {
        match all.iter_mut().find(|other| other.key == part) {
            Some(Entry { node: Node { content: Content::Table(within), .. }, .. }) => within.push(entry),
            _ => {
                let line = entry.line;
                all.push(Entry { key: part, line, node: Node::table(line, vec![entry]) });
            }
        }
    }
    all
}
