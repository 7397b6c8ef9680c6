//! Optimisers by the names that trainers have for them, and the numbers that they take.

use serde_json::{Value, json};

use crate::outcome::{Outcome, Settings, becomes, instead, lost, taken};
use crate::values;

/// What an optimiser of another trainer is here.
pub(crate) enum Known {
    /// The same.
    Same(&'static str),
    /// The same steps, with what is different told.
    Like(&'static str, &'static str),
    /// Another stands in its place.
    Instead(&'static str, &'static str),
}

/// The optimiser of a name, however it is written.
pub(crate) fn known(name: &str) -> Known {
    let last = name.rsplit('.').next().unwrap_or(name);
    let plain: String = last.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    const STATES: &str = "its states are kept in fp32 instead of 8 bits";
    match plain.as_str() {
        "adamw" | "adamwtorch" | "adamwtorchfused" | "adamwhf" | "adamwapexfused" | "adamwanyprecision"
        | "adamwoptimi" => Known::Same("adamw"),
        "adamw8bit" | "adamwbnb8bit" | "adamw8bittorchao" | "adamwtorch8bit" => Known::Same("adamw8bit"),
        "adamw8bitkahan" => Known::Like("adamw8bit", "trained numbers are fp32, without Kahan's sums"),
        "pagedadamw8bit" | "pagedadamwbnb8bit" => Known::Like("adamw8bit", "its states are not paged to host memory"),
        "pagedadamw" | "pagedadamw32bit" | "pagedadamwbnb" => {
            Known::Like("adamw", "its states are not paged to host memory")
        }
        "adam8bit" => {
            Known::Instead("adamw8bit", "Adam's weight decay goes through the gradient; AdamW stands in its place")
        }
        "adam" => Known::Instead("adamw", "Adam's weight decay goes through the gradient; AdamW stands in its place"),
        "lion" | "lion32bit" | "lionpytorch" => Known::Same("lion"),
        "lion8bit" | "pagedlion8bit" | "pagedlion32bit" => Known::Like("lion", STATES),
        "adafactor" => Known::Same("adafactor"),
        "prodigy" => Known::Same("prodigy"),
        "prodigy8bit" => Known::Like("prodigy", STATES),
        "adamwschedulefree" | "schedulefreeadamw" => Known::Same("adamw_schedulefree"),
        "came" => Known::Same("came"),
        "stableadamw" => Known::Same("stable_adamw"),
        "muon" => {
            Known::Like("muon", "its steps are as large as AdamW's: see to learning_rate, or match_rms_adamw = false")
        }
        other if other.starts_with("dadapt") || other.starts_with("dadaptation") => Known::Instead(
            "prodigy",
            "no D-Adaptation; Prodigy, which grew out of it and takes the same learning rate of 1, stands in its place",
        ),
        other if other.starts_with("prodigy") => {
            Known::Instead("prodigy", "no Prodigy of this kind; the plain one stands in its place")
        }
        _ => Known::Instead("adamw", "no such optimiser; AdamW stands in its place: see to learning_rate"),
    }
}

/// What our optimiser is for a name.
pub(crate) fn ours(name: &str) -> &'static str {
    match known(name) {
        Known::Same(ours) | Known::Like(ours, _) | Known::Instead(ours, _) => ours,
    }
}

/// What becomes of the key that names it.
pub(crate) fn named(name: &str) -> Outcome {
    match known(name) {
        Known::Same(ours) => taken("optimizer", ours),
        Known::Like(ours, how) => becomes("optimizer", ours, how),
        Known::Instead(ours, what) => instead(vec![("optimizer", ours.into())], format!("{name}: {what}")),
    }
}

