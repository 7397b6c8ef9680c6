//! sd-scripts' optimisation: lengths, optimisers, learning rates, schedules.

use serde_json::Value;

use super::is_flow;
use crate::engine::Field;
use crate::outcome::{Outcome, becomes, lost, no_effect, refused, taken, translated};
use crate::row::{Kind, Row, arguments, by, same};
use crate::tools::optimisers;
use crate::values;

pub(in crate::tools) static ROWS: &[Row] = &[
    by("max_train_epochs", &["epochs"], "wins over max_train_steps", |field| match field.count() {
        Some(0) => no_effect("0: max_train_steps counts"),
        _ => field.count_as("epochs"),
    }),
    by("max_train_steps", &["max_train_steps"], "optimiser steps, unless max_train_epochs is given", |field| {
        match (field.root.count("max_train_epochs").filter(|&epochs| epochs > 0), field.count()) {
            (Some(_), _) => no_effect("max_train_epochs wins over it"),
            (None, Some(steps)) => taken("max_train_steps", steps),
            (None, None) => field.expected("a whole number"),
        }
    })
    .default("1600"),
    by(
        "optimizer_type",
        &["optimizer"],
        "by its name, in capitals or not, with its module or not",
        |field| match field.root.on("use_8bit_adam") || field.root.on("use_lion_optimizer") {
            true => refused("contradicts use_8bit_adam or use_lion_optimizer; keep one of them"),
            false => optimisers::named(&field.text()),
        },
    ),
    by("use_8bit_adam", &["optimizer"], "`adamw8bit`", |field| switched(field, "adamw8bit")),
    by("use_lion_optimizer", &["optimizer"], "`lion`", |field| switched(field, "lion")),
    by("lr_warmup_steps", &["lr_warmup_steps"], "steps, or a share below 1", |field| match field.number() {
        Some(steps) if steps > 0.0 && field.root.text("lr_scheduler").as_deref() == Some("constant") => {
            refused("lr_scheduler = constant has no warm-up in sd-scripts, which ends there; take constant_with_warmup")
        }
        Some(0.0) => no_effect("off, as without it"),
        Some(steps) => taken("lr_warmup_steps", values::of_number(steps)),
        None => field.expected("steps, or a share below 1"),
    }),
    by("learning_rate", &["learning_rate"], "of what has none of its own", |field| {
        match is_flow(&field.root) && field.root.number("unet_lr").is_some() {
            true => no_effect("unet_lr is the transformer's"),
            false => field.number_as("learning_rate"),
        }
    })
    .default("0.000002"),
    by("unet_lr", &["unet_lr", "learning_rate"], "learning_rate where none is given", |field| match field.number() {
        Some(_) if is_flow(&field.root) => {
            becomes("learning_rate", values::of_number(field.number().unwrap_or_default()), "the transformer's")
        }
        _ => field.number_as("unet_lr"),
    }),
    by(
        "text_encoder_lr",
        &["text_encoder_lr", "text_encoder_1_lr", "text_encoder_2_lr"],
        "learning_rate where none is given (here half of it); two numbers are SDXL's two encoders",
        text_encoder_lr,
    )
    .default("\"learning_rate\""),
    same("max_grad_norm", "max_grad_norm", Kind::Number),
    by("lr_scheduler", &["lr_scheduler"], "by its name", |field| optimisers::schedule(&field.text())),
    arguments(
        "optimizer_args",
        optimisers::argument_rows!(|field: &Field<'_>| optimisers::ours(
            &field.root.text("optimizer_type").or_else(|| field.root.text("optimizer")).unwrap_or_else(|| {
                if field.root.on("use_8bit_adam") {
                    "adamw8bit"
                } else if field.root.on("use_lion_optimizer") {
                    "lion"
                } else {
                    "adamw"
                }
                .to_owned()
            })
        )),
    ),
    by("lr_scheduler_type", &[], "a schedule of another program", |field| {
        lost(format!("no schedule {}; that of lr_scheduler stands in its place", field.text()))
    }),
    by("lr_scheduler_args", &[], "numbers of a schedule", |_| lost("schedules have no numbers of their own")),
    by("lr_scheduler_num_cycles", &["lr_scheduler_num_cycles"], "of `cosine_with_restarts`", |field| {
        schedules_own(field, "cosine_with_restarts", "lr_scheduler_num_cycles")
    }),
    by("lr_scheduler_power", &["lr_scheduler_power"], "of `polynomial`, which ends at 1e-7 there", |field| {
        schedules_own(field, "polynomial", "lr_scheduler_power")
    }),
    by("lr_decay_steps", &["lr_decay_steps"], "of `warmup_stable_decay`", |field| {
        schedules_own(field, "warmup_stable_decay", "lr_decay_steps")
    }),
    by("lr_scheduler_timescale", &[], "of `inverse_sqrt`: its warm-up", |field| {
        match field.root.text("lr_scheduler").as_deref() == Some("inverse_sqrt")
            && field.number().is_some_and(|scale| scale > 0.0)
        {
            true => lost("the time scale of inverse_sqrt is its warm-up"),
            false => no_effect("a number of inverse_sqrt"),
        }
    }),
    by("lr_scheduler_min_lr_ratio", &["lr_min_ratio"], "of `cosine_with_min_lr` and `warmup_stable_decay`", |field| {
        match field.root.text("lr_scheduler").as_deref() {
            Some("warmup_stable_decay") => schedules_own(field, "warmup_stable_decay", "lr_min_ratio"),
            _ => schedules_own(field, "cosine_with_min_lr", "lr_min_ratio"),
        }
    }),
    same("gradient_accumulation_steps", "gradient_accumulation_steps", Kind::Count),
    by("seed", &["seed"], "other random numbers follow from it here", |field| match field.value.as_i64() {
        // The GUI's 0 is a seed; negative ones wrap there.
        Some(seed) if seed >= 0 => taken("seed", seed),
        _ => match values::count(&field.value) {
            Some(seed) => taken("seed", seed),
            None => field.expected("a whole number from 0 on"),
        },
    }),
];

