//! Command lines of sd-scripts: in a shell script, a batch file or given as words. Options become a table; those that stand
//! before the script belong to `accelerate launch`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::tree::{Content, Entry, Node};
use super::{Document, Problem};

/// The key under which options of `accelerate launch` are put.
pub(crate) const LAUNCH: &str = "accelerate";

/// A word and its line.
struct Word {
    text: String,
    line: usize,
}

/// Whether a text has a command that trains.
pub(crate) fn is_in(text: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim_start();
        !line.starts_with(['#', '"']) && line.split([' ', '\t', '"', '\'']).any(is_script)
    })
}

/// Whether a word names a script that trains.
fn is_script(word: &str) -> bool {
    let name = word.rsplit(['/', '\\']).next().unwrap_or_default();
    name.strip_suffix(".py").is_some_and(|name| name.contains("train") || name == "fine_tune")
}

pub(super) fn of_words(place: &str, words: &[String]) -> Result<Document, Problem> {
    options(place, words.iter().map(|word| Word { text: word.clone(), line: 0 }).collect())
}

pub(super) fn of_script(place: &str, text: &str) -> Result<Document, Problem> {
    let mut variables = BTreeMap::new();
    let mut found: Option<Vec<Word>> = None;
    for command in commands(text) {
        let words = words_of(place, &command, &variables)?;
        if words.iter().any(|word| is_script(&word.text)) {
            if let Some(first) = &found {
                let line = words.first().map_or(0, |word| word.line);
                let first = first.first().map_or(0, |word| word.line);
                let message = format!("a second command that trains, after that of line {first}; import one at a time");
                return Err(Problem::new(place, line, "", message));
            }
            found = Some(words);
        } else if let Some((name, value)) = assignment(&words) {
            variables.insert(name, value);
        }
    }
    let words = found.ok_or_else(|| {
        Problem::of(
            place,
            "no command that trains; expected one with train_network.py, sdxl_train_network.py or the like",
        )
    })?;
    options(place, words)
}

/// Options in one text, as a table; all stand on one line.
pub(crate) fn options_in(place: &str, line: usize, text: &str) -> Result<Vec<Entry>, Problem> {
    let words = words_of(place, &[(line, text.to_owned())], &BTreeMap::new())?;
    table(place, &words)
}

/// `NAME=value`, `export NAME=value`, `set NAME=value`.
fn assignment(words: &[Word]) -> Option<(String, String)> {
    let words = match words.first().map(|word| word.text.as_str()) {
        Some("export" | "set" | "SET") => &words[1..],
        _ => words,
    };
    let [word] = words else { return None };
    let (name, value) = word.text.split_once('=')?;
    let is_name = !name.is_empty() && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
    is_name.then(|| (name.to_owned(), value.to_owned()))
}

/// Lines that belong together, each with its number.
fn commands(text: &str) -> Vec<Vec<(usize, String)>> {
    let mut all = Vec::new();
    let mut command = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim_end();
        let going_on = line.strip_suffix(['\\', '^', '`']);
        // A line that is commented out in the middle of a command leaves it open.
        let comment = line.trim_start().starts_with('#') || line.trim_start().to_ascii_lowercase().starts_with("rem ");
        if !comment {
            command.push((index + 1, going_on.unwrap_or(line).to_owned()));
        }
        if going_on.is_none() && !comment && !command.is_empty() {
            all.push(std::mem::take(&mut command));
        }
    }
    all.extend(Some(command).filter(|command| !command.is_empty()));
    all
}

/// The words of a command, quotes taken off and variables put in.
fn words_of(
    place: &str,
    command: &[(usize, String)],
    variables: &BTreeMap<String, String>,
) -> Result<Vec<Word>, Problem> {
    let mut words: Vec<Word> = Vec::new();
    for (line, text) in command {
        let mut word: Option<String> = None;
        let mut quote = None;
        let mut letters = text.chars().peekable();
        while let Some(letter) = letters.next() {
            match letter {
                _ if quote == Some(letter) => quote = None,
                '"' | '\'' if quote.is_none() => {
                    quote = Some(letter);
                    word.get_or_insert_default();
                }
                '#' if quote.is_none() && word.is_none() => break,
                '\\' if quote != Some('\'') && letters.peek().is_some_and(|next| ['"', '$', ' '].contains(next)) => {
                    word.get_or_insert_default().extend(letters.next());
                }
                '$' if quote != Some('\'') => {
                    let braced = letters.next_if_eq(&'{').is_some();
                    let mut name = String::new();
                    while let Some(next) = letters.next_if(|next| next.is_ascii_alphanumeric() || *next == '_') {
                        name.push(next);
                    }
                    if braced {
                        letters.next_if_eq(&'}');
                    }
                    let value = variables.get(&name).ok_or_else(|| {
                        Problem::new(place, *line, "", format!("${name} is not set in this file; write its value"))
                    })?;
                    word.get_or_insert_default().push_str(value);
                }
                _ if letter.is_whitespace() && quote.is_none() => {
                    words.extend(word.take().map(|text| Word { text, line: *line }));
                }
                _ => word.get_or_insert_default().push(letter),
            }
        }
        if quote.is_some() {
            return Err(Problem::new(place, *line, "", "a quote is not closed on its line"));
        }
        words.extend(word.map(|text| Word { text, line: *line }));
    }
    Ok(words)
}

