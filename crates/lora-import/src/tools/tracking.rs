//! What trainers log runs for: TensorBoard, whose files are written here too, and services, to which nothing is sent.

use crate::engine::Field;
use crate::outcome::{Outcome, becomes, no_effect, taken};
use crate::values;

/// A list of names, as sd-scripts' `log_with` and transformers' `report_to`.
pub(super) fn trackers(field: &Field<'_>) -> Outcome {
    match values::texts(&field.value) {
        Some(names) if to_tensorboard(&names) => taken("log_with", "tensorboard"),
        Some(_) => becomes("log_with", "none", "nothing is sent anywhere; metrics.jsonl is written"),
        None => field.expected("a name or a list of names"),
    }
}

/// A switch of TensorBoard's alone.
pub(super) fn tensorboard(field: &Field<'_>) -> Outcome {
    field.when_on(becomes("log_with", "tensorboard", "files for TensorBoard"))
}

/// Where transformers' files go, if there are any.
pub(super) fn folder(field: &Field<'_>) -> Outcome {
    let named = field.root.get("report_to").and_then(|names| values::texts(&names));
    match field.root.on("use_tensorboard") || named.is_some_and(|names| to_tensorboard(&names)) {
        true => taken("logging_dir", field.text()),
        false => no_effect("nothing is logged for TensorBoard"),
    }
}

fn to_tensorboard(names: &[String]) -> bool {
    names.iter().any(|name| name == "tensorboard" || name == "all")
}
