//! When OneTrainer draws samples, tells the held-out loss, and saves.

use serde_json::Value;

use crate::engine::{Field, Scope};
use crate::outcome::{Outcome, becomes, lost, no_effect, taken};
use crate::row::{Row, by, nothing};
use crate::tools::shared;
use crate::values;

pub(super) static ROWS: &[Row] = &[
    by("validation", &[], "with concepts of validation", |_| no_effect("with concepts of validation")),
    by("validate_after", &["validate_every_n_steps"], "by steps", |field| {
        match field.root.text("validate_after_unit").as_deref() {
            _ if !field.root.on("validation") => no_effect("validation is off"),
            Some("STEP") => taken("validate_every_n_steps", field.count().unwrap_or(1)),
            _ => lost("held-out loss is told by steps, and before and after training"),
        }
    }),
    nothing("validate_after_unit", "with validate_after"),
    by("samples", &["sample_prompts"], "each with its own size, seed, steps and guidance", |field| {
        shared::prompts(prompts(&field.root))
    }),
    nothing("sample_definition_file_name", "its samples are read with these keys"),
    by("sample_after", &["sample_every_n_steps", "sample_every_minutes"], "by steps or by time", |field| {
        match field.root.text("sample_after_unit").as_deref() {
            _ if prompts(&field.root).is_empty() => no_effect("there are no prompts"),
            Some("NEVER") => no_effect("off, as without it"),
            Some("STEP") => taken("sample_every_n_steps", field.count().unwrap_or(1)),
            unit => match unit.and_then(|unit| minutes(field, unit)) {
                Some(minutes) => taken("sample_every_minutes", minutes),
                None => lost("samples are drawn before and after training, by steps and by time"),
            },
        }
    })
    .default("10"),
    nothing("sample_after_unit", "with sample_after").default("\"MINUTE\""),
    by("save_every", &["save_every_n_steps", "save_every_n_epochs", "save_every_minutes"], "by its unit", save_every),
    by(
        "save_after",
        &["save_every_n_steps", "save_every_n_epochs", "save_every_minutes"],
        "an old name of save_every",
        save_every,
    ),
    nothing("save_every_unit", "with save_every"),
];

fn save_every(field: &Field<'_>) -> Outcome {
    let unit = field.root.text("save_every_unit").or_else(|| field.root.text("save_after_unit")).unwrap_or_default();
    match (field.count(), unit.as_str()) {
        (Some(0), _) | (_, "NEVER" | "") => no_effect("off, as without it"),
        (Some(count), "EPOCH") => becomes("save_every_n_epochs", count, "epochs"),
        (Some(count), "STEP") => becomes("save_every_n_steps", count, "steps"),
        (Some(_), unit) => match minutes(field, unit) {
            Some(minutes) => taken("save_every_minutes", minutes),
            None => lost("saves are made by steps, epochs and time"),
        },
        (None, _) => field.expected("a whole number"),
    }
}

/// A time in minutes; `None` where its unit is none of time, or it is 0.
fn minutes(field: &Field<'_>, unit: &str) -> Option<Value> {
    let each = match unit {
        "SECOND" => 1.0 / 60.0,
        "MINUTE" => 1.0,
        "HOUR" => 60.0,
        _ => return None,
    };
    field.number().filter(|count| *count > 0.0).map(|count| values::of_number(each * count))
}

/// Prompts as lines with what they say of their own.
pub(super) fn prompts(root: &Scope<'_>) -> Vec<String> {
    let Some(Value::Array(samples)) = root.given("samples") else { return Vec::new() };
    samples
        .iter()
        .filter(|sample| sample.get("enabled").is_none_or(|on| values::switch(on) != Some(false)))
        .filter_map(line)
        .collect()
}

fn line(sample: &Value) -> Option<String> {
    let prompt = values::text(sample.get("prompt")?).filter(|prompt| !prompt.is_empty())?;
    let random = sample.get("random_seed").is_some_and(|on| values::switch(on) == Some(true));
    let seed = if random { "" } else { "seed" };
    Some(shared::prompt(prompt, sample, ["negative_prompt", "width", "height", seed, "diffusion_steps", "cfg_scale"]))
}
