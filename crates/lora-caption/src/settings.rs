//! All that can be set about captions, as flat values: `auto_label` of a configuration reads into them, and so do the options
//! of `lora caption`. What is done with them is said where they are used.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::choose::{RatingPlace, TagChoice};
use crate::tagger::Device;
use crate::{Error, Result};

/// What a server is asked where no prompt is given.
pub const PROMPT: &str = "Describe this picture in one or two plain sentences, as a caption to train an image model with. \
                          Say what is there, its pose or arrangement, the surroundings and the style. Answer with the \
                          caption alone.";
/// The same, where a tagger was asked before.
pub const PROMPT_WITH_TAGS: &str = "Describe this picture in one or two plain sentences, as a caption to train an image \
                                    model with. A tagger found, and may be wrong: {tags}. Answer with the caption alone.";

/// Where captions come from, and how they are made. A tagger, a server, or both: then `{tags}` in the prompt is what the tagger
/// said.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// A tagger: its folder, its `.onnx` file, or a `metadata.jsonl` with what one said before.
    pub tagger: Option<PathBuf>,
    /// Where the tagger computes.
    pub device: Device,
    /// General tags from this probability on.
    pub threshold: f32,
    /// Characters from this probability on.
    pub character_threshold: f32,
    /// The most tags of a caption.
    pub max_tags: Option<usize>,
    /// Underscores stay.
    pub keep_underscores: bool,
    /// Tags that are left out.
    pub exclude: Vec<String>,
    /// Tags that are called otherwise.
    pub replace: BTreeMap<String, String>,
    /// Tags that stand first where the picture has them.
    pub always_first: Vec<String>,
    /// Characters stand before other tags.
    pub characters_first: bool,
    /// Where the rating stands.
    pub rating: RatingPlace,
    /// Brackets are written `\(` and `\)`.
    pub escape_brackets: bool,

    /// Address of a server of OpenAI's protocol: `http://localhost:11434`, with or without `/v1`.
    pub server: Option<String>,
    /// Name of the model there.
    pub model: Option<String>,
    /// What it is asked. `{tags}`, `{name}` and `{folder}` are filled in.
    pub prompt: Option<String>,
    /// Environment variable with the key of the server; `LORA_API_KEY` where it is set.
    pub api_key_env: Option<String>,
    /// The longer side of the picture that is sent, in pixels, at most.
    pub max_side: usize,
    /// The most tokens of an answer, thoughts included.
    pub max_tokens: usize,
    /// The server's temperature; its own where none is given.
    pub temperature: Option<f64>,
    /// Requests at once.
    pub requests: usize,
    /// How often a request is sent again that failed for the moment.
    pub retries: usize,
    /// Seconds that an answer may take.
    pub timeout: u64,

    /// Stands before every caption.
    pub prefix: String,
    /// Stands behind every caption.
    pub suffix: String,
    /// Between tags, and between a caption and what is put before or behind it.
    pub separator: String,
}

impl Default for Settings {
    fn default() -> Self {
        let TagChoice { threshold, character_threshold, .. } = TagChoice::default();
        Self {
            tagger: None,
            device: Device::Auto,
            threshold,
            character_threshold,
            max_tags: None,
            keep_underscores: false,
            exclude: Vec::new(),
            replace: BTreeMap::new(),
            always_first: Vec::new(),
            characters_first: false,
            rating: RatingPlace::None,
            escape_brackets: false,
            server: None,
            model: None,
            prompt: None,
            api_key_env: None,
            max_side: 1024,
            max_tokens: 512,
            temperature: None,
            requests: 4,
            retries: 5,
            timeout: 300,
            prefix: String::new(),
            suffix: String::new(),
            separator: ", ".into(),
        }
    }
}

