//! ai-toolkit's `sample`: what is drawn, and when.

use serde_json::Value;

use crate::engine::{Field, Scope};
use crate::outcome::{Outcome, becomes, no_effect, taken};
use crate::row::{Row, by, nothing};
use crate::tools::shared;
use crate::values;

pub(super) static SAMPLE: &[Row] = &[
    by("sampler", &["sample_sampler"], "of those that there are", |field| match field.text().as_str() {
        _ if prompts(&field.root).is_empty() => no_effect("there are no prompts"),
        sampler @ ("euler" | "euler_a" | "ddim") => taken("sample_sampler", sampler),
        _ => no_effect("samples alone look otherwise"),
    }),
    by("sample_every", &["sample_every_n_steps"], "with prompts", |field| {
        match (prompts(&field.root).is_empty(), field.count()) {
            (true, _) => no_effect("there are no prompts"),
            (false, Some(steps @ 1..)) => taken("sample_every_n_steps", steps),
            _ => no_effect("off, as without it"),
        }
    })
    .default("100"),
    nothing("sample_start_step", "samples are drawn from the first step on"),
    by("width", &["sample_resolution"], "with height", size),
    by("height", &["sample_resolution"], "with width", size),
    by("prompts", &["sample_prompts"], "[trigger] is the trigger word", |field| shared::prompts(prompts(&field.root))),
    by("samples", &["sample_prompts"], "each with its own size, seed, steps and guidance", |field| {
        shared::prompts(prompts(&field.root))
    }),
    by("neg", &["sample_negative_prompt"], "the negative prompt", |field| match field.value.as_str() {
        Some(text) if !text.is_empty() => taken("sample_negative_prompt", text),
        _ => no_effect("none"),
    }),
    by("seed", &["sample_seed"], "of the samples' noise", |field| match field.count() {
        Some(seed) => taken("sample_seed", seed),
        None => no_effect("drawn anew there"),
    }),
    nothing("walk_seed", "all samples have one seed"),
    by("guidance_scale", &["sample_guidance_scale"], "its name here", |field| match field.number() {
        Some(scale) if scale >= 1.0 => taken("sample_guidance_scale", values::of_number(scale)),
        _ => no_effect("no guidance"),
    }),
    by("sample_steps", &["sample_steps"], "steps of the sampler", |field| match field.count() {
        Some(steps @ 1..) => taken("sample_steps", steps),
        _ => field.expected("a whole number from 1 on"),
    }),
    nothing("network_multiplier", "samples are drawn with the adapter fully"),
    nothing("guidance_rescale", "where the base asks for it"),
    nothing("format", "samples are one grid of PNG"),
    nothing("adapter_conditioning_scale", "no control adapters"),
    nothing("refiner_start_at", "no refiner is used"),
    nothing("extra_values", "for bases that read them"),
    nothing("num_frames fps", "films are not drawn"),
    nothing("do_cfg_norm", "where the base asks for it"),
];

fn size(field: &Field<'_>) -> Outcome {
    let side = |key: &str| field.here.count(key).unwrap_or(512) / 8 * 8;
    becomes("sample_resolution", format!("{},{}", side("width"), side("height")), "width and height")
}

/// Prompts as lines with what they say of their own.
pub(super) fn prompts(root: &Scope<'_>) -> Vec<String> {
    if root.on("train.disable_sampling") {
        return Vec::new();
    }
    let trigger = root.text("trigger_word").unwrap_or_default();
    let line = |sample: &Value| {
        let prompt = values::text(sample).or_else(|| values::text(sample.get("prompt")?))?;
        let keys = ["neg", "width", "height", "seed", "sample_steps", "guidance_scale"];
        Some(shared::prompt(prompt.replace("[trigger]", &trigger), sample, keys))
    };
    let list = root.get("sample.samples").or_else(|| root.get("sample.prompts"));
    list.as_ref().and_then(Value::as_array).into_iter().flatten().filter_map(line).collect()
}
