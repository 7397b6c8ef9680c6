//! What makes a run the run that it is: with another value of one of these its continuation would be another run. And
//! what may change in the middle, which is noted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use lora_core::DType;
use lora_data::Pictures;
use lora_data::source::Source;
use serde::{Deserialize, Serialize};

use crate::config::TrainConfig;
use crate::config::keys::{Group, Resumed};

/// What tells base models apart.
const BASE: &str = "base_model";

/// The settings of a run, by the names of their keys.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// Those that must stay.
    pub fixed: BTreeMap<String, String>,
    /// Those that may change.
    pub free: BTreeMap<String, String>,
    /// Names of those that only a look at the items themselves tells.
    #[serde(skip)]
    items: BTreeSet<String>,
}

/// A setting that is another than it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Difference {
    /// The key.
    pub key: String,
    /// What it was.
    pub was: String,
    /// What it is.
    pub is: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was {}, is {}", self.key, self.was, self.is)
    }
}

impl Settings {
    /// The settings of a run whose base and data bring these groups of keys, but for the base itself.
    pub(crate) fn new(config: &TrainConfig, own: &[&Group], source: &dyn Source, precision: DType) -> Self {
        // On a device without the configuration's number type another is computed in.
        let mut config = config.clone();
        config.precision = precision;
        let mut settings = Self::default();
        // What only other bases have says nothing of this run.
        for key in config.keys().iter().filter(|key| config.has_key(key.name, own)) {
            match key.resumed {
                Resumed::Fixed(shown) => settings.fixed.insert(key.name.to_owned(), shown(&config)),
                Resumed::FixedSince(before, shown) => Some(shown(&config))
                    .filter(|value| value != before)
                    .and_then(|value| settings.fixed.insert(key.name.to_owned(), value)),
                Resumed::Free(shown) => settings.free.insert(key.name.to_owned(), shown(&config)),
                Resumed::FreeAs(name, shown) => settings.free.insert(name.to_owned(), shown(&config)),
                Resumed::Elsewhere | Resumed::Unrecorded => None,
            };
        }
        let data = source.identity();
        settings.items = data.items.iter().map(|(name, _)| name.clone()).collect();
        settings.fixed.extend(data.options.into_iter().chain(data.items));
        settings
    }

    /// All of them, with what they are.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, &str)> {
        self.fixed.iter().chain(&self.free).map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// A digest of the base, where it is known.
    pub(crate) fn base(&self) -> Option<&str> {
        self.fixed.get(BASE).map(String::as_str)
    }

    /// Names the base.
    pub(crate) fn set_base(&mut self, digest: String) {
        self.fixed.insert(BASE.to_owned(), digest);
    }

    /// What differs from an earlier run of those that must stay.
    pub(crate) fn differences(&self, earlier: &Self) -> Vec<Difference> {
        let mut all = differences(&earlier.fixed, &self.fixed);
        // A state of a version that did not look at it says nothing of it.
        all.retain(|own| earlier.fixed.contains_key(&own.key) || !own.key.starts_with(Pictures::LENGTHS));
        all
    }

    /// As [`Settings::differences`], of what the configuration alone says.
    pub(crate) fn differences_of_config(&self, earlier: &Self) -> Vec<Difference> {
        let mut all = self.differences(earlier);
        all.retain(|difference| difference.key != BASE && !self.items.contains(&difference.key));
        all
    }

    /// What differs from an earlier run of those that may change.
    pub(crate) fn changes(&self, earlier: &Self) -> Vec<Difference> {
        differences(&earlier.free, &self.free)
    }
}

fn differences(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<Difference> {
    let keys: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let none = || "nothing".to_owned();
    let pairs = keys.into_iter().map(|key| {
        (key, before.get(key).map_or_else(none, Clone::clone), now.get(key).map_or_else(none, Clone::clone))
    });
    pairs
        .filter(|(_, was, is)| was != is)
        .map(|(key, was, is)| {
            let (was, is) = apart(&was, &is);
            Difference { key: key.clone(), was, is }
        })
        .collect()
}

/// Two long texts from where they begin to differ.
fn apart(was: &str, is: &str) -> (String, String) {
    const SHORT: usize = 60;
    if was.chars().count().max(is.chars().count()) <= SHORT {
        return (was.to_owned(), is.to_owned());
    }
    let same = was.chars().zip(is.chars()).take_while(|(a, b)| a == b).count();
    // From the name of the field on.
    let common: String = was.chars().take(same).collect();
    let from = common.rfind([',', '{', '(']).map_or(0, |at| common[..=at].chars().count());
    let part = |text: &str| {
        let all: Vec<char> = text.chars().skip(from).collect();
        let end = if all.len() > SHORT { " …" } else { "" };
        format!("{}{}{end}", if from > 0 { "…" } else { "" }, all.iter().take(SHORT).collect::<String>())
    };
    (part(was), part(is))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_from_before_files_were_looked_at_goes_on() {
        let of = |pairs: &[(&str, &str)]| {
            let fixed = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            Settings { fixed, ..Settings::default() }
        };
        let now = of(&[("seed", "1"), (Pictures::LENGTHS, "b")]);
        assert_eq!(now.differences(&of(&[("seed", "1")])), []);
        assert_eq!(now.differences(&of(&[("seed", "1"), (Pictures::LENGTHS, "a")])).len(), 1);
    }

    #[test]
    fn differences_are_named_and_long_ones_shortened() {
        let of = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let long = |value: &str| format!("Options {{ first: {}, second: {value}, third: 3 }}", "x".repeat(80));
        let (before, now) = (
            of(&[("a", "1"), ("b", "2"), ("c", &long("alpha")), ("gone", "x")]),
            of(&[("a", "1"), ("b", "3"), ("c", &long("beta"))]),
        );
        let all: Vec<String> = differences(&before, &now).iter().map(ToString::to_string).collect();
        assert_eq!(
            all,
            [
                "b was 2, is 3",
                "c was … second: alpha, third: 3 }, is … second: beta, third: 3 }",
                "gone was x, is nothing"
            ]
        );
    }
}