fn switched(field: &Field<'_>, optimiser: &'static str) -> Outcome {
    field.when_on(taken("optimizer", optimiser))
}

fn text_encoder_lr(field: &Field<'_>) -> Outcome {
    let only_unet = field.root.on("network_train_unet_only");
    let number = |value: &Value| values::number(value).map(values::of_number);
    match &field.value {
        _ if is_flow(&field.root) => no_effect("text encoders of this base are never trained here"),
        _ if only_unet => no_effect("text encoders are not trained"),
        Value::String(text) if text == "learning_rate" => match field.root.number("learning_rate") {
            Some(rate) => becomes("text_encoder_lr", values::of_number(rate), "learning_rate, as for the U-Net"),
            None => no_effect("learning_rate is not given"),
        },
        Value::Array(items) => match items.iter().map(number).collect::<Option<Vec<_>>>().as_deref() {
            Some([rate]) => taken("text_encoder_lr", rate.clone()),
            Some([first, second, ..]) => translated(
                vec![("text_encoder_1_lr", first.clone()), ("text_encoder_2_lr", second.clone())],
                "one for each text encoder of SDXL",
            ),
            _ => field.expected("numbers"),
        },
        value => match number(value) {
            Some(rate) => taken("text_encoder_lr", rate),
            None => field.expected("a number"),
        },
    }
}

/// A number of one schedule: nothing for others.
fn schedules_own(field: &Field<'_>, schedule: &str, ours: &'static str) -> Outcome {
    match (field.root.text("lr_scheduler").as_deref() == Some(schedule), field.number()) {
        (true, Some(number)) if number > 0.0 => taken(ours, values::of_number(number)),
        (true, Some(_)) => no_effect("off, as without it"),
        (true, None) => field.expected("a number"),
        (false, _) => no_effect(format!("a number of {schedule}")),
    }
}