/// Options as a table; values that look like numbers are numbers.
fn options(place: &str, words: Vec<Word>) -> Result<Document, Problem> {
    let start = words.iter().position(|word| is_script(&word.text));
    let script = start.map(|at| words[at].text.rsplit(['/', '\\']).next().unwrap_or_default().to_owned());
    let (launch, own) = match start {
        Some(at) => (&words[..at], &words[at + 1..]),
        None => (&words[..0], &words[..]),
    };
    let mut entries = table(place, own)?;
    let launch: Vec<Entry> = table(place, launch)?;
    if !launch.is_empty() {
        let line = launch[0].line;
        entries.insert(0, Entry { key: LAUNCH.to_owned(), line, node: Node::table(line, launch) });
    }
    Ok(Document { place: place.to_owned(), root: Node::table(1, entries), script })
}

fn table(place: &str, words: &[Word]) -> Result<Vec<Entry>, Problem> {
    let mut options: Vec<(String, usize, Vec<&str>)> = Vec::new();
    for word in words {
        match (word.text.strip_prefix("--"), options.last_mut()) {
            (Some(""), _) => {}
            (Some(option), _) => {
                let (key, value) = option.split_once('=').map_or((option, None), |(key, value)| (key, Some(value)));
                let key = key.replace('-', "_");
                if options.iter().any(|(known, ..)| *known == key) {
                    return Err(Problem::new(place, word.line, &key, "it is given twice; keep one of them"));
                }
                options.push((key, word.line, value.into_iter().collect()));
            }
            (None, Some((.., values))) => values.push(&word.text),
            // `accelerate launch`, `python`, `-m` and what else stands before options.
            (None, None) => {}
        }
    }
    let entry = |(key, line, values): (String, usize, Vec<&str>)| {
        let node = match values[..] {
            [] => Node::scalar(line, true.into()),
            [value] => Node::scalar(line, scalar(value)),
            _ => {
                let items = values.iter().map(|value| Node::scalar(line, scalar(value))).collect();
                Node { line, content: Content::List(items) }
            }
        };
        Entry { key, line, node }
    };
    Ok(options.into_iter().map(entry).collect())
}

fn scalar(text: &str) -> Value {
    if let Ok(number) = text.parse::<i64>() {
        return number.into();
    }
    let number = text.parse::<f64>().ok().filter(|_| text.contains(|letter: char| letter.is_ascii_digit()));
    number.and_then(serde_json::Number::from_f64).map_or_else(|| text.into(), Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_gives_its_options_with_lines_quotes_and_variables() {
        let text = "#!/bin/sh\nMODEL='/models/a b.safetensors'\n\naccelerate launch --num_processes 1 sd-scripts/train_network.py \\\n  \
                    --pretrained_model_name_or_path \"$MODEL\" \\\n  # --seed 3 \\\n  --network_dim=8 --learning_rate 1e-4 \\\n  \
                    --optimizer_args \"weight_decay=0.1\" betas=0.9,0.99 --cache_latents\n";
        let document = of_script("run.sh", text).unwrap();
        assert_eq!(document.script.as_deref(), Some("train_network.py"));
        let value = document.root.value();
        assert_eq!(value["pretrained_model_name_or_path"], "/models/a b.safetensors");
        assert_eq!((&value["network_dim"], &value["learning_rate"]), (&8.into(), &1e-4.into()));
        assert_eq!(value["optimizer_args"][1], "betas=0.9,0.99");
        assert_eq!((&value["cache_latents"], &value[LAUNCH]["num_processes"]), (&true.into(), &1.into()));
        assert!(value.get("seed").is_none());
        let line = document.root.entries().iter().find(|entry| entry.key == "network_dim").unwrap().line;
        assert_eq!(line, 7);
    }

    #[test]
    fn what_cannot_be_known_is_said_with_its_line() {
        let error = |text: &str| of_script("run.sh", text).unwrap_err().to_string();
        assert!(error("a\npython train_network.py --seed $SEED").starts_with("run.sh:2: $SEED is not set"));
        assert!(
            error("python train_network.py --seed 1 \\\n --seed 2").starts_with("run.sh:2: `seed`: it is given twice")
        );
        assert!(error("python train_network.py --output_name \"a").contains("a quote is not closed"));
        assert!(error("python train_network.py\npython sdxl_train.py").starts_with("run.sh:2: a second command"));
        assert!(error("echo").contains("no command that trains"));
    }
}
