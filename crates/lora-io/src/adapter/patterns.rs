//! `rank_pattern` and `alpha_pattern` of PEFT's configurations, which PEFT's folders and diffusers' headers have: what
//! they say of a module, and the keys to write for one.
//!
//! A key is a regular expression for the end of a module's path, cut at a dot; the first that fits counts (PEFT 0.21,
//! `get_pattern_key`).

use lora_core::ModulePath;
use regex::Regex;
use serde_json::{Map, Value};

/// Numbers of modules that differ from the configuration's usual one.
#[derive(Debug, Default)]
pub(super) struct Patterns(Vec<(Regex, f64)>);

impl Patterns {
    /// Of a field's value, which may be missing.
    ///
    /// # Errors
    /// If a key is no expression that is supported, or its value no number; says which.
    pub(super) fn parse(field: Option<&Value>) -> Result<Self, String> {
        let Some(patterns) = field.and_then(Value::as_object) else { return Ok(Self::default()) };
        let parse = |(key, value): (&String, &Value)| {
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
                .map_err(|error| format!("`{key}` is no pattern that is supported: {error}"))?;
            Ok((regex, value.as_f64().ok_or_else(|| format!("`{key}` is no number"))?))
        };
        Ok(Self(patterns.iter().map(parse).collect::<Result<_, String>>()?))
    }

    /// The number of the first pattern that names a module.
    pub(super) fn number(&self, path: &ModulePath) -> Option<f64> {
        self.0.iter().find(|(regex, _)| regex.is_match(&path.path)).map(|(_, number)| *number)
    }
}

/// The field for modules with numbers of their own. `all` are the paths of all modules. A path that others end with, as
/// FLUX.1's `proj_out` (`single_transformer_blocks.0.proj_out`), is held to the beginning, as diffusers 0.42 does; PEFT
/// before 0.15 knows no such keys, so all others stay plain.
pub(super) fn written<'p>(
    own: impl IntoIterator<Item = (&'p ModulePath, Value)>,
    all: &[&ModulePath],
) -> Map<String, Value> {
    let key = |path: &ModulePath| {
        let end = format!(".{}", path.path);
        let is_end = all.iter().any(|other| other.path.ends_with(&end));
        format!("{}{}", if is_end { "^" } else { "" }, path.path)
    };
    own.into_iter().map(|(path, number)| (key(path), number)).collect()
}
