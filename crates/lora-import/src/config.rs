//! Our configuration while it is being made, and as a file: TOML with a comment at each line that was translated.

use std::fmt::Write as _;

use serde_json::Value;

use crate::report::Verdict;

/// What stands at the top of the file; the rest follows the order of the trainer's table.
const FIRST: &[&str] = &["base_model", "train_data_dir", "reg_data_dir", "metadata_file", "output_dir", "output_name"];

/// One key of ours.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) key: &'static str,
    pub(crate) value: Value,
    /// What stands beside it.
    comment: String,
    assumed: bool,
}

/// What has been set so far.
#[derive(Debug, Default, Clone)]
pub(crate) struct Draft {
    pub(crate) top: Vec<Setting>,
    pub(crate) datasets: Vec<Vec<Setting>>,
}

impl Draft {
    /// A dataset more; its number.
    pub(crate) fn add_dataset(&mut self) -> usize {
        self.datasets.push(Vec::new());
        self.datasets.len() - 1
    }

    /// Sets a key for another trainer's. What is given wins over what is assumed.
    pub(crate) fn set(
        &mut self,
        dataset: Option<usize>,
        key: &'static str,
        value: &Value,
        theirs: &str,
        verdict: &Verdict,
        assumed: bool,
    ) -> Result<(), String> {
        let comment = comment(key, theirs, verdict, assumed);
        let settings = match dataset {
            Some(index) => &mut self.datasets[index],
            None => &mut self.top,
        };
        let setting = Setting { key, value: value.clone(), comment, assumed };
        match settings.iter_mut().find(|setting| setting.key == key) {
            None => settings.push(setting),
            // Tables are made of the parts that several keys give.
            Some(Setting { value: Value::Object(before), comment, .. }) if setting.value.is_object() => {
                for (name, value) in setting.value.as_object().into_iter().flatten() {
                    before.entry(name.clone()).or_insert_with(|| value.clone());
                }
                if !setting.comment.is_empty() && !comment.contains(&setting.comment) {
                    *comment = format!("{comment}; {}", setting.comment);
                }
            }
            Some(before) if before.assumed && !assumed => *before = setting,
            Some(_) if assumed => {}
            Some(before) if before.value == *value => {}
            Some(before) => {
                return Err(format!(
                    "it means {key} = {}, but another key ({}) means {key} = {}; keep one of them",
                    inline(value),
                    before.comment.split(':').next().unwrap_or_default(),
                    inline(&before.value)
                ));
            }
        }
        Ok(())
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.top.iter().find(|setting| setting.key == key).map(|setting| &setting.value)
    }

