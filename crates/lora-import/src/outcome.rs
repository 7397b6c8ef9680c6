//! What becomes of one key.

use serde_json::Value;

/// Our keys with their values.
pub(crate) type Settings = Vec<(&'static str, Value)>;

/// What becomes of one key. Each puts the key into exactly one list.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It means the same here.
    Taken(Settings),
    /// It means something else here, which is accounted for.
    Translated(Settings, String),
    /// The result does not depend on it.
    NoEffect(String),
    /// There is nothing like it here. What stands in its place, and what is lost.
    Lost(Settings, String),
    /// The value is none that the trainer would take, or contradicts another key.
    Refused(String),
}

/// The same here.
pub(crate) fn taken(ours: &'static str, value: impl Into<Value>) -> Outcome {
    Outcome::Taken(vec![(ours, value.into())])
}

/// Something else here.
pub(crate) fn translated(settings: Settings, how: impl Into<String>) -> Outcome {
    Outcome::Translated(settings, how.into())
}

/// One key of ours, with what is said of it.
pub(crate) fn becomes(ours: &'static str, value: impl Into<Value>, how: impl Into<String>) -> Outcome {
    translated(vec![(ours, value.into())], how)
}

/// No difference.
pub(crate) fn no_effect(why: impl Into<String>) -> Outcome {
    Outcome::NoEffect(why.into())
}

/// Nothing like it.
pub(crate) fn lost(what: impl Into<String>) -> Outcome {
    Outcome::Lost(Vec::new(), what.into())
}

/// Nothing like it, and what stands in its place.
pub(crate) fn instead(settings: Settings, what: impl Into<String>) -> Outcome {
    Outcome::Lost(settings, what.into())
}

/// What the trainer itself would not take.
pub(crate) fn refused(message: impl Into<String>) -> Outcome {
    Outcome::Refused(message.into())
}
