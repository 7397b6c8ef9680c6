//! Values of keys that a program registers itself: they have no field of their own in the configuration.

use std::collections::BTreeMap;

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub enum Setting {
    /// True or false.
    Switch(bool),
    /// A whole number.
    Whole(usize),
    /// A number.
    Number(f64),
    /// Text.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// Nothing: the key is not given and has no default.
    Nothing,
}

/// Values by the names of their keys. Every key that is registered has one.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Extra(BTreeMap<&'static str, Setting>);

impl Extra {
    pub(super) fn insert(&mut self, key: &'static str, setting: Setting) {
        self.0.insert(key, setting);
    }

    /// The value of a key; `None` where no such key is registered.
    pub fn get(&self, key: &str) -> Option<&Setting> {
        self.0.get(key)
    }

    /// The value of a switch.
    pub fn switch(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Setting::Switch(on) => Some(*on),
            _ => None,
        }
    }

    /// The value of a whole number.
    pub fn whole(&self, key: &str) -> Option<usize> {
        match self.get(key)? {
            Setting::Whole(number) => Some(*number),
            _ => None,
        }
    }

    /// The value of a number.
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Setting::Number(number) => Some(*number),
            _ => None,
        }
    }

    /// The value of a text.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Setting::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The value of a list of texts.
    pub fn texts(&self, key: &str) -> Option<&[String]> {
        match self.get(key)? {
            Setting::Texts(texts) => Some(texts),
            _ => None,
        }
    }

    /// A value as the state of a run records it.
    pub fn shown(&self, key: &str) -> String {
        match self.get(key) {
            None | Some(Setting::Nothing) => "none".to_owned(),
            Some(Setting::Switch(on)) => on.to_string(),
            Some(Setting::Whole(number)) => number.to_string(),
            Some(Setting::Number(number)) => format!("{number:?}"),
            Some(Setting::Text(text)) => text.clone(),
            Some(Setting::Texts(texts)) => format!("{texts:?}"),
        }
    }
}
