//! One picture's caption: the tagger, the server, or the server with what the tagger says.

use std::path::Path;

use lora_data::RgbPicture;
use lora_data::dataset::Item;
use serde::Serialize;

use crate::Result;
use crate::choose::TagChoice;
use crate::recorded::{LEAST, Recorded};
use crate::server::{Answer, Server};
use crate::settings::Settings;
use crate::tagger::Tagger;
use crate::tags::Probabilities;

/// JPEG quality of pictures that are sent.
const QUALITY: u8 = 92;
/// JPEG quality of thumbnails.
const THUMBNAIL_QUALITY: u8 = 80;

/// Why a picture has got no caption.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", content = "reason", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Problem {
    /// It cannot be decoded.
    Unreadable(String),
    /// The model would not describe it.
    Refused(String),
    /// The answer has no words, or no tag reaches its threshold.
    Empty,
    /// The answer ended at `max_tokens`.
    CutOff,
    /// The model thought and said nothing.
    Thinking,
    /// The caption that it has cannot be read, or could not be told from another's.
    Caption(String),
    /// Anything else that the server said.
    Failed(String),
}

impl Problem {
    /// What the kind is called in tables.
    pub fn name(&self) -> &'static str {
        match self {
            Problem::Unreadable(_) => "not readable",
            Problem::Refused(_) => "refused",
            Problem::Empty => "empty answers",
            Problem::CutOff => "cut off",
            Problem::Thinking => "thoughts without an answer",
            Problem::Caption(_) => "captions in the way",
            Problem::Failed(_) => "failed",
        }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Problem::Unreadable(reason) | Problem::Caption(reason) | Problem::Failed(reason) => f.write_str(reason),
            Problem::Refused(reason) => write!(f, "refused: {reason}"),
            Problem::Empty => f.write_str("the answer is empty"),
            Problem::CutOff => f.write_str("the answer was cut off; raise max_tokens"),
            Problem::Thinking => f.write_str(
                "the model thought and gave no answer; raise max_tokens, or take a model that does not think",
            ),
        }
    }
}

/// What a picture has got.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Described {
    /// The caption, with prefix and suffix, or why there is none.
    pub(crate) caption: Result<String, Problem>,
    /// Whether it is a list of tags.
    pub(crate) is_tags: bool,
    /// What the tagger said.
    pub(crate) probabilities: Option<Probabilities>,
    /// A small JPEG, where one was asked for and there is a picture.
    pub(crate) thumbnail: Vec<u8>,
}

/// Where tags come from.
#[derive(Debug)]
enum Tags {
    Model(Box<Tagger>),
    Recorded(Recorded),
}

/// Gives captions, as [`Settings`] say. Threads may share it.
#[derive(Debug)]
pub struct Captioner {
    settings: Settings,
    choice: TagChoice,
    tags: Option<Tags>,
    server: Option<Server>,
}

impl Captioner {
    /// Opens the tagger and looks at the server's address; the server is not asked yet.
    ///
    /// # Errors
    /// [`crate::Error::Option`] for settings that cannot work; whatever keeps a tagger from being opened.
    pub fn open(settings: Settings) -> Result<Self> {
        settings.check()?;
        let thresholds = [("threshold", settings.threshold), ("character_threshold", settings.character_threshold)];
        let open = |path: &Path| match path.extension().is_some_and(|own| own.eq_ignore_ascii_case("jsonl")) {
            true => Recorded::read(path, thresholds).map(Tags::Recorded),
            false => Tagger::open(path, settings.device).map(|tagger| Tags::Model(Box::new(tagger))),
        };
        let server = settings.server.as_deref().map(|address| Server::new(address, &settings)).transpose()?;
        let tags = settings.tagger.as_deref().map(open).transpose()?;
        Ok(Self { choice: settings.choice(), tags, server, settings })
    }

    /// With a tagger that is open already, in the place of the one that the settings name.
    ///
    /// # Errors
    /// [`crate::Error::Option`] for settings that cannot work.
    pub fn with_tagger(mut settings: Settings, tagger: Tagger) -> Result<Self> {
        settings.tagger = Some(tagger.path().to_owned());
        settings.check()?;
        let server = settings.server.as_deref().map(|address| Server::new(address, &settings)).transpose()?;
        Ok(Self { choice: settings.choice(), tags: Some(Tags::Model(Box::new(tagger))), server, settings })
    }

    /// The first wait before a request is sent again, instead of a second. It doubles with each repetition.
    pub fn with_pause(mut self, pause: std::time::Duration) -> Self {
        self.server = self.server.map(|server| server.pausing(pause));
        self
    }

    /// The settings that it goes by.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The tagger, where one looks at pictures.
    pub fn tagger(&self) -> Option<&Tagger> {
        match &self.tags {
            Some(Tags::Model(tagger)) => Some(tagger),
            _ => None,
        }
    }

