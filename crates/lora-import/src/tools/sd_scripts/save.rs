//! Where and when sd-scripts saves, looks at what is held out, and draws samples.

use std::path::Path;

use super::is_flow;
use crate::engine::Field;
use crate::outcome::{Outcome, Settings, becomes, instead, lost, no_effect, taken, translated};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};

pub(in crate::tools) static ROWS: &[Row] = &[
    by("output_name", &["output_name"], "the file's name", |field| taken("output_name", field.text()))
        .default("\"last\""),
    by("save_precision", &["save_precision"], "`float` is fp32, and so is none", save_precision).default("\"float\""),
    same("output_dir", "output_dir", Kind::Text),
    same("logging_dir", "logging_dir", Kind::Text),
    same("save_every_n_epochs", "save_every_n_epochs", Kind::AtLeastOne),
    same("save_every_n_steps", "save_every_n_steps", Kind::AtLeastOne),
    gone("save_n_epoch_ratio", OFF, "no saves by a share of the epochs"),
    by("save_last_n_epochs", &["save_total_limit"], "so many saves are kept", |field| match field.count() {
        Some(0) => no_effect("off, as without it"),
        Some(count) if field.root.count("save_every_n_steps").unwrap_or(0) == 0 => {
            becomes("save_total_limit", count, "so many saves are kept")
        }
        Some(_) => lost("saves by steps and by epochs are counted together here: set save_total_limit"),
        None => field.expected("a whole number"),
    }),
    by("save_last_n_steps", &["save_total_limit"], "divided by save_every_n_steps, and one", save_last_n_steps),
    nothing("save_last_n_epochs_state save_last_n_steps_state", "a state takes the place of the one before"),
    by("save_state", &["save_state", "save_state_every_n_steps"], "and every save_every_n_steps", |field| match field
        .on()
    {
        false => no_effect("off, as without it"),
        true => {
            let mut settings: Settings = vec![("save_state", true.into())];
            let steps = field.root.count("save_every_n_steps").filter(|&steps| steps > 0);
            settings.extend(steps.map(|steps| ("save_state_every_n_steps", steps.into())));
            translated(settings, "one file, which takes the place of the one before")
        }
    }),
    by("save_state_on_train_end", &["save_state"], "the state of the whole run", |field| {
        field.when_on(taken("save_state", true))
    }),
    gone("resume", OFF, "a state of accelerate cannot be gone on from; init_from goes on from its LoRA"),
    gone("resume_from_huggingface", OFF, "nothing is fetched"),
    gone("skip_until_initial_step initial_epoch initial_step", OFF, "a run goes on from its own state alone"),
    gone("save_model_as", &["\"safetensors\"", "\"same as source model\""], "files are safetensors"),
    same("validation_split", "validation_split", Kind::Positive),
    by("validation_seed", &[], "which pictures are held out, `seed` says", |_| {
        no_effect("which pictures are held out, seed says")
    }),
    same("validate_every_n_steps", "validate_every_n_steps", Kind::AtLeastOne),
    gone("validate_every_n_epochs", OFF, "held-out loss is told by steps, and before and after training"),
    gone("max_validation_steps", OFF, "all that is held out is looked at"),
    by("sample_every_n_steps", &["sample_every_n_steps"], "with prompts", |field| {
        match (field.count(), has_prompts(field)) {
            (Some(0), _) => no_effect("off, as without it"),
            (Some(_), false) => no_effect("there are no prompts"),
            (Some(steps), true) => taken("sample_every_n_steps", steps),
            (None, _) => field.expected("a whole number"),
        }
    }),
    by("sample_every_n_epochs", &[], "by steps alone", |field| match (field.count(), has_prompts(field)) {
        (Some(1..), true) => lost("samples are drawn before and after training, and by steps"),
        (Some(_), _) => no_effect("off, as without it"),
        (None, _) => field.expected("a whole number"),
    }),
    nothing("sample_at_first", "samples are always drawn before the first step, too"),
    by("sample_prompts", &["sample_prompts"], "a .txt file of a line each", |field| {
        let text = field.text();
        match Path::new(&text).extension().is_some_and(|name| name == "toml" || name == "json") {
            true => lost("prompts are read from a .txt file of a line each"),
            false => taken("sample_prompts", text),
        }
    }),
    by("sample_sampler", &["sample_sampler"], "ddim where none is given; of those that there are", |field| {
        match (has_prompts(field), field.text().trim_start_matches("k_")) {
            (false, _) => no_effect("there are no prompts"),
            _ if is_flow(&field.root) => no_effect("samples follow the flow, there too"),
            (true, sampler @ ("euler" | "euler_a" | "ddim")) => taken("sample_sampler", sampler),
            (true, "dpmsolver++") => taken("sample_sampler", "dpmpp_2m"),
            (true, other) => instead(
                vec![("sample_sampler", "ddim".into())],
                format!("no sampler {other}; samples alone look otherwise"),
            ),
        }
    })
    .default("\"ddim\""),
];

pub(in crate::tools) fn save_precision(field: &Field<'_>) -> Outcome {
    match field.text().as_str() {
        precision @ ("fp16" | "bf16") => taken("save_precision", precision),
        "float" | "fp32" | "None" => taken("save_precision", "fp32"),
        _ => field.expected("float, fp16 or bf16"),
    }
}

fn save_last_n_steps(field: &Field<'_>) -> Outcome {
    match (field.count(), field.root.count("save_every_n_steps").filter(|&every| every > 0)) {
        (Some(0), _) => no_effect("off, as without it"),
        (Some(_), None) => no_effect("only with save_every_n_steps"),
        (Some(steps), Some(every)) => becomes("save_total_limit", steps / every + 1, "saves of so many steps"),
        (None, _) => field.expected("a whole number"),
    }
}

fn has_prompts(field: &Field<'_>) -> bool {
    field.root.text("sample_prompts").is_some_and(|text| !text.ends_with(".toml") && !text.ends_with(".json"))
}