/// The numbers that an optimiser of ours takes.
fn takes(optimiser: &str) -> &'static [&'static str] {
    match optimiser {
        "adamw8bit" => &["betas", "eps", "weight_decay", "min_8bit_size"],
        "lion" => &["betas", "weight_decay"],
        "came" => &["betas", "eps", "clip_threshold", "weight_decay"],
        "muon" => &["momentum", "betas", "eps", "weight_decay"],
        "adafactor" => &[
            "relative_step",
            "warmup_init",
            "eps",
            "clip_threshold",
            "decay_rate",
            "beta1",
            "weight_decay",
            "scale_parameter",
        ],
        "prodigy" => &[
            "betas",
            "beta3",
            "eps",
            "weight_decay",
            "decouple",
            "use_bias_correction",
            "safeguard_warmup",
            "d0",
            "d_coef",
            "growth_rate",
            "slice_p",
        ],
        "adamw_schedulefree" => &["betas", "eps", "weight_decay", "warmup_steps", "r", "weight_lr_power"],
        _ => &["betas", "eps", "weight_decay"],
    }
}

/// One number of an optimiser, where ours has it.
pub(crate) fn argument(optimiser: &str, name: &'static str, value: &Value) -> Outcome {
    if !takes(optimiser).contains(&name) {
        return lost(format!("{optimiser} has no number of this name here"));
    }
    match numbers(value) {
        Some(value) => Outcome::Taken(of_argument(name, value)),
        None => Outcome::Refused(format!("expected a number or several, found {value}")),
    }
}

/// Its place in our table of numbers.
pub(crate) fn of_argument(name: &'static str, value: Value) -> Settings {
    vec![("optimizer_args", json!({ name: value }))]
}

/// A number, a switch or several numbers, which may be written as text: `0.9,0.99`, `(0.9, 0.99)`, `True`.
fn numbers(value: &Value) -> Option<Value> {
    match value {
        Value::Bool(_) => Some(value.clone()),
        Value::Number(_) => values::number(value).map(values::of_number),
        Value::Array(items) => items.iter().map(numbers).collect(),
        Value::String(text) => {
            let text = text.trim().trim_matches(['(', ')', '[', ']']).trim_end_matches(',');
            if let Some(on) = values::switch(&text.into()) {
                return Some(on.into());
            }
            let parts: Option<Vec<Value>> =
                text.split(',').map(|part| values::number(&part.into()).map(values::of_number)).collect();
            match parts?.as_slice() {
                [one] => Some(one.clone()),
                several => Some(several.to_vec().into()),
            }
        }
        _ => None,
    }
}

/// A schedule by the names that trainers have for it.
pub(crate) fn schedule(name: &str) -> Outcome {
    let plain = name.to_ascii_lowercase();
    match plain.as_str() {
        "constant"
        | "constant_with_warmup"
        | "linear"
        | "cosine"
        | "cosine_with_restarts"
        | "polynomial"
        | "inverse_sqrt"
        | "warmup_stable_decay" => taken("lr_scheduler", plain),
        "cosine_with_min_lr" => becomes("lr_scheduler", "cosine", "down to lr_min_ratio"),
        "none" => taken("lr_scheduler", "constant"),
        name if name.starts_with("adafactor") => {
            becomes("lr_scheduler", "constant", "Adafactor finds its step size itself")
        }
        _ => instead(
            vec![("lr_scheduler", if plain.contains("cosine") { "cosine" } else { "constant" }.into())],
            format!("no schedule `{name}`; another stands in its place"),
        ),
    }
}

/// Rows of `optimizer_args` for a trainer whose optimiser a function tells.
macro_rules! argument_rows {
    ($optimiser:expr) => {
        &[
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "betas"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "eps"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "weight_decay"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "relative_step"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "warmup_init"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "clip_threshold"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "decay_rate"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "beta1"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "beta3"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "scale_parameter"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "decouple"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "use_bias_correction"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "safeguard_warmup"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "d0"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "d_coef"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "growth_rate"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "slice_p"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "warmup_steps"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "r"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "weight_lr_power"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "min_8bit_size"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "momentum"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "percentile_clipping"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "block_wise"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "amsgrad"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "fused"),
            $crate::tools::optimisers::argument_rows!(@row $optimiser, "foreach"),
        ]
    };
    (@row $optimiser:expr, $name:literal) => {
        $crate::row::by(
            $name,
            &["optimizer_args"],
            "the optimiser's own number, where it has it here",
            |field| $crate::tools::optimisers::argument(&($optimiser)(field), $name, &field.value),
        )
    };
}

pub(crate) use argument_rows;
