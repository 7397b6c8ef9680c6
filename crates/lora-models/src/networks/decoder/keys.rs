//! Keys of a `config.json`: read as what they should be, with errors that name them. What they mean is
//! [`super::config`]'s.

use serde_json::Value;

use crate::{Error, Result};

/// A configuration's values, with errors that name the key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'c> {
    pub(super) values: &'c Value,
    pub(super) source: &'c str,
    /// Whole numbers of keys that the file may leave out.
    pub(super) defaults: &'static [(&'static str, usize)],
}

impl<'c> Reader<'c> {
    pub(super) fn wrong(&self, reason: String) -> Error {
        Error::Architecture { source_name: self.source.to_owned(), reason: format!("config.json: {reason}") }
    }

    /// The value of a key; `None` without the key or where its value is null.
    pub(super) fn value(&self, key: &str) -> Option<&'c Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'c Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(format!("{key} is {value}; expected {expected}")))
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        self.wrong(format!("{key} is missing; is the file complete?"))
    }

    /// A whole number that a size may be: it leaves products of two room.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>> {
        let found = self.typed(key, "a whole number below 2^31", |value| {
            value.as_u64().filter(|number| *number < 1 << 31).and_then(|number| usize::try_from(number).ok())
        })?;
        let default = || self.defaults.iter().find(|(own, _)| *own == key).map(|(_, number)| *number);
        Ok(found.or_else(default))
    }

    pub(super) fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.count(key)?.unwrap_or(default))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        let number = self.count(key)?.ok_or_else(|| self.missing(key))?;
        if number == 0 { Err(self.wrong(format!("{key} is 0; expected more"))) } else { Ok(number) }
    }

    pub(super) fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.count(key)?.is_some() { self.size(key) } else { Ok(default) }
    }

    pub(super) fn real(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub(super) fn needed_real(&self, key: &str) -> Result<f64> {
        self.real(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn reals(&self, key: &str, count: usize) -> Result<Vec<f64>> {
        let expected = format!("a list of {count} numbers");
        let list = self.typed(key, &expected, |value| {
            value.as_array().filter(|list| list.len() == count)?.iter().map(Value::as_f64).collect()
        })?;
        list.ok_or_else(|| self.missing(key))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'c str>> {
        self.typed(key, "a text", Value::as_str)
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<&'c Vec<Value>>> {
        self.typed(key, "a list", Value::as_array)
    }

    /// A soft cap: null is none, a missing key the default.
    pub(super) fn cap(&self, key: &str, default: Option<f64>) -> Result<Option<f64>> {
        if self.values.get(key).is_none() { Ok(default) } else { self.real(key) }
    }

    /// The width of a window: null is none, a missing key the default.
    pub(super) fn window(&self, default: Option<usize>) -> Result<Option<usize>> {
        match self.values.get("sliding_window") {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => Ok(Some(self.size("sliding_window")?)),
        }
    }
}