impl Settings {
    /// Whether all values can work together; no file or server is looked at.
    ///
    /// # Errors
    /// [`Error::Option`] with the first that cannot.
    pub fn check(&self) -> Result<()> {
        let refused = |key: &'static str, reason: &str| Err(Error::option(key, reason));
        for (key, value) in [("threshold", self.threshold), ("character_threshold", self.character_threshold)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::option(key, format!("expected a probability from 0 to 1, found {value}")));
            }
        }
        let counts = [
            ("max_side", self.max_side, 64..=8192),
            ("max_tokens", self.max_tokens, 1..=1_000_000),
            ("requests", self.requests, 1..=256),
            ("retries", self.retries, 0..=100),
            ("timeout", usize::try_from(self.timeout).unwrap_or(usize::MAX), 1..=86_400),
        ];
        for (key, value, range) in counts {
            if !range.contains(&value) {
                let (least, most) = (range.start(), range.end());
                return Err(Error::option(key, format!("expected a number from {least} to {most}, found {value}")));
            }
        }
        if self.temperature.is_some_and(|temperature| !(0.0..=2.0).contains(&temperature)) {
            return refused("temperature", "expected a number from 0 to 2");
        }
        if [&self.prefix, &self.suffix, &self.separator].iter().any(|text| text.contains(['\n', '\r'])) {
            return refused("separator", "prefix, suffix and separator stand in one line; take the line break out");
        }
        match (&self.tagger, &self.server) {
            (None, None) => return refused("tagger", "give a tagger, or a server and its model, or both"),
            (_, Some(_)) if self.model.as_ref().is_none_or(|model| model.trim().is_empty()) => {
                return refused("model", "a server has several models; name one");
            }
            (Some(_), None) if self.model.is_some() || self.prompt.is_some() => {
                return refused("server", "model and prompt are a server's; give its address or take them out");
            }
            _ => {}
        }
        match (self.tagger.is_some(), self.prompt.as_ref()) {
            (_, Some(prompt)) if prompt.trim().is_empty() => refused("prompt", "it is empty"),
            (true, Some(prompt)) if !prompt.contains("{tags}") => refused(
                "prompt",
                "what the tagger says would go nowhere; write {tags} where it belongs, or drop the tagger",
            ),
            (false, Some(prompt)) if prompt.contains("{tags}") => {
                refused("prompt", "there is no tagger that says what {tags} are; give one")
            }
            _ => Ok(()),
        }
    }

    /// How tags are chosen.
    pub(crate) fn choice(&self) -> TagChoice {
        TagChoice {
            threshold: self.threshold,
            character_threshold: self.character_threshold,
            max_tags: self.max_tags,
            keep_underscores: self.keep_underscores,
            exclude: self.exclude.clone(),
            replace: self.replace.clone(),
            always_first: self.always_first.clone(),
            characters_first: self.characters_first,
            rating: self.rating,
            escape_brackets: self.escape_brackets,
        }
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }

    /// The prompt, with its places for tags and names.
    pub(crate) fn prompt(&self) -> &str {
        match (&self.prompt, &self.tagger) {
            (Some(prompt), _) => prompt,
            (None, Some(_)) => PROMPT_WITH_TAGS,
            (None, None) => PROMPT,
        }
    }

    /// A text with prefix and suffix, in one line.
    pub(crate) fn framed(&self, text: &str) -> String {
        let parts = [self.prefix.trim(), text.trim(), self.suffix.trim()];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(&self.separator)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut Settings)) -> String {
        let mut settings = Settings { server: Some("http://h".into()), model: Some("m".into()), ..Settings::default() };
        change(&mut settings);
        settings.check().map_or_else(|error| error.to_string(), |()| String::new())
    }

    #[test]
    fn values_that_cannot_work_are_named_with_what_would() {
        assert_eq!(refused(|_| {}), "");
        assert!(
            refused(|own| own.threshold = 35.0).contains("threshold: expected a probability from 0 to 1, found 35")
        );
        assert!(refused(|own| own.requests = 0).contains("requests: expected a number from 1 to 256"));
        assert!(refused(|own| own.model = None).contains("model: a server has several models"));
        assert!(refused(|own| own.prompt = Some("What? {tags}".into())).contains("no tagger"));
        assert!(refused(|own| own.server = None).contains("give a tagger, or a server"));
        assert!(refused(|own| own.suffix = "a\nb".into()).contains("line break"));
        let both = |prompt: &str| {
            let prompt = prompt.to_owned();
            refused(|own| (own.tagger, own.prompt) = (Some("t".into()), Some(prompt)))
        };
        assert_eq!(both("With {tags}: what?"), "");
        assert!(both("What?").contains("would go nowhere"));
        assert!(
            refused(|own| (own.tagger, own.server) = (Some("t".into()), None)).contains("server: model and prompt")
        );
    }

    #[test]
    fn the_table_of_options_has_every_key_once_with_its_default() {
        let error = serde_json::from_str::<Settings>("{\"no such key\": 1}").unwrap_err().to_string();
        let (_, keys) = error.split_once("expected one of ").unwrap();
        let keys: Vec<&str> = keys.split('`').skip(1).step_by(2).collect();
        let docs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/captions.md");
        let docs = std::fs::read_to_string(docs).unwrap();
        let rows = docs.lines().filter_map(|line| line.strip_prefix("| `")).filter(|line| line.contains("` | `--"));
        let listed: Vec<&str> = rows.map(|line| line.split('`').next().unwrap()).collect();
        assert_eq!(listed, keys);
        let own = Settings::default();
        for (key, default) in [
            ("threshold", own.threshold.to_string()),
            ("character_threshold", own.character_threshold.to_string()),
            ("max_side", own.max_side.to_string()),
            ("max_tokens", own.max_tokens.to_string()),
            ("requests", own.requests.to_string()),
            ("retries", own.retries.to_string()),
            ("timeout", own.timeout.to_string()),
        ] {
            let row = format!("| `{key}` | `--{}` | {default} |", key.replace('_', "-"));
            assert!(docs.contains(&row), "{row}");
        }
    }

    #[test]
    fn prefix_and_suffix_are_joined_by_the_separator() {
        let settings = Settings { prefix: "sks".into(), suffix: " style ".into(), ..Settings::default() };
        assert_eq!(settings.framed(" a, b "), "sks, a, b, style");
        assert_eq!(settings.framed(""), "sks, style");
        assert_eq!(Settings::default().framed("a"), "a");
    }
}
