//! An optimiser's own numbers, as the configuration gives them: each is asked for by name, and what nobody asked for is an
//! error that names those that were.

use std::collections::BTreeMap;

use crate::{Error, Result};

/// Values by name: one number, a switch as 0 or 1, or several numbers.
pub type Arguments = BTreeMap<String, Vec<f64>>;

/// What an optimiser is made from.
#[derive(Debug)]
pub struct Settings {
    optimiser: String,
    learning_rate: f64,
    arguments: Arguments,
    /// Names asked for, with the values in effect as Python writes them.
    asked: Vec<(&'static str, Option<String>)>,
    problem: Option<(String, String)>,
}

impl Settings {
    pub(super) fn new(optimiser: &str, learning_rate: f64, arguments: &Arguments) -> Self {
        Self {
            optimiser: optimiser.to_owned(),
            learning_rate,
            arguments: arguments.clone(),
            asked: Vec::new(),
            problem: None,
        }
    }

    /// The run's learning rate.
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    /// A number.
    pub fn number(&mut self, name: &'static str, default: f64, expected: &str, fits: impl Fn(f64) -> bool) -> f64 {
        let value = self.given(name, expected, &fits).unwrap_or(default);
        self.asked.push((name, Some(python(value))));
        value
    }

    /// A number that may be missing.
    pub fn optional(&mut self, name: &'static str, expected: &str, fits: impl Fn(f64) -> bool) -> Option<f64> {
        let value = self.given(name, expected, &fits);
        self.asked.push((name, value.map(python)));
        value
    }

    /// A switch.
    pub fn switch(&mut self, name: &'static str, default: bool) -> bool {
        let given = self.given(name, "true or false", &|value| value == 0.0 || value == 1.0);
        let value = given.map_or(default, |value| value == 1.0);
        self.asked.push((name, Some(if value { "True" } else { "False" }.to_owned())));
        value
    }

    /// Two numbers.
    pub fn pair(
        &mut self,
        name: &'static str,
        default: (f64, f64),
        expected: &str,
        fits: impl Fn(f64) -> bool,
    ) -> (f64, f64) {
        let [first, second] = self.several(name, [default.0, default.1], expected, fits);
        (first, second)
    }

    /// So many numbers.
    pub fn several<const N: usize>(
        &mut self,
        name: &'static str,
        default: [f64; N],
        expected: &str,
        fits: impl Fn(f64) -> bool,
    ) -> [f64; N] {
        let own = self.arguments.get(name).map(|given| (<[f64; N]>::try_from(given.as_slice()), list(given)));
        let value = match own {
            None => default,
            Some((Ok(value), _)) if value.iter().all(|&number| fits(number)) => value,
            Some((_, found)) => {
                self.problem(name, format!("expected {expected}, found {found}"));
                default
            }
        };
        self.asked.push((name, Some(format!("({})", value.map(python).join(", ")))));
        value
    }

    /// `betas`: how slowly two averages follow.
    pub fn betas(&mut self, default: (f64, f64)) -> (f64, f64) {
        self.pair("betas", default, "two numbers from 0 to below 1", |beta| (0.0..1.0).contains(&beta))
    }

    /// `weight_decay`.
    pub fn weight_decay(&mut self, default: f64) -> f64 {
        self.number("weight_decay", default, "a number from 0 on", |value| value >= 0.0 && value.is_finite())
    }

    /// Notes what is wrong with a value; the first such note becomes the error.
    pub fn problem(&mut self, name: &str, reason: impl Into<String>) {
        if self.problem.is_none() {
            self.problem = Some((name.to_owned(), reason.into()));
        }
    }

    fn given(&mut self, name: &str, expected: &str, fits: &dyn Fn(f64) -> bool) -> Option<f64> {
        match self.arguments.get(name)?.as_slice() {
            &[value] if fits(value) => Some(value),
            other => {
                let found = format!("expected {expected}, found {}", list(other));
                self.problem(name, found);
                None
            }
        }
    }

    /// The values in effect, as sd-scripts records them: `name=value,…`.
    pub(super) fn finish(self) -> Result<String> {
        let known = || self.asked.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        let unknown = self.arguments.keys().find(|name| !self.asked.iter().any(|(asked, _)| asked == name));
        let (argument, reason) = match (self.problem.as_ref(), unknown) {
            (None, None) => {
                let values = self.asked.iter().filter_map(|(name, value)| Some(format!("{name}={}", value.as_ref()?)));
                return Ok(values.collect::<Vec<_>>().join(","));
            }
            (Some((argument, reason)), _) => (argument.clone(), reason.clone()),
            (None, Some(unknown)) => {
                let scored = known().into_iter().map(|name| (strsim::jaro_winkler(unknown, name), name));
                let near = scored.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(score, _)| *score > 0.8);
                let near = near.map_or_else(String::new, |(_, name)| format!("; did you mean `{name}`?"));
                let known = match known().is_empty() {
                    true => "none".to_owned(),
                    false => known().join(", "),
                };
                (unknown.clone(), format!("unknown; it knows {known}{near}"))
            }
        };
        Err(Error::OptimiserArgument { optimiser: self.optimiser, argument, reason })
    }
}

/// As Python writes a float.
fn python(value: f64) -> String {
    if value.is_infinite() {
        return format!("float('{}inf')", if value < 0.0 { "-" } else { "" });
    }
    let text = format!("{value:?}");
    // Python writes two digits of exponent.
    match text.split_once("e-") {
        Some((number, exponent)) if exponent.len() == 1 => format!("{number}e-0{exponent}"),
        _ => text,
    }
}

fn list(values: &[f64]) -> String {
    match values {
        [value] => format!("{value:?}"),
        _ => format!("{values:?}"),
    }
}
