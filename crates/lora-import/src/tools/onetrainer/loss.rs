//! OneTrainer's loss, noise and timesteps.

use serde_json::json;

use super::is_flow;
use crate::engine::{Field, Scope};
use crate::outcome::{Outcome, becomes, instead, lost, no_effect, refused, taken};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};
use crate::values;

pub(super) static ROWS: &[Row] = &[
    by("mse_strength", &[], "1, or 0 beside `mae_strength` of 1", |field| match field.number() {
        Some(1.0) => no_effect("as without it"),
        Some(0.0) if is_absolute(&field.root) => no_effect("mae_strength says the loss"),
        _ => lost("the loss is the squared difference"),
    }),
    by("mae_strength", &["loss_type"], "alone: `l1`", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(_) if is_absolute(&field.root) => becomes("loss_type", "l1", "the absolute difference alone"),
        _ => lost("the loss is one of the squared and the absolute difference, not a mixture"),
    }),
    gone("log_cosh_strength huber_strength", OFF, "the loss is the squared difference"),
    by("huber_delta", &[], "with huber_strength", |_| no_effect("with huber_strength")),
    by("loss_weight_fn", &["min_snr_gamma", "debiased_estimation_loss"], "with loss_weight_strength", |field| {
        match field.text().as_str() {
            "CONSTANT" => no_effect("off, as without it"),
            "MIN_SNR_GAMMA" => becomes(
                "min_snr_gamma",
                field.root.number("loss_weight_strength").map_or(json!(5), values::of_number),
                "loss_weight_strength",
            ),
            "DEBIASED_ESTIMATION" => taken("debiased_estimation_loss", true),
            other => lost(format!("no weight {other} of the loss")),
        }
    }),
    nothing("loss_weight_strength", "with loss_weight_fn"),
    same("offset_noise_weight", "noise_offset", Kind::Positive),
    gone("generalized_offset_noise", OFF, "the offset has the same strength at all timesteps"),
    gone("perturbation_noise_weight", OFF, "the inputs' noise is that of the target"),
    same("rescale_noise_scheduler_to_zero_terminal_snr", "zero_terminal_snr", Kind::Flag),
    by("force_v_prediction", &["v_parameterization"], "on", |field| match field.on() {
        true if field.root.on("force_epsilon_prediction") => {
            refused("contradicts force_epsilon_prediction; keep one of them")
        }
        true => taken("v_parameterization", true),
        false => no_effect("the base says it"),
    }),
    by("force_epsilon_prediction", &["v_parameterization"], "off", |field| match field.on() {
        true => taken("v_parameterization", false),
        false => no_effect("the base says it"),
    }),
    by("min_noising_strength", &["min_timestep"], "in thousandths", |field| noising(field, "min_timestep", 0.0)),
    by("max_noising_strength", &["max_timestep"], "in thousandths", |field| noising(field, "max_timestep", 1.0)),
    by("timestep_distribution", &["timestep_sampling"], "`UNIFORM`, `LOGIT_NORMAL` and `HEAVY_TAIL`", distribution)
        .default("\"UNIFORM\""),
    by(
        "noising_weight",
        &["logit_std", "sigmoid_scale", "mode_scale"],
        "of `LOGIT_NORMAL`: one less than the standard deviation; of `HEAVY_TAIL`: how much the middle is favoured",
        |field| match field.root.text("timestep_distribution").as_deref() {
            Some("HEAVY_TAIL") => field.number_as("mode_scale"),
            _ if is_dynamic(&field.root) => of_distribution(field, "sigmoid_scale", 1.0),
            _ => of_distribution(field, "logit_std", 1.0),
        },
    ),
    by("noising_bias", &["logit_mean"], "of `LOGIT_NORMAL`: the mean", |field| {
        match is_dynamic(&field.root) && field.number() != Some(0.0) {
            true => lost("noise levels that follow the picture's size have no mean of their own"),
            false => of_distribution(field, "logit_mean", 0.0),
        }
    }),
    by("timestep_shift", &["discrete_flow_shift"], "1 is none", |field| match field.number() {
        Some(1.0) => no_effect("off, as without it"),
        _ if is_dynamic(&field.root) => no_effect("dynamic_timestep_shifting wins over it"),
        _ => field.number_as("discrete_flow_shift"),
    }),
    by("dynamic_timestep_shifting", &["timestep_sampling"], "`flux_shift`, with `LOGIT_NORMAL`", |field| {
        match (field.on() && is_flow(&field.root), is_dynamic(&field.root)) {
            (false, _) => no_effect("off, as without it"),
            (true, true) => becomes("timestep_sampling", "flux_shift", "by the picture's size"),
            (true, false) => lost("only noise levels of LOGIT_NORMAL are moved by the picture's size"),
        }
    }),
    gone("cep_gamma", OFF, "captions' states are taken as they are"),
    gone("force_circular_padding", OFF, "convolutions pad with zeros"),
    same("min_snr_gamma", "min_snr_gamma", Kind::Positive),
];

fn noising(field: &Field<'_>, ours: &'static str, neutral: f64) -> Outcome {
    match field.number() {
        Some(strength) if strength == neutral => no_effect("off, as without it"),
        Some(strength) => becomes(ours, values::of_number(strength * 1000.0), "in thousandths"),
        None => field.expected("a number"),
    }
}

/// Whether the loss is the absolute difference alone.
fn is_absolute(root: &Scope<'_>) -> bool {
    let strength = |key, usual| root.number(key).unwrap_or(usual);
    strength("mae_strength", 0.0) == 1.0
        && strength("mse_strength", 1.0) == 0.0
        && strength("log_cosh_strength", 0.0) == 0.0
        && strength("huber_strength", 0.0) == 0.0
}

/// A number of the distribution of timesteps, so much less than ours.
fn of_distribution(field: &Field<'_>, ours: &'static str, less: f64) -> Outcome {
    match (field.number(), field.root.text("timestep_distribution").as_deref()) {
        (Some(0.0), _) => no_effect("off, as without it"),
        (Some(number), Some("LOGIT_NORMAL")) if ours == "logit_mean" || number + less > 0.0 => {
            becomes(ours, values::of_number(number + less), "of the normal numbers")
        }
        (Some(_), None | Some("UNIFORM")) => no_effect("a number of other distributions"),
        (Some(_), _) => lost("the shape of timestep_distribution is its usual one"),
        (None, _) => field.expected("a number"),
    }
}

fn distribution(field: &Field<'_>) -> Outcome {
    match field.text().as_str() {
        "UNIFORM" => taken("timestep_sampling", "uniform"),
        "LOGIT_NORMAL" if is_dynamic(&field.root) => {
            becomes("timestep_sampling", "flux_shift", "by the picture's size, as dynamic_timestep_shifting says")
        }
        "LOGIT_NORMAL" => taken("timestep_sampling", "logit_normal"),
        "HEAVY_TAIL" => becomes("timestep_sampling", "mode", "the same formula"),
        // It favours the middle.
        "INVERTED_PARABOLA" => instead(
            vec![("timestep_sampling", "logit_normal".into())],
            "no parabola over the noise levels; the sigmoid of normal numbers, which favours the middle too, stands in its place",
        ),
        other => instead(
            vec![("timestep_sampling", "uniform".into())],
            format!("timesteps are not drawn by {other}; they are drawn evenly"),
        ),
    }
}

/// Whether noise levels are normal numbers' sigmoid, moved by the picture's size.
fn is_dynamic(root: &Scope<'_>) -> bool {
    is_flow(root)
        && root.on("dynamic_timestep_shifting")
        && root.text("timestep_distribution").as_deref() == Some("LOGIT_NORMAL")
}
