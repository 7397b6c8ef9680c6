//! The optimiser's name and numbers. Whether an optimiser of the name takes them is its own to say, once it is made.

use super::read::Reader;
use crate::optimiser::Arguments;

/// Keys that are short for one of `optimizer_args`.
const SHORT: [(&str, &str); 3] = [("adam_betas", "betas"), ("adam_eps", "eps"), ("weight_decay", "weight_decay")];

/// `optimizer` and `optimizer_args`.
pub(super) fn read(reader: &mut Reader) -> (String, Arguments) {
    let name = reader.text("optimizer").unwrap_or_else(|| "adamw".into());
    let mut arguments = reader.number_lists("optimizer_args");
    for (key, argument) in SHORT {
        if !reader.has(key) {
            continue;
        }
        let values = match key {
            "adam_betas" => reader.pair(key).map(|(first, second)| vec![first, second]),
            _ => reader.number(key, "a number from 0 on", |value| value >= 0.0).map(|value| vec![value]),
        };
        let Some(values) = values else { continue };
        if arguments.insert(argument.to_owned(), values).is_some() {
            reader.problem(Some(key), format!("optimizer_args has `{argument}` too; give one of them"));
        }
    }
    (name, arguments)
}
