//! What a tagger said before: the probabilities in a `metadata.jsonl`, from which captions with other thresholds are made
//! without looking at a picture again. How such a list is written is in [`crate::folder`].

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::tags::Probabilities;
use crate::{Error, Result};

/// Tags below this probability are not kept: thousands of a tagger's outputs are near 0.
pub(crate) const LEAST: f32 = 0.05;

/// What is kept of a tagger's answer, under `tags` in a line of `metadata.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// Tags below this probability are not there.
    pub(crate) from: f32,
    #[serde(flatten)]
    pub(crate) probabilities: Probabilities,
}

/// Answers by the pictures' names.
#[derive(Debug)]
pub(crate) struct Recorded(HashMap<String, Probabilities>);

impl Recorded {
    /// Reads a list.
    ///
    /// # Errors
    /// [`Error::List`] where a line is no JSON object, or none has probabilities; [`Error::Option`] where a threshold lies below
    /// what was kept.
    pub(crate) fn read(path: &Path, thresholds: [(&'static str, f32); 2]) -> Result<Self> {
        let mut answers = HashMap::new();
        for line in lines(path)? {
            let (number, mut row) = line?;
            let Some(kept) = row.remove("tags") else { continue };
            let refused = |reason: String| Error::List { path: path.to_owned(), line: number, reason };
            let kept: Kept = serde_json::from_value(kept).map_err(|error| refused(format!("`tags`: {error}")))?;
            if let Some((key, value)) = thresholds.iter().find(|(_, value)| *value < kept.from) {
                let reason = format!(
                    "{value} lies below {}, from where on {} keeps probabilities; raise it, or give the tagger itself",
                    kept.from,
                    path.display()
                );
                return Err(Error::option(key, reason));
            }
            if let Some(name) = name_of(&row) {
                answers.insert(name, kept.probabilities);
            }
        }
        match answers.is_empty() {
            true => Err(Error::List {
                path: path.to_owned(),
                line: 1,
                reason: "there are no probabilities in it; `lora caption --output jsonl` writes them".into(),
            }),
            false => Ok(Self(answers)),
        }
    }

    /// What was said of a picture, by its path from the dataset's folder.
    pub(crate) fn of(&self, name: &str) -> Option<&Probabilities> {
        self.0.get(name)
    }
}

/// A line of a list with its number, from 1.
pub(crate) type Row = (usize, serde_json::Map<String, serde_json::Value>);

/// The objects of a list in JSON lines; none where there is no such file.
pub(crate) fn lines(path: &Path) -> Result<impl Iterator<Item = Result<Row>> + use<'_>> {
    let text = lora_data::dataset::read_text(path)?;
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let numbered = lines.into_iter().enumerate().filter(|(_, line)| !line.trim().is_empty());
    Ok(numbered.map(move |(index, line)| {
        let refused = |reason: String| Error::List { path: path.to_owned(), line: index + 1, reason };
        match serde_json::from_str(&line) {
            Ok(serde_json::Value::Object(row)) => Ok((index + 1, row)),
            Ok(_) => Err(refused("expected a JSON object".into())),
            Err(error) => Err(refused(format!("not valid JSON: {error}"))),
        }
    }))
}

/// The picture that a row names, with slashes and without `./`.
pub(crate) fn name_of(row: &serde_json::Map<String, serde_json::Value>) -> Option<String> {
    let name = ["file_name", "filename", "image_path"].iter().find_map(|key| row.get(*key)?.as_str())?;
    Some(normal(name))
}

/// A picture's name in a list, with slashes and without `./`.
pub(crate) fn normal(name: &str) -> String {
    let name = name.replace('\\', "/");
    name.strip_prefix("./").unwrap_or(&name).to_owned()
}