    /// Whether a key is set, at the top or in a dataset.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.get(key).is_some() || self.datasets.iter().flatten().any(|setting| setting.key == key)
    }

    /// Takes a key that holds for the whole run out of the datasets.
    pub(crate) fn hoist(&mut self, key: &'static str) -> Result<(), String> {
        let mut own: Vec<Setting> = Vec::new();
        for dataset in &mut self.datasets {
            own.extend(dataset.extract_if(.., |setting| setting.key == key));
        }
        let Some(first) = own.first() else { return Ok(()) };
        if let Some(other) = own.iter().find(|other| other.value != first.value) {
            let (first, other) = (inline(&first.value), inline(&other.value));
            return Err(format!("{key} holds for the whole run, and is {first} of one dataset, {other} of another"));
        }
        if self.get(key).is_none() {
            self.top.push(own.swap_remove(0));
        }
        Ok(())
    }

    /// Gives a key of the top to each dataset that has none of its own.
    pub(crate) fn spread(&mut self, key: &'static str, value: &Value) {
        let Some(at) = self.top.iter().position(|setting| setting.key == key) else { return };
        let setting = Setting { value: value.clone(), ..self.top.remove(at) };
        for dataset in &mut self.datasets {
            if dataset.iter().all(|own| own.key != key) {
                dataset.push(setting.clone());
            }
        }
    }

    /// Puts a dataset in the place of another: each of these values of a key is one of its own.
    pub(crate) fn split(&mut self, key: &'static str) {
        let mut all = Vec::new();
        for dataset in std::mem::take(&mut self.datasets) {
            let values = match dataset.iter().find(|setting| setting.key == key).map(|setting| &setting.value) {
                Some(Value::Array(values)) => values.clone(),
                _ => {
                    all.push(dataset);
                    continue;
                }
            };
            for value in values {
                let mut own = dataset.clone();
                own.iter_mut().filter(|setting| setting.key == key).for_each(|setting| setting.value = value.clone());
                all.push(own);
            }
        }
        self.datasets = all;
    }

    /// The file. A single dataset stands at the top.
    pub(crate) fn file(&self, heading: &[String], missing: &[&str], footer: &[String]) -> String {
        let mut text = String::new();
        for line in heading {
            let _ = writeln!(text, "# {line}");
        }
        text.push('\n');
        for key in missing {
            let _ = writeln!(text, "# {key} = \"\"  # not in the input: fill it in");
        }
        let single = self.datasets.len() == 1;
        let own = self.datasets.first().filter(|_| single);
        let overruled = |setting: &Setting| own.is_some_and(|own| own.iter().any(|other| other.key == setting.key));
        let mut settings: Vec<&Setting> = self.top.iter().filter(|setting| !overruled(setting)).collect();
        settings.extend(own.into_iter().flatten());
        settings.sort_by_key(|setting| FIRST.iter().position(|key| *key == setting.key).unwrap_or(FIRST.len()));
        settings.into_iter().for_each(|setting| write_setting(&mut text, setting));
        if !single {
            for dataset in &self.datasets {
                text.push_str("\n[[datasets]]\n");
                dataset.iter().for_each(|setting| write_setting(&mut text, setting));
            }
        }
        if !footer.is_empty() {
            text.push('\n');
        }
        for line in footer {
            let _ = writeln!(text, "# {line}");
        }
        text
    }
}

/// What is said beside a line.
fn comment(key: &str, theirs: &str, verdict: &Verdict, assumed: bool) -> String {
    let not_given = if assumed { " not given" } else { "" };
    match verdict {
        Verdict::Taken if theirs == key && !assumed => String::new(),
        Verdict::Taken | Verdict::WithoutEffect(_) => format!("{theirs}{not_given}"),
        Verdict::Translated(how) => format!("{theirs}{not_given}: {how}"),
        Verdict::NoCounterpart(what) => format!("{theirs}{not_given}: stands in its place: {what}"),
    }
}

fn write_setting(text: &mut String, setting: &Setting) {
    let Setting { key, value, comment, .. } = setting;
    let comment = comment.replace(['\n', '\r'], " ");
    let _ = match comment.is_empty() {
        true => writeln!(text, "{key} = {}", inline(value)),
        false => writeln!(text, "{key} = {}  # {comment}", inline(value)),
    };
}

/// A value on one line of TOML. Nothing is never set.
pub(crate) fn inline(value: &Value) -> String {
    match value {
        Value::Null => "\"\"".to_owned(),
        Value::Bool(on) => on.to_string(),
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => toml::Value::Float(float).to_string(),
            _ => number.to_string(),
        },
        Value::String(text) => toml::Value::String(text.clone()).to_string(),
        Value::Array(items) => format!("[{}]", items.iter().map(inline).collect::<Vec<_>>().join(", ")),
        Value::Object(table) => {
            let name =
                |key: &str| match key.chars().all(|letter| letter.is_ascii_alphanumeric() || "_-".contains(letter)) {
                    true if !key.is_empty() => key.to_owned(),
                    _ => toml::Value::String(key.to_owned()).to_string(),
                };
            let pairs: Vec<_> = table.iter().map(|(key, value)| format!("{} = {}", name(key), inline(value))).collect();
            format!("{{ {} }}", pairs.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_as_toml_reads_them_back() {
        let value = serde_json::json!({
            "a": 1, "b": 1e-4, "c": [true, "x \"y\"\n# z"], "re:.*\\.(conv1)": 2.0, "d": { "e": -3 }, "f": 18446744073709551615u64 >> 1,
        });
        let text = format!("value = {}", inline(&value));
        let back: Value = toml::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(back["value"], value);
    }
}
