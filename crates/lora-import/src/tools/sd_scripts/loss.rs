//! sd-scripts' noise, timesteps and losses, for bases that predict the noise or the velocity, and what other bases share.

use super::{is_flow, of_diffusion};
use crate::engine::{Field, Scope};
use crate::outcome::{Outcome, becomes, no_effect, refused, taken};
use crate::row::{Kind, Row, by, same};
use crate::values;

pub(in crate::tools) static ROWS: &[Row] = &[
    by(
        "v_parameterization",
        &["v_parameterization"],
        "off means that the noise is predicted, whatever the base says",
        |field| {
            of_diffusion(
                field,
                match field.on() {
                    true => taken("v_parameterization", true),
                    false => becomes("v_parameterization", false, "the noise is predicted unless it is given"),
                },
            )
        },
    )
    .default("false"),
    by("noise_offset", &["noise_offset"], "a constant for each channel", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(offset) => of_diffusion(field, taken("noise_offset", values::of_number(offset))),
        None => field.expected("a number"),
    }),
    by(
        "noise_offset_random_strength",
        &["noise_offset_random_strength"],
        "drawn for each picture of a batch",
        |field| of_diffusion(field, random_strength(field, "noise_offset_random_strength")),
    ),
    by(
        "multires_noise_iterations",
        &["multires_noise_iterations"],
        "each picture's noise has unit variance",
        |field| match field.count() {
            Some(0) => no_effect("off, as without it"),
            Some(count) => of_diffusion(
                field,
                becomes("multires_noise_iterations", count, "each picture's noise has unit variance, not a batch's"),
            ),
            None => field.expected("a whole number"),
        },
    ),
    by("multires_noise_discount", &["multires_noise_discount"], "of `multires_noise_iterations`", |field| match field
        .root
        .number("multires_noise_iterations")
        .is_some_and(|iterations| iterations > 0.0)
    {
        true => of_diffusion(field, field.number_as("multires_noise_discount")),
        false => no_effect("only with multires_noise_iterations"),
    }),
    by("adaptive_noise_scale", &["adaptive_noise_scale"], "with noise_offset", adaptive_noise_scale),
    same("ip_noise_gamma", "ip_noise_gamma", Kind::Positive),
    by(
        "ip_noise_gamma_random_strength",
        &["ip_noise_gamma_random_strength"],
        "drawn for each picture of a batch",
        |field| random_strength(field, "ip_noise_gamma_random_strength"),
    ),
    same("zero_terminal_snr", "zero_terminal_snr", Kind::Flag),
    by("min_timestep", &["min_timestep"], "0 is none", |field| timestep(field, "min_timestep", 0.0)),
    by("max_timestep", &["max_timestep"], "1000 is none", |field| timestep(field, "max_timestep", 1000.0)),
    by("min_snr_gamma", &["min_snr_gamma"], "0 is none", |field| match field.number() {
        Some(gamma) if gamma > 0.0 => of_diffusion(field, taken("min_snr_gamma", values::of_number(gamma))),
        Some(_) => no_effect("off, as without it"),
        None => field.expected("a number"),
    }),
    same("scale_v_pred_loss_like_noise_pred", "scale_v_pred_loss_like_noise_pred", Kind::Flag),
    same("v_pred_like_loss", "v_pred_like_loss", Kind::Positive),
    same("debiased_estimation_loss", "debiased_estimation_loss", Kind::Flag),
    by("loss_type", &["loss_type"], "by its name", |field| match field.text().as_str() {
        "l2" => no_effect("as without it"),
        loss @ ("l1" | "huber" | "smooth_l1") => taken("loss_type", loss),
        _ => field.expected("l2, l1, huber or smooth_l1"),
    }),
    by("huber_schedule", &["huber_schedule"], "of `huber` and `smooth_l1`", |field| {
        let schedule = field.text();
        match schedule.as_str() {
            "snr" if is_flow(&field.root) && has_threshold(&field.root) => {
                refused("snr is for bases that predict the noise, there too; take constant or exponential")
            }
            "constant" | "snr" | "exponential" => of_huber(field, taken("huber_schedule", schedule)),
            _ => field.expected("constant, snr or exponential"),
        }
    }),
    by("huber_c", &["huber_c"], "of `huber` and `smooth_l1`", |field| of_huber(field, field.number_as("huber_c"))),
    by("huber_scale", &["huber_scale"], "of `huber` and `smooth_l1`", |field| {
        of_huber(field, field.number_as("huber_scale"))
    }),
];

fn timestep(field: &Field<'_>, ours: &'static str, neutral: f64) -> Outcome {
    match field.number() {
        Some(number) if number == neutral => no_effect("off, as without it"),
        _ => field.number_as(ours),
    }
}

/// With `noise_offset` alone, which is what it changes.
pub(in crate::tools) fn adaptive_noise_scale(field: &Field<'_>) -> Outcome {
    let offset = field.root.number("noise_offset").is_some_and(|offset| offset > 0.0);
    match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(_) if !offset => refused("changes noise_offset, which is not given, there too"),
        _ => of_diffusion(field, field.number_as("adaptive_noise_scale")),
    }
}

fn random_strength(field: &Field<'_>, ours: &'static str) -> Outcome {
    field.when_on(becomes(ours, true, "drawn for each picture of a batch instead of once"))
}

fn has_threshold(root: &Scope<'_>) -> bool {
    matches!(root.text("loss_type").as_deref(), Some("huber" | "smooth_l1"))
}

fn of_huber(field: &Field<'_>, outcome: Outcome) -> Outcome {
    match has_threshold(&field.root) {
        true => outcome,
        false => no_effect("a number of other losses"),
    }
}