    /// Pictures that are worked at at the same time: requests of a server; of a tagger, what keeps it busy.
    pub(crate) fn threads(&self) -> usize {
        match self.server {
            Some(_) => self.settings.requests,
            None => lora_data::prefetch::cores(),
        }
    }

    /// Looks at a picture of a dataset. `name` is its path from the dataset's folder; once `ends` says so there is no waiting, and
    /// `None` where there is no caption for that reason.
    ///
    /// # Errors
    /// What no other picture would do better with.
    pub(crate) fn describe(
        &self,
        item: &Item,
        name: &str,
        thumbnail: usize,
        ends: &dyn Fn() -> bool,
    ) -> Result<Option<Described>> {
        let mut described = Described {
            caption: Err(Problem::Empty),
            is_tags: self.server.is_none(),
            probabilities: None,
            thumbnail: Vec::new(),
        };
        let looks = self.server.is_some() || self.tagger().is_some() || thumbnail > 0;
        let picture = match looks.then(|| self.picture(item)).transpose() {
            Ok(picture) => picture,
            Err(error) => {
                described.caption = Err(Problem::Unreadable(error.reason()));
                return Ok(Some(described));
            }
        };
        if let Some(picture) = picture.as_ref().filter(|_| thumbnail > 0) {
            described.thumbnail =
                picture.scaled_to(thumbnail).map_or_else(|_| Vec::new(), |own| own.to_jpeg(THUMBNAIL_QUALITY));
        }
        let probabilities = match (&self.tags, &picture) {
            (Some(Tags::Model(tagger)), Some(picture)) => {
                Some(Probabilities::of_outputs(tagger.tags(), &tagger.outputs(picture)?, self.least()))
            }
            (Some(Tags::Recorded(recorded)), _) => match recorded.of(name) {
                Some(probabilities) => Some(probabilities.clone()),
                None => {
                    described.caption = Err(Problem::Failed("the list has no probabilities of this picture".into()));
                    return Ok(Some(described));
                }
            },
            _ => None,
        };
        let tags = probabilities.as_ref().map(|own| self.choice.choose(own).join(&self.settings.separator));
        described.probabilities = probabilities;
        let text = match (&self.server, &picture) {
            (Some(server), Some(picture)) => {
                let prompt = prompt(self.settings.prompt(), tags.as_deref().unwrap_or_default(), item);
                let sent = picture.scaled_to(self.settings.max_side)?.to_jpeg(QUALITY);
                match server.ask(&prompt, &sent, ends)? {
                    Answer::Caption(caption) => Ok(caption),
                    Answer::Problem(problem) => Err(problem),
                    Answer::Stopped => return Ok(None),
                }
            }
            _ => Ok(tags.unwrap_or_default()),
        };
        described.caption = text.map(|text| self.settings.framed(&text)).and_then(|text| match text.is_empty() {
            true => Err(Problem::Empty),
            false => Ok(text),
        });
        Ok(Some(described))
    }

    /// The probability from where on a tagger's answer is kept.
    pub(crate) fn least(&self) -> f32 {
        LEAST.min(self.settings.threshold).min(self.settings.character_threshold)
    }

    /// A picture over white: whole for a tagger, no larger than need be for a server.
    fn picture(&self, item: &Item) -> lora_data::Result<RgbPicture> {
        let bytes = item.file.read()?;
        let (width, height) = item.size;
        let longest = width.max(height).max(1);
        let side = |side: usize| (side * self.settings.max_side).div_ceil(longest).min(side);
        let enough = self.tagger().is_none().then(|| (side(width), side(height)));
        RgbPicture::decode(&item.file.path, &bytes, [255; 3], enough)
    }

    /// What makes two runs the same but for the folder: all settings that a caption depends on.
    pub(crate) fn identity(&self) -> String {
        let Settings { device, requests, retries, timeout, api_key_env, .. } = Settings::default();
        format!("{:?}", Settings { device, requests, retries, timeout, api_key_env, ..self.settings.clone() })
    }
}

/// A prompt with its places filled in.
fn prompt(template: &str, tags: &str, item: &Item) -> String {
    let name = item.file.path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    // One pass, so that a tag or a name that looks like a place is none.
    let mut filled = String::new();
    let mut rest = template;
    let places = [("{tags}", tags), ("{name}", name.as_str()), ("{folder}", &item.folder)];
    while let Some(start) = rest.find('{') {
        filled.push_str(&rest[..start]);
        rest = &rest[start..];
        match places.iter().find(|(place, _)| rest.starts_with(place)) {
            Some((place, value)) => {
                filled.push_str(value);
                rest = &rest[place.len()..];
            }
            None => {
                filled.push('{');
                rest = &rest[1..];
            }
        }
    }
    filled + rest
}
